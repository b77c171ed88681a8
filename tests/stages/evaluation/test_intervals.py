"""Intervals against textbook formulas, and how often they hold."""

import math

import numpy as np
import pytest

from stages.evaluation.intervals import Proportion, estimate_mean, estimate_means


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
    draw = np.random.default_rng(2)
    clips = {str(number): draw.normal(size=1 + number % 3) for number in range(30)}
    times = np.random.default_rng(0).multinomial(30, [1 / 30] * 30, 2000)
    names = sorted(clips)
    means = [np.concatenate([clips[name] for name in np.repeat(names, drawn)]).mean() for drawn in times]
    values, sources = np.concatenate(list(clips.values())), [name for name, of_it in clips.items() for _ in of_it]
    assert estimate_mean(values, sources).interval == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=1e-9)


def test_ninety_five_in_a_hundred_intervals_hold_the_truth() -> None:
    draw = np.random.default_rng(1)
    values = draw.exponential(size=(60, 300))  # 300 experiments of 60 samples
    found = estimate_means(values, [str(number) for number in range(60)])
    held = sum(low <= 1 <= high for low, high in (estimate.interval for estimate in found))
    assert 0.88 <= held / 300 <= 0.98


def test_one_source_tells_of_no_other() -> None:
    assert estimate_mean(np.array([1.0, 3.0]), ["a", "a"]).interval is None


def test_wilsons_interval_solves_its_own_equation():
    """Both ends p satisfy (observed - p)^2 = z^2 p (1 - p) / n, the equation the interval is defined by."""
    for count, total in ((112, 120), (1, 7), (60, 120)):
        share = Proportion(count, total)
        for p in share.interval:
            assert (share.value - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / total)
    assert Proportion(120, 120).interval == pytest.approx((0.96898, 1.0), abs=1e-5)
    assert math.isnan(Proportion(0, 0).value) and Proportion(0, 0).interval == (0, 1)
