"""Guard rails: the limit of adaptive clipping against numpy, and what one outlier can do to it."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict

import numpy as np
import pytest

from stages.training.guard import MIN_NORMS, WINDOW, Guard
from stages.training.optimizer import OptimizerConfig

ADAPTIVE = OptimizerConfig(clip_norm=0.0, clip_sigmas=3.0)
FRESH = Guard()


def after(norms: Iterable[float | None], guard: Guard = FRESH) -> Guard:
    for norm in norms:
        guard = guard.after(norm, ADAPTIVE)
    return guard


def test_the_limit_is_mean_and_sigmas_of_the_past_norms() -> None:
    norms = np.random.default_rng(0).uniform(1, 2, WINDOW).tolist()  # none of them above the limit
    for count in (MIN_NORMS, WINDOW):
        expected = np.mean(norms[:count]) + 3 * np.std(norms[:count])
        assert after(norms[:count]).clip_norm(ADAPTIVE) == pytest.approx(expected, rel=1e-12)
    settled = after(2 + 0.1 * np.sin(range(10 * WINDOW)))  # the past is forgotten
    assert settled.clip_norm(ADAPTIVE) == pytest.approx(2 + 3 * 0.1 / math.sqrt(2), abs=0.02)
    assert after([1.0, 2.0] * WINDOW + [5.0, 6.0] * 10 * WINDOW).norm_mean == pytest.approx(5.5, abs=0.1)


def test_an_outlier_moves_the_limit_by_no_more_than_the_limit_would() -> None:
    guard = after(np.random.default_rng(0).uniform(1, 2, WINDOW))
    limit = guard.clip_norm(ADAPTIVE)
    assert after([1e30], guard) == after([limit], guard)
    assert after([1e30], guard).clip_norm(ADAPTIVE) < 1.1 * limit


def test_the_tighter_limit_is_in_force() -> None:
    guard = after([1.0] * MIN_NORMS)
    assert guard.clip_norm(OptimizerConfig(clip_norm=0.5, clip_sigmas=3.0)) == 0.5
    assert guard.clip_norm(OptimizerConfig(clip_norm=5.0, clip_sigmas=3.0)) == 1.0
    assert guard.clip_norm(OptimizerConfig(clip_norm=0.0)) == math.inf
    assert after([1.0] * (MIN_NORMS - 1)).clip_norm(OptimizerConfig(clip_norm=5.0, clip_sigmas=3.0)) == 5.0


def test_skipped_steps_are_counted_and_leave_the_statistics() -> None:
    guard = after([1.0, None, None])
    assert (guard.skipped_steps, guard.skipped_in_a_row, guard.norms) == (2, 2, 1)
    assert after([3.0], guard) == Guard(2, 0, 2, 2.0, 1.0)


def test_a_checkpoint_keeps_every_bit() -> None:
    guard = after(np.random.default_rng(0).uniform(1, 2, WINDOW))
    assert Guard(**json.loads(json.dumps(asdict(guard)))) == guard
