"""Train the diffusion transformer from latent shards alone: no VAE, text encoder or video decoder is loaded."""

import math
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from models.flow import FlowConfig
from models.latents import LatentStats
from models.loading import load_into
from models.presets import preset
from models.transformer import Transformer, TransformerConfig
from models.weights import CheckpointInfo, read_null_text
from shards.dataset import Dataset
from shards.loader import DataConfig, Loader, selection_hash
from shards.order import SampleOrder
from shards.schema import LATENTS
from stages import checkpoint
from stages.checkpoint import Progress
from stages.engine import Engine, Ranks, check_settings, check_shared, mean_over_ranks, start_ranks
from stages.errors import ConfigError, WorkError, at_least
from stages.loss import FlowLoss
from stages.optimizer import OptimizerConfig, learning_rate
from stages.output import output_folder, save_settings, save_summary
from stages.runlog import RunLog, Stopwatch, peak_memory_gb
from stages.start import model_settings, start_from


@dataclass(frozen=True)
class StepConfig:
    """The ``train`` section; batch_size is of all ranks together."""

    steps: int = 1000
    batch_size: int = 16
    gradient_accumulation: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: bool = False
    caption_dropout: float = 0.1
    init_from: str | None = None
    save_every: int = 1000
    keep_last: int = 2
    log_every: int = 10
    log_sample_ids: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch_size", "gradient_accumulation", "save_every", "keep_last", "log_every")
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
    flow: FlowConfig = field(default_factory=FlowConfig)
    train: StepConfig = field(default_factory=StepConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: dict[str, Any] = field(default_factory=lambda: {"zero_optimization": {"stage": 1}})


@dataclass(frozen=True)
class Source:
    """The data of a run: what is read, in which order, and what the model must know of it."""

    dataset: Dataset
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
    dataset = Dataset.open(config.data.shards, text=columns, filter=config.data.filter)
    vae = dataset.shared(LATENTS, "vae")
    multiple = vae["spatial_factor"] * transformer_config(config).patch_size
    for bucket in dataset.buckets:
        if bucket.height % multiple or bucket.width % multiple:
            raise ConfigError(f"bucket {bucket}: expected multiples of {multiple} pixels (VAE x model.patch_size)")
    batch = config.train.batch_size
    order = SampleOrder(
        {bucket.name: dataset.counts_per_shard(bucket) for bucket in dataset.buckets},
        {bucket.name: batch for bucket in dataset.buckets},
        config.seed,
        config.data.window_shards,
    )
    return Source(
        dataset,
        Loader(dataset, config.data, order, rank, world),
        torch.from_numpy(dataset.null_text(columns[0])[0]),
        vae,
        dataset.shared(columns[0], "text_encoder"),
        dataset.shared(LATENTS, "sampling")["fps"],
        selection_hash(dataset, dataset.buckets, columns),
    )


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
    sizes = {"in_channels": channels, "out_channels": channels, "text_dim": source.text_encoder["dim"]}
    model = Transformer(transformer_config(config, **sizes))
    model.activation_checkpointing = config.train.activation_checkpointing
    return model


@dataclass(frozen=True)
class Run:
    """A run that has been set up: what the loop works with."""

    config: TrainConfig
    folder: Path
    ranks: Ranks
    source: Source
    model: Transformer
    info: CheckpointInfo
    engine: Engine


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, or continue the run in ``config.output``, until ``train.steps``. Returns the summary."""
    ranks = start_ranks()
    config = settled(config)
    check(config, ranks.world)
    folder = output_folder(config.output)
    check_shared(folder, ranks)
    source = open_source(config, ranks.rank, ranks.world)
    model = build_model(config, source)
    info = _info(config, model, source)

    # Where to start: the newest checkpoint of this run, or other weights, or fresh ones.
    resumed = checkpoint.newest(folder)
    progress = Progress(0, 0, config.seed, config.train.batch_size, config.data.window_shards, source.selection_hash)
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
    run = Run(config, folder, ranks, source, model, info, _engine(config, model, ranks))
    if resumed:
        checkpoint.restore(resumed, run.engine, progress)
    if ranks.main:
        save_settings(folder, config)
    ranks.print(_opening(run, progress))

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
    loss_of = FlowLoss(
        config.flow,
        LatentStats.of(source.vae),
        source.null_text,
        frame_interval_s=1 / source.fps,
        caption_dropout=settings.caption_dropout,
        seed=config.seed,
        device=run.ranks.device,
    )
    watch = Stopwatch()
    with closing(source.loader.batches(progress.step, settings.steps)) as batches:
        for step in range(progress.step, settings.steps):
            # Read.
            waiting = time.perf_counter()
            batch = next(batches)
            waited_s = time.perf_counter() - waiting

            # Step.
            tokens = run.model.config.tokens(batch.mean.shape[1], *batch.mean.shape[3:])
            losses = []
            for part in batch.split(settings.gradient_accumulation):
                loss = loss_of(run.engine.module, part, tokens)
                run.engine.backward(loss)
                losses.append(loss.detach())
            norm = run.engine.step(learning_rate(step, settings.steps, config.optimizer))
            watch.add(settings.batch_size, settings.batch_size * tokens, waited_s)
            done = step + 1

            logs = done % settings.log_every == 0 or done == settings.steps
            saves = done % settings.save_every == 0 or done == settings.steps

            # Check: nothing that is not finite is ever saved.
            if logs or saves:
                mean_loss = float(mean_over_ranks(torch.stack(losses).mean()))
                if not math.isfinite(mean_loss):
                    raise WorkError(f"the loss is {mean_loss} at step {done}: lower optimizer.lr and run again")

            # Report.
            if logs:
                if log:
                    keys = source.loader.keys(step) if settings.log_sample_ids else None
                    log.write(_metrics(config, done, mean_loss, norm, watch, keys))
                watch = Stopwatch()

            # Save.
            if saves:
                progress = progress.after(done)
                checkpoint.save(run.folder, progress, run.info, source.null_text, run.engine, run.ranks)
                if run.ranks.main:
                    checkpoint.keep_last(run.folder, settings.keep_last)
    return progress


def _metrics(
    config: TrainConfig, done: int, loss: float, norm: float, watch: Stopwatch, keys: list[str] | None
) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "step": done,
        "loss": loss,
        "learning_rate": learning_rate(done - 1, config.train.steps, config.optimizer),
        "gradient_norm": norm,
        **watch.report(),
        "peak_memory_gb": peak_memory_gb(),
        "mfu": None,
    }
    return metrics if keys is None else {**metrics, "sample_ids": keys}


def settled(config: TrainConfig) -> TrainConfig:
    """The config with the settings of the model that follow from the weights it starts from."""
    resumed = checkpoint.newest(Path(config.output)) if config.output else None
    return replace(config, model=model_settings(config.model, config.train.init_from, resumed))


def check(config: TrainConfig, world: int) -> None:
    """Raises ConfigError for settings that no run can have on this many ranks."""
    transformer_config(config)
    check_settings(config.deepspeed)
    settings = config.train
    share = world * settings.gradient_accumulation
    if settings.batch_size % share:
        raise ConfigError(
            f"train.batch_size: found {settings.batch_size}, expected a multiple of {share} "
            f"({world} ranks x train.gradient_accumulation {settings.gradient_accumulation})"
        )


def _engine(config: TrainConfig, model: Transformer, ranks: Ranks) -> Engine:
    settings = config.train
    return Engine(
        model,
        config.optimizer,
        precision=settings.precision,
        micro_batch=settings.batch_size // (ranks.world * settings.gradient_accumulation),
        accumulation=settings.gradient_accumulation,
        deepspeed_settings=config.deepspeed,
    )


def _info(config: TrainConfig, model: Transformer, source: Source) -> CheckpointInfo:
    return CheckpointInfo(
        step=0,
        transformer=model.config,
        prediction="velocity",
        flow=config.flow,
        vae=source.vae,
        text_encoder=source.text_encoder,
        frame_interval_s=1 / source.fps,
        buckets=tuple(bucket.name for bucket in source.dataset.buckets),
    )


def _opening(run: Run, progress: Progress) -> str:
    parameters = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    shapes = ", ".join(bucket.name for bucket in run.source.dataset.buckets)
    start = f"continues at step {progress.step}" if progress.step else "starts"
    return (
        f"{run.folder} {start}: {parameters:.2f} M parameters, {run.ranks.world} ranks on "
        f"{run.ranks.device.type}, buckets {shapes}, {run.config.train.precision}"
    )


def describe(config: TrainConfig, world: int) -> str:
    """What ``train`` would do, in a few lines."""
    config = settled(config)
    check(config, world)
    source = open_source(config, 0, world)
    model = build_model(config, source)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    epoch = sum(source.dataset.index(bucket).num_rows for bucket in source.dataset.buckets)
    passes = config.train.steps * config.train.batch_size / epoch
    state_gb = parameters * 20 / world / 1e9
    return (
        f"{parameters / 1e6:.2f} M parameters; {epoch} samples, {passes:.1f} passes over them\n"
        f"checkpoints of {parameters * 16 / 1e9:.2f} GB, the newest {config.train.keep_last} kept; "
        f"weights, moments and average take about {state_gb:.2f} GB a rank, activations come on top"
    )
