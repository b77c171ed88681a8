"""Run by test_engine.py, on two ranks and then on one: trains a small model whole, and stopped and resumed.

usage: engine_run.py FOLDER; each of CASES has a folder in FOLDER.
"""

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from models.compute import PRECISIONS
from stages.engine import OPTIMIZER_STATES, WEIGHTS, Engine, Ranks, barrier, start_ranks
from stages.training.optimizer import OptimizerConfig, lr_share

STEPS, STOP, BATCH, ACCUMULATION = 8, 4, 8, 2
SKIPPED = {2: "loss", 5: "gradient"}  # step: what is not finite in it, on the last rank and in one micro-batch alone
KINDS = (WEIGHTS, *OPTIMIZER_STATES)
CPU = {"device": "cpu"}
CASES = {  # precision and ZeRO stage, and what the latter is set to
    "fp32-1": {"stage": 1},
    "fp32-2": {"stage": 2},
    "fp32-3": {"stage": 3},
    "bf16-2": {"stage": 2},
    "fp32-2-offload": {"stage": 2, "offload_optimizer": CPU},
    "fp32-3-offload": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
}
RATES = {"0.weight": 1e-2, "2.weight": 3e-3, "2.bias": 3e-3}
FROZEN = "0.bias"
GROUP_LR = {"2.bias": 3e-3, "*.bias": 0.0, "2.*": 3e-3}
OPTIMIZER = OptimizerConfig(lr=1e-2, group_lr=GROUP_LR, warmup_steps=2, decay="cosine", clip_norm=0.5)


def clip_norm(step: int) -> float:
    """Another one at each step, as adaptive clipping has; at one step there is none."""
    return math.inf if step == 3 else OPTIMIZER.clip_norm / (1 + step)


def poison(loss: torch.Tensor, what: str) -> torch.Tensor:
    """Makes the loss infinite though its gradient is finite, or the other way round."""
    if what == "loss":
        return loss + math.inf
    loss.register_hook(lambda gradient: gradient * math.nan)
    return loss * 1


def build_model() -> torch.nn.Module:
    """Sizes that two ranks cannot halve evenly."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3))


def micro_batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The step's global batch in its micro-batches: inputs and targets."""
    generator = torch.Generator().manual_seed(step)
    inputs, targets = torch.randn(BATCH, 5, generator=generator), torch.randn(BATCH, 3, generator=generator)
    return list(zip(inputs.chunk(ACCUMULATION), targets.chunk(ACCUMULATION), strict=True))


def train(folder: Path, first: int, last: int, name: str, ranks: Ranks) -> None:
    """Steps first..last, from the state saved at ``first``; saves the state as NAME-KIND.safetensors."""
    precision = folder.name.partition("-")[0]
    model = build_model()
    state = {}
    if first:
        state = {kind: load_file(folder / f"{first}-{kind}.safetensors") for kind in KINDS}
        model.load_state_dict(state[WEIGHTS])
    share = BATCH // ACCUMULATION // ranks.world
    engine = Engine(
        model,
        OPTIMIZER,
        precision=precision,
        accumulation=ACCUMULATION,
        deepspeed_settings={"zero_optimization": CASES[folder.name]},
    )
    for kind, tensors in state.items():
        engine.scatter(kind, tensors)
    engine.set_step(first - len([step for step in SKIPPED if step < first]))
    mine = slice(ranks.rank * share, (ranks.rank + 1) * share)
    for step in range(first, last):
        for place, (inputs, targets) in enumerate(micro_batches(step)):
            loss = (engine.module(inputs[mine].to(PRECISIONS[precision])) - targets[mine]).square().mean()
            if step in SKIPPED and place == 0 and ranks.rank == ranks.world - 1:
                loss = poison(loss, SKIPPED[step])
            engine.backward(loss)
        norm = engine.step(lr_share(step, STEPS, OPTIMIZER), clip_norm(step))
        assert (norm is None) == (step in SKIPPED)
    for kind in KINDS:
        tensors = engine.gather(kind)
        if ranks.main:
            save_file(tensors, folder / f"{name}-{kind}.safetensors")
    barrier()


if __name__ == "__main__":
    root = Path(sys.argv[1])
    ranks = start_ranks()
    for case in CASES:
        folder = root / case
        if ranks.world > 1:
            train(folder, 0, STEPS, "whole", ranks)
            train(folder, 0, STOP, str(STOP), ranks)
        train(folder, STOP, STEPS, f"resumed-{ranks.world}", ranks)
