"""A run's checkpoints: whole or absent, resumable on any number of ranks.

``RUN/checkpoints/step-0000500`` holds what `models.weights` reads (the weights, their average, model.json),
the run's settings, and the training state: Adam's moments by parameter name and training.json. A folder is
filled under a hidden name and renamed when it is complete, so one that can be seen is whole.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from models.weights import CHECKPOINTS, CheckpointInfo, find_checkpoint, read_info, save_checkpoint
from shards import storage
from stages.engine import WEIGHTS, Engine, Ranks, barrier
from stages.errors import ConfigError
from stages.guard import Guard

TRAINING = "training.json"
SETTINGS = "config.yaml"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """How far a run has come, and over which samples in which order. The weights moved in all steps but the skipped."""

    step: int
    samples_seen: int
    seed: int
    batch_size: int
    window_shards: int
    selection_hash: str
    guard: Guard = Guard()

    def after(self, step: int, guard: Guard) -> "Progress":
        return replace(self, step=step, samples_seen=step * self.batch_size, guard=guard)


def newest(run: Path) -> Path | None:
    """The checkpoint that a resume starts from; None before the first."""
    return find_checkpoint(run) if any((run / CHECKPOINTS).glob("step-*")) else None


def save(
    run: Path, progress: Progress, info: CheckpointInfo, null_text: torch.Tensor, engine: Engine, ranks: Ranks
) -> None:
    """Write the checkpoint of ``progress.step``; every rank must call."""
    folder = run / CHECKPOINTS / f"step-{progress.step:07d}"
    hidden = folder.with_name(f".{folder.name}")
    if ranks.main:
        _remove_leftovers(run)
        hidden.mkdir(parents=True)
        shutil.copy(run / SETTINGS, hidden)
        (hidden / TRAINING).write_text(json.dumps(asdict(progress), indent=2) + "\n")
    for moment in MOMENTS:
        tensors = _gather(engine, moment, ranks)
        if ranks.main:
            save_file(tensors, hidden / f"{moment}.safetensors")
    weights = {"model": _gather(engine, WEIGHTS, ranks), "ema": _gather(engine, "ema", ranks)}
    if ranks.main:
        for path in hidden.iterdir():
            storage.flush(path)
        mask = torch.ones(len(null_text), dtype=torch.bool)
        save_checkpoint(hidden, replace(info, step=progress.step), weights, (null_text, mask))
        storage.flush(hidden)
        if folder.exists():  # a damaged one, which the run did not resume from
            _remove(folder)
        hidden.rename(folder)
        storage.flush(folder.parent)
    barrier()


def _remove(folder: Path) -> None:
    """Never seen half removed."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.removed")))


def _remove_leftovers(run: Path) -> None:
    """What a kill left of a save or a removal."""
    for folder in (run / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(folder)


def _gather(engine: Engine, kind: str, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The full tensors on rank 0, nothing on the others."""
    return {name: tensor for name, tensor in engine.gather(kind) if ranks.main}


def restore(checkpoint: Path, engine: Engine, progress: Progress) -> None:
    """Put a checkpoint's weights, their average and the moments into the engine."""
    for kind, file in ((WEIGHTS, "model"), ("ema", "ema"), *((moment, moment) for moment in MOMENTS)):
        engine.scatter(kind, load_file(checkpoint / f"{file}.safetensors"))
    engine.set_step(progress.step - progress.guard.skipped_steps)


def keep_last(run: Path, count: int) -> None:
    """Remove all but the newest ``count`` checkpoints."""
    for folder in sorted((run / CHECKPOINTS).glob("step-*"))[:-count]:
        _remove(folder)


def resume_point(checkpoint: Path, wanted: Progress, info: CheckpointInfo) -> Progress:
    """How far the checkpoint is. Raises ConfigError where going on would change the model or the samples."""
    content = json.loads((checkpoint / TRAINING).read_text())
    found = Progress(**{**content, "guard": Guard(**content["guard"])})
    before = {**asdict(found), **asdict(read_info(checkpoint))}
    now = {**asdict(wanted), **asdict(info)}
    differing = _differences(before, now, ignored=("step", "samples_seen", "guard"))
    if differing:
        raise ConfigError(
            f"{checkpoint} belongs to another run ({'; '.join(differing)}): give another output=, "
            f"or start from its weights with train.init_from={checkpoint}"
        )
    return found


def _differences(before: Mapping[str, object], now: Mapping[str, object], ignored: tuple[str, ...]) -> list[str]:
    names = [name for name in now if name not in ignored and before[name] != now[name]]
    return [f"{name} was {before[name]!r}, is {now[name]!r}" for name in names]
