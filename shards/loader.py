"""Batches for training, read ahead by threads.

Every rank computes the same global batch and reads its own slice of it. Text is padded to the longest caption
of the *global* batch, known from the index, so that all ranks have the same shapes in the same step. Where
several text columns are mixed, the one of a sample depends on the seed and on its position alone.
"""

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import numpy as np
import xxhash

from shards.cache import TarCache, require_room
from shards.dataset import Dataset, require_equal
from shards.errors import DatasetError
from shards.memory import RecycledMemory
from shards.order import FixedOrder, SampleOrder
from shards.schema import (
    CHECKSUM,
    KEY,
    LATENTS,
    LENGTH,
    MEAN,
    STD,
    TEXT,
    Bucket,
    index_field,
    record_layout,
    text_column,
)
from shards.subclip import Subclips
from shards.tars import TarsKeptOpen

_OPEN_TARS = 128


@dataclass(frozen=True)
class DataConfig:
    """Where the training data is and how it is read."""

    shards: str = ""  # the dataset's folder, or its URL
    text: str | dict[str, float] = "t5"  # which text column: text.NAME; several by their shares: {t5: 0.7, short: 0.3}
    filter: str = ""  # train on the samples that hold it alone, such as aesthetic >= 4.75
    strides: tuple[int, ...] = (1,)  # each step takes every n-th frame of its clips, with n drawn from these
    subclip_frames: tuple[int, ...] = ()  # and so many frames of them, drawn from these; none: all that n leaves
    window_shards: int = 8  # samples are shuffled within this many shards
    prefetch_batches: int = 4  # read ahead of the step
    read_threads: int = 2
    cache: str = ""  # where shards is a URL: the folder for its tars; default: wisesora in the user's cache folder
    cache_gb: float = 50.0  # the most that folder holds

    def text_columns(self) -> dict[str, float]:
        """Column -> weight, in the order given; DatasetError for a mapping that is no mixture."""
        weights = {self.text: 1.0} if isinstance(self.text, str) else self.text
        wrong = [weight for weight in weights.values() if not isinstance(weight, int | float) or not 0 < weight < inf]
        if wrong or not weights:
            raise DatasetError(f"data.text is {self.text}: expected names of text columns, with a weight above 0 each")
        return {text_column(name): weight for name, weight in weights.items()}


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's share of a step. b samples; T frames, C channels, h x w of the latents; L tokens, D wide.

    The latents are as the VAE gives them, unscaled. Padding of the text is zero, and false in the mask. The arrays are
    contiguous but for their first axis: they are views of the records as read.
    """

    step: int
    bucket: Bucket
    frame_stride: int  # from one frame to the next, in frames of the stored clip, which may be longer too
    keys: list[str]
    positions: np.ndarray  # [b] int64, unique in the whole training (see ``order.GlobalBatch``)
    mean: np.ndarray  # [b, T, C, h, w] float16
    std: np.ndarray | None  # [b, T, C, h, w] float16, where the dataset stores it
    text: np.ndarray  # [b, L, D] float16
    text_mask: np.ndarray  # [b, L] bool

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """T, h, w"""
        frames, _, height, width = self.mean.shape[1:]
        return frames, height, width

    def split(self, parts: int) -> "list[Batch]":
        """The batch in equal micro-batches; ``parts`` divides b."""
        size = len(self.keys) // parts
        return [self._slice(slice(start, start + size)) for start in range(0, len(self.keys), size)]

    def _slice(self, rows: slice) -> "Batch":
        return replace(
            self,
            keys=self.keys[rows],
            positions=self.positions[rows],
            mean=self.mean[rows],
            std=None if self.std is None else self.std[rows],
            text=self.text[rows],
            text_mask=self.text_mask[rows],
        )


class Loader:
    """Reads one rank's batches of ``order`` from an opened dataset.

    Raises DatasetError if the ranks cannot share a batch evenly, if a text column is missing somewhere or differs
    in width from the null text, which is the first column's, or if the cache is too small for a window of shards.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, order: SampleOrder | FixedOrder, rank: int, world: int):
        assert 0 <= rank < world
        for setting in ("prefetch_batches", "read_threads"):
            if getattr(config, setting) < 1:
                raise DatasetError(f"data.{setting} is {getattr(config, setting)}: set it to 1 or more")
        for bucket, size in order.batch_size.items():
            if size % world:
                raise DatasetError(
                    f"{bucket}: {world} ranks cannot share a batch of {size} samples evenly: use a multiple of {world}"
                )
        self._config, self._order, self._rank, self._world = config, order, rank, world
        self._buckets = {name: Bucket.parse(name) for name in order.batch_size}
        self._texts = _Mixture(config.text_columns(), order.seed)
        self._subclips = Subclips(config.strides, config.subclip_frames, order.seed)
        null, _ = dataset.null_text(self._texts.columns[0])
        self._null_tokens, self._width = null.shape
        for bucket in order.batch_size:
            _check_latents(dataset, bucket)
            if not self._subclips.whole:
                _check_frames(dataset, bucket)
            for column in self._texts.columns:
                _check_text(dataset, bucket, column, self._texts.columns[0], self._width)
        self._memory = RecycledMemory()
        local = isinstance(dataset.path, Path)
        self._dataset = dataset.through(TarsKeptOpen(_OPEN_TARS) if local else self._cache(dataset))

    def _cache(self, dataset: Dataset) -> TarCache:
        cache = TarCache(self._config.cache, int(self._config.cache_gb * 1e9))
        sizes = [
            sorted(dataset.tar_bytes(bucket, column))[-self._config.window_shards :]
            for bucket in self._order.batch_size
            for column in (LATENTS, *self._texts.columns)
        ]
        require_room(cache, sum(map(sum, sizes)))
        return cache

    def batches(self, start_step: int, stop_step: int) -> Generator[Batch, None, None]:
        """This rank's batches of the steps ``start_step`` to ``stop_step - 1``.

        An error of a reading thread is raised here, at its step. Closing the iterator ends the threads.
        """
        pool = ThreadPoolExecutor(self._config.read_threads, thread_name_prefix="loader")
        pending: deque[Future[Batch]] = deque()
        try:
            for step in range(start_step, stop_step):
                pending.append(pool.submit(self._read, step))
                if len(pending) > self._config.prefetch_batches:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def keys(self, step: int) -> list[str]:
        """The samples of a step's global batch, in order."""
        bucket, rows, _ = self._order.batch(step)
        return self._dataset.keys(bucket, rows)

    def _read(self, step: int) -> Batch:
        bucket, rows, positions = self._order.batch(step)
        columns, share = self._texts.choose(positions), len(rows) // self._world
        own = slice(self._rank * share, (self._rank + 1) * share)
        tokens = self._tokens(bucket, rows, columns)
        mask = np.arange(max(self._null_tokens, tokens.max())) < tokens[:, None]  # as long as the longest of all ranks
        keys, members = self._read_members(bucket, rows[own], columns[own], mask.shape[1])
        members[TEXT][~mask[own]] = 0
        return self._cut(
            Batch(
                step=step,
                bucket=self._buckets[bucket],
                frame_stride=1,
                keys=keys,
                positions=positions[own],
                mean=members[MEAN],
                std=members.get(STD),
                text=members[TEXT],
                text_mask=mask[own],
            )
        )

    def _read_members(
        self, bucket: str, rows: np.ndarray, columns: np.ndarray, length: int
    ) -> tuple[list[str], dict[str, np.ndarray]]:
        """The keys of some samples, and suffix -> array [b, ...]; what follows a text is undefined."""
        latents = self._dataset.layout(bucket, rows.item(0), LATENTS)  # of all of them: a bucket has one
        text = record_layout(self._texts.columns[0], (length, self._width))
        memory, text_memory = (self._memory.empty_rows(len(rows), layout.length) for layout in (latents, text))
        records = self._dataset.records(bucket, rows, LATENTS, memory)
        keys = [record.key for record in records]
        for number, column in enumerate(self._texts.columns):
            places = np.flatnonzero(columns == number)
            records += self._dataset.records(bucket, rows[places], column, [text_memory[place] for place in places])
        self._dataset.read_records(records)
        return keys, latents.members(memory) | text.members(text_memory)

    def _cut(self, batch: Batch) -> Batch:
        """The batch with as many frames as its step has, at that step's stride."""
        stride, frames = self._subclips.shape(batch.step, batch.mean.shape[1])
        if frames == batch.mean.shape[1]:
            return batch
        mean = self._subclips.cut(batch.mean, batch.positions, stride, frames)
        std = None if batch.std is None else self._subclips.cut(batch.std, batch.positions, stride, frames)
        return replace(batch, frame_stride=stride, mean=mean, std=std)

    def _tokens(self, bucket: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The length of each sample's text, [B], in the column that was chosen for it."""
        return np.choose(columns, [self._dataset.shapes(bucket, name)[rows, 0] for name in self._texts.columns])


class _Mixture:
    """Which of several text columns a sample takes: a pure function of the seed and the sample's position."""

    def __init__(self, weights: Mapping[str, float], seed: int):
        self.columns, self._seed = list(weights), seed
        self._ends = np.cumsum(list(weights.values()))[:-1] / sum(weights.values())

    def choose(self, positions: np.ndarray) -> np.ndarray:
        """The number of the column for each position."""
        if len(self.columns) == 1:
            return np.zeros(len(positions), np.int64)
        words = [xxhash.xxh3_64_intdigest(f"text {self._seed} {position}".encode()) for position in positions.tolist()]
        return np.searchsorted(self._ends, np.array(words, np.uint64) / 2**64, side="right")


def _check_latents(dataset: Dataset, bucket: str) -> None:
    shapes = dataset.shapes(bucket, LATENTS)
    if (shapes != shapes[:1]).any():
        found = np.unique(shapes, axis=0).tolist()
        raise DatasetError(f"{dataset.path / bucket / LATENTS} has samples of the shapes {found}, expected one")
    lengths = dataset.index(bucket)[index_field(LATENTS, LENGTH)].to_numpy()
    if (lengths != lengths[:1]).any():
        raise DatasetError(f"{dataset.path / bucket / LATENTS} has {MEAN} and {STD} of some samples, {MEAN} of others")


def _check_frames(dataset: Dataset, bucket: str) -> None:
    """DatasetError unless each frame was encoded alone, so that a clip can be cut."""
    factor = dataset.fingerprint(bucket, LATENTS)["vae"]["temporal_factor"]
    if factor != 1:
        raise DatasetError(
            f"{dataset.path / bucket / LATENTS} holds {factor} frames in each latent, which cannot be cut: "
            "leave data.strides and data.subclip_frames out"
        )


def _check_text(dataset: Dataset, bucket: str, column: str, first: str, width: int) -> None:
    """DatasetError unless a text column is there and fits the null text, and the column that this one is of."""
    if column not in dataset.columns(bucket):
        raise DatasetError(
            f"{dataset.path / bucket} has no column {column}: "
            f"found {', '.join(dataset.columns(bucket))}; set data.text to a text column's name"
        )
    widths = np.unique(dataset.shapes(bucket, column)[:, 1]).tolist()
    if widths not in ([], [width]):
        raise DatasetError(
            f"{dataset.path / bucket / column} is {widths} wide, the null text "
            f"{width}: embeddings of different text encoders cannot be mixed"
        )
    if column != first:
        found, expected = (dataset.fingerprint(bucket, name)["text_encoder"] for name in (column, first))
        what = f"{dataset.path / bucket}: the text encoder of {column} is not that of {first}"
        require_equal(found, expected, what, "mix columns of one text encoder")


def selection_hash(dataset: Dataset, buckets: Sequence[Bucket | str], columns: str | Sequence[str]) -> str:
    """The hash of what a training reads: key, latents and texts of every row, and how shards divide the rows.

    A checkpoint stores it, because the order of samples continues only over the very same selection.
    """
    digest = xxhash.xxh3_128()
    for bucket in sorted(map(str, buckets)):
        index = dataset.index(bucket)
        digest.update(f"{bucket} {dataset.counts_per_shard(bucket)}\n".encode())
        for batch in index.select([KEY]).to_batches():
            digest.update("".join(f"{key}\n" for key in batch[KEY].to_pylist()).encode())
        for name in (LATENTS, *([columns] if isinstance(columns, str) else columns)):
            digest.update(index[index_field(name, CHECKSUM)].to_numpy().astype("<u8").tobytes())
    return digest.hexdigest()
