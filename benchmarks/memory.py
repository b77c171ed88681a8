"""How much memory a training step takes, by arithmetic, and what autograd keeps of a forward pass, against Latte's.

python -m benchmarks.memory [key=value ...]     of that case; without, those of docs/performance.md

Settings: preset, height, width, frames, batch (clips of one micro-batch on a rank), text_tokens, zero_stage, ranks,
precision, mlp_chunk_tokens and gpu_gb; `stages.training.memory` has the arithmetic. The bytes that autograd keeps are
counted, at the width of XL/2 on one and on two pairs of blocks in fp32, and continued to 28; every storage counts once,
parameters do not. Some seconds.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.table import Row, report
from models.activations import ActivationMemory
from models.presets import preset
from models.transformer import Transformer, TransformerConfig
from pipelines.config import load_config
from stages.errors import at_least
from stages.training.memory import GPU_SLACK_BYTES, StepMemory, state_bytes
from tests.models.networks import latte

POLICIES: tuple[ActivationMemory, ...] = get_args(ActivationMemory)
KEPT: dict[ActivationMemory, float | None] = {"none": 0.70, "block": None}  # at most, of Latte's bytes
VAE_FACTOR = 8
PATCH_PIXELS = 2 * VAE_FACTOR
PAIRS, LATENTS, TEXT_TOKENS = 28, (16, 32, 32), 120  # of the clip whose kept bytes are counted


@dataclass(frozen=True)
class Case:
    preset: str = "XL/2"
    height: int = 256
    width: int = 256
    frames: int = 56
    batch: int = 1
    text_tokens: int = 120
    zero_stage: int = 1
    ranks: int = 1
    precision: str = "bf16"
    mlp_chunk_tokens: int | None = None
    gpu_gb: float = 141.0

    def __post_init__(self) -> None:
        at_least(self, 1, "height", "width", "frames", "batch", "text_tokens", "ranks")
        if self.height % PATCH_PIXELS or self.width % PATCH_PIXELS:
            raise ValueError(f"found {self.height} x {self.width}, expected multiples of {PATCH_PIXELS}")
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(f"zero_stage: found {self.zero_stage}, expected 1, 2 or 3")


CASES = (
    Case(),
    Case(height=512, width=512, frames=128),
    Case(height=720, width=1280, frames=128),
    Case(height=1088, width=1920, frames=56),  # 1080 is no multiple of 16
    Case(height=1088, width=1920, frames=128),
    Case(height=1088, width=1920, frames=128, mlp_chunk_tokens=65536),
)


def main() -> None:
    if len(sys.argv) > 1:
        report("memory", list(predicted(load_config(Case, None, sys.argv[1:]))), ("torch",))
        return
    rows = [row for case in CASES for row in predicted(case)]
    report("memory", [*rows, *against_latte()], ("torch", "diffusers"))


def predicted(case: Case) -> Iterator[Row]:
    """The peak of a rank with each policy."""
    model = preset(case.preset)
    parameters = sum(parameter.numel() for parameter in _on_meta(model).parameters())
    zero = {"zero_optimization": {"stage": case.zero_stage}}
    states = parameters * state_bytes(zero, case.precision, case.ranks)
    tokens = model.tokens(case.frames, case.height // VAE_FACTOR, case.width // VAE_FACTOR)
    chunks = f", MLP {case.mlp_chunk_tokens}" if case.mlp_chunk_tokens else ""
    for policy in POLICIES:
        activations = StepMemory(
            model, case.batch, tokens, case.text_tokens, policy, case.mlp_chunk_tokens, case.precision
        ).activation_bytes
        peak_gb = (states + activations + GPU_SLACK_BYTES) / 1e9
        name = f"{case.height}x{case.width}x{case.frames} x {case.batch}{chunks}: {policy}"
        yield Row(name, peak_gb, "GB", f"{case.gpu_gb:g} GB", peak_gb / case.gpu_gb)


def _on_meta(config: TransformerConfig) -> nn.Module:
    with torch.device("meta"):
        return Transformer(config)


def against_latte() -> Iterator[Row]:
    """Bytes that autograd keeps of 28 pairs, a token."""
    theirs = _kept_bytes_a_token(None)
    yield Row("kept for backward, diffusers' Latte", theirs / 1e3, "kB/token")
    for policy, most in KEPT.items():
        ours = _kept_bytes_a_token(policy)
        target, holds = (None, None) if most is None else (f"<= {most}", ours <= most * theirs)
        yield Row(f"kept for backward, {policy}", ours / 1e3, "kB/token", "Latte's", ours / theirs, target, holds)


def _kept_bytes_a_token(policy: ActivationMemory | None) -> float:
    """Ours with a policy; None: Latte's. Continued from one and two pairs to 28, as pairs do not differ."""
    one, two = (_kept_bytes(preset("XL/2", {"num_layers": pairs}), policy) for pairs in (1, 2))
    return (one + (PAIRS - 1) * (two - one)) / preset("XL/2").tokens(*LATENTS)


def _kept_bytes(config: TransformerConfig, policy: ActivationMemory | None) -> int:
    """Of one clip, by tensors that have no contents."""
    with FakeTensorMode():
        latents, text = torch.empty(1, config.in_channels, *LATENTS), torch.empty(1, TEXT_TOKENS, config.text_dim)
        if policy is None:
            return saved_bytes(latte(config, LATENTS[0]), latents, torch.ones(1), text)[0]
        model = Transformer(config)
        model.activation_memory = policy
        return saved_bytes(model, latents, torch.ones(1), text, torch.ones(1, TEXT_TOKENS, dtype=torch.bool))[0]


def saved_bytes(network: nn.Module, *arguments: Tensor) -> tuple[int, Tensor]:
    """What autograd holds after a forward pass, parameters apart and each storage once, and the output."""
    parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        output = network(*arguments)
    return sum(storage.nbytes() for storage in storages.values()), output if isinstance(output, Tensor) else output[0]


if __name__ == "__main__":
    main()
