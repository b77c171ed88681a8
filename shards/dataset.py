"""Opening a dataset and reading any sample of it, checked.

Only the manifest and the indexes are read to open one; nothing is listed. Reading a sample is one positioned
read of its record, whole, whose checksum is compared with the index; the arrays given out are views of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import xxhash

from shards import storage
from shards.bucket_index import OpenBucket, Records, open_bucket
from shards.compaction import compact, incomplete_columns, lacking
from shards.errors import DatasetError, ShardError
from shards.manifest import MANIFEST, Manifest, create_dataset, ensure_fingerprint, read_header, require_equal
from shards.memory import empty_rows
from shards.node_tables import Share, own_table
from shards.null_text import null_text_bytes, null_text_path, parse_null_text
from shards.schema import LATENTS, Bucket, RecordLayout, record_layout
from shards.tars import RESTORE, Tar, Tars, TarsInPlace

_Value = TypeVar("_Value")

__all__ = ["Dataset", "compact", "create_dataset", "ensure_fingerprint", "require_equal", "write_null_text"]


class Record(NamedTuple):
    """A record to read: where it is, what the index says of it, and where its bytes go."""

    tar: Tar
    key: str
    offset: int
    length: int
    checksum: int
    buffer: memoryview
    layout: RecordLayout


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset whose encode has finished. A bucket is given as a Bucket or by its name."""

    path: storage.Place
    manifest: Manifest
    buckets: list[Bucket]
    _opened: Mapping[str, OpenBucket]
    _tars: Tars = TarsInPlace()

    @classmethod
    def open(
        cls,
        path: storage.Location,
        *,
        buckets: Sequence[Bucket | str] | None = None,
        text: str | Sequence[str] | None = None,
        filter: str = "",
        share: Share = own_table,
    ) -> "Dataset":
        """Opens the dataset at ``path``, a folder or a URL.

        ``buckets`` chooses among its buckets (default: all). ``text`` is a text column, such as ``text.t5``, or
        several, that each of them must have; the others are then left out. ``filter`` is a condition on the
        columns of the index (see ``filter.Filter``): samples for which it does not hold are as if not there.
        ``share`` may hold the indexes in memory once for several processes.
        Raises DatasetError if the dataset, a bucket or a column is not there or if the filter is none or leaves
        nothing, ShardError if the manifest or an index is damaged.
        """
        root = storage.place(path)
        read_header(root)
        if not storage.exists(root / MANIFEST):
            raise DatasetError(f"{root} has no {MANIFEST}: its encode has not finished; run it again")
        manifest = Manifest.read(root / MANIFEST)
        names = list(manifest.buckets) if buckets is None else [str(bucket) for bucket in buckets]
        texts = [text] if isinstance(text, str) else text
        opened = {}
        for name in names:
            entry = _find(manifest.buckets, name, root, "bucket")
            for column in texts or ():
                if column not in entry.columns and (shards := incomplete_columns(root, manifest).get(column)):
                    raise DatasetError(f"{root}: {lacking(column, shards)}")
                _find(entry.columns, column, root, name, "column")
            columns = [LATENTS, *texts] if texts else list(entry.columns)
            opened[name] = open_bucket(root, name, entry, columns, filter, share)
        if filter and not any(len(bucket.shard) for bucket in opened.values()):
            samples = sum(bucket.entry.samples for bucket in opened.values())
            raise DatasetError(f"data.filter: {filter!r} holds for none of the {samples} samples of {root}: widen it")
        return cls(root, manifest, sorted(map(Bucket.parse, names)), opened)

    def through(self, tars: Tars) -> "Dataset":
        """The same dataset, whose tars are read in another way."""
        return replace(self, _tars=tars)

    def columns(self, bucket: Bucket | str) -> list[str]:
        """The columns of a bucket, ``latents`` first."""
        return sorted(self._open(bucket).columns)  # "latents" < "text.NAME"

    def fingerprint(self, bucket: Bucket | str, column: str) -> dict[str, Any]:
        """How a column of a bucket was made."""
        columns = self._open(bucket).entry.columns
        return _find(columns, column, self.path, bucket, "column").fingerprint

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
        """How many samples of each shard are in the index, in its order: what ``SampleOrder`` takes."""
        opened = self._open(bucket)
        numbers = [shard.number for shard in opened.entry.columns[LATENTS].shards]
        ends = np.searchsorted(opened.shard, numbers, side="right")
        return (ends - np.searchsorted(opened.shard, numbers, side="left")).tolist()

    def tar_bytes(self, bucket: Bucket | str, column: str) -> list[int]:
        """The size of each tar of a column."""
        return [tar.bytes for tar in self._column(bucket, column).tars.values()]

    def shapes(self, bucket: Bucket | str, column: str) -> np.ndarray:
        """The shape of each sample's arrays in a column, [rows, axes] int32."""
        return self._column(bucket, column).shape

    def keys(self, bucket: Bucket | str, rows: np.ndarray) -> list[str]:
        """The keys of some samples of a bucket."""
        keys = self._open(bucket).keys
        return [keys[row].as_py() for row in rows.tolist()]

    def null_text(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """The embedding of the empty caption, [L, D] float16, and its mask, [L] bool."""
        path = null_text_path(self.path, column)
        try:
            embedding, mask = parse_null_text(storage.read(path))
        except FileNotFoundError as error:
            raise DatasetError(f"{path} does not exist: run the same encode again") from error
        except ValueError as error:
            raise ShardError(
                f"{path} is damaged ({error}): restore it from a copy, or remove it and run the same encode again"
            ) from error
        return embedding, mask

    def read(self, bucket: Bucket | str, row: int, column: str) -> dict[str, np.ndarray]:
        """The members of one sample in one column: suffix (``mean.npy``) -> array. Raises as ``read_records`` does."""
        layout = self.layout(bucket, row, column)
        memory = empty_rows(1, layout.length)
        self.read_records(self.records(bucket, np.array([row]), column, memory))
        return {suffix: array[0] for suffix, array in layout.members(memory).items()}

    def layout(self, bucket: Bucket | str, row: int, column: str) -> RecordLayout:
        """Where the members are in the record of a sample."""
        found = self._column(bucket, column)
        return record_layout(column, tuple(found.shape[row].tolist()), found.length.item(row))

    def records(
        self, bucket: Bucket | str, rows: np.ndarray, column: str, memory: Iterable[np.ndarray]
    ) -> list[Record]:
        """The records of some samples, for ``read_records``, each with an array uint8 of at least its length."""
        opened, found = self._open(bucket), self._column(bucket, column)
        looked_up = (opened.shard, found.offset, found.length, found.checksum, found.shape)
        entries = zip(self.keys(bucket, rows), memory, *(values[rows].tolist() for values in looked_up), strict=True)
        return [
            Record(
                found.tars[shard], key, offset, length, checksum,
                own.data[:length], record_layout(column, tuple(shape), length),
            )
            for key, own, shard, offset, length, checksum, shape in entries
        ]  # fmt: skip

    def read_records(self, records: Sequence[Record]) -> None:
        """Reads each record into its memory.

        Raises ShardError, which names the tar and the key, if the bytes are not those that were written.
        """
        # What is done between two of them is as little as can be: a record pushes all else out of the CPU's caches.
        read = [self._fill(record) for record in records]
        for record, (count, checksum) in zip(records, read, strict=True):
            self._check(record, count, checksum)

    def _fill(self, record: Record) -> tuple[int, int]:
        """Reads a record; how many bytes there were, and the checksum."""
        try:
            count = self._tars.read_into(record.tar, record.offset, record.buffer)
        except FileNotFoundError as error:
            raise ShardError(f"{record.tar.path}, which holds {record.key}, does not exist: {RESTORE}") from error
        return count, xxhash.xxh3_64_intdigest(record.buffer)

    def _check(self, record: Record, count: int, checksum: int) -> None:
        tar, length = record.tar, record.length
        if length != record.layout.length:
            raise ShardError(
                f"{tar.path}: the record of {record.key} is not of this format: it has {length} bytes, "
                f"expected {record.layout.length}"
            )
        if count != length:
            raise ShardError(
                f"{tar.path}: the record of {record.key} is cut, {count} of {length} bytes are there: "
                f"{self._tars.damaged(tar)}"
            )
        if checksum != record.checksum:
            raise ShardError(
                f"{tar.path}: the record of {record.key} (bytes {record.offset} to {record.offset + length}) has the "
                f"checksum {checksum:016x}, the index says {record.checksum:016x}: the tar is damaged; "
                f"{self._tars.damaged(tar)}"
            )
        try:
            record.layout.check(record.key, record.buffer)
        except ValueError as error:
            raise ShardError(f"{tar.path}: the record of {record.key} is not of this format: {error}") from error

    def _column(self, bucket: Bucket | str, column: str) -> Records:
        return _find(self._open(bucket).columns, column, self.path, str(bucket), "column")

    def _open(self, bucket: Bucket | str) -> OpenBucket:
        return _find(self._opened, str(bucket), self.path, "bucket")


def write_null_text(path: storage.Location, column: str, embedding: np.ndarray) -> None:
    """Stores the embedding of the empty caption, [L, D] float16, for all buckets; the first one stays."""
    target = null_text_path(storage.place(path), column)
    if not storage.create_exclusive(target, null_text_bytes(embedding)):
        found, _ = parse_null_text(storage.read(target))
        if found.shape != embedding.shape:
            raise DatasetError(
                f"{target} has the shape {found.shape}, not {embedding.shape}: another text encoder made it; "
                "use another text column or another output folder"
            )


def _find(known: Mapping[str, _Value], name: str, *inside: object) -> _Value:
    """``inside`` says where it was looked for: a path, names below it, and last what it is one of."""
    found = known.get(name)
    if found is None:
        *place, kind = map(str, inside)
        raise DatasetError(f"{'/'.join(place)} has no {kind} {name}: found {', '.join(sorted(known)) or 'none'}")
    return found
