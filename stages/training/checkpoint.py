"""A run's checkpoints: whole or absent, resumable on any number of ranks.

``RUN/checkpoints/step-0000500`` holds what `models.weights` reads (the weights, their average, model.json),
the run's settings, and the training state: Adam's moments by parameter name and training.json. A folder is
filled under a hidden name and renamed when it is complete, so one that can be seen is whole.

``RUN/milestones/step-0010000`` holds the weights and their average alone, for ever; `models.weights` reads it too.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.weights import (
    CHECKPOINTS,
    INFO,
    NULL_TEXT,
    CheckpointInfo,
    checkpoints_of,
    find_checkpoint,
    read_info,
    save_checkpoint,
)
from shards import storage
from shards.manifest import differences
from stages.engine import WEIGHTS, Engine, Ranks, from_main
from stages.errors import ConfigError, WorkError
from stages.output import SETTINGS
from stages.training.guard import Guard

TRAINING = "training.json"
MILESTONES = "milestones"
MOMENTS = ("exp_avg", "exp_avg_sq")
# Settings that change no step to come beyond rounding, or that `resume_point` looks after.
SELECTING = ("data.shards", "data.filter", "data.text*", "validation.holdout")
HARMLESS = (
    "output", "seed", "data.shards", "data.filter", "data.window_shards", "data.prefetch_batches", "data.read_threads",
    "data.cache*", "model.*", "objective.*", "train.steps", "train.batch_*", "train.gradient_accumulation",
    "train.sequence_parallel", "train.activation_memory", "train.mlp_chunk_tokens", "train.attention",
    "train.compile",
    "train.init_from", "train.max_*", "train.*_every",
    "train.keep_last", "train.log_*", "validation.*", "deepspeed.*",
)  # fmt: skip
FILES = {"model": WEIGHTS, "ema": "ema", **{moment: moment for moment in MOMENTS}}  # name -> what the engine holds


@dataclass(frozen=True)
class Progress:
    """How far a run has come, and over which samples in which order. The weights moved in all steps but the skipped."""

    step: int
    samples_seen: int
    seed: int
    batch_sizes: dict[str, int]  # of all ranks together, by bucket
    window_shards: int
    selection_hash: str
    guard: Guard = Guard()

    def after(self, step: int, samples_seen: int, guard: Guard) -> "Progress":
        return replace(self, step=step, samples_seen=samples_seen, guard=guard)


def newest(run: Path) -> Path | None:
    """The checkpoint that a resume starts from; None before the first. Raises WeightsError where none is whole."""
    return find_checkpoint(run) if any((run / CHECKPOINTS).glob("step-*")) else None


class Checkpoints:
    """Writes a run's checkpoints in a thread, one at a time, while training goes on.

    `save` stops training for the copy off the device alone; every rank must call it. Rank 0 holds the copy, as large
    as the checkpoint (16 bytes a trained parameter), in host memory until it is written. A kill meanwhile leaves the
    checkpoint before. What went wrong in writing is told by `failure`, for all ranks to hear of before the next
    step, and raised by `wait`.
    """

    def __init__(
        self,
        run: Path,
        info: CheckpointInfo,
        null_text: torch.Tensor,  # [L0, D]
        engine: Engine,
        ranks: Ranks,
        *,
        keep_last: int,
        milestone_every: int | None,
    ):
        self._run, self._info, self._null_text = run, info, null_text
        self._engine, self._ranks = engine, ranks
        self._keep_last, self._milestone_every = keep_last, milestone_every
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def check_room(self, start: int, steps: int) -> str:
        """What a run from step ``start`` to ``steps`` writes. Raises ConfigError where the disk is too small for it."""
        size = 4 * (len(FILES) * self._engine.trained + len(self._info.weights) * self._engine.frozen)
        weights = 4 * len(self._info.weights) * (self._engine.trained + self._engine.frozen)
        every = self._milestone_every or steps + 1
        milestones = steps // every - start // every
        there = len(checkpoints_of(self._run))
        # One more than is kept: the oldest goes when the newest is whole.
        needed = size * max(0, self._keep_last + 1 - there) + weights * milestones
        free = from_main(shutil.disk_usage(self._run).free)
        plan = f"checkpoints of {size / 1e9:.2f} GB, the newest {self._keep_last} kept"
        plan += f", {milestones} milestones of {weights / 1e9:.2f} GB" if milestones else ""
        if needed > free:
            raise ConfigError(
                f"{self._run} needs {needed / 1e9:.1f} GB more for {plan}, and has {free / 1e9:.1f} GB free: "
                f"give another output=, or lower train.keep_last or raise train.milestone_every"
            )
        return f"{plan}; {free / 1e9:.1f} GB free; rank 0 holds {size / 1e9:.2f} GB of memory while it writes one"

    def save(self, progress: Progress) -> None:
        """Waits until the checkpoint before is written, then begins with the one of ``progress.step``."""
        if self._writing:
            futures.wait([self._writing])
        tensors = {file: self._engine.gather(kind) for file, kind in FILES.items()}
        if self._ranks.main and not self.failure():
            self._writing = self._pool.submit(self._write, progress, tensors)

    def failure(self) -> WorkError | None:
        """Why a checkpoint could not be written; known on rank 0."""
        error = self._writing.exception() if self._writing and self._writing.done() else None
        return WorkError(f"{self._run}: a checkpoint could not be written: {error}") if error else None

    def wait(self) -> None:
        """Until all is written. Raises WorkError, on rank 0, where it could not be."""
        self.close()
        failure = self.failure()
        if failure:
            raise failure

    def close(self) -> None:
        self._pool.shutdown()

    def _write(self, progress: Progress, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        folder = self._run / CHECKPOINTS / f"step-{progress.step:07d}"
        hidden = _hidden(folder)
        shutil.copy(self._run / SETTINGS, hidden)
        (hidden / TRAINING).write_text(json.dumps(asdict(progress), indent=2) + "\n")
        for moment in MOMENTS:
            save_file(dict(tensors[moment]), hidden / f"{moment}.safetensors")
        for path in hidden.iterdir():
            storage.flush(path)
        weights = {name: tensors[name] for name in self._info.weights}
        save_checkpoint(hidden, replace(self._info, step=progress.step), weights, self._null_text)
        if self._milestone_every and progress.step % self._milestone_every == 0:
            self._keep_weights(hidden, self._run / MILESTONES / folder.name)
        _show(hidden, folder)
        keep_last(self._run, self._keep_last)

    def _keep_weights(self, checkpoint: Path, folder: Path) -> None:
        """Before the checkpoint is seen: a run that goes on from it does not come by its milestone again."""
        hidden = _hidden(folder)
        for name in (INFO, NULL_TEXT, SETTINGS, *(f"{name}.safetensors" for name in self._info.weights)):
            try:
                os.link(checkpoint / name, hidden / name)  # takes no room of its own as long as the checkpoint is kept
            except OSError:  # a file system without links
                shutil.copy(checkpoint / name, hidden)
                storage.flush(hidden / name)
        _show(hidden, folder)


def _hidden(folder: Path) -> Path:
    """An empty folder to fill, under a name that is never seen as whole."""
    hidden = folder.with_name(f".{folder.name}")
    for leftover in folder.parent.glob(".step-*"):  # what a kill left of a save or a removal
        shutil.rmtree(leftover)
    hidden.mkdir(parents=True)
    return hidden


def _show(hidden: Path, folder: Path) -> None:
    storage.flush(hidden)
    if folder.exists():  # a damaged one, which the run did not resume from
        _remove(folder)
    hidden.rename(folder)
    storage.flush(folder.parent)


def _remove(folder: Path) -> None:
    """Never seen half removed."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.removed")))


def restore(checkpoint: Path, engine: Engine, progress: Progress) -> None:
    """Put a checkpoint's weights, their average and the moments into the engine.

    Raises ConfigError where other parameters were frozen.
    """
    with safe_open(checkpoint / f"{MOMENTS[0]}.safetensors", "pt") as file:
        differing = engine.trained_names ^ set(file.keys())
    if differing:
        raise ConfigError(
            f"{checkpoint}: {len(differing)} parameters were frozen and are trained, or the other way round "
            f"({min(differing)}): set optimizer.group_lr as it was, or start with train.init_from={checkpoint}"
        )
    for file, kind in FILES.items():
        engine.scatter(kind, load_file(checkpoint / f"{file}.safetensors"))
    engine.set_step(progress.step - progress.guard.skipped_steps)


def keep_last(run: Path, count: int) -> None:
    """Remove all but the newest ``count`` checkpoints. An incomplete one counts for none, and stays."""
    for folder in checkpoints_of(run)[:-count]:
        _remove(folder)


def resume_point(checkpoint: Path, wanted: Progress, info: CheckpointInfo, settings: str) -> Progress:
    """How far the checkpoint is. Raises ConfigError where going on would change the model or the samples.

    settings: as `stages.output` writes them; those that choose the samples are named where the selection differs.
    """
    content = json.loads((checkpoint / TRAINING).read_text())
    found = Progress(**{**content, "guard": Guard(**content["guard"])})
    before = {**asdict(found), **asdict(read_info(checkpoint))}
    now = {**asdict(wanted), **asdict(info)}
    differing = _differences(before, now, ignored=("step", "samples_seen", "guard.*"))
    if found.selection_hash != wanted.selection_hash:
        differing += _differences(settings_of(checkpoint), yaml.safe_load(settings), chosen=SELECTING)
    if differing:
        raise ConfigError(
            f"{checkpoint} belongs to another run ({'; '.join(differing)}): give another output=, "
            f"or start from its weights with train.init_from={checkpoint}"
        )
    return found


def changed_settings(checkpoint: Path, settings: str) -> str | None:
    """Which of the ``settings``, as `stages.output` writes them, are not those of the run so far; None: all are.

    Only what changes the steps to come beyond rounding: a run that goes on with it is not the one that it was.
    """
    return "; ".join(_differences(settings_of(checkpoint), yaml.safe_load(settings), ignored=HARMLESS)) or None


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """Those that the run had when it was written."""
    return yaml.safe_load((checkpoint / SETTINGS).read_text())


def _differences(
    before: Mapping[str, object],
    now: Mapping[str, object],
    *,
    chosen: Sequence[str] = ("*",),
    ignored: Sequence[str] = (),
) -> list[str]:
    """In words; ``chosen`` and ``ignored`` are patterns of dotted names."""

    def any_of(patterns: Sequence[str], name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return [
        f"{name} was {was}, is {is_now}"
        for name, was, is_now in differences(before, now)
        if any_of(chosen, name) and not any_of(ignored, name)
    ]
