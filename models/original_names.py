"""Reads the checkpoints that PixArt-alpha and Latte published or their trainers wrote, in PyTorch's own format.

The names are from PixArt-alpha's diffusion/model/nets/PixArt.py and PixArt_blocks.py (and what they become from
diffusers' scripts/convert_pixart_alpha_to_diffusers.py). Latte's text-to-video model is built of diffusers' blocks
(its models/latte_t2v.py), so its names are ours. Both trainers wrap the weights: PixArt-alpha's as `state_dict` and
`state_dict_ema` (diffusion/utils/checkpoint.py), Latte's as `model` and `ema` (train.py, download.py).
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import WeightsError
from models.layers import spatial_positions
from models.pretrained import NULL_TEXT, SIZE_EMBEDDERS, SPATIAL_TABLE, TEMPORAL_BLOCKS, Kind, Pretrained, taken_over
from models.transformer import TransformerConfig

AVERAGED = ("state_dict_ema", "ema")
TRAINED = ("state_dict", "model")

# A module of PixArt-alpha's and what it is here; where there are several, its rows are cut into as many.
NETWORK: dict[str, tuple[str, ...]] = {
    "pos_embed": (SPATIAL_TABLE,),
    "y_embedder.y_embedding": (NULL_TEXT,),
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
    "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
    "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
    "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "final_layer.scale_shift_table": ("scale_shift_table",),
    "final_layer.linear": ("proj_out",),
}
BLOCK: dict[str, tuple[str, ...]] = {
    "scale_shift_table": ("scale_shift_table",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}

# The files do not say how many heads there are. All that was published is XL/2.
HEAD_DIM = 72
# Latte's text-to-video model was published for 512 px alone; its files hold no positions.
LATTE_SAMPLE_SIZE = 64


def open_original(path: Path, weights: str) -> Pretrained:
    """What the file at `path` holds; weights: "ema" for the averaged ones where there are any, or "model".

    Raises WeightsError when it is not a file of tensors, or holds neither a PixArt-alpha nor a Latte.
    """
    tensors = renamed(_unwrapped(_load(path), weights, path))
    kind: Kind = "Latte" if any(name.startswith(TEMPORAL_BLOCKS) for name in tensors) else "PixArt"
    positions = (LATTE_SAMPLE_SIZE, 1.0) if kind == "Latte" else None
    try:
        config = _config(tensors, kind)
        if kind == "PixArt" and SPATIAL_TABLE in tensors:
            positions = _positions(tensors[SPATIAL_TABLE], config.patch_size)
    except (KeyError, ValueError) as error:
        names = ", ".join(sorted(tensors)[:3])
        raise WeightsError(
            f"{path} holds neither a PixArt-alpha nor a Latte text-to-video transformer: expected {error}, "
            f"found {len(tensors)} tensors ({names}, ...)"
        ) from error
    if positions:
        config = replace(config, sample_size=positions[0], position_scale=positions[1])
    return Pretrained(path, kind, config, "epsilon", taken_over(kind, positions=bool(positions)), lambda: tensors)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names, fused ones cut apart; names that are not PixArt-alpha's stay as they are."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")  # of DistributedDataParallel
        prefix, table, rest = "", NETWORK, name
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            prefix, table, rest = f"transformer_blocks.{match[1]}.", BLOCK, match[2]
        module, dot, leaf = rest.rpartition(".")
        if rest in table:
            found[prefix + table[rest][0]] = tensor
        elif module in table and leaf in ("weight", "bias"):
            parts = tensor.chunk(len(table[module]))
            for ours, part in zip(table[module], parts, strict=True):
                found[f"{prefix}{ours}.{leaf}"] = part.clone() if len(parts) > 1 else part
        else:
            found[name] = tensor
    return found


def _load(path: Path) -> Any:
    try:
        # The format before PyTorch 1.6 is no zip file, and cannot be mapped into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{path} cannot be read as a file of tensors alone ({reason}); "
            "expected a .pth of PixArt-alpha or Latte; one that would run code is never opened"
        ) from error


def _unwrapped(content: Any, weights: str, path: Path) -> dict[str, Tensor]:
    wrappers = (*AVERAGED, *TRAINED) if weights == "ema" else TRAINED
    if isinstance(content, dict):
        inner = next((content[key] for key in wrappers if isinstance(content.get(key), dict)), content)
        tensors = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    raise WeightsError(f"{path} holds no tensors by name, neither bare nor under {', '.join(wrappers)}")


def _config(tensors: Mapping[str, Tensor], kind: Kind) -> TransformerConfig:
    """The network that the tensors are of, from their shapes. KeyError names one that is absent."""
    width, channels, patch, _ = tensors["pos_embed.proj.weight"].shape
    hidden, _ = tensors["transformer_blocks.0.ff.net.0.proj.weight"].shape
    text_dim = tensors["caption_projection.linear_1.weight"].shape[1]
    outputs = tensors["proj_out.weight"].shape[0]
    for name in ("adaln_single.linear.weight", "transformer_blocks.0.attn2.to_k.weight"):
        tensors[name]  # other transformers of the time have neither
    if width % HEAD_DIM:
        raise ValueError(f"a width that is a multiple of {HEAD_DIM}, not {width}")
    return TransformerConfig(
        in_channels=channels,
        out_channels=outputs // patch**2,
        patch_size=patch,
        num_layers=len({name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")}),
        num_heads=width // HEAD_DIM,
        head_dim=HEAD_DIM,
        mlp_ratio=hidden // width,
        text_dim=text_dim,
        temporal_pos="stream" if kind == "Latte" else "branch",
        temporal_init="normal" if kind == "Latte" else "zero",
        size_conditioning=any(name.startswith(SIZE_EMBEDDERS) for name in tensors),
    )


def _positions(table: Tensor, patch: int) -> tuple[int, float]:
    """Sample size and position scale of a table [1, N, D] of spatial positions. ValueError if it is none of ours."""
    table = table.flatten(0, -2).float()
    side, width = round(len(table) ** 0.5), table.shape[1]
    # The first channel of the first half is the sine of the column, which at the second patch is 1 / scale; its
    # cosine stands a quarter of the channels on.
    step = float(torch.atan2(table[1, 0], table[1, width // 4]))
    scale = round(1 / step, 2) if step > 0 else 1.0
    expected = spatial_positions(side, side, width, base=side, scale=scale, device=table.device)
    if table.shape != expected.shape or (table - expected).abs().max() > 0.02:
        raise ValueError(f"positions of a square grid as in PixArt-alpha, not pos_embed {tuple(table.shape)}")
    return side * patch, scale
