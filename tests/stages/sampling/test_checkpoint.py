"""Which checkpoint is sampled from when none is named."""

import os
from pathlib import Path

import pytest

from stages.errors import ConfigError
from stages.sampling.checkpoint import choose_checkpoint
from tests.stages.small_run import small_run


def test_the_newest_run_is_taken_but_no_arm_of_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="train first"):
        choose_checkpoint("")
    for age, run in enumerate(("comparison/all/seed-0", "mine", "demo/run")):
        folder = small_run(Path("outputs") / run)
        os.utime(folder / "checkpoints", (1e9 - age, 1e9 - age))
    assert choose_checkpoint("").is_relative_to("outputs/mine")
    assert choose_checkpoint("outputs/demo/run").is_relative_to("outputs/demo/run")
