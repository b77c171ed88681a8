"""The arithmetic of the transformer, counted by formula, and what devices can do of it."""

from dataclasses import dataclass

import torch

from models.layers import SCALAR_CHANNELS
from models.transformer import TransformerConfig

# Dense bf16 with fp32 accumulation, by a part of the name that CUDA tells; the longest part that fits counts. From the
# makers' data sheets, halved where these count two-to-four sparsity.
PEAK_FLOPS_PER_S = {
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "H20": 148e12,
    "H100": 989.5e12,
    "H100 PCIe": 756.5e12,
    "H100 NVL": 835.5e12,
    "H800": 989.5e12,
    "H200": 989.5e12,
    "H200 NVL": 835.5e12,
    "GH200": 989.5e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
}


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of the matrix products, a product and a sum each counting as one; nothing else counts.

    first: of the layers whose input is data, which needs no gradient. rest: of all others.
    """

    first: int
    rest: int

    @property
    def forward(self) -> int:
        return self.first + self.rest

    @property
    def training(self) -> int:
        """Forward and backward when every weight is trained; what is computed a second time to save memory is not
        counted, be it activations or, in fused attention, scores."""
        return 2 * self.first + 3 * self.rest


def count_flops(config: TransformerConfig, batch: int, frames: int, height: int, width: int, text_tokens: int) -> Flops:
    """What `batch` samples of (frames, latent height, latent width) take of the network.

    text_tokens: of all samples together; without padding it is what the text needs, with padding what is computed.
    Each sample has one timestep (one a frame costs less than 1e-4 more), and size and frame rate are told for all.
    """
    d, places = config.width, config.tokens(1, height, width)
    tokens = batch * frames * places

    # Layers of data: patches, caption, mean text and the features of timestep, size and frame rate.
    first = tokens * d * config.in_channels * config.patch_size**2 + text_tokens * config.text_dim * d
    first += batch * config.text_dim * d * config.pooled_text
    scalars = batch * d + d * config.fps_conditioning + 3 * (d // 3) * config.size_conditioning
    first += scalars * SCALAR_CHANNELS

    # Their second layers, and the vectors of adaLN-single.
    rest = text_tokens * d * d + batch * 7 * d * d
    rest += d * d * config.fps_conditioning + 3 * (d // 3) ** 2 * config.size_conditioning

    # Blocks: queries, keys, values and outputs, the MLP; attention's scores and the sums they weigh.
    mlp = 2 * config.mlp_ratio * d * d
    seen = places if config.temporal_attention == "full" else 1
    spatial = tokens * (4 * d * d + mlp + 2 * places * d)
    cross = tokens * 2 * d * d + text_tokens * (2 * d * d + 2 * frames * places * d)
    temporal = tokens * (4 * d * d + mlp + 2 * frames * seen * d)
    rest += config.num_layers * (spatial + cross + temporal)

    rest += tokens * d * config.patch_size**2 * config.out_channels
    return Flops(2 * first, 2 * rest)


def peak_flops_per_s(device: torch.device) -> float | None:
    """Of a known GPU; None for others and for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [part for part in PEAK_FLOPS_PER_S if part in name]
    return PEAK_FLOPS_PER_S[max(known, key=len)] if known else None
