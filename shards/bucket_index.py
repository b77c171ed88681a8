"""A bucket of an open dataset: the rows of its index that were chosen, and where their records are."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from shards import storage
from shards.errors import DatasetError, ShardError
from shards.filter import Filter
from shards.manifest import INDEX, BucketEntry, ColumnEntry
from shards.node_tables import Share
from shards.schema import CHECKSUM, KEY, LATENTS, LENGTH, OFFSET, SHAPE, SHARD, SPLIT, index_field, index_schema
from shards.tars import Tar


@dataclass(frozen=True, eq=False)
class Records:
    """Where the record of each row of a bucket's index is in one column."""

    tars: Mapping[int, Tar]  # by the number of the shard
    offset: np.ndarray  # [rows] int64
    length: np.ndarray  # [rows] int64
    checksum: np.ndarray  # [rows] uint64
    shape: np.ndarray  # [rows, axes] int32


@dataclass(frozen=True, eq=False)
class OpenBucket:
    """What is read of a bucket when it is opened; ``keys``, ``shard`` and the Records have the rows of ``index``."""

    entry: BucketEntry
    index: pa.Table
    keys: pa.Array
    shard: np.ndarray  # [rows] int32, ascending
    columns: Mapping[str, Records]


def open_bucket(
    root: storage.Place, name: str, entry: BucketEntry, columns: list[str], filter: str, share: Share
) -> OpenBucket:
    """Reads the columns' part of a bucket's index, after a check of the whole file's hash.

    ``filter`` says which rows are chosen; all if it is empty. It may use ``split``, a number from 0 to 1 that each
    source has of its own, the same in all datasets. Raises DatasetError where the filter is no condition on the
    index's columns, ShardError if the index is damaged.
    """
    index = share(lambda: _select(_read(root / INDEX / entry.index, entry, columns), filter))
    opened = {column: _records(root / name / column, entry.columns[column], index, column) for column in columns}
    return OpenBucket(entry, index, index[KEY].combine_chunks(), index[SHARD].to_numpy(), opened)


def _read(path: storage.Place, entry: BucketEntry, columns: list[str]) -> pa.Table:
    try:
        data = storage.read(path)
    except FileNotFoundError as error:
        raise ShardError(f"{path} does not exist: run the same encode again") from error
    found = xxhash.xxh3_128_hexdigest(data)
    if found != entry.index_hash:
        raise ShardError(
            f"{path} has the hash {found}, the manifest says {entry.index_hash}: "
            "the index is damaged; run the same encode again"
        )
    return pq.read_table(pa.BufferReader(data), columns=index_schema(columns).names)


def _select(index: pa.Table, filter: str) -> pa.Table:
    if not filter:
        return index
    try:
        condition = Filter.parse(filter)
        table = index.append_column(SPLIT, _split(index)) if SPLIT in condition.columns else index
        return index.filter(condition.mask(table))
    except ValueError as error:
        raise DatasetError(f"data.filter: {error}") from error


def _split(index: pa.Table) -> pa.Array:
    """A number of each row, evenly spread over [0, 1), to divide a dataset by: ``split < 0.01`` is a hundredth.

    A pure function of the row's source, so that all clips of a video are on one side; of its key where it has none.
    """
    sources = pc.coalesce(index["source"], index[KEY]).combine_chunks().dictionary_encode()
    words = [xxhash.xxh3_64_intdigest(f"split {source}".encode()) for source in sources.dictionary.to_pylist()]
    return pa.array(np.array(words, np.uint64) / 2**64).take(sources.indices)


def _records(folder: storage.Place, entry: ColumnEntry, index: pa.Table, column: str) -> Records:
    tars = {shard.number: Tar(folder / shard.tar, shard.tar_hash, shard.tar_bytes) for shard in entry.shards}
    offset, length, checksum = (index[index_field(column, name)].to_numpy() for name in (OFFSET, LENGTH, CHECKSUM))
    sizes = pc.list_flatten(index[index_field(column, SHAPE)]).to_numpy()
    return Records(tars, offset, length, checksum, sizes.reshape(len(offset), 4 if column == LATENTS else 2))
