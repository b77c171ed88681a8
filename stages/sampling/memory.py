"""How much of a device's memory sampling takes, by arithmetic; a test holds it against PyTorch's own account.

T5, the transformer and the VAE take turns there, so that the largest of them is the peak.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.compute import PRECISIONS
from models.text import text_encoder_parameters
from models.text_lengths import padded_length
from models.transformer import Transformer, TransformerConfig
from models.vae import empty_vae
from models.weights import CheckpointInfo
from stages.sampling.config import SampleConfig

NARROW = 6
"""Of a temporal block's MLP, the tensors as wide as the model, beside two that are mlp_ratio times as wide."""
MID_BLOCK = 8
"""Tensors that exist at once while the middle of the VAE's decoder attends."""


@dataclass(frozen=True)
class Turn:
    """Of one model on the device, in bytes."""

    name: str
    weights: float
    activations: float
    doing: str

    def __str__(self) -> str:
        return f"{self.name} {self.weights / 1e9:.2f} + {self.activations / 1e9:.2f} GB {self.doing}"


def peak_of(config: SampleConfig, info: CheckpointInfo, shape: tuple[int, int, int, int]) -> str:
    """What sampling latents of this shape takes, in words."""
    turns = [_transformer(config, info, shape), _vae(config, shape)]
    if config.text_encoder.device is None:
        parameters = text_encoder_parameters(config.pretrained_model_path)
        turns.insert(
            0, Turn("T5", parameters * PRECISIONS[config.text_encoder.precision].itemsize, 0, "for a few captions")
        )
    peak = max(turn.weights + turn.activations for turn in turns)
    return (
        f"by arithmetic {peak / 1e9:.2f} GB of the device's memory at its peak (weights + activations): "
        f"{'; '.join(map(str, turns))}"
    )


def _transformer(config: SampleConfig, info: CheckpointInfo, shape: tuple[int, int, int, int]) -> Turn:
    model, size = info.transformer, PRECISIONS[config.precision].itemsize
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Transformer(model).parameters())
    rows = config.samples_together * (1 if config.guidance_scale == 1 else 2)
    tokens = model.tokens(*shape[1:]) // config.sequence_parallel
    text_tokens = padded_length(info.text_encoder["max_tokens"])
    numbers = forward_numbers(model, rows, tokens, text_tokens)
    return Turn("transformer", parameters * size, numbers * size, f"for {rows} rows of {tokens:,} tokens")


def _vae(config: SampleConfig, shape: tuple[int, int, int, int]) -> Turn:
    vae, size = empty_vae(config.pretrained_model_path), torch.float32.itemsize
    numbers = config.vae_batch_frames * decode_numbers(
        vae.config["block_out_channels"], *shape[2:], config.vae_band_rows
    )
    return Turn("VAE", vae.num_parameters() * size, numbers * size, f"for {config.vae_batch_frames} frames")


def forward_numbers(model: TransformerConfig, rows: int, tokens: int, text_tokens: int) -> int:
    """Of the transformer, without gradients, at their most: while a temporal block's MLP computes. With the text, and
    its keys and values in all spatial blocks. Options of the model beyond PixArt's and Latte's are not counted."""
    block = tokens * model.width * (NARROW + 2 * model.mlp_ratio)
    return rows * (block + text_tokens * (model.text_dim + 2 * model.num_layers * model.width))


def decode_numbers(channels: Sequence[int], height: int, width: int, band_rows: int | None = None) -> int:
    """Of the VAE's decoder with these ``block_out_channels``, for one frame of latents, at their most."""
    levels = range(len(channels))  # from that of the pixels down to that of the latents
    blocks = [MID_BLOCK * channels[-1] * height * width]
    for level in levels:
        inner, outer = channels[min(level + 1, levels[-1])], channels[level]
        rows, columns = (side * 2 ** (levels[-1] - level) for side in (height, width))
        if band_rows is None:
            blocks.append(max(3 * inner, inner + 4 * outer) * rows * columns)  # at a resnet's beginning, at its end
        else:  # a band and the rows beside it, with zeros at the edges, and what becomes of it
            blocks.append(3 * inner * (min(band_rows, rows) + 2) * columns)
    return max(blocks)
