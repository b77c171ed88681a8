"""Intervals of paired differences: known quantiles, plain formulas, and how often they hold the truth."""

import math

import numpy as np
import pytest

from stages.evaluation.paired import paired_difference, t_quantile


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.3027), (2.5, 3.5747), (3, 3.1824), (10, 2.2281), (1e6, 1.95997)]
)
def test_quantiles_are_those_of_the_tables(freedom: float, expected: float):
    assert t_quantile(freedom) == pytest.approx(expected, rel=1e-4)


def drawn(draw: np.random.Generator, seeds: int, clips: int, spread: tuple[float, float, float]) -> np.ndarray:
    of_seed, of_clip, of_both = spread
    return (
        of_seed * draw.normal(size=(seeds, 1))
        + of_clip * draw.normal(size=(1, clips))
        + of_both * draw.normal(size=(seeds, clips))
    )


@pytest.mark.parametrize("spread", [(1, 0.1, 1), (0.05, 1, 1), (0.3, 2, 0.5)])
def test_the_interval_holds_the_truth_in_nineteen_of_twenty(spread: tuple[float, float, float]):
    draw, times, held = np.random.default_rng(0), 400, 0
    for _ in range(times):
        low, high = paired_difference(0.7 + drawn(draw, 3, 50, spread), [str(n) for n in range(50)]).interval
        held += low <= 0.7 <= high
    assert 0.925 <= held / times  # 400 tries: 2.3 standard deviations below 0.95


def test_differences_of_seeds_alone_are_students_interval_over_the_seeds():
    means = np.array([0.1, 0.4, 0.3])
    found = paired_difference(np.repeat(means[:, None], 20, axis=1), [str(n) for n in range(20)])
    half = 4.30265 * means.std(ddof=1) / math.sqrt(3)
    assert found.value == pytest.approx(means.mean())
    assert found.interval == pytest.approx((means.mean() - half, means.mean() + half), rel=1e-4)


def test_differences_of_clips_alone_are_students_interval_over_the_clips():
    means = np.random.default_rng(1).normal(size=11)
    found = paired_difference(np.repeat(means[None], 4, axis=0), [str(n) for n in range(11)])
    half = 2.22814 * means.std(ddof=1) / math.sqrt(11)
    assert found.interval == pytest.approx((means.mean() - half, means.mean() + half), rel=1e-4)


def test_clips_of_one_source_count_as_one():
    means = np.random.default_rng(2).normal(size=12)
    once = paired_difference(np.repeat(means[None], 2, axis=0), [str(n) for n in range(12)])
    thrice = paired_difference(np.repeat(means[None], 2, axis=0).repeat(3, axis=1), [str(n // 3) for n in range(36)])
    assert thrice.interval == pytest.approx(once.interval)


def test_no_difference_at_all_is_told_as_none():
    found = paired_difference(np.zeros((2, 5)), list("abcde"))
    assert (found.value, found.interval, found.told) == (0, (0, 0), False)
