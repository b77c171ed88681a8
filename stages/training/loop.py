"""The steps of a run."""

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.transformer import Transformer
from models.weights import CheckpointInfo
from shards.loader import Batch
from stages.engine import Engine, Ranks, largest_over_ranks
from stages.errors import WorkError
from stages.output import SAMPLES
from stages.sampling.sampled_latents import SampledLatents
from stages.training.checkpoint import Checkpoints, Progress
from stages.training.config import TrainConfig
from stages.training.loss import LatentLoss
from stages.training.network import build_loss
from stages.training.optimizer import lr_share
from stages.training.prompts import Prompts
from stages.training.runlog import Rates, RunLog, peak_memory_gb
from stages.training.source import Source
from stages.training.stopping import REASONS, StopRequests
from stages.training.validate import HeldOut


@dataclass(frozen=True)
class Run:
    """A run that has been set up: what the loop works with."""

    config: TrainConfig
    folder: Path
    ranks: Ranks
    source: Source
    held_out: HeldOut | None
    prompts: Prompts | None
    model: Transformer
    info: CheckpointInfo
    engine: Engine
    checkpoints: Checkpoints
    stops: StopRequests


@dataclass(frozen=True)
class Step:
    """What a step gave: its loss, still on the device, and its gradient's norm before clipping to ``clip_norm``.

    Where loss or gradient was not finite nothing has moved, and ``norm`` is None.
    """

    loss: torch.Tensor
    norm: float | None
    clip_norm: float


def run_steps(run: Run, progress: Progress, log: RunLog | None) -> Progress:
    """Take steps until the last one, or a stop; returns how far the run has come."""
    config, settings, source = run.config, run.config.train, run.source
    loss_of = build_loss(config, source, run.ranks.device)
    if run.prompts and log:
        _show(run, run.prompts, "sampled_clips", run.prompts.clips, progress.step, log)
    rates, stop, saved_step = Rates(run.ranks.device), 0, progress.step
    with closing(run.checkpoints), closing(source.loader.batches(progress.step, settings.steps)) as batches:
        while progress.step < settings.steps:
            # Read.
            waiting = time.perf_counter()
            read = (log and log.failure) or run.checkpoints.failure() or _read(batches)
            waited_s = time.perf_counter() - waiting
            batch, stop = _agreed(run, read)
            if stop:
                break

            # Step.
            step = _step(run, loss_of, batch, progress)
            samples = source.order.batch_size[batch.bucket.name]
            rates.add(run.model.config, batch, samples, waited_s)
            guard = progress.guard.after(step.norm, config.optimizer)
            progress = progress.after(progress.step + 1, progress.samples_seen + samples, guard)
            done, last = progress.step, progress.step == settings.steps

            # Report.
            validates = run.held_out and (last or done % config.validation.every == 0)
            if step.norm is None:
                _tell_skipped(run, progress, step.loss)
            elif last or validates or done % settings.log_every == 0:
                metrics = _metrics(run, progress, step, rates)
                if run.held_out and validates:
                    metrics |= run.held_out.losses(run.engine.module, loss_of)
                if log:
                    log.attempt(log.write, metrics)
                rates = Rates(run.ranks.device)

            # Sample.
            if run.prompts and (last or done % run.prompts.every == 0):
                sampled = run.prompts.sample(run.model, run.info, source.null_text, done)
                if sampled and log:
                    log.attempt(_keep, run, run.prompts, sampled, log)
                rates = Rates(run.ranks.device)

            # Save.
            if done % settings.save_every == 0:
                run.checkpoints.save(progress)
                saved_step = done

        if progress.step > saved_step:
            run.checkpoints.save(progress)
        run.checkpoints.wait()
    if log and log.failure:
        raise log.failure
    if stop:
        run.ranks.print(f"stopped at step {progress.step} ({REASONS[stop]}): run the same command to go on")
    return progress


def _agreed(run: Run, read: Batch | Exception) -> tuple[Batch, int]:
    """The batch, and what asks to stop: all ranks go on, or none, as one alone would wait for the others for ever."""
    failed_rank = run.ranks.rank if isinstance(read, Exception) else -1
    stop, failed_rank = largest_over_ranks([run.stops.look(), failed_rank])
    if isinstance(read, Exception):
        raise read
    if failed_rank >= 0:
        raise WorkError(f"rank {failed_rank} cannot go on, so that no rank can: see its own message")
    return read, stop


def _step(run: Run, loss_of: LatentLoss, batch: Batch, progress: Progress) -> Step:
    settings, optimizer = run.config.train, run.config.optimizer
    tokens = run.model.config.tokens(*batch.latent_shape)
    losses = [
        run.engine.backward(loss_of.training(run.engine.module, part, tokens))
        for part in batch.split(settings.gradient_accumulation)
    ]
    clip_norm = progress.guard.clip_norm(optimizer)
    norm = run.engine.step(lr_share(progress.step, settings.steps, optimizer), clip_norm)
    return Step(torch.stack(losses).mean(), norm, clip_norm)


def _keep(run: Run, prompts: Prompts, samples: SampledLatents, log: RunLog) -> None:
    folder = run.folder / SAMPLES
    folder.mkdir(exist_ok=True)
    samples.save(folder / f"step-{samples.step:07d}.safetensors")
    _show(run, prompts, "samples", samples.latents.transpose(1, 2).numpy(), samples.step, log)


def _show(run: Run, prompts: Prompts, name: str, latents: np.ndarray, step: int, log: RunLog) -> None:
    """Latents [N, T, C, h, w], unscaled, as the dataset's map to colours shows them, where it has one."""
    rgb_map = run.source.dataset.manifest.latent_rgb
    if rgb_map:
        log.show(name, prompts.picture(latents, rgb_map), step)
        log.play(f"{name}_video", prompts.video(latents, rgb_map), run.source.fps, step)


def _tell_skipped(run: Run, progress: Progress, loss: torch.Tensor) -> None:
    """Raises WorkError when too many steps in a row were skipped."""
    count, done = progress.guard.skipped_in_a_row, progress.step
    what = "gradient" if math.isfinite(loss) else "loss"
    samples = _some(run.source.loader.keys(done - 1))
    run.ranks.print(f"step {done} is skipped, its {what} is not finite; samples {samples}")
    if count >= run.config.train.max_skipped:
        raise WorkError(
            f"steps {done - count + 1} to {done} were skipped, {count} in a row, for a {what} that is not finite: "
            f"lower optimizer.lr and run again, or look at their samples, the last ones being {samples}"
        )


def _read(batches: Iterator[Batch]) -> Batch | Exception:
    """The next batch, or why there is none: to be told to the other ranks before it is raised."""
    try:
        return next(batches)
    except Exception as error:
        return error


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _metrics(run: Run, progress: Progress, step: Step, rates: Rates) -> dict[str, Any]:
    """Of the step that ``progress`` has come to."""
    config, number = run.config, progress.step - 1
    metrics: dict[str, Any] = {
        "step": progress.step,
        "loss": float(step.loss),
        "learning_rate": config.optimizer.lr * lr_share(number, config.train.steps, config.optimizer),
        "gradient_norm": step.norm,
        "clip_norm": step.clip_norm if math.isfinite(step.clip_norm) else None,
        "skipped_steps": progress.guard.skipped_steps,
        **rates.report(),
        "peak_memory_gb": peak_memory_gb(),
    }
    return metrics | {"sample_ids": run.source.loader.keys(number)} if config.train.log_sample_ids else metrics
