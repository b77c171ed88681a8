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

from models.latents import LatentStats
from models.objective import make_objective
from models.transformer import Transformer
from models.weights import CheckpointInfo
from shards.loader import Batch
from stages.engine import Engine, Ranks, largest_over_ranks
from stages.errors import WorkError
from stages.sampling.sampled_latents import SampledLatents
from stages.training.checkpoint import Checkpoints, Progress
from stages.training.config import TrainConfig
from stages.training.loss import LatentLoss
from stages.training.optimizer import lr_share
from stages.training.prompts import Prompts
from stages.training.runlog import RunLog, Stopwatch, peak_memory_gb
from stages.training.source import Source
from stages.training.stopping import REASONS, StopRequests
from stages.training.validate import HeldOut

SAMPLES = "samples"


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


def run_steps(run: Run, progress: Progress, log: RunLog | None) -> Progress:
    """Take steps until the last one, or a stop; returns how far the run has come."""
    config, settings, source = run.config, run.config.train, run.source
    loss_of = LatentLoss(
        make_objective(config.objective),
        LatentStats.of(source.vae),
        source.null_text,
        frame_interval_s=1 / source.fps,
        caption_dropout=settings.caption_dropout,
        seed=config.seed,
        device=run.ranks.device,
        conditioning=config.conditioning,
    )
    if run.prompts and log:
        _show(run, run.prompts, "sampled_clips", run.prompts.clips, progress.step, log)
    watch, stop, saved_step = Stopwatch(run.ranks.device), 0, progress.step
    with closing(run.checkpoints), closing(source.loader.batches(progress.step, settings.steps)) as batches:
        for step in range(progress.step, settings.steps):
            # Read.
            waiting = time.perf_counter()
            batch = (log and log.failure) or run.checkpoints.failure() or _read(batches)
            waited_s = time.perf_counter() - waiting

            # Agree: all ranks go on, or none; one that went alone would wait for the others for ever.
            failed_rank = run.ranks.rank if isinstance(batch, Exception) else -1
            stop, failed_rank = largest_over_ranks([run.stops.look(), failed_rank])
            if isinstance(batch, Exception):
                raise batch
            if failed_rank >= 0:
                raise WorkError(f"rank {failed_rank} cannot go on, so that no rank can: see its own message")
            if stop:
                break

            # Step.
            tokens = run.model.config.tokens(*batch.latent_shape)
            losses = [
                run.engine.backward(loss_of.training(run.engine.module, part, tokens))
                for part in batch.split(settings.gradient_accumulation)
            ]
            clip_norm = progress.guard.clip_norm(config.optimizer)
            norm = run.engine.step(lr_share(step, settings.steps, config.optimizer), clip_norm)
            samples = source.order.batch_size[batch.bucket.name]
            watch.add(run.model.config, batch, samples, waited_s)
            done = step + 1
            seen = progress.samples_seen + samples
            progress = progress.after(done, seen, progress.guard.after(norm, config.optimizer))

            # Report.
            last = done == settings.steps
            validates = run.held_out and (last or done % config.validation.every == 0)
            if norm is None:
                _tell_skipped(run, progress, torch.stack(losses).mean())
            elif last or validates or done % settings.log_every == 0:
                keys = source.loader.keys(step) if settings.log_sample_ids else None
                mean_loss = float(torch.stack(losses).mean())
                metrics = _metrics(config, progress, mean_loss, norm, clip_norm, watch, keys)
                if run.held_out and validates:
                    metrics |= run.held_out.losses(run.engine.module, loss_of)
                if log:
                    log.attempt(log.write, metrics)
                watch = Stopwatch(run.ranks.device)

            # Sample.
            if run.prompts and (last or done % run.prompts.every == 0):
                sampled = run.prompts.sample(run.model, run.info, source.null_text, done)
                if sampled and log:
                    log.attempt(_keep, run, run.prompts, sampled, log)
                watch = Stopwatch(run.ranks.device)

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


def _metrics(
    config: TrainConfig,
    progress: Progress,
    loss: float,
    norm: float,
    clip_norm: float,
    watch: Stopwatch,
    keys: list[str] | None,
) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "step": progress.step,
        "loss": loss,
        "learning_rate": config.optimizer.lr * lr_share(progress.step - 1, config.train.steps, config.optimizer),
        "gradient_norm": norm,
        "clip_norm": clip_norm if math.isfinite(clip_norm) else None,
        "skipped_steps": progress.guard.skipped_steps,
        **watch.report(),
        "peak_memory_gb": peak_memory_gb(),
    }
    return metrics if keys is None else {**metrics, "sample_ids": keys}
