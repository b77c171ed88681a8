"""The data of a run."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.samplers import check_steps
from shards.dataset import Dataset
from shards.loader import Loader, selection_hash
from shards.node_tables import NodeTables, Share, own_table
from shards.order import SampleOrder, batch_sizes
from shards.schema import LATENTS
from stages.engine import Ranks, barrier, from_all
from stages.errors import ConfigError
from stages.training.config import StepConfig, TrainConfig, transformer_config
from stages.training.held_out import training_filter
from stages.training.prompts import Prompts
from stages.training.validate import HeldOut


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


@contextmanager
def node_tables(ranks: Ranks) -> Iterator[Share]:
    """How the ranks of a node hold the indexes in memory once; all of them must open the same."""
    if ranks.world == 1:
        yield own_table
        return
    first = ranks.node_rank == 0
    own = tempfile.mkdtemp(prefix="wisesora-") if first else ""
    folder = Path(from_all(own)[ranks.rank - ranks.node_rank])  # the ranks of a node follow each other
    try:
        yield NodeTables(folder, barrier, first=first)
    finally:
        if first:
            shutil.rmtree(folder)


def open_source(config: TrainConfig, rank: int = 0, world: int = 1, share: Share = own_table) -> Source:
    """Open the shards and fix the order of samples. Raises DatasetError where they cannot be trained on."""
    if not config.data.shards:
        raise ConfigError("data.shards is not set: give data.shards=the output folder of an encode")
    columns = list(config.data.text_columns())
    chosen = training_filter(config.data.filter, config.validation)
    dataset = Dataset.open(config.data.shards, text=columns, filter=chosen, share=share)
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
    if not isinstance(settings.batch_size, int):
        raise ConfigError(f"train.batch_size: found {settings.batch_size}, expected a number here")
    return dict.fromkeys(sample_tokens, settings.batch_size)


def open_held_out(
    config: TrainConfig, source: Source, rank: int = 0, world: int = 1, share: Share = own_table
) -> HeldOut | None:
    """The clips to validate on. Raises ConfigError where ``validation.holdout`` holds none."""
    sizes = {name: size // config.train.gradient_accumulation for name, size in source.order.batch_size.items()}
    return HeldOut.open(config.validation, config.data, sizes, rank, world, share)


def open_prompts(
    config: TrainConfig, source: Source, rank: int = 0, world: int = 1, share: Share = own_table
) -> Prompts | None:
    """The captions to sample. Raises ConfigError where ``validation.holdout`` holds none, or for too many steps."""
    prompts = Prompts.open(config.validation, config.data, list(source.order.batch_size), rank, world, share)
    if prompts:
        assert config.objective.prediction is not None
        try:
            check_steps("validation.sample_steps", config.objective.prediction, config.validation.sample_steps)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return prompts


def batches_of(source: Source) -> str:
    """Each bucket's batch, of all ranks together."""
    told = [
        f"{size} of {bucket} ({size * source.sample_tokens[bucket]} tokens)"
        for bucket, size in source.order.batch_size.items()
    ]
    return f"batches of {', '.join(told)}"
