"""Train the diffusion transformer from latent shards alone: no VAE, text encoder or video decoder is loaded."""

import time
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.compute import default_device
from models.flops import count_flops, peak_flops_per_s
from models.loading import load_into
from models.transformer import Transformer
from models.weights import CheckpointInfo, read_null_text
from shards import storage
from shards.schema import LATENTS
from stages.engine import Engine, Ranks, check_shared, from_main, largest_over_ranks, sequence_group, start_ranks
from stages.output import output_folder, save_settings, save_summary, settings_text
from stages.training import checkpoint
from stages.training.batches import micro_batches, settle_batches, states_of
from stages.training.checkpoint import Checkpoints, Progress
from stages.training.config import TrainConfig, check, settled
from stages.training.loop import Run, run_steps
from stages.training.memory import peak_of, room_bytes
from stages.training.network import attention_of, build_model, settle_attention
from stages.training.optimizer import parameter_groups
from stages.training.prompts import Prompts
from stages.training.run_lock import run_lock
from stages.training.runlog import RunLog
from stages.training.source import Source, batches_of, node_tables, open_held_out, open_prompts, open_source
from stages.training.start import start_from
from stages.training.stopping import StopRequests
from stages.training.validate import HeldOut

USUAL_MFU = 0.4  # assumed for estimates: what is reached is in metrics.jsonl


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, or continue the run in ``config.output``, until ``train.steps`` or a stop. Returns the summary."""
    ranks = start_ranks()
    check(config, ranks.world)
    folder = output_folder(config.output)
    with run_lock(folder, ranks), StopRequests(folder, config.train.max_hours, main=ranks.main) as stops:
        check_shared(folder, ranks)
        # As rank 0 sees it: on a file system over the network, others may see what was there a moment ago.
        resumed = from_main(checkpoint.newest(folder) if ranks.main else None)
        return _carry_out(*_set_up(settled(config, resumed), folder, resumed, ranks, stops))


def _set_up(
    config: TrainConfig, folder: Path, resumed: Path | None, ranks: Ranks, stops: StopRequests
) -> tuple[Run, Progress]:
    """The run, and how far it has come."""
    config, source, held_out, prompts = _data(config, ranks)
    model = build_model(config, source)
    model.shard_sequence(sequence_group(config.train.sequence_parallel))
    info = _info(config, model, source)
    config = settle_attention(config, model.config, source, ranks)
    progress, source = _begin(config, resumed, model, source, info, ranks)
    if config.train.compile:
        model.compile_blocks(any_size=True)
    engine = _engine(config, model)
    if resumed:
        checkpoint.restore(resumed, engine, progress)
    checkpoints = Checkpoints(
        folder,
        info,
        source.null_text,
        engine,
        ranks,
        keep_last=config.train.keep_last,
        milestone_every=config.train.milestone_every,
    )
    return Run(config, folder, ranks, source, held_out, prompts, model, info, engine, checkpoints, stops), progress


def _data(config: TrainConfig, ranks: Ranks) -> tuple[TrainConfig, Source, HeldOut | None, Prompts | None]:
    """The config with its batches settled, and what this rank reads."""
    sharing = config.train.sequence_parallel
    reader, readers = ranks.rank // sharing, ranks.world // sharing  # ranks that share a video read the same
    with node_tables(ranks) as share:
        # What all of them have, of whatever devices.
        room = -largest_over_ranks([-int(room_bytes(ranks.world))])[0]
        config = settle_batches(config, ranks.world, room, share)
        source = open_source(config, reader, readers, share)
        held_out = open_held_out(config, source, reader, readers, share)
        prompts = open_prompts(config, source, reader, readers, share)
    if held_out:
        held_out.read()
    return config, source, held_out, prompts


def _carry_out(run: Run, start: Progress) -> dict[str, Any]:
    """Take the steps from ``start`` on, as long as nothing stops them. Returns the summary."""
    config, ranks = run.config, run.ranks
    plan = run.checkpoints.check_room(start.step, config.train.steps)
    if ranks.main:
        save_settings(run.folder, config)
    ranks.print(_opening(run, start))
    ranks.print(plan)
    if run.prompts:
        ranks.print(run.prompts)

    log = RunLog(run.folder, start.step, config.train.steps) if ranks.main else None
    started = time.perf_counter()
    with closing(log) if log else nullcontext(), attention_of(config):
        progress = run_steps(run, start, log)
    summary: dict[str, Any] = {"steps": progress.step, "samples_seen": progress.samples_seen}
    if log:
        summary |= {"final_loss": log.last_loss, "seconds": round(time.perf_counter() - started, 1)}
        if progress.step > start.step:
            save_summary(run.folder, summary)
    return summary


def _begin(
    config: TrainConfig, resumed: Path | None, model: Transformer, source: Source, info: CheckpointInfo, ranks: Ranks
) -> tuple[Progress, Source]:
    """Gives the model the weights of the newest checkpoint of this run, or of ``train.init_from``, or leaves it fresh.

    Returns how far the run has come, and its source with the empty caption that goes with the weights.
    """
    sizes = source.order.batch_size
    progress = Progress(0, 0, config.seed, sizes, config.data.window_shards, source.selection_hash)
    null_text: torch.Tensor | None = None
    if resumed:
        settings = settings_text(config)
        progress = checkpoint.resume_point(resumed, progress, info, settings)
        changed = checkpoint.changed_settings(resumed, settings)
        if changed:
            ranks.print(f"{config.output} goes on with other settings than before: {changed}")
        load_into(model, resumed, "model")
        null_text = read_null_text(resumed)
    elif config.train.init_from:
        report = start_from(config.train.init_from, model, source.vae, source.text_encoder)
        ranks.print(f"starts from {config.train.init_from}: {report}")
        null_text = report.null_text
    return progress, source if null_text is None else replace(source, null_text=null_text)


def _engine(config: TrainConfig, model: Transformer) -> Engine:
    settings = config.train
    return Engine(
        model,
        config.optimizer,
        precision=settings.precision,
        accumulation=settings.gradient_accumulation,
        deepspeed_settings=config.deepspeed,
    )


def _info(config: TrainConfig, model: Transformer, source: Source) -> CheckpointInfo:
    return CheckpointInfo(
        step=0,
        transformer=model.config,
        objective=config.objective,
        vae=source.vae,
        text_encoder=source.text_encoder,
        frame_interval_s=1 / source.fps,
        buckets=tuple(bucket.name for bucket in source.dataset.buckets),
        conditioning=config.conditioning.masks(),
    )


def _opening(run: Run, progress: Progress) -> str:
    parameters = (run.engine.trained + run.engine.frozen) / 1e6  # ZeRO-3 leaves none in the model
    start = f"continues at step {progress.step}" if progress.step else "starts"
    return (
        f"{run.folder} {start}: {parameters:.2f} M parameters, {run.ranks.world} ranks on "
        f"{run.ranks.device.type}, {run.config.train.precision}, predicts {run.config.objective.prediction}; "
        f"{batches_of(run.source)}"
    )


def describe(config: TrainConfig, world: int) -> str:
    """What ``train`` would do, in a few lines."""
    check(config, world)
    config = settled(config, checkpoint.newest(storage.local_path(config.output)) if config.output else None)
    readers = world // config.train.sequence_parallel
    config = settle_batches(config, world, room_bytes(world))
    source = open_source(config, 0, readers)
    held_out = open_held_out(config, source, 0, readers)
    prompts = open_prompts(config, source, 0, readers)
    with torch.device("meta"):
        model = build_model(config, source)
    parameter_groups(model, config.optimizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    epoch = sum(source.dataset.index(bucket).num_rows for bucket in source.dataset.buckets)
    passes = sum(source.order.samples_before(config.train.steps).values()) / epoch
    return (
        f"{parameters / 1e6:.2f} M parameters that predict {config.objective.prediction}; {epoch} samples, "
        f"{passes:.1f} passes over them, {held_out.samples if held_out else 0} held-out samples; {batches_of(source)}"
        f"{f'; {prompts}' if prompts else ''}\n"
        f"{_work(config, source, model, world)}\n"
        f"checkpoints of {parameters * 16 / 1e9:.2f} GB, the newest {config.train.keep_last} kept; "
        f"{peak_of(micro_batches(config, source, model, world), states_of(config, model, world), room_bytes(world))}"
    )


def _work(config: TrainConfig, source: Source, model: Transformer, world: int) -> str:
    """The arithmetic of the whole run, and how long this kind of device takes for it."""
    column = next(iter(config.data.text_columns()))
    flops = 0
    for bucket, samples in source.order.samples_before(config.train.steps).items():
        frames, _, height, width = source.dataset.shapes(bucket, LATENTS)[0].tolist()
        text_tokens = round(samples * float(source.dataset.shapes(bucket, column)[:, 0].mean()))
        flops += count_flops(model.config, samples, frames, height, width, text_tokens).training
    told = f"{flops / 1e15:,.3g} PFLOP of matrix products"
    peak = peak_flops_per_s(default_device())
    if peak is None:
        return f"{told}; what this device can do of them a second is not known, nor then the hours"
    hours = flops / (USUAL_MFU * peak * world) / 3600
    return f"{told}: {hours:,.3g} hours on {world} GPUs at {USUAL_MFU:.0%} of this one's {peak / 1e12:,.0f} TFLOP/s"
