"""Intervals against textbook formulas, and how often they hold."""

import math

import numpy as np
import pytest

from stages.evaluation.estimate import estimate_mean, estimate_means


def test_an_interval_is_that_of_the_central_limit_theorem() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = estimate_mean(values, [str(number) for number in range(400)])
    error = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean()) and (found.samples, found.groups) == (400, 400)
    assert found.interval == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)


def test_clips_of_one_source_count_as_one_look_at_it() -> None:
    """Every value five times over: as sure as of each value once, not sqrt(5) times surer."""
    values = np.random.default_rng(0).normal(size=100)
    once = estimate_mean(values, [str(number) for number in range(100)])
    often = estimate_mean(np.repeat(values, 5), [str(number) for number in range(100) for _ in range(5)])
    assert often.value == pytest.approx(once.value) and often.samples == 500
    assert often.interval == pytest.approx(once.interval)
    unrelated = estimate_mean(np.repeat(values, 5), [str(number) for number in range(500)])
    assert np.ptp(often.interval) == pytest.approx(math.sqrt(5) * np.ptp(unrelated.interval), rel=0.1)


def test_an_interval_is_that_of_a_bootstrap_written_out() -> None:
    """Sources of one to three clips are drawn with all that they have, and the middle 95 % of the means is taken."""
    sources = [str(number) for number in range(30) for _ in range(1 + number % 3)]
    values = np.random.default_rng(2).normal(size=len(sources))
    drawn = np.random.default_rng(0).multinomial(30, [1 / 30] * 30, 2000)
    names = sorted(set(sources))
    means = [
        np.mean(
            [value for value, source in zip(values, sources, strict=True) for _ in range(times[names.index(source)])]
        )
        for times in drawn
    ]
    assert estimate_mean(values, sources).interval == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=1e-9)


def test_ninety_five_in_a_hundred_intervals_hold_the_truth() -> None:
    draw = np.random.default_rng(1)
    values = draw.exponential(size=(60, 300))  # 300 experiments of 60 samples
    found = estimate_means(values, [str(number) for number in range(60)])
    held = sum(low <= 1 <= high for low, high in (estimate.interval for estimate in found))
    assert 0.88 <= held / 300 <= 0.98


def test_one_source_tells_of_no_other() -> None:
    assert estimate_mean(np.array([1.0, 3.0]), ["a", "a"]).interval is None
