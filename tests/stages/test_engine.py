"""ZeRO 1, 2 and 3 on two CPU ranks against one plain PyTorch process, and a resume against no stop."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.engine import check_settings
from stages.errors import ConfigError
from stages.training.optimizer import OptimizerConfig, lr_share, parameter_groups
from tests.resident import ResidentRanks
from tests.stages.engine_run import (
    ACCUMULATION,
    CASES,
    FROZEN,
    KINDS,
    OPTIMIZER,
    RATES,
    SKIPPED,
    STEPS,
    build_model,
    clip_norm,
    micro_batches,
)

SCRIPT = "tests/stages/engine_run.py"
FP32 = [case for case in CASES if case.startswith("fp32")]


@pytest.fixture(scope="module")
def runs(resident_ranks: ResidentRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of engine_run.py on two ranks, and of its resume on one."""
    folder = tmp_path_factory.mktemp("engine")
    for case in CASES:
        (folder / case).mkdir()
    for world in (2, 1):
        resident_ranks.run(world, SCRIPT, folder)
    return folder


def plain_run() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same training without DeepSpeed or the skipped steps: weights, and their average kept in float64."""
    model = build_model()
    trained = {name: parameter for name, parameter in model.named_parameters() if name != FROZEN}
    groups = [{"params": [parameter], "peak": RATES[name]} for name, parameter in trained.items()]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0)
    average = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    for moved, step in enumerate(step for step in range(STEPS) if step not in SKIPPED):
        adam.zero_grad()
        for inputs, targets in micro_batches(step):
            ((model(inputs) - targets).square().mean() / ACCUMULATION).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), clip_norm(step))
        for group in adam.param_groups:
            group["lr"] = group["peak"] * lr_share(step, STEPS, OPTIMIZER)
        adam.step()
        decay = min(0.9999, (2 + moved) / (11 + moved))
        for name, parameter in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach().double()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, average


@pytest.mark.parametrize("case", FP32)
def test_zero_on_two_ranks_trains_like_plain_pytorch(case: str, runs: Path) -> None:
    weights, average = plain_run()
    for kind, reference in (("weights", weights), ("ema", average)):
        assert_equal(load_file(runs / f"{case}/whole-{kind}.safetensors"), reference)


@pytest.mark.parametrize("case", CASES)
def test_frozen_weights_keep_every_bit_and_have_no_moments(case: str, runs: Path) -> None:
    states = {kind: load_file(runs / f"{case}/resumed-2-{kind}.safetensors") for kind in KINDS}
    for kind in ("weights", "ema"):
        assert torch.equal(states[kind][FROZEN], build_model().get_parameter(FROZEN))
    for kind in ("exp_avg", "exp_avg_sq"):
        assert states[kind].keys() == RATES.keys()


@pytest.mark.parametrize("case", CASES)
def test_a_resume_is_bit_equal(case: str, runs: Path) -> None:
    for kind in KINDS:
        whole, resumed = (runs / f"{case}/{name}-{kind}.safetensors" for name in ("whole", "resumed-2"))
        assert whole.read_bytes() == resumed.read_bytes(), kind


@pytest.mark.parametrize("case", FP32)
def test_a_resume_on_one_rank_agrees_within_rounding(case: str, runs: Path) -> None:
    weights, _ = plain_run()
    assert_equal(load_file(runs / f"{case}/resumed-1-weights.safetensors"), weights)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.float(), rtol=0, atol=1e-6)


def test_the_learning_rate_warms_up_and_decays() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, decay="cosine", final_lr_share=0.1)
    rates = [lr_share(step, 104, config) for step in range(104)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[54] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in zip(rates[3:], rates[4:], strict=False))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"0.*": 1e-3, "1.*": 1e-3}, "no parameter is left for '1.*'"),
        ({"*": 1e-3, "0.bias": 0.0}, "no parameter is left for '0.bias'"),
        ({"*": 0.0}, "freezes every parameter"),
    ],
)
def test_patterns_that_decide_nothing_are_refused(patterns: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parameter_groups(build_model(), OptimizerConfig(group_lr=patterns))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_batch_size": 8}, "deepspeed.train_batch_size is derived"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean zero_optimization"),
        ({"zero_optimization": {"stage": 0}}, "expected keys with stage: 1, 2 or 3"),
        ({"zero_optimization": 2}, "expected keys with stage"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "zero_optimization.overlap_com"),
    ],
)
def test_deepspeed_settings_that_would_be_refused_or_ignored_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_settings(settings)
    assert message in str(error.value)
