"""Opening a dataset and reading any sample of it, checked.

Only the manifest and the indexes are read to open one; nothing is listed. Reading a sample is one positioned
read of its record, whose checksum is compared with the index before a byte of it is used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.numpy
import xxhash

from shards import storage
from shards.errors import DatasetError, ShardError
from shards.manifest import (
    INDEX,
    MANIFEST,
    BucketEntry,
    Manifest,
    compact,
    create_dataset,
    ensure_fingerprint,
    read_header,
    require_equal,
)
from shards.schema import (
    CHECKSUM,
    KEY,
    LATENTS,
    LENGTH,
    OFFSET,
    SHARD,
    TOKENS,
    Bucket,
    decode_record,
    index_field,
    index_schema,
)

_Value = TypeVar("_Value")
_RESTORE = "restore it from a copy, or remove it with its commit and run the same encode again"

__all__ = ["Dataset", "compact", "create_dataset", "ensure_fingerprint", "require_equal", "write_null_text"]


@dataclass(frozen=True, eq=False)
class _OpenBucket:
    entry: BucketEntry
    index: pa.Table
    tars: Mapping[str, Mapping[int, Path]]  # column -> shard number -> tar


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset whose encode has finished. A bucket is given as a Bucket or by its name."""

    path: Path
    manifest: Manifest
    buckets: list[Bucket]
    _opened: Mapping[str, _OpenBucket]

    @classmethod
    def open(
        cls, path: storage.Location, *, buckets: Sequence[Bucket | str] | None = None, text: str | None = None
    ) -> "Dataset":
        """Opens the dataset at ``path``.

        ``buckets`` chooses among its buckets (default: all). ``text`` is a text column, such as ``text.t5``,
        that each of them must have; the others are then left out. Raises DatasetError if the dataset, a
        bucket or the column is not there, ShardError if the manifest or an index is damaged.
        """
        root = storage.local_path(path)
        read_header(root)
        if not storage.exists(root / MANIFEST):
            raise DatasetError(f"{root} has no {MANIFEST}: its encode has not finished; run it again")
        manifest = Manifest.read(root / MANIFEST)
        names = list(manifest.buckets) if buckets is None else [str(bucket) for bucket in buckets]
        opened = {}
        for name in names:
            entry = _find(manifest.buckets, name, f"{root} has no bucket")
            if text is not None:
                _find(entry.columns, text, f"{root / name} has no column")
            opened[name] = _open_bucket(root, name, entry, [LATENTS, text] if text else list(entry.columns))
        return cls(root, manifest, sorted(map(Bucket.parse, names)), opened)

    def columns(self, bucket: Bucket | str) -> list[str]:
        """The columns of a bucket, ``latents`` first."""
        return sorted(self._open(bucket).tars)  # "latents" < "text.NAME"

    def fingerprint(self, bucket: Bucket | str, column: str) -> dict[str, Any]:
        """How a column of a bucket was made."""
        columns = self._open(bucket).entry.columns
        return _find(columns, column, f"{self.path / str(bucket)} has no column").fingerprint

    def shared(self, column: str, field: str) -> dict[str, Any]:
        """The part ``field`` of a column's fingerprint, which all buckets must agree on, else DatasetError.

        A model is trained on the latents of one ``vae`` and the text of one ``text_encoder``.
        """
        first = self.fingerprint(self.buckets[0], column)[field]
        for bucket in self.buckets[1:]:
            what = f"{self.path}: {field} of {bucket}/{column} is not that of {self.buckets[0]}"
            require_equal(self.fingerprint(bucket, column)[field], first, what, "choose buckets that agree")
        return first

    def index(self, bucket: Bucket | str) -> pa.Table:
        """One row a sample, ordered by shard and key (see ``schema.index_schema``)."""
        return self._open(bucket).index

    def counts_per_shard(self, bucket: Bucket | str) -> list[int]:
        """How many samples each shard holds, in the order of the index: what ``SampleOrder`` takes."""
        return [shard.samples for shard in self._open(bucket).entry.columns[LATENTS].shards]

    def tokens(self, bucket: Bucket | str, column: str) -> np.ndarray:
        """The true text length of each sample of a bucket, [rows] int32."""
        return self.index(bucket)[index_field(column, TOKENS)].to_numpy()

    def null_text(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """The embedding of the empty caption, [L, D] float16, and its mask, [L] bool."""
        path = _null_path(self.path, column)
        try:
            tensors = safetensors.numpy.load(storage.read(path))
            return tensors["embedding"], tensors["mask"]
        except FileNotFoundError as error:
            raise DatasetError(f"{path} does not exist: run the same encode again") from error
        except (safetensors.SafetensorError, KeyError) as error:
            raise ShardError(f"{path} is damaged ({error}): {_RESTORE}") from error

    def read(self, bucket: Bucket | str, row: int, column: str) -> dict[str, np.ndarray]:
        """The members of one sample in one column: suffix (``mean.npy``) -> array.

        Raises ShardError, which names the tar and the key, if the bytes are not those that were written.
        """
        opened = self._open(bucket)
        tars = _find(opened.tars, column, f"{self.path / str(bucket)} has no column")

        def of_row(field: str) -> Any:
            return opened.index[field][row].as_py()

        path, key = tars[of_row(SHARD)], of_row(KEY)
        offset, length = of_row(index_field(column, OFFSET)), of_row(index_field(column, LENGTH))
        record = _read_record(path, key, offset, length)
        found, expected = xxhash.xxh3_64_intdigest(record), of_row(index_field(column, CHECKSUM))
        if found != expected:
            raise ShardError(
                f"{path}: the record of {key} (bytes {offset} to {offset + length}) has the checksum "
                f"{found:016x}, the index says {expected:016x}: the tar is damaged; {_RESTORE}"
            )
        try:
            return decode_record(record)
        except ValueError as error:
            raise ShardError(f"{path}: the record of {key} is not of this format: {error}") from error

    def _open(self, bucket: Bucket | str) -> _OpenBucket:
        return _find(self._opened, str(bucket), f"{self.path} has no bucket")


def write_null_text(path: storage.Location, column: str, embedding: np.ndarray) -> None:
    """Stores the embedding of the empty caption, [L, D] float16, for all buckets; the first one stays."""
    if embedding.dtype != np.float16 or embedding.ndim != 2 or not len(embedding):
        raise ValueError(f"found {embedding.dtype} {embedding.shape}, expected float16 [L, D] with L >= 1")
    mask = np.ones(len(embedding), bool)
    target = _null_path(storage.local_path(path), column)
    data = safetensors.numpy.save({"embedding": np.ascontiguousarray(embedding), "mask": mask})
    if not storage.create_exclusive(target, data):
        found = safetensors.numpy.load(storage.read(target))["embedding"].shape
        if found != embedding.shape:
            raise DatasetError(
                f"{target} has the shape {found}, not {embedding.shape}: another text encoder made it; "
                "use another text column or another output folder"
            )


def _open_bucket(root: Path, name: str, entry: BucketEntry, columns: list[str]) -> _OpenBucket:
    """Reads the columns' part of a bucket's index, after a check of the whole file's hash."""
    path = root / INDEX / entry.index
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
    index = pq.read_table(pa.BufferReader(data), columns=index_schema(columns).names)
    tars = {
        column: {shard.number: root / name / column / shard.tar for shard in entry.columns[column].shards}
        for column in columns
    }
    return _OpenBucket(entry, index, tars)


def _read_record(path: Path, key: str, offset: int, length: int) -> bytes:
    try:
        record = storage.read_range(path, offset, length)
    except FileNotFoundError as error:
        raise ShardError(f"{path}, which holds {key}, does not exist: {_RESTORE}") from error
    if len(record) != length:
        raise ShardError(f"{path}: the record of {key} is cut, {len(record)} of {length} bytes are there: {_RESTORE}")
    return record


def _null_path(root: Path, column: str) -> Path:
    return root / f"null.{column}.safetensors"


def _find(known: Mapping[str, _Value], name: str, what: str) -> _Value:
    if name not in known:
        raise DatasetError(f"{what} {name}: found {', '.join(sorted(known)) or 'none'}")
    return known[name]
