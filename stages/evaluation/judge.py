"""The losses of a comparison's runs, and what they tell of its arms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stages.evaluation.arms import Arm
from stages.evaluation.paired import Difference, paired_difference


@dataclass(frozen=True)
class Judged:
    """An arm's losses: of its runs by seed, and at each level; less those of the first arm, if it is another."""

    arm: Arm
    loss: float
    of_seeds: list[float]
    by_level: list[float]
    difference: Difference | None
    level_differences: list[Difference]

    @property
    def verdict(self) -> str:
        """What the interval tells, in a word or two."""
        if self.difference is None:
            return "compared with"
        if not self.difference.told:
            return "not told apart"
        return "better" if self.difference.value < 0 else "worse"


def judge(arms: Sequence[Arm], losses: Mapping[str, np.ndarray], sources: Sequence[str]) -> list[Judged]:
    """losses: by arm, [seeds, clips, levels]; sources: of the clips."""
    first = losses[arms[0].name]
    found = []
    for arm in arms:
        own = losses[arm.name]
        by_level = own.mean((0, 1)).tolist()
        one = Judged(arm, float(own.mean()), own.mean((1, 2)).tolist(), by_level, None, [])
        if arm is not arms[0]:
            paired = own - first
            levels = [paired_difference(paired[:, :, level], sources) for level in range(paired.shape[2])]
            one = replace(one, difference=paired_difference(paired.mean(2), sources), level_differences=levels)
        found.append(one)
    return found
