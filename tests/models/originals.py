"""PixArt-alpha's own checkpoints, made from diffusers' models: the way back, written for the tests alone."""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.transformer import TransformerConfig

# Latte and PixArt-alpha were published with heads of 72 channels alone.
XL_LIKE = TransformerConfig(
    in_channels=4, out_channels=8, num_layers=2, num_heads=2, head_dim=72, text_dim=20, sample_size=16
)


def pixart_state(reference: nn.Module) -> dict[str, Tensor]:
    """A PixArtTransformer2DModel's weights as PixArt-alpha's class names and fuses them."""
    ours = reference.state_dict()
    layers = 1 + max(int(name.split(".")[1]) for name in ours if name.startswith("transformer_blocks."))
    names = [
        ("x_embedder.proj", ["pos_embed.proj"]),
        ("t_embedder.mlp.0", ["adaln_single.emb.timestep_embedder.linear_1"]),
        ("t_embedder.mlp.2", ["adaln_single.emb.timestep_embedder.linear_2"]),
        ("t_block.1", ["adaln_single.linear"]),
        ("y_embedder.y_proj.fc1", ["caption_projection.linear_1"]),
        ("y_embedder.y_proj.fc2", ["caption_projection.linear_2"]),
        ("final_layer.linear", ["proj_out"]),
    ]
    if any("resolution_embedder" in name for name in ours):
        for theirs, embedder in (("csize", "resolution"), ("ar", "aspect_ratio")):
            for layer, index in ((0, 1), (2, 2)):
                source = f"adaln_single.emb.{embedder}_embedder.linear_{index}"
                names.append((f"{theirs}_embedder.mlp.{layer}", [source]))
    for n in range(layers):
        block = f"transformer_blocks.{n}"
        names += [
            (f"blocks.{n}.attn.qkv", [f"{block}.attn1.to_{part}" for part in "qkv"]),
            (f"blocks.{n}.attn.proj", [f"{block}.attn1.to_out.0"]),
            (f"blocks.{n}.cross_attn.q_linear", [f"{block}.attn2.to_q"]),
            (f"blocks.{n}.cross_attn.kv_linear", [f"{block}.attn2.to_{part}" for part in "kv"]),
            (f"blocks.{n}.cross_attn.proj", [f"{block}.attn2.to_out.0"]),
            (f"blocks.{n}.mlp.fc1", [f"{block}.ff.net.0.proj"]),
            (f"blocks.{n}.mlp.fc2", [f"{block}.ff.net.2"]),
        ]
    state = {
        f"{theirs}.{leaf}": torch.cat([ours.pop(f"{name}.{leaf}") for name in sources])
        for theirs, sources in names
        for leaf in ("weight", "bias")
    }
    for n in range(layers):
        state[f"blocks.{n}.scale_shift_table"] = ours.pop(f"transformer_blocks.{n}.scale_shift_table")
    state["final_layer.scale_shift_table"] = ours.pop("scale_shift_table")
    assert not ours, f"no original name for {sorted(ours)}"
    return state


def pixart_positions(reference: nn.Module) -> Tensor:
    """The table [1, N, D] that PixArt-alpha keeps as a buffer: diffusers' own for the model's sample size."""
    return reference.pos_embed.pos_embed.clone()


def save_pth(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path
