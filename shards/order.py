"""The order of samples in training: a pure function of (seed, step).

Each bucket is an endless stream of passes over its samples. A pass permutes the shards, cuts that sequence
into windows of ``window_shards``, and permutes the samples in each window, so that few shards are read at a
time. Batch b of a bucket takes the stream's positions [b B, (b + 1) B): nothing is dropped or doubled at the
end of a pass. Epoch e holds batches floor(e n / B) up to floor((e + 1) n / B) of each bucket of n samples,
those of all buckets shuffled together. No call depends on an earlier one, so that a resume continues exactly.
"""

import bisect
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from shards.errors import DatasetError


class GlobalBatch(NamedTuple):
    """The samples of one step, over all ranks; all of one bucket."""

    bucket: str
    rows: np.ndarray  # [B] int64, rows of the bucket's index
    positions: np.ndarray  # [B] int64, unique in the whole training: no other draw of any sample has it


class SampleOrder:
    """Which samples each step trains on.

    ``counts_per_shard`` and ``batch_size`` (of all ranks together) are by bucket. A bucket may have fewer
    samples than its batch: a batch then holds a sample more than once, from successive passes.
    """

    def __init__(
        self,
        counts_per_shard: Mapping[str, Sequence[int] | np.ndarray],
        batch_size: Mapping[str, int],
        seed: int,
        window_shards: int,
    ):
        if counts_per_shard.keys() != batch_size.keys():
            raise DatasetError(f"batch sizes of {sorted(batch_size)} for buckets {sorted(counts_per_shard)}")
        if min([window_shards, *batch_size.values()]) < 1:
            raise DatasetError(f"window_shards {window_shards}, batch sizes {dict(batch_size)}: at least 1 each")
        self.batch_size = {name: int(batch_size[name]) for name in sorted(batch_size)}
        self._counts = {name: np.asarray(counts_per_shard[name], np.int64) for name in self.batch_size}
        self._samples = {name: int(counts.sum()) for name, counts in self._counts.items()}
        if not any(self._samples.values()):
            raise DatasetError(f"no samples in the buckets {sorted(counts_per_shard)}: nothing to train on")
        self.seed = int(seed)
        self._window_shards = window_shards
        recent = functools.lru_cache(maxsize=2 * len(self.batch_size))  # memory only: the values are pure
        self._shuffled = recent(self._shuffle)
        self._shards, self._window = recent(self._permute_shards), recent(self._permute_window)

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step (from 0), in time that does not grow with the step."""
        epoch = self.epoch(step)
        place = int(self._shuffled(epoch)[step - self._batches_before(epoch)])
        for number, name in enumerate(self.batch_size):
            first, end = (self._bucket_batches_before(name, e) for e in (epoch, epoch + 1))
            if place < end - first:
                return self._bucket_batch(number, name, first + place)
            place -= end - first
        raise AssertionError("an epoch holds its buckets' batches and no others")

    def epoch(self, step: int) -> int:
        """The epoch that a step is in."""
        if step < 0:
            raise ValueError(f"steps count from 0, found {step}")
        high = 1
        while self._batches_before(high) <= step:
            high *= 2
        return bisect.bisect_right(range(high), step, key=self._batches_before) - 1

    def samples_before(self, step: int) -> dict[str, int]:
        """How many samples of each bucket, of all ranks, the steps before this one take, in time that does not grow
        with the step."""
        epoch = self.epoch(step)
        batches = {name: self._bucket_batches_before(name, epoch) for name in self.batch_size}
        places = self._shuffled(epoch)[: step - sum(batches.values())]
        place = 0
        for name in self.batch_size:
            end = place + self._bucket_batches_before(name, epoch + 1) - batches[name]
            batches[name] += int(np.count_nonzero((place <= places) & (places < end)))
            place = end
        return {name: count * self.batch_size[name] for name, count in batches.items()}

    def _batches_before(self, epoch: int) -> int:
        return sum(self._bucket_batches_before(name, epoch) for name in self.batch_size)

    def _bucket_batches_before(self, name: str, epoch: int) -> int:
        return epoch * self._samples[name] // self.batch_size[name]

    def _shuffle(self, epoch: int) -> np.ndarray:
        batches = self._batches_before(epoch + 1) - self._batches_before(epoch)
        return _permutation(batches, self.seed, "epoch", epoch)

    def _bucket_batch(self, number: int, name: str, batch: int) -> GlobalBatch:
        size = self.batch_size[name]
        start = batch * size
        positions = np.arange(start, start + size, dtype=np.int64) * len(self.batch_size) + number
        return GlobalBatch(name, self._stream(name, start, size), positions)

    def _stream(self, bucket: str, start: int, count: int) -> np.ndarray:
        """The rows at ``count`` positions of a bucket's stream; they may span windows and passes."""
        parts: list[np.ndarray] = []
        while count:
            number, place = divmod(start, self._samples[bucket])
            part = self._window_from(bucket, number, place)[:count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _window_from(self, bucket: str, number: int, place: int) -> np.ndarray:
        """The rows of pass ``number`` from position ``place`` of it to the end of the window it lies in."""
        _, ends = self._shards(bucket, number)
        window = int(np.searchsorted(ends, place, side="right")) // self._window_shards
        begin = int(ends[window * self._window_shards - 1]) if window else 0
        return self._window(bucket, number, window)[place - begin :]

    def _permute_shards(self, bucket: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of a bucket in the order of pass ``number``, and where in the pass each of them ends."""
        counts = self._counts[bucket]
        shards = _permutation(len(counts), self.seed, "shards", bucket, number)
        return shards, np.cumsum(counts[shards])

    def _permute_window(self, bucket: str, number: int, window: int) -> np.ndarray:
        counts, width = self._counts[bucket], self._window_shards
        starts = np.cumsum(counts) - counts
        chosen = self._shards(bucket, number)[0][window * width : (window + 1) * width]
        rows = np.concatenate([np.arange(starts[shard], starts[shard] + counts[shard]) for shard in chosen])
        return rows[_permutation(len(rows), self.seed, "samples", bucket, number, window)]


def batch_sizes(sample_tokens: Mapping[str, int], batch_tokens: int, multiple: int) -> dict[str, int]:
    """The batch of each bucket: the most samples of ``sample_tokens`` each that have at most ``batch_tokens`` together.

    It is a multiple of ``multiple``, and at least one, even if that has more tokens. The number of ranks is not asked
    for, so that it changes neither the samples of a step nor their order.
    """
    return {name: max(batch_tokens // tokens // multiple, 1) * multiple for name, tokens in sample_tokens.items()}


class FixedOrder:
    """Given rows of each bucket, each once: what is read again and again to validate.

    A bucket's last batch is filled up with rows that it has already; their position is -1.
    """

    def __init__(self, rows: Mapping[str, Sequence[int]], batch_size: Mapping[str, int]):
        self.batch_size = {name: batch_size[name] for name in sorted(rows) if len(rows[name])}
        self.seed = 0
        self._batches: list[GlobalBatch] = []
        position = 0
        for name, size in self.batch_size.items():
            for start in range(0, len(rows[name]), size):
                own = np.array(rows[name][start : start + size], np.int64)
                positions = np.full(size, -1, np.int64)
                positions[: len(own)] = np.arange(position, position + len(own))
                self._batches.append(GlobalBatch(name, np.resize(own, size), positions))
                position += len(own)
        self.samples = position

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step, from 0 to below the length."""
        return self._batches[step]


def _permutation(length: int, *key: int | str) -> np.ndarray:
    """A permutation that depends on ``key`` alone.

    Made from Philox's raw words, whose stream numpy keeps for ever; ``Generator.permutation`` may change.
    """
    words = np.random.Philox(key=xxhash.xxh3_128_intdigest(repr(key).encode())).random_raw(length)
    return np.argsort(words, kind="stable")
