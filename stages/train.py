"""Train the diffusion transformer from latent shards alone: no VAE, text encoder or video decoder is loaded."""

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from models.latents import LatentStats
from models.loading import load_into
from models.objective import ObjectiveConfig, make_objective
from models.presets import preset
from models.transformer import Transformer, TransformerConfig
from models.weights import CheckpointInfo, read_null_text
from shards.dataset import Dataset
from shards.loader import Batch, DataConfig, Loader, selection_hash
from shards.order import SampleOrder, batch_sizes
from shards.schema import LATENTS
from stages import checkpoint
from stages.checkpoint import Checkpoints, Progress
from stages.engine import (
    Engine,
    Ranks,
    check_settings,
    check_shared,
    largest_over_ranks,
    start_ranks,
)
from stages.errors import ConfigError, WorkError, at_least
from stages.loss import LatentLoss
from stages.optimizer import OptimizerConfig, lr_share, parameter_groups
from stages.output import output_folder, save_settings, save_summary
from stages.run_lock import run_lock
from stages.runlog import RunLog, Stopwatch, peak_memory_gb
from stages.start import model_settings, objective_settings, start_from
from stages.stopping import REASONS, StopRequests
from stages.validate import HeldOut, ValidationConfig, training_filter


@dataclass(frozen=True)
class StepConfig:
    """The ``train`` section.

    A step takes samples of one bucket. How many, of all ranks together, is either ``batch_size``, the same for every
    bucket, or follows from ``batch_tokens``: each bucket's batch is then the largest multiple of ``batch_multiple``
    samples that has at most so many tokens (of whole clips, see data.subclip_frames), and at least that many samples.
    Neither depends on the number of ranks, so that a run may go on with another number; ranks x gradient_accumulation
    must divide the batches.

    max_hours: save and leave when the command has run this long; the same command goes on.
    milestone_every: of these checkpoints, multiples of save_every, the weights are kept for ever.
    max_skipped: the run fails when so many steps in a row had a loss or gradient that is not finite.
    """

    steps: int = 1000
    max_hours: float | None = None
    max_skipped: int = 10
    batch_size: int | None = None
    batch_tokens: int | None = None
    batch_multiple: int = 8
    gradient_accumulation: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: bool = False
    caption_dropout: float = 0.1
    init_from: str | None = None
    save_every: int = 1000
    keep_last: int = 2
    milestone_every: int | None = None
    log_every: int = 10
    log_sample_ids: bool = False

    def __post_init__(self) -> None:
        counts = ("batch_size", "batch_tokens", "batch_multiple", "gradient_accumulation")
        at_least(self, 1, "steps", *counts, "save_every", "keep_last", "log_every", "max_skipped", "milestone_every")
        at_least(self, 0, "max_hours")
        if self.milestone_every and self.milestone_every % self.save_every:
            raise ValueError(f"milestone_every: found {self.milestone_every}, expected a multiple of {self.save_every}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout: found {self.caption_dropout}, expected 0 to 1")


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run is made from.

    model: ``preset`` (see `models.presets`) and the fields of TransformerConfig that differ from it.
    deepspeed: any DeepSpeed setting that does not follow from the others, such as ``zero_optimization``.
    """

    output: str = ""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=lambda: {"preset": "XL/2"})
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: StepConfig = field(default_factory=StepConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: dict[str, Any] = field(default_factory=lambda: {"zero_optimization": {"stage": 1}})


@dataclass(frozen=True)
class Source:
    """The data of a run: what is read, in which order, and what the model must know of it."""

    dataset: Dataset
    order: SampleOrder
    sample_tokens: dict[str, int]  # by bucket: what the model cuts one sample into
    loader: Loader
    null_text: torch.Tensor  # [L0, D], the dataset's until the run's own is known
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    fps: float
    selection_hash: str


def open_source(config: TrainConfig, rank: int = 0, world: int = 1) -> Source:
    """Open the shards and fix the order of samples. Raises DatasetError where they cannot be trained on."""
    if not config.data.shards:
        raise ConfigError("data.shards is not set: give data.shards=the output folder of an encode")
    columns = list(config.data.text_columns())
    chosen = training_filter(config.data.filter, config.validation)
    dataset = Dataset.open(config.data.shards, text=columns, filter=chosen)
    vae = dataset.shared(LATENTS, "vae")
    multiple = vae["spatial_factor"] * transformer_config(config).patch_size
    for bucket in dataset.buckets:
        if bucket.height % multiple or bucket.width % multiple:
            raise ConfigError(f"bucket {bucket}: expected multiples of {multiple} pixels (VAE x model.patch_size)")
    counts = {bucket.name: dataset.counts_per_shard(bucket) for bucket in dataset.buckets}
    counts = {bucket: shards for bucket, shards in counts.items() if any(shards)}  # the filter may leave none
    tokens = {bucket: _sample_tokens(config, dataset, bucket) for bucket in counts}
    order = SampleOrder(counts, _batch_sizes(config.train, tokens), config.seed, config.data.window_shards)
    return Source(
        dataset,
        order,
        tokens,
        Loader(dataset, config.data, order, rank, world),
        torch.from_numpy(dataset.null_text(columns[0])[0]),
        vae,
        dataset.shared(columns[0], "text_encoder"),
        dataset.shared(LATENTS, "sampling")["fps"],
        selection_hash(dataset, dataset.buckets, columns),
    )


def _sample_tokens(config: TrainConfig, dataset: Dataset, bucket: str) -> int:
    frames, _, height, width = dataset.shapes(bucket, LATENTS)[0].tolist()
    return transformer_config(config).tokens(frames, height, width)


def _batch_sizes(settings: StepConfig, sample_tokens: dict[str, int]) -> dict[str, int]:
    """By bucket, of all ranks together; a pure function of the settings and the data."""
    if settings.batch_tokens:
        return batch_sizes(sample_tokens, settings.batch_tokens, settings.batch_multiple)
    assert settings.batch_size
    return dict.fromkeys(sample_tokens, settings.batch_size)


def open_held_out(config: TrainConfig, source: Source, rank: int = 0, world: int = 1) -> HeldOut | None:
    """The clips to validate on. Raises ConfigError where ``validation.holdout`` holds none."""
    sizes = {name: size // config.train.gradient_accumulation for name, size in source.order.batch_size.items()}
    return HeldOut.open(config.validation, config.data, sizes, rank, world)


def transformer_config(config: TrainConfig, **data: int) -> TransformerConfig:
    """The network that the ``model`` section names, with the sizes that the data set."""
    settings = dict(config.model)
    try:
        return preset(settings.pop("preset", "XL/2"), settings | data)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from None


def build_model(config: TrainConfig, source: Source) -> Transformer:
    """The transformer for this data, with fresh weights drawn from the run's seed."""
    torch.manual_seed(config.seed)
    channels = source.vae["latent_channels"]
    objective = make_objective(config.objective)
    outputs = objective.out_channels(channels)
    sizes = {"in_channels": channels, "out_channels": outputs, "text_dim": source.text_encoder["dim"]}
    model = Transformer(transformer_config(config, **sizes), objective.prediction)
    model.activation_checkpointing = config.train.activation_checkpointing
    return model


@dataclass(frozen=True)
class Run:
    """A run that has been set up: what the loop works with."""

    config: TrainConfig
    folder: Path
    ranks: Ranks
    source: Source
    held_out: HeldOut | None
    model: Transformer
    engine: Engine
    checkpoints: Checkpoints
    stops: StopRequests


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, or continue the run in ``config.output``, until ``train.steps`` or a stop. Returns the summary."""
    ranks = start_ranks()
    config = settled(config)
    check(config, ranks.world)
    folder = output_folder(config.output)
    with run_lock(folder, ranks), StopRequests(folder, config.train.max_hours, main=ranks.main) as stops:
        check_shared(folder, ranks)
        return _train(config, folder, ranks, stops)


def _train(config: TrainConfig, folder: Path, ranks: Ranks, stops: StopRequests) -> dict[str, Any]:
    source = open_source(config, ranks.rank, ranks.world)
    held_out = open_held_out(config, source, ranks.rank, ranks.world)
    resumed = checkpoint.newest(folder)
    model = build_model(config, source)
    info = _info(config, model, source)

    # Where to start: the newest checkpoint of this run, or other weights, or fresh ones.
    sizes = source.order.batch_size
    progress = Progress(0, 0, config.seed, sizes, config.data.window_shards, source.selection_hash)
    if resumed:
        progress = checkpoint.resume_point(resumed, progress, info)
        load_into(model, resumed, "model")
        embedding, mask = read_null_text(resumed)
        source = replace(source, null_text=embedding[mask])
    elif config.train.init_from:
        report = start_from(config.train.init_from, model, source.vae, source.text_encoder)
        ranks.print(f"starts from {config.train.init_from}: {report}")
        if report.null_text is not None:
            source = replace(source, null_text=report.null_text)
    engine = _engine(config, model, ranks)
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
    plan = checkpoints.check_room(progress.step, config.train.steps)
    run = Run(config, folder, ranks, source, held_out, model, engine, checkpoints, stops)
    if ranks.main:
        save_settings(folder, config)
    ranks.print(_opening(run, progress))
    ranks.print(plan)

    start = progress.step
    log = RunLog(folder, start, config.train.steps) if ranks.main else None
    started = time.perf_counter()
    progress = _loop(run, progress, log)
    summary: dict[str, Any] = {"steps": progress.step, "samples_seen": progress.samples_seen}
    if log:
        summary |= {"final_loss": log.last_loss, "seconds": round(time.perf_counter() - started, 1)}
        if progress.step > start:
            save_summary(folder, summary)
        log.close()
    return summary


def _loop(run: Run, progress: Progress, log: RunLog | None) -> Progress:
    config, settings, source = run.config, run.config.train, run.source
    loss_of = LatentLoss(
        make_objective(config.objective),
        LatentStats.of(source.vae),
        source.null_text,
        frame_interval_s=1 / source.fps,
        caption_dropout=settings.caption_dropout,
        seed=config.seed,
        device=run.ranks.device,
    )
    watch, stop, saved_step = Stopwatch(), 0, progress.step
    with closing(run.checkpoints), closing(source.loader.batches(progress.step, settings.steps)) as batches:
        for step in range(progress.step, settings.steps):
            # Read.
            waiting = time.perf_counter()
            batch = run.checkpoints.failure() or _read(batches)
            waited_s = time.perf_counter() - waiting

            # Agree: all ranks go on, or none; one that went alone would wait for the others for ever.
            failed_rank = run.ranks.rank if isinstance(batch, Exception) else -1
            stop, failed_rank = largest_over_ranks([run.stops.look(), failed_rank], run.ranks)
            if isinstance(batch, Exception):
                raise batch
            if failed_rank >= 0:
                raise WorkError(f"rank {failed_rank} cannot go on, so that no rank can: see its own message")
            if stop:
                break

            # Step.
            tokens = run.model.config.tokens(batch.mean.shape[1], *batch.mean.shape[3:])
            losses = [
                run.engine.backward(loss_of.training(run.engine.module, part, tokens))
                for part in batch.split(settings.gradient_accumulation)
            ]
            clip_norm = progress.guard.clip_norm(config.optimizer)
            norm = run.engine.step(lr_share(step, settings.steps, config.optimizer), clip_norm)
            samples = source.order.batch_size[batch.bucket.name]
            watch.add(samples, samples * tokens, waited_s)
            done = step + 1
            seen = source.order.samples_before(done)
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
                    log.write(metrics)
                watch = Stopwatch()

            # Save.
            if done % settings.save_every == 0:
                run.checkpoints.save(progress)
                saved_step = done

        if progress.step > saved_step:
            run.checkpoints.save(progress)
        run.checkpoints.wait()
    if stop:
        run.ranks.print(f"stopped at step {progress.step} ({REASONS[stop]}): run the same command to go on")
    return progress


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
        "mfu": None,
    }
    return metrics if keys is None else {**metrics, "sample_ids": keys}


def settled(config: TrainConfig) -> TrainConfig:
    """The config with what follows from the weights that the run starts from, or goes on from."""
    resumed = checkpoint.newest(Path(config.output)) if config.output else None
    init_from = config.train.init_from
    return replace(
        config,
        model=model_settings(config.model, init_from, resumed),
        objective=objective_settings(config.objective, init_from, resumed),
    )


def check(config: TrainConfig, world: int) -> None:
    """Raises ConfigError for settings that no run can have on this many ranks."""
    transformer_config(config)
    check_settings(config.deepspeed)
    settings = config.train
    if (settings.batch_size is None) == (settings.batch_tokens is None):
        raise ConfigError(
            f"found train.batch_size {settings.batch_size} and train.batch_tokens {settings.batch_tokens}, "
            "expected one of them: set the other to null"
        )
    share = world * settings.gradient_accumulation
    name = "batch_size" if settings.batch_size else "batch_multiple"
    size = getattr(settings, name)
    if size % share:
        raise ConfigError(
            f"train.{name}: found {size}, expected a multiple of {share} "
            f"({world} ranks x train.gradient_accumulation {settings.gradient_accumulation})"
        )


def _engine(config: TrainConfig, model: Transformer, ranks: Ranks) -> Engine:
    settings = config.train
    return Engine(
        model,
        config.optimizer,
        precision=settings.precision,
        micro_batch=1,  # it differs by bucket, and DeepSpeed only counts with it
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
    )


def _opening(run: Run, progress: Progress) -> str:
    parameters = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    start = f"continues at step {progress.step}" if progress.step else "starts"
    return (
        f"{run.folder} {start}: {parameters:.2f} M parameters, {run.ranks.world} ranks on "
        f"{run.ranks.device.type}, {run.config.train.precision}, predicts {run.config.objective.prediction}; "
        f"{_batches(run.source)}"
    )


def _batches(source: Source) -> str:
    """Each bucket's batch, of all ranks together."""
    told = [
        f"{size} of {bucket} ({size * source.sample_tokens[bucket]} tokens)"
        for bucket, size in source.order.batch_size.items()
    ]
    return f"batches of {', '.join(told)}"


def describe(config: TrainConfig, world: int) -> str:
    """What ``train`` would do, in a few lines."""
    config = settled(config)
    check(config, world)
    source = open_source(config, 0, world)
    held_out = open_held_out(config, source, 0, world)
    model = build_model(config, source)
    parameter_groups(model, config.optimizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    epoch = sum(source.dataset.index(bucket).num_rows for bucket in source.dataset.buckets)
    passes = source.order.samples_before(config.train.steps) / epoch
    state_gb = parameters * 20 / world / 1e9
    return (
        f"{parameters / 1e6:.2f} M parameters that predict {config.objective.prediction}; {epoch} samples, "
        f"{passes:.1f} passes over them, {held_out.samples if held_out else 0} held-out samples; {_batches(source)}\n"
        f"checkpoints of {parameters * 16 / 1e9:.2f} GB, the newest {config.train.keep_last} kept; "
        f"weights, moments and average take about {state_gb:.2f} GB a rank, activations come on top"
    )
