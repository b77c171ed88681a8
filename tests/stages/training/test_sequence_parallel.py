"""Training where two ranks share each video, two such groups, against training on one rank."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.errors import ConfigError
from stages.training.config import StepConfig, TrainConfig, check
from tests.running import run
from tests.stages.training.sequence_run import CASES, RANKS, STEPS

ALONE = {case: "zero-1, uneven/1" if "uneven" in case else "zero-1/1" for case in CASES}
PAIRS = {**{f"{case}/{RANKS}": alone for case, alone in ALONE.items()}, "resumed": "zero-1/1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run(sys.executable, "-m", "tests.stages.training.sequence_run", folder, timeout_s=600)
    return folder


def logged(run: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.parametrize("shared", PAIRS)
def test_losses_and_gradient_norms_are_those_of_one_rank(shared: str, runs: Path) -> None:
    for name in ("loss", "gradient_norm", "validation_loss"):
        found, expected = (logged(runs / run, name) for run in (shared, PAIRS[shared]))
        assert STEPS in expected
        assert {step: found[step] for step in expected} == pytest.approx(expected, rel=1e-6), name


@pytest.mark.parametrize("shared", PAIRS)
def test_weights_averages_moments_and_samples_are_those_of_one_rank(shared: str, runs: Path) -> None:
    for kind in ("model", "ema", "exp_avg", "exp_avg_sq"):
        file = f"checkpoints/step-{STEPS:07d}/{kind}.safetensors"
        found, expected = (load_file(runs / run / file) for run in (shared, PAIRS[shared]))
        assert found.keys() == expected.keys()
        largest = max(float(tensor.abs().max()) for tensor in expected.values())
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5 * largest)
    file = f"samples/step-{STEPS:07d}.safetensors"
    found, expected = (load_file(runs / run / file)["latents"] for run in (shared, PAIRS[shared]))
    torch.testing.assert_close(found, expected, rtol=0, atol=2**-9)  # two roundings to float16


@pytest.mark.parametrize(
    ("ranks", "model", "train", "message"),
    [
        (4, {}, {"sequence_parallel": 3}, "train.sequence_parallel: found 3, expected a divisor of the 4 ranks"),
        (4, {}, {"batch_size": 3}, "expected a multiple of 2 (4 ranks / train.sequence_parallel 2"),
        (4, {"temporal_attention": "full"}, {}, "expected 1 with model.temporal_attention=full"),
    ],
)
def test_what_ranks_cannot_share_is_refused(ranks: int, model: dict, train: dict, message: str) -> None:
    settings = {"batch_size": 4, "sequence_parallel": 2} | train
    with pytest.raises(ConfigError) as error:
        check(TrainConfig(model={"preset": "tiny"} | model, train=StepConfig(**settings)), ranks)
    assert message in str(error.value)
