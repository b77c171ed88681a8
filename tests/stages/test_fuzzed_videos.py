"""Damaged files of every kind end as frames or as a reason; ``benchmarks.fuzz_videos`` tries more of them."""

from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.fuzz_videos import REASONS, fuzz, mutate, render_sources


def test_every_damaged_file_is_accounted_for(tmp_path: Path) -> None:
    outcomes = Counter(fuzz(render_sources(tmp_path), tmp_path, 40))
    assert sum(outcomes.values()) == 40 and not set(outcomes) - {"frames", *REASONS}
    assert outcomes["frames"] >= 3 and outcomes["undecodable"] >= 10


def test_damage_is_done_and_can_be_repeated() -> None:
    data = np.random.default_rng(0).bytes(5000)
    copies = [mutate(data, np.random.default_rng(seed)) for seed in range(50)]
    assert data not in copies and len(set(copies)) == 50
    assert copies == [mutate(data, np.random.default_rng(seed)) for seed in range(50)]
