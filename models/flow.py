"""Rectified flow: the path from data to noise, the training target and loss.

Straight paths x_s = (1 - s) data + s noise and their velocity noise - data are those of rectified flow
(Liu et al., arXiv:2209.03003); logit-normal noise levels and the shift towards noise for larger videos are
those of Stable Diffusion 3 (Esser et al., arXiv:2403.03206, sections 3.1 and 5.3.2). The level is s itself.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

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


class RectifiedFlow:
    """The `models.objective.Objective` of models that predict the velocity."""

    prediction: Literal["velocity"] = "velocity"

    def __init__(self, config: FlowConfig):
        self.config = config

    def out_channels(self, channels: int) -> int:
        return channels

    def levels(self, normal: Tensor, tokens: int) -> Tensor:
        """Logit-normal levels (Esser et al., equation 19), shifted for this many tokens."""
        level = torch.sigmoid(self.config.logit_mean + self.config.logit_std * normal)
        return _shifted(level, self.shift(tokens))

    def timestep(self, level: Tensor) -> Tensor:
        return TIMESTEPS * level

    def noised(self, data: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        share = level.to(data, non_blocking=True).reshape(len(level), 1, -1, 1, 1)
        return (1 - share) * data + share * noise

    def loss(self, output: Tensor, data: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Mean squared error of the velocity, which is the same at every level."""
        return (output.float() - (noise - data)).square().mean((1, 3, 4))

    def shift(self, tokens: int) -> float:
        """The shift for a video of this many tokens (latent patches of all frames)."""
        anchors = list(zip(self.config.shift_tokens, self.config.shift_values, strict=True))
        if tokens <= anchors[0][0]:
            return anchors[0][1]
        for (low, low_shift), (high, high_shift) in pairwise(anchors):
            if tokens <= high:
                share = math.log(tokens / low) / math.log(high / low)
                return low_shift * (high_shift / low_shift) ** share
        return anchors[-1][1]


def _shifted(level: Tensor, shift: float) -> Tensor:
    """Moves noise levels towards noise (shift > 1), keeping 0 and 1 (Esser et al., equation 23)."""
    return shift * level / (1 + (shift - 1) * level)
