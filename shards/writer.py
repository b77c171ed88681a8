"""One shard of one column, written whole or not at all.

First the tar, whose name carries the hash of its bytes; then the commit, ``000000.parquet``, created only if
there is none. The commit is what makes a shard exist: a tar that no commit names is garbage. After a kill at
any moment, doing the same again gives the same dataset.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from shards import storage
from shards.errors import DatasetError, ShardError
from shards.latent_rgb import LatentRgbFit
from shards.schema import (
    CHECKSUM,
    KEY,
    LENGTH,
    MESSAGE,
    OFFSET,
    SCHEMA_VERSION,
    SHAPE,
    STATUS,
    TAR_TRAILER,
    WRITTEN,
    Reject,
    Sample,
    check_sample,
    commit_schema,
    decode_record,
    encode_record,
    main_shape,
)

PARQUET: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
"""How every table is stored."""

_METADATA = b"wisesora"  # where the parquet file keeps what is true of the whole shard


@dataclass(frozen=True)
class Commit:
    """One committed shard of one column.

    ``table`` has a row for each planned clip, written or rejected, sorted by key (``schema.commit_schema``).
    ``latent_rgb`` are the sums of a shard of latents for ``latent_rgb.solve``.
    """

    number: int
    table: pa.Table
    tar: str
    tar_bytes: int
    tar_hash: str  # xxh3_128 of the file
    fingerprint_hash: str
    latent_rgb: list[list[float]]
    commit_hash: str  # xxh3_128 of this commit's own file

    @property
    def written(self) -> pa.Table:
        """The rows that have a record, in the order of the tar."""
        return self.table.filter(pc.equal(self.table[STATUS], WRITTEN))


def commit_path(folder: storage.Location, number: int) -> storage.Place:
    """Where the commit of a shard is; ``folder`` is BUCKET/COLUMN of a dataset."""
    return storage.place(folder) / f"{number:06d}.parquet"


def committed_numbers(folder: storage.Location) -> list[int]:
    """The numbers of the shards that a column has, ascending."""
    names = storage.list_folder(storage.place(folder))
    return sorted(int(name.partition(".")[0]) for name in names if re.fullmatch(r"[0-9]{6,}\.parquet", name))


def check_tar_name(name: str, found_in: storage.Place) -> str:
    """``name`` if it is a tar's plain file name: what a table says is never a path elsewhere or a command."""
    if not re.fullmatch(r"[0-9]{6,}-[0-9a-f]{8}\.tar", name):
        raise ShardError(f"{found_in} names {name!r} as a shard: expected NUMBER-HASH.tar")
    return name


def write_shard(
    folder: storage.Location,
    number: int,
    samples: Iterable[Sample],
    rejects: Iterable[Reject] = (),
    *,
    fingerprint_hash: str,
    latent_rgb: LatentRgbFit | None = None,
) -> Commit:
    """Writes and commits a shard, and returns the commit that counts: the first one.

    ``folder`` is BUCKET/COLUMN of a dataset; ``samples`` come in ascending order of keys and are not looked
    at if the shard is there already. ``rejects`` and ``latent_rgb`` are looked at after the samples are consumed, so
    that their maker may add to them meanwhile. Raises DatasetError if the shard there has another fingerprint.
    """
    folder = storage.place(folder)
    path = commit_path(folder, number)
    if not storage.exists(path):
        rows, tar = _write_tar(folder, number, samples)
        rows += [{KEY: reject.key, STATUS: reject.reason, MESSAGE: reject.message} for reject in rejects]
        sums = latent_rgb.sums() if latent_rgb else []
        about = {"schema_version": SCHEMA_VERSION, "fingerprint_hash": fingerprint_hash, "latent_rgb": sums} | tar
        storage.create_exclusive(path, _commit_bytes(folder.name, rows, about))
    commit = read_commit(path)
    if commit.fingerprint_hash != fingerprint_hash:
        raise DatasetError(
            f"{path} was encoded with other settings: fingerprint {commit.fingerprint_hash}, "
            f"expected {fingerprint_hash}; use another output folder"
        )
    return commit


def read_commit(path: storage.Place) -> Commit:
    """Reads what ``write_shard`` committed; DatasetError for another version, ShardError for damage."""
    try:
        data = storage.read(path)
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        about = json.loads(table.schema.metadata[_METADATA])
        check_version(about.pop("schema_version"), path)
        check_tar_name(about["tar"], path)
        about["commit_hash"] = xxhash.xxh3_128_hexdigest(data)
        commit = Commit(int(path.stem), table.replace_schema_metadata(None), **about)
        if commit.table.schema != commit_schema(path.parent.name):
            raise ValueError(f"fields {commit.table.schema.names}")
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{path} is not a readable commit: {error!r}; remove it and encode again") from error
    return commit


def read_samples(folder: storage.Location, commit: Commit) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Each written row of a commit and the members of its record; ShardError if the tar is damaged."""
    path = storage.place(folder) / commit.tar
    tar = storage.read(path)
    for row in commit.written.to_pylist():
        record = tar[row[OFFSET] : row[OFFSET] + row[LENGTH]]
        if xxhash.xxh3_64_intdigest(record) != row[CHECKSUM]:
            raise ShardError(f"{path}: the record of {row[KEY]} is not the one that was written: see pipelines.verify")
        yield row, decode_record(record)


def check_version(found: object, path: storage.Place) -> None:
    """DatasetError unless this version of the format wrote it."""
    if found != SCHEMA_VERSION:
        raise DatasetError(
            f"{path} has schema version {found}, this wisesora reads version {SCHEMA_VERSION}: "
            "use the wisesora that wrote it, or encode the dataset again"
        )


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a parquet file: equal tables give equal bytes, and a flipped bit is found on reading."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **PARQUET)
    return sink.getvalue().to_pybytes()


def _write_tar(folder: storage.Place, number: int, samples: Iterable[Sample]) -> tuple[list[dict], dict[str, Any]]:
    """The rows of the written samples, and what the commit says of the tar."""
    storage.make_folder(folder)
    digest = xxhash.xxh3_128()
    rows: list[dict] = []
    tar_bytes = 0

    def name() -> str:
        return f"{number:06d}-{digest.hexdigest()[:8]}.tar"

    with storage.write_whole(folder / f"{number:06d}.tar", final_name=name) as file:
        for sample in _ascending(samples):
            check_sample(folder.name, sample)
            record = encode_record(sample)
            rows.append(_row(sample, tar_bytes, record))
            digest.update(record)
            tar_bytes += file.write(record)
        digest.update(TAR_TRAILER)
        tar_bytes += file.write(TAR_TRAILER)
    return rows, {"tar": name(), "tar_bytes": tar_bytes, "tar_hash": digest.hexdigest()}


def _ascending(samples: Iterable[Sample]) -> Iterator[Sample]:
    last = ""
    for sample in samples:
        assert sample.key > last, f"keys must ascend: {sample.key} after {last}"
        last = sample.key
        yield sample


def _row(sample: Sample, offset: int, record: bytes) -> dict[str, Any]:
    location = {
        OFFSET: offset,
        LENGTH: len(record),
        CHECKSUM: xxhash.xxh3_64_intdigest(record),
        SHAPE: list(main_shape(sample)),
    }
    return {KEY: sample.key, STATUS: WRITTEN} | location | sample.attributes


def _commit_bytes(column: str, rows: list[dict], about: dict[str, Any]) -> bytes:
    rows = sorted(rows, key=lambda row: row[KEY])  # rejects come in any order
    keys = [row[KEY] for row in rows]
    assert len(set(keys)) == len(keys), "a clip is written once or rejected once, never both"
    schema = commit_schema(column).with_metadata({_METADATA: json.dumps(about, sort_keys=True)})
    return parquet_bytes(pa.Table.from_pylist(rows, schema=schema))
