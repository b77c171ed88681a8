"""Rectified flow: the path from data to noise, the training target and loss, and the sampler's step.

Straight paths x_s = (1 - s) data + s noise and their velocity noise - data are those of rectified flow
(Liu et al., arXiv:2209.03003); logit-normal noise levels and the shift towards noise for larger videos are
those of Stable Diffusion 3 (Esser et al., arXiv:2403.03206, sections 3.1 and 5.3.2). The noise level s is
called sigma here: 1 is pure noise, 0 is data. Nothing here draws random numbers: the caller does.

Shapes: B batch, C channels, T frames, h w height and width; a sigma is [B], or [B, T] for frames at noise
levels of their own.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

TIMESTEPS = 1000.0


@dataclass(frozen=True)
class FlowConfig:
    """How noise levels are drawn.

    The shift goes through (shift_tokens[i], shift_values[i]), linearly in log(shift) over log(tokens), and is
    constant outside. logit_mean and logit_std describe the normal whose sigmoid is the unshifted level.
    Raises ValueError unless there is a positive shift for every one of the ascending token counts.
    """

    shift_tokens: tuple[int, ...] = (256, 14_336, 131_072)
    shift_values: tuple[float, ...] = (1.0, 3.0, 6.0)
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        tokens, values = self.shift_tokens, self.shift_values
        if not tokens or len(tokens) != len(values):
            raise ValueError(f"shift_tokens {tokens} and shift_values {values} must be equally many")
        if tokens[0] < 1 or min(values) <= 0 or any(a >= b for a, b in pairwise(tokens)):
            raise ValueError(f"shift_tokens {tokens} must ascend, and shift_values {values} be positive")


def shift_for(config: FlowConfig, tokens: int) -> float:
    """The shift for a video of this many tokens (latent patches of all frames)."""
    anchors = list(zip(config.shift_tokens, config.shift_values, strict=True))
    if tokens <= anchors[0][0]:
        return anchors[0][1]
    for (low, low_shift), (high, high_shift) in pairwise(anchors):
        if tokens <= high:
            share = math.log(tokens / low) / math.log(high / low)
            return low_shift * (high_shift / low_shift) ** share
    return anchors[-1][1]


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Moves noise levels towards noise (shift > 1), keeping 0 and 1 (Esser et al., equation 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigmas(config: FlowConfig, normal: Tensor, shift: float) -> Tensor:
    """Noise levels to train at, from standard-normal draws of the same shape (Esser et al., equation 19)."""
    return shifted(torch.sigmoid(config.logit_mean + config.logit_std * normal), shift)


def timestep(sigma: Tensor) -> Tensor:
    """What the model is told: 1000 at pure noise, 0 at data."""
    return TIMESTEPS * sigma


def noised(data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The point of the path at sigma: data and noise [B, C, T, h, w], sigma [B] or [B, T]."""
    level = sigma.reshape(sigma.shape[0], 1, -1, 1, 1).to(data.dtype)
    return (1 - level) * data + level * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """The target: how a point of the path moves as sigma grows."""
    return noise - data


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, in float32: two of [B, C, T, h, w] -> [B]."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def schedule(steps: int, shift: float) -> Tensor:
    """The sampler's noise levels, from 1 to 0: [steps + 1] float64, evenly spaced before the shift."""
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def euler_step(latents: Tensor, predicted_velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """One step of the sampler along the predicted velocity, from sigma to the lower next_sigma."""
    return latents + (next_sigma - sigma) * predicted_velocity
