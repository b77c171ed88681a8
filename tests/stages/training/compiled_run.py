"""Run by test_compiled.py: trains without and with compiled blocks, under ZeRO-1.

usage: compiled_run.py FOLDER; leaves the runs FOLDER/plain and FOLDER/compiled.
"""

import sys
from functools import partialmethod
from pathlib import Path

import torch

from shards.loader import DataConfig
from stages.train import train
from stages.training.config import StepConfig, TrainConfig
from stages.training.optimizer import OptimizerConfig
from tests.stages.training.mixed_dataset import mixed_dataset

STEPS = 4


def run(output: Path, shards: Path, compiled: bool) -> None:
    """Of single frames, as other numbers of them would be compiled too."""
    settings = StepConfig(steps=STEPS, batch_size=4, precision="fp32", compile=compiled, log_every=1)
    data = DataConfig(shards=str(shards), subclip_frames=(1,))
    model = {"preset": "tiny", "num_layers": 1}
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=1)  # the blocks have no gradient until the output has moved
    train(TrainConfig(output=str(output), data=data, model=model, train=settings, optimizer=optimizer))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    shards = mixed_dataset(folder / "shards")
    # Traced as torch.compile traces it, but run by PyTorch's own kernels: a C++ compiler takes minutes.
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="eager")  # type: ignore[method-assign]
    for name in ("plain", "compiled"):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        run(folder / name, shards, name == "compiled")
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        assert made == (2 if name == "compiled" else 0), f"{made} graphs"
