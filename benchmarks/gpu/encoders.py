"""The encoders at full size, with random weights, and diffusers' Latte beside our transformer."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import torch

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.training import TOY, fastest_kernel
from benchmarks.plain_step import Clips
from benchmarks.rounds import fastest
from benchmarks.table import Row
from models.attention_kernels import preferring
from models.presets import preset
from models.text_lengths import USUAL_TOKENS
from models.transformer import Transformer

PADDED_TOKENS = 120  # Latte cannot mask padding, so it computes all of them
WAYS = {  # of the VAE
    "plain": {"channels_last": False, "compiled": False},
    "channels-last": {"channels_last": True, "compiled": False},
    "channels-last, compiled": {"channels_last": True, "compiled": True},
}


def measure_vae(machine: Machine) -> Iterator[Row]:
    """Stable Diffusion's VAE in bf16: each layout, compiled or not, in some batches."""
    for pixels, batches, target, moonshot in ((256, (16, 32, 64), 900, 1400), (512, (8, 16), 220, 350)):
        best = 0.0
        for (layout, way), batch in product(WAYS.items(), (2,) if machine.toy else batches):
            rate = _frames_per_s(machine, 32 if machine.toy else pixels, batch, **way)
            best = max(best, rate)
            yield Row(f"VAE {pixels}², {layout}, {batch} at once", rate, "frames/s")
        targets = f">= {target}, moonshot {moonshot}"
        yield Row(f"VAE {pixels}², the fastest", best, "frames/s", target=targets, holds=best >= target)


def _frames_per_s(machine: Machine, pixels: int, batch: int, *, channels_last: bool, compiled: bool) -> float:
    from diffusers import AutoencoderKL

    from models.vae import FrozenVAE

    widths = (32, 32, 32, 32) if machine.toy else (128, 256, 512, 512)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    with machine.device:
        model = AutoencoderKL(
            down_block_types=down, up_block_types=up, block_out_channels=widths, layers_per_block=2, latent_channels=4
        )
    identity = {"spatial_factor": 8, "latent_channels": 4}
    vae = FrozenVAE(
        model.to(torch.bfloat16), identity, batch, channels_last=channels_last, compiled=compiled and not machine.toy
    )
    frames = np.random.default_rng(0).integers(0, 256, (4 * batch, pixels, pixels, 3), np.uint8)
    return len(frames) / machine.seconds(lambda: vae.encode(frames), rounds=10)


def measure_text(machine: Machine) -> Iterator[Row]:
    """The shape of T5-XXL's encoder in bf16, with captions as InternVid's."""
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    from benchmarks.text_encoder import captions
    from models.source import resolve_model
    from models.text import TextEncoder

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("tiny", "tokenizer"), local_files_only=True)
    full = {"d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64}
    small = {"d_model": 64, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=32_128, feed_forward_proj="gated-gelu", **(small if machine.toy else full))
    torch.set_default_dtype(torch.bfloat16)  # 19 GB in float32
    try:
        with machine.device:
            model = T5EncoderModel(config)
    finally:
        torch.set_default_dtype(torch.float32)
    shard = [caption for seed in range(1 if machine.toy else 4) for caption in captions(seed)]
    found = {}
    for batch_tokens in (1024,) if machine.toy else (1024, 2048, 4096):
        encoder = TextEncoder(model, tokenizer, {"max_tokens": PADDED_TOKENS}, batch_tokens)
        rate = len(shard) / machine.seconds(lambda e=encoder: e.encode(shard), rounds=5)  # type: ignore[misc]
        found[batch_tokens] = rate
        yield Row(f"T5-XXL, batches of {batch_tokens} tokens", rate, "/s")
    best = max(found.values())
    yield Row("T5-XXL, the fastest", best, "/s", target=">= 1500, moonshot 3000", holds=best >= 1500)


def measure_latte(machine: Machine) -> Iterator[Row]:
    """Forward and backward of both, in bf16 and compiled, at 16 x 256² x 4; diffusers' text is padded."""
    from diffusers import LatteTransformer3DModel

    clips = TOY if machine.toy else Clips(16, 256, 256, batch=4)
    network = preset("tiny", {"text_dim": 4096, "pooled_text": False}) if machine.toy else preset("XL/2")
    with machine.device:
        ours = Transformer(network)
        latte = LatteTransformer3DModel(
            num_attention_heads=network.num_heads,
            attention_head_dim=network.head_dim,
            num_layers=network.num_layers,
            in_channels=4,
            out_channels=4,
            cross_attention_dim=network.width,
            attention_bias=True,
            sample_size=clips.latent_shape[1],
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=4096,
            video_length=clips.frames,
        )
    frames, height, width = clips.latent_shape
    latents = machine.randn(clips.batch, 4, frames, height, width)
    timestep = torch.full((clips.batch,), 500.0, device=machine.device)
    padded, own = (machine.randn(clips.batch, length, 4096) for length in (PADDED_TOKENS, USUAL_TOKENS))
    for model in (ours, latte):
        model.to(torch.bfloat16)
    if not machine.toy:  # both block by block: those of a kind share one compilation
        ours.compile_blocks(any_size=False)
        for block in (*latte.transformer_blocks, *latte.temporal_transformer_blocks):
            block.compile(dynamic=False)

    def back(output: torch.Tensor) -> None:
        output.float().square().mean().backward()
        machine.wait()

    arms = {
        "ours": lambda: back(ours(latents, timestep, own)),  # no mask, as nothing is padded
        "Latte": lambda: back(latte(latents, timestep.long(), padded, return_dict=False)[0]),
    }
    with preferring(fastest_kernel(machine, network, clips)):
        seconds = fastest(arms, 2 if machine.toy else 20)
    yield Row("ours", seconds["ours"] * 1e3, "ms")
    target, ratio = ">= 1.3, moonshot 2", seconds["Latte"] / seconds["ours"]
    yield Row("diffusers' Latte", seconds["Latte"] * 1e3, "ms", "ours", ratio, target, ratio >= 1.3)
