"""Run by test_sequence_parallel.py on four ranks: each case's outputs and gradients, shared and on one rank.

usage: sequence_run.py FOLDER
"""

import json
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from models.activations import ActivationMemory
from models.transformer import Transformer, TransformerConfig

WORLD = 4
SMALL = {"num_layers": 2, "num_heads": 2, "head_dim": 6, "text_dim": 5, "sample_size": 8}


@dataclass(frozen=True)
class Case:
    """shape: T, h and w of the latents; patches are 2 x 2. sharing: the ranks of a group."""

    shape: tuple[int, int, int]
    sharing: int
    model: dict[str, Any] = field(default_factory=dict)
    level_a_frame: bool = False
    memory: ActivationMemory = "none"


CASES = {
    "even": Case((4, 4, 8), 2),
    **{memory: Case((5, 4, 6), 2, memory=memory) for memory in get_args(ActivationMemory)},
    "frames that do not divide": Case((5, 4, 8), 2),
    "tokens that do not divide": Case((4, 6, 6), 2),
    "neither divides": Case((7, 6, 6), 4),
    "a frame a rank": Case((4, 4, 4), 4),
    "fewer frames than ranks": Case((3, 4, 8), 4),
    "an image": Case((1, 4, 8), 2),
    "fewer tokens than ranks": Case((6, 2, 4), 4),
    "positions in the branch": Case((5, 4, 6), 4, {"temporal_pos": "branch"}),
    "rotary positions": Case((5, 4, 6), 4, {"temporal_pos": "rope", "qk_norm": True}),
    "a level a frame": Case((5, 4, 6), 2, {"pooled_text": True}, level_a_frame=True),
    "told size and rate": Case((5, 4, 6), 2, {"size_conditioning": True, "fps_conditioning": True}),
}


def build(case: Case) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SMALL | case.model)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.activation_memory = case.memory
    return model


def arguments(case: Case, sample: int) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """A sample of its own for each group, as a batch of two."""
    generator = torch.Generator().manual_seed(sample)
    latents = torch.randn(2, 4, *case.shape, generator=generator, dtype=torch.float64)
    timestep = 1000 * torch.rand((2, case.shape[0]) if case.level_a_frame else 2, generator=generator)
    text = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return [latents, timestep, text, mask], {"frame_interval_s": 0.2, "size": (64, 96)}


def outputs_and_gradients(model: Transformer, case: Case, samples: list[int]) -> list[torch.Tensor]:
    """Of the mean over these samples; the gradients of all weights as one vector."""
    outputs = []
    model.zero_grad()
    for sample in samples:
        positional, named = arguments(case, sample)
        output = model(*positional, **named)
        (output.sin().square().mean() / len(samples)).backward()
        outputs.append(output.detach())
    return [torch.stack(outputs), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])]


def furthest(case: Case, rank: int, group: dist.ProcessGroup) -> list[float]:
    """How far output and gradient are from one rank's, at most, over their scale."""
    model = build(case)
    groups = WORLD // case.sharing
    expected = outputs_and_gradients(model, case, list(range(groups)))
    expected[0] = expected[0][rank // case.sharing]
    model.shard_sequence(group)
    found = outputs_and_gradients(model, case, [rank // case.sharing])
    found[0] = found[0][0]
    dist.all_reduce(found[1])  # as DeepSpeed does
    found[1] /= WORLD
    differences = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    worst = torch.stack(differences)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.tolist()


def compare(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    groups = {sharing: dist.new_subgroups(sharing)[0] for sharing in (2, 4)}
    found = {name: furthest(case, rank, groups[case.sharing]) for name, case in CASES.items()}
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(compare, (Path(sys.argv[1]),), WORLD, start_method="fork")  # what is imported is so once
