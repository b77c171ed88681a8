"""The Fréchet distance between the features of samples and of real clips, with what is known of its bias.

Features are taken as normally distributed (Heusel et al., arXiv:1706.08500; for videos Unterthiner et al.,
arXiv:1812.01717).
"""

import math
from dataclasses import dataclass

import numpy as np

from stages.evaluation.intervals import NORMAL_QUANTILE

LEAST_SAMPLES = 2048
HALVES = 8
FOLDS = 10


@dataclass(frozen=True)
class FrechetDistance:
    """distance: of ``samples`` samples and as many real clips, in ``dimensions`` features.

    interval: 95 %, for the spread of the distance at this number of samples; its bias is not in it.
    at_half: the mean of the distances of random halves of both. extrapolated: to endless samples.
    """

    features: str
    diagnostic: bool
    dimensions: int
    samples: int
    distance: float
    interval: tuple[float, float]
    at_half: float
    extrapolated: float

    @property
    def warning(self) -> str | None:
        if self.samples >= LEAST_SAMPLES:
            return None
        return f"{self.samples} samples: below {LEAST_SAMPLES} the distance is mostly bias, compare nothing by it"


def frechet_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """Of two normal distributions of D features: |m - m'|² + tr(S + S' - 2 (S S')^½) (Dowson & Landau 1982).

    tr (S S')^½ is the sum of the singular values of S^½ S'^½, which also holds where S or S' is singular, and needs
    no square root of a matrix that is not symmetric. float64.
    """
    roots = [_symmetric_root(matrix) for matrix in (covariance, other_covariance)]
    common = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    apart = np.square(mean - other_mean).sum()
    return float(apart + np.trace(covariance) + np.trace(other_covariance) - 2 * common)


def measure_frechet(name: str, samples: np.ndarray, real: np.ndarray, *, diagnostic: bool) -> FrechetDistance | None:
    """From features [n, D] and [m, D], of the larger set as many as of the smaller. None below 4 of each.

    The distance of few samples is too large, by about a constant / n: Chong & Forsyth (arXiv:1911.07023) fit a line
    in 1/n and read it off at 0. With two points, n and n / 2, that is twice the former less the latter.
    The interval is of a jackknife by tenths: a bootstrap draws samples twice, which shrinks the covariances.
    """
    count = min(len(samples), len(real))
    if count < 4:
        return None
    draw = np.random.default_rng(0)
    samples, real = (x[draw.permutation(len(x))[:count]].astype(np.float64) for x in (samples, real))
    halves = [_of_features(*(x[draw.permutation(count)[: count // 2]] for x in (samples, real))) for _ in range(HALVES)]
    distance, at_half = _of_features(samples, real), float(np.mean(halves))
    spread = NORMAL_QUANTILE * _jackknife_error(samples, real)
    # In 1/n from n // 2 to n: for an odd n a little less than twice.
    slope = (at_half - distance) / (1 / (count // 2) - 1 / count)
    return FrechetDistance(
        name,
        diagnostic,
        samples.shape[1],
        count,
        distance,
        (max(0.0, distance - spread), distance + spread),
        at_half,
        distance - slope / count,
    )


def _of_features(samples: np.ndarray, real: np.ndarray) -> float:
    moments = [(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (samples, real)]
    return frechet_distance(*moments[0], *moments[1])


def _jackknife_error(samples: np.ndarray, real: np.ndarray) -> float:
    """The standard error, from the distances that leave out each tenth of both sets (at least one sample)."""
    folds = min(FOLDS, len(samples) // 2)
    left = [
        _of_features(np.delete(samples, fold, 0), np.delete(real, fold, 0))
        for fold in np.array_split(np.arange(len(samples)), folds)
    ]
    return math.sqrt((folds - 1) * np.var(left))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """The square root of a positive semidefinite matrix; eigenvalues below zero are rounding."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T
