"""Run by test_ranks.py: samples on four ranks, two of which share each batch, and on one rank.

usage: sequence_run.py RUN FOLDER; leaves FOLDER/RANKS-RANK.pt: the latents, and of how many rows and frames spatial
blocks saw.
"""

import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.modules.module import register_module_forward_pre_hook

from models.layers import SpatialBlock
from stages.sampling.config import SampleConfig
from stages.sampling.generate import generate, requests_of
from stages.sampling.models import Models
from stages.sampling.plan import plan_samples
from tests.running import free_port

RANKS, SHARING, FRAMES = 4, 2, 5
PROMPTS = ["a ball", "a cube", "a star", "a moon", "a boat"]


def make(rank: int, ranks: int, run: Path, folder: Path, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    seen = set()

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, SpatialBlock):
            seen.add(tuple(inputs[0].shape[:2]))

    register_module_forward_pre_hook(note)
    plan = plan_samples(
        SampleConfig(
            text_prompt=PROMPTS, ckpt=str(run), height=32, width=48, frames=FRAMES, steps=3, batch_size=2,
            sequence_parallel=SHARING if ranks > 1 else 1,
        )
    )  # fmt: skip
    models = Models.on_this_machine()
    latents = generate(plan, requests_of(plan, range(len(PROMPTS)), models), models)
    torch.save((latents, seen), folder / f"{ranks}-{rank}.pt")


if __name__ == "__main__":
    for ranks in (RANKS, 1):
        start_processes(make, (ranks, *map(Path, sys.argv[1:]), free_port()), ranks, start_method="fork")
