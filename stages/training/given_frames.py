"""Frames that are given to the model rather than asked of it: image-to-video and the like, from stored latents alone.

Given frames are shown as they are, at timestep 0, and bear no loss; the others are noised at the clip's level. So
trains Open-Sora since 1.1, whose masks these are, but for those of random frames and of last frames alone (its
docs/report_02.md, "Masked DiT as Image/Video-to-Video Model"). A model that was not trained so does poorly with given
frames, it says.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

from stages.errors import at_least

# By mask: of a clip's number of frames, how many may be given at its start and at its end, each choice as likely.
MASKS: dict[str, Callable[[int], list[tuple[int, int]]]] = {
    "first": lambda frames: [(1, 0)],
    "extend": lambda frames: [(count, 0) for count in range(2, frames // 2 + 1)],
    "between": lambda frames: [(1, 1)],
    "loop": lambda frames: [(count, count) for count in range(1, frames // 4 + 1)],
}


@dataclass(frozen=True)
class ConditioningConfig:
    """Each mask's share of the samples; the rest is plain text-to-video, and so is a clip too short for its mask.

    first: the first frame, to animate an image. extend: the first 2 frames up to half of them, to go on with a clip.
    between: the first and the last frame. loop: at both ends 1 frame up to a quarter of them, to close a loop or join
    two clips.

    Raises ValueError for shares below 0, and for shares that add up to more than 1.
    """

    first: float = 0.0
    extend: float = 0.0
    between: float = 0.0
    loop: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, 0, *MASKS)
        total = math.fsum(self._shares())
        if total > 1:
            raise ValueError(f"{', '.join(MASKS)}: found shares that add up to {total:g}, expected at most 1")

    def masks(self) -> tuple[str, ...]:
        """The masks that samples get."""
        return tuple(mask for mask in MASKS if getattr(self, mask) > 0)

    def draw(self, frames: int, generator: torch.Generator) -> torch.Tensor:
        """Which frames of a clip are given, [frames] bool; never all of them."""
        given = torch.zeros(frames, dtype=torch.bool)
        drawn = float(torch.rand((), generator=generator))
        mask = next((mask for mask, end in zip(MASKS, accumulate(self._shares()), strict=True) if drawn < end), None)
        choices = [ends for ends in MASKS[mask](frames) if sum(ends) < frames] if mask else []
        if choices:
            start, end = choices[int(torch.randint(len(choices), (), generator=generator))]
            given[:start] = True
            given[frames - end :] = True
        return given

    def _shares(self) -> list[float]:
        return [getattr(self, mask) for mask in MASKS]


TEXT_ALONE = ConditioningConfig()
