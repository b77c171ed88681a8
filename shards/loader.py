"""Batches for training, read ahead by threads.

Every rank computes the same global batch and reads its own slice of it. Text is padded to the longest caption
of the *global* batch, known from the index, so that all ranks have the same shapes in the same step.
"""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from shards.dataset import Dataset
from shards.errors import DatasetError
from shards.order import SampleOrder
from shards.schema import CHECKSUM, KEY, LATENTS, MEAN, SHAPE, STD, TEXT, Bucket, index_field, text_column


@dataclass(frozen=True)
class DataConfig:
    """Where the training data is and how it is read."""

    shards: str = ""  # the dataset's folder
    text: str = "t5"  # which text column: text.NAME
    window_shards: int = 8  # samples are shuffled within this many shards
    prefetch_batches: int = 4  # read ahead of the step
    read_threads: int = 2


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's share of a step. b samples; T frames, C channels, h x w of the latents; L tokens, D wide.

    The latents are as the VAE gives them, unscaled. Padding of the text is zero, and false in the mask.
    """

    step: int
    bucket: Bucket
    keys: list[str]
    positions: np.ndarray  # [b] int64, unique in the whole training (see ``order.GlobalBatch``)
    mean: np.ndarray  # [b, T, C, h, w] float16
    std: np.ndarray | None  # [b, T, C, h, w] float16, where the dataset stores it
    text: np.ndarray  # [b, L, D] float16
    text_mask: np.ndarray  # [b, L] bool

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

    Raises DatasetError if the ranks cannot share a batch evenly, or if the text column is missing somewhere
    or has another width than the null text.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, order: SampleOrder, rank: int, world: int):
        assert 0 <= rank < world
        for setting in ("prefetch_batches", "read_threads"):
            if getattr(config, setting) < 1:
                raise DatasetError(f"data.{setting} is {getattr(config, setting)}: set it to 1 or more")
        for bucket, size in order.batch_size.items():
            if size % world:
                raise DatasetError(
                    f"{bucket}: {world} ranks cannot share a batch of {size} samples evenly: use a multiple of {world}"
                )
        self._dataset, self._config, self._order = dataset, config, order
        self._rank, self._world = rank, world
        self._column = text_column(config.text)
        null, _ = dataset.null_text(self._column)
        self._null_tokens, self._width = null.shape
        self._tokens = {bucket: self._check_text(bucket) for bucket in order.batch_size}

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
        return self._keys(bucket, rows)

    def _keys(self, bucket: str, rows: np.ndarray) -> list[str]:
        return self._dataset.index(bucket)[KEY].take(pa.array(rows)).to_pylist()

    def _read(self, step: int) -> Batch:
        bucket, rows, positions = self._order.batch(step)
        share = len(rows) // self._world
        own = slice(self._rank * share, (self._rank + 1) * share)
        latents = [self._dataset.read(bucket, row, LATENTS) for row in rows[own].tolist()]
        texts = [self._dataset.read(bucket, row, self._column)[TEXT] for row in rows[own].tolist()]
        length = max(self._null_tokens, int(self._tokens[bucket][rows].max()))  # of all ranks' samples
        text, mask = _pad(texts, length, self._width)
        return Batch(
            step=step,
            bucket=Bucket.parse(bucket),
            keys=self._keys(bucket, rows[own]),
            positions=positions[own],
            mean=np.stack([members[MEAN] for members in latents]),
            std=np.stack([members[STD] for members in latents]) if STD in latents[0] else None,
            text=text,
            text_mask=mask,
        )

    def _check_text(self, bucket: str) -> np.ndarray:
        """The token counts of a bucket's samples, [rows], once its text is known to fit the null text."""
        if self._column not in self._dataset.columns(bucket):
            raise DatasetError(
                f"{self._dataset.path / bucket} has no column {self._column}: "
                f"found {', '.join(self._dataset.columns(bucket))}; set data.text to a text column's name"
            )
        shapes = self._dataset.index(bucket)[index_field(self._column, SHAPE)]
        widths = pc.unique(pc.list_element(shapes, 1)).to_pylist()
        if widths not in ([], [self._width]):
            raise DatasetError(
                f"{self._dataset.path / bucket / self._column} is {widths} wide, the null text "
                f"{self._width}: embeddings of different text encoders cannot be mixed"
            )
        return self._dataset.tokens(bucket, self._column)


def selection_hash(dataset: Dataset, buckets: Sequence[Bucket | str], column: str) -> str:
    """The hash of what a training reads: key, latents and text of every row, and how shards divide the rows.

    A checkpoint stores it, because the order of samples continues only over the very same selection.
    """
    digest = xxhash.xxh3_128()
    for bucket in sorted(map(str, buckets)):
        index = dataset.index(bucket)
        digest.update(f"{bucket} {dataset.counts_per_shard(bucket)}\n".encode())
        for batch in index.select([KEY]).to_batches():
            digest.update("".join(f"{key}\n" for key in batch[KEY].to_pylist()).encode())
        for name in (LATENTS, column):
            digest.update(index[index_field(name, CHECKSUM)].to_numpy().astype("<u8").tobytes())
    return digest.hexdigest()


def _pad(texts: list[np.ndarray], length: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """[b, L, D] float16, zero where [b, L] bool is false."""
    text = np.zeros((len(texts), length, width), np.float16)
    mask = np.zeros((len(texts), length), bool)
    for number, tokens in enumerate(texts):
        text[number, : len(tokens)] = tokens
        mask[number, : len(tokens)] = True
    return text, mask
