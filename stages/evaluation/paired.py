"""How far two arms of a comparison differ, over seeds and clips, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean and its 95 % interval."""

    value: float
    interval: tuple[float, float]

    @property
    def told(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval[0] > 0 or self.interval[1] < 0


def paired_difference(differences: np.ndarray, sources: Sequence[str]) -> Difference:
    """Of ``differences`` [seeds, clips], two seeds and two sources or more: another seed, or other clips, would give
    another mean, and the interval is of both.

    Seeds and clips are crossed random effects (Searle, Casella & McCulloch 1992, section 4.6). The variance of the
    mean is taken as that of the seeds' means plus that of the clips' means, the latter over sources, since clips of one
    video are alike; noise that belongs to one seed and one clip is so counted twice, which errs on the wide side.
    The degrees of freedom are Satterthwaite's (1946): with three seeds that differ, a little above two.
    """
    seeds, clips = differences.shape
    mean = float(differences.mean())
    of_seeds = float(differences.mean(axis=1).var(ddof=1)) / seeds
    _, members = np.unique(np.asarray(sources), return_inverse=True)
    count = int(members.max()) + 1
    residuals = np.bincount(members, differences.mean(axis=0) - mean)
    of_clips = count / (count - 1) * float(residuals @ residuals) / clips**2
    variance = of_seeds + of_clips
    if variance == 0:
        return Difference(mean, (mean, mean))
    freedom = variance**2 / (of_seeds**2 / (seeds - 1) + of_clips**2 / (count - 1))
    half = t_quantile(freedom) * math.sqrt(variance)
    return Difference(mean, (mean - half, mean + half))


def t_quantile(freedom: float) -> float:
    """What Student's t of so many degrees of freedom, 1 or more, exceeds in size in one case of twenty.

    With t = sqrt(freedom) tan(angle), the density of the angle is in proportion to cos(angle) ** (freedom - 1).
    """
    edges = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos((edges[1:] + edges[:-1]) / 2) ** (freedom - 1)
    below = np.concatenate([[0], np.cumsum(density)])
    angle = float(np.interp(CONFIDENCE * below[-1], below, edges))
    return math.sqrt(freedom) * math.tan(angle)
