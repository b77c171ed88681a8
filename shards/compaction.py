"""From the commits to what a reader opens: the index of each bucket, and the manifest, written last."""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from shards import latent_rgb, storage
from shards.errors import DatasetError
from shards.manifest import (
    FINGERPRINT,
    INDEX,
    MANIFEST,
    BucketEntry,
    ColumnEntry,
    Manifest,
    ShardEntry,
    fingerprint_hash,
    read_header,
    read_json,
)
from shards.schema import KEY, LATENTS, SHARD, STATUS, TEXT_PREFIX, Bucket, index_field, index_schema
from shards.writer import PARQUET, Commit, commit_path, committed_numbers, read_commit

GROUP_ROWS = 65_536
"""Of an index that are in memory at once, and in one of its parts."""


def compact(path: storage.Location, totals: Mapping[str, Any]) -> Manifest:
    """Makes the indexes and the manifest from the commits; the manifest is replaced as a whole, last.

    A bucket gets those of its text columns that cover every committed latent shard, key for key; DatasetError
    if there is none, or if columns disagree. A text column that is still being encoded is left out.
    """
    root = storage.place(path)
    header = read_header(root)
    names = [name for name in storage.list_folder(root) if committed_numbers(root / name / LATENTS)]
    if not names:
        raise DatasetError(f"{root} has no committed shard: run the encode again")
    sums: list[list[list[float]]] = []
    buckets = {str(bucket): _compact_bucket(root, bucket, sums) for bucket in sorted(map(Bucket.parse, names))}
    manifest = Manifest(totals=dict(totals), latent_rgb=latent_rgb.solve(sums), buckets=buckets, **header)
    with storage.write_whole(root / MANIFEST) as file:
        file.write(manifest.to_bytes())
    return manifest


def _compact_bucket(root: storage.Place, bucket: Bucket, sums: list[list[list[float]]]) -> BucketEntry:
    """One shard after the other, so that memory does not grow with them; appends those of their latents' colours."""
    folder = root / bucket.name
    numbers = committed_numbers(folder / LATENTS)
    columns = [LATENTS, *_complete_text_columns(folder, numbers)]
    entries = {column: ColumnEntry(read_json(folder / column / FINGERPRINT), []) for column in columns}
    hashes = {column: fingerprint_hash(entry.fingerprint) for column, entry in entries.items()}
    statuses: Counter[str] = Counter()

    def joined() -> Iterator[pa.Table]:
        for number in numbers:
            commits = {column: read_commit(commit_path(folder / column, number)) for column in columns}
            for column, commit in commits.items():
                _check_fingerprint(folder / column, commit, hashes[column])
                entries[column].shards.append(ShardEntry.of(commit))
            statuses.update(commits[LATENTS].table[STATUS].to_pylist())
            sums.append(commits[LATENTS].latent_rgb)
            yield _join_columns(folder, commits)

    index, index_hash = _write_index(root, bucket, index_schema(columns), joined())
    samples = sum(shard.samples for shard in entries[LATENTS].shards)
    return BucketEntry(index, index_hash, samples, dict(sorted(statuses.items())), entries)


def _write_index(root: storage.Place, bucket: Bucket, schema: pa.Schema, tables: Iterable[pa.Table]) -> tuple[str, str]:
    """The name of the file and the xxh3_128 of its bytes."""
    digest = xxhash.xxh3_128()

    def name() -> str:
        return f"{bucket}-{digest.hexdigest()[:8]}.parquet"

    storage.make_folder(root / INDEX)
    with storage.write_whole(root / INDEX / f"{bucket}.parquet", final_name=name) as file:
        with pq.ParquetWriter(pa.PythonFile(_Hashing(file, digest), "w"), schema, **PARQUET) as writer:
            for group in _groups(tables, schema):
                writer.write_table(group)
    return name(), digest.hexdigest()


class _Hashing(io.RawIOBase):
    """A file whose bytes are hashed as they are written."""

    def __init__(self, file: BinaryIO, digest: xxhash.xxh3_128):
        self._file, self._digest = file, digest

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()


def _groups(tables: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """The same rows, in tables of GROUP_ROWS or a little more."""
    held = [schema.empty_table()]
    for table in tables:
        held.append(table)
        if sum(part.num_rows for part in held) >= GROUP_ROWS:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def incomplete_columns(root: storage.Place, manifest: Manifest) -> dict[str, int]:
    """The text columns that a bucket lacks or has in part, and so its readers do not see -> the shards they lack."""
    made: Counter[str] = Counter()
    shards = 0
    for name, bucket in manifest.buckets.items():
        numbers = [shard.number for shard in bucket.columns[LATENTS].shards]
        made.update(_text_columns(root / name, numbers))
        shards += len(numbers)
    return {column: shards - count for column, count in sorted(made.items()) if count < shards}


def lacking(column: str, shards: int) -> str:
    """What to say of one of them."""
    return (
        f"{column} lacks {shards} shard{'s' * (shards > 1)} and cannot be used until encode --columns {column} has "
        "made the rest"
    )


def _text_columns(folder: storage.Place, numbers: Sequence[int]) -> dict[str, int]:
    """How many of these shards each text column of a bucket has."""
    return {
        column: len({*committed_numbers(folder / column)} & {*numbers})
        for column in storage.list_folder(folder)
        if column.startswith(TEXT_PREFIX)
    }


def _complete_text_columns(folder: storage.Place, numbers: Sequence[int]) -> list[str]:
    found = _text_columns(folder, numbers)
    complete = [column for column, shards in found.items() if shards == len(numbers)]
    if not complete:
        raise DatasetError(
            f"{folder} has no complete text column: {found or 'none'} of {len(numbers)} shards; "
            "run the same encode again"
        )
    return complete


def _join_columns(folder: storage.Place, commits: Mapping[str, Commit]) -> pa.Table:
    """The index's rows of one shard, from its commit in each column."""
    tables = {column: commit.written for column, commit in commits.items()}
    latents, number = tables[LATENTS], commits[LATENTS].number
    for column, table in tables.items():
        if not table[KEY].equals(latents[KEY]):
            raise DatasetError(
                f"{folder}: shard {number} has {latents.num_rows} samples in {LATENTS} and "
                f"{table.num_rows} in {column}, not the same keys: remove "
                f"{commit_path(folder / column, number)} and run the same encode again"
            )
    values = {index_field(column, name): table[name] for column, table in tables.items() for name in table.column_names}
    values |= {KEY: latents[KEY], SHARD: pa.array([number] * latents.num_rows, pa.int32())}
    schema = index_schema(list(tables))
    return pa.table([values[name] for name in schema.names], schema=schema)


def _check_fingerprint(folder: storage.Place, commit: Commit, expected: str) -> None:
    if commit.fingerprint_hash != expected:
        raise DatasetError(
            f"{commit_path(folder, commit.number)} has fingerprint {commit.fingerprint_hash}, "
            f"{FINGERPRINT} beside it {expected}: remove it and encode again"
        )
