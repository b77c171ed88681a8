"""Numbers with the uncertainty that comes from the samples they were measured on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
TAIL = 0.025
"""Left out at either end: a 95 % interval."""
NORMAL_QUANTILE = 1.959964
"""What a normal variable exceeds in size in one case of twenty."""


@dataclass(frozen=True)
class Estimate:
    """A mean over ``samples`` of ``groups`` sources, and its 95 % interval; None where one source tells of no other."""

    value: float
    interval: tuple[float, float] | None
    samples: int
    groups: int


@dataclass(frozen=True)
class Proportion:
    """``count`` of a ``total`` of samples."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """count / total; nan when there are no samples."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval of the true share (Wilson 1927, equation 4); 0..1 when there are no samples."""
        if not self.total:
            return 0.0, 1.0
        square = NORMAL_QUANTILE**2 / self.total
        centre = (self.value + square / 2) / (1 + square)
        half = math.sqrt(self.value * (1 - self.value) * square + square**2 / 4) / (1 + square)
        return max(0.0, centre - half), min(1.0, centre + half)


def estimate_means(values: np.ndarray, groups: Sequence[str]) -> list[Estimate]:
    """Of each column of ``values`` [n, k] its mean over the samples, whose sources ``groups`` names.

    The interval is the percentile bootstrap (Efron & Tibshirani 1993, chapter 13) over the sources, each with all its
    samples: clips of one video are alike, and would make samples look more certain than they are. The draws are the
    same for all columns and in every call of as many sources. Below some 20 sources it is too narrow.
    """
    _, members = np.unique(np.asarray(groups), return_inverse=True)
    count = int(members.max()) + 1
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, members, values.astype(np.float64))
    sizes = np.bincount(members)
    means = sums.sum(0) / len(values)
    if count == 1:
        return [Estimate(mean, None, len(values), 1) for mean in means.tolist()]
    chosen = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)  # [resamples, count]
    resampled = (chosen @ sums) / (chosen @ sizes)[:, None]
    low, high = np.quantile(resampled, [TAIL, 1 - TAIL], axis=0).tolist()
    return [
        Estimate(mean, interval, len(values), count)
        for mean, interval in zip(means.tolist(), zip(low, high, strict=True), strict=True)
    ]


def estimate_mean(values: np.ndarray, groups: Sequence[str]) -> Estimate:
    """`estimate_means` of one column."""
    return estimate_means(values[:, None], groups)[0]
