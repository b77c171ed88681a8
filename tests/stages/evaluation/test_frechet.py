"""The Fréchet distance against closed forms and a matrix square root written out, and its bias with few samples."""

import numpy as np
import pytest

from stages.evaluation.frechet import frechet_distance, measure_frechet


def covariance(draw: np.random.Generator, dimensions: int, rank: int) -> np.ndarray:
    factor = draw.normal(size=(dimensions, rank))
    return factor @ factor.T


def plain_distance(mean, covariance_, other_mean, other_covariance) -> float:
    """As pytorch-fid has it, tr (S S')^½ from the eigenvalues of the product, which is not symmetric."""
    eigenvalues = np.linalg.eigvals(covariance_ @ other_covariance)
    root = np.sqrt(eigenvalues.astype(complex)).real.sum()
    return ((mean - other_mean) ** 2).sum() + np.trace(covariance_) + np.trace(other_covariance) - 2 * root


def test_of_commuting_covariances_it_is_the_closed_form() -> None:
    """Of diagonal ones: the sum of (m - m')² + (s - s')²."""
    draw = np.random.default_rng(0)
    means, deviations = draw.normal(size=(2, 30)), draw.uniform(0, 2, size=(2, 30))
    deviations[:, ::3] = 0  # singular, and in places only one of them
    deviations[0, 1::3] = 0
    found = frechet_distance(means[0], np.diag(deviations[0] ** 2), means[1], np.diag(deviations[1] ** 2))
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ranks", [(12, 12), (12, 5), (4, 5), (12, 0)])
def test_of_any_covariances_it_is_that_of_the_square_root(ranks: tuple[int, int]) -> None:
    draw = np.random.default_rng(1)
    first, second = (covariance(draw, 12, rank) for rank in ranks)
    mean, other = draw.normal(size=(2, 12))
    found = frechet_distance(mean, first, other, second)
    tolerance = 1e-10 if min(ranks) == 12 else 1e-6  # the reference loses half the digits of eigenvalues that are 0
    assert found == pytest.approx(plain_distance(mean, first, other, second), rel=tolerance)
    assert frechet_distance(mean, first, mean, first) == pytest.approx(0, abs=1e-10)


def test_a_rank_one_covariance_is_known_in_closed_form() -> None:
    """tr (S aaᵀ)^½ = sqrt(aᵀ S a)."""
    draw = np.random.default_rng(2)
    full, a, zero = covariance(draw, 9, 9), draw.normal(size=9), np.zeros(9)
    expected = np.trace(full) + a @ a - 2 * np.sqrt(a @ full @ a)
    assert frechet_distance(zero, full, zero, np.outer(a, a)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("shift", "truth"), [(0.0, 0.0), (1.0, 8.0)])
def test_the_bias_of_few_samples_is_shown_and_taken_off(shift: float, truth: float) -> None:
    """Of two standard normals in 8 dimensions, one of them moved by ``shift`` in each."""
    draw = np.random.default_rng(3)
    found = [
        measure_frechet("test", draw.normal(size=(80, 8)), draw.normal(shift, size=(90, 8)), diagnostic=True)
        for _ in range(40)
    ]
    assert all(one is not None and (one.samples, one.dimensions) == (80, 8) for one in found)
    at_half, distance, extrapolated = (
        np.mean([getattr(one, name) for one in found]) - truth for name in ("at_half", "distance", "extrapolated")
    )
    assert at_half == pytest.approx(2 * distance, rel=0.3) and distance > 0.2
    assert abs(extrapolated) < 0.3 * distance


def test_the_interval_is_the_spread_of_repeated_measurements() -> None:
    """So it holds, in about 95 of 100 of them, what their mean is at this number of samples."""
    draw = np.random.default_rng(4)
    found = [
        measure_frechet("test", draw.normal(size=(100, 3)), draw.normal(0.5, size=(100, 3)), diagnostic=True)
        for _ in range(60)
    ]
    spread = 2 * 1.96 * np.std([one.distance for one in found])
    assert np.median([np.ptp(one.interval) for one in found]) == pytest.approx(spread, rel=0.3)
    usual = np.mean([one.distance for one in found])
    assert 0.85 <= np.mean([one.interval[0] <= usual <= one.interval[1] for one in found]) < 1


def test_below_2048_samples_it_warns() -> None:
    draw = np.random.default_rng(5)
    for count, warned in ((2047, True), (2048, False)):
        found = measure_frechet("test", draw.normal(size=(count, 2)), draw.normal(size=(5000, 2)), diagnostic=False)
        assert found and (found.warning is not None) == warned
        assert not warned or found.warning.startswith("2047 samples: below 2048")
    assert measure_frechet("test", draw.normal(size=(3, 2)), draw.normal(size=(5000, 2)), diagnostic=False) is None
