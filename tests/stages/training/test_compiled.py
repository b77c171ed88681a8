"""Training with compiled blocks against training without."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stages.errors import ConfigError
from stages.training.config import StepConfig, TrainConfig, check
from tests.running import run
from tests.stages.training.compiled_run import STEPS


def test_compiled_blocks_train_like_others(tmp_path: Path) -> None:
    run(sys.executable, "-m", "tests.stages.training.compiled_run", tmp_path, timeout_s=600)
    plain, compiled = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "compiled")
    )
    for name in ("loss", "gradient_norm"):
        assert len(plain) == STEPS
        assert [line[name] for line in compiled] == pytest.approx([line[name] for line in plain], rel=1e-5), name


@pytest.mark.parametrize(
    ("train", "deepspeed", "message"),
    [
        ({}, {"zero_optimization": {"stage": 3}}, "expected false with deepspeed.zero_optimization.stage 3"),
        ({"activation_memory": "selective"}, {}, "train.activation_memory=selective"),
        ({"mlp_chunk_tokens": 64}, {}, "train.mlp_chunk_tokens=64"),
    ],
)
def test_what_compiled_blocks_cannot_do_is_refused(train: dict, deepspeed: dict, message: str) -> None:
    settings = StepConfig(batch_size=4, compile=True)
    check(TrainConfig(model={"preset": "tiny"}, train=settings), 1)
    with pytest.raises(ConfigError) as error:
        check(TrainConfig(model={"preset": "tiny"}, train=replace(settings, **train), deepspeed=deepspeed), 1)
    assert message in str(error.value)
