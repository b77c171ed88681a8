"""The arithmetic of a step's memory against PyTorch's own account of it, on tensors without contents."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from models.activations import ActivationMemory
from models.compute import PRECISIONS
from models.presets import preset
from models.transformer import Transformer, TransformerConfig
from stages.training.memory import GPU_SLACK_BYTES, StepMemory, peak_of, state_bytes

XL = preset("XL/2", {"num_layers": 2})
FRAMES, SIDE = 56, 32  # of latents
STEP = StepMemory(XL, samples=2, tokens=XL.tokens(FRAMES, SIDE, SIDE))
POLICIES = get_args(ActivationMemory)[:-1]  # the account tells no host from a device that is a CPU
CASES = {
    **{policy: replace(STEP, activation_memory=policy) for policy in POLICIES},
    "long text": replace(STEP, text_tokens=300, samples=1),
    "fp32": replace(STEP, precision="fp32", activation_memory="block"),
    "chunks": replace(STEP, activation_memory="pair", mlp_chunk_tokens=2048),
    "chunks, nothing else": replace(STEP, mlp_chunk_tokens=2048),
    "another width": replace(STEP, model=preset("S/2", {"num_layers": 2}), activation_memory="selective"),
    "another MLP": replace(STEP, model=replace(XL, mlp_ratio=2)),
}


@pytest.mark.parametrize("step", CASES.values(), ids=CASES)
def test_a_step_takes_what_arithmetic_says(step: StepMemory) -> None:
    """Within 6 %: what the table leaves out are tensors narrower than the model, and the order in which some die."""
    assert accounted_bytes(step) == pytest.approx(step.activation_bytes, rel=0.06)


def accounted_bytes(step: StepMemory) -> int:
    """The peak of a forward and backward pass, but for weights and gradients, as PyTorch's tracker counts storages."""
    config: TransformerConfig = step.model
    with FakeTensorMode():
        torch.set_default_dtype(PRECISIONS[step.precision])
        try:
            model = Transformer(config)
        finally:
            torch.set_default_dtype(torch.float32)
        model.activation_memory = step.activation_memory
        model.chunk_mlp(step.mlp_chunk_tokens)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        latents = torch.empty(step.samples, config.in_channels, FRAMES, SIDE, SIDE)
        text = torch.empty(step.samples, step.text_tokens, config.text_dim)
        tracker = MemTracker()
        tracker.track_external(model)
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        with tracker:
            model(latents, torch.ones(step.samples), text, mask).sum().backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
        weights = sum(parameter.nbytes for parameter in model.parameters())
    return peak["Total"] - 2 * weights


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", get_args(ActivationMemory))
def test_a_step_on_a_gpu_takes_what_arithmetic_says(policy: ActivationMemory) -> None:
    """And no more beside it than the slack that is left for what products and attention work in."""
    step, device = replace(STEP, activation_memory=policy, samples=8), torch.device("cuda")
    with device:
        model = Transformer(XL).to(PRECISIONS[step.precision])
    model.activation_memory = policy
    latents = torch.randn(step.samples, XL.in_channels, FRAMES, SIDE, SIDE, device=device)
    text = torch.randn(step.samples, step.text_tokens, XL.text_dim, device=device)
    for _ in range(2):  # the first makes the gradients
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(latents, torch.ones(step.samples, device=device), text).float().square().mean().backward()
    beside = torch.cuda.max_memory_allocated() - before - step.activation_bytes
    assert -0.06 * step.activation_bytes <= beside <= GPU_SLACK_BYTES


@pytest.mark.parametrize(
    ("stage", "precision", "world", "expected"),
    [(1, "bf16", 1, 20), (None, "bf16", 8, 6), (2, "bf16", 8, 4.25), (3, "bf16", 8, 2.5), (1, "fp32", 2, 16)],
)
def test_bytes_of_a_parameter(stage: int | None, precision: str, world: int, expected: float) -> None:
    """By hand: weight and gradient of 2 or 4 bytes; master, two moments and average of 4, over the ranks. None: 1."""
    settings = {"zero_optimization": {"stage": stage}} if stage else {}
    assert state_bytes(settings, precision, world) == expected


def test_what_will_not_fit_is_told_with_a_way_out() -> None:
    steps = {"256x256x56": replace(STEP, samples=1), "256x256x16": replace(STEP, samples=1, tokens=4096)}
    need, block = steps["256x256x56"].activation_bytes, CASES["block"].activation_bytes / 2
    assert "NOT FIT" not in peak_of(steps, 1e9, need + 1e9)
    told = peak_of(steps, 1e9, need + 1e9 - 1)
    assert f"{(need + 1e9) / 1e9:.2f} GB a rank" in told and "activations of 1 of 256x256x56" in told
    assert "NOT FIT" in told and "train.activation_memory=selective does" in told
    assert "train.activation_memory=block does" in peak_of(steps, 1e9, block * 1.01 + 1e9)
    assert "smaller batches" in peak_of(steps, 1e9, 1e9)
