"""What a dataset is made of: its header, the fingerprints of its columns, and the manifest over its commits.

DATASET/dataset.json                          schema version and name, created first
DATASET/256x256x56/latents/fingerprint.json   how this column was made; another way is refused
DATASET/index/256x256x56-HASH.parquet         the samples of a bucket, in order
DATASET/manifest.json                         written last; a reader needs only this and the indexes
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from shards import storage
from shards.errors import DatasetError, ShardError
from shards.schema import (
    SCHEMA_VERSION,
    Bucket,
)
from shards.writer import (
    Commit,
    check_tar_name,
    check_version,
)

HEADER, MANIFEST, FINGERPRINT, INDEX = "dataset.json", "manifest.json", "fingerprint.json", "index"


@dataclass(frozen=True)
class ShardEntry:
    """One shard of one column: its tar, and the hashes (xxh3_128) of the tar's bytes and of the commit's."""

    number: int
    samples: int
    tar: str
    tar_bytes: int
    tar_hash: str
    commit_hash: str

    @classmethod
    def of(cls, commit: Commit) -> "ShardEntry":
        samples = commit.written.num_rows
        return cls(commit.number, samples, commit.tar, commit.tar_bytes, commit.tar_hash, commit.commit_hash)


@dataclass(frozen=True)
class ColumnEntry:
    """One column of a bucket, its shards ascending by number: the same numbers in every column."""

    fingerprint: dict[str, Any]
    shards: list[ShardEntry]


@dataclass(frozen=True)
class BucketEntry:
    """One bucket. ``statuses`` counts its planned clips: ``written``, and each reason of a reject."""

    index: str
    index_hash: str
    samples: int
    statuses: dict[str, int]
    columns: dict[str, ColumnEntry]


@dataclass(frozen=True)
class Manifest:
    """All that a reader needs beside the indexes.

    ``totals`` are the encode job's own counts. ``latent_rgb`` shows latents without a VAE: see ``latent_rgb.to_rgb``.
    """

    schema_version: int
    name: str
    totals: dict[str, Any]
    latent_rgb: list[list[float]]
    buckets: dict[str, BucketEntry]

    @classmethod
    def read(cls, path: storage.Place) -> "Manifest":
        """Reads manifest.json; DatasetError for another schema version, ShardError for damage."""
        data = _content(path)
        found = _json_object(data, path)
        try:
            check_version(found["schema_version"], path)
            del found["hash"]
            buckets = {name: _bucket_entry(entry, path) for name, entry in found["buckets"].items()}
            manifest = cls(**(found | {"buckets": buckets}))
        except (AttributeError, KeyError, TypeError) as error:
            raise ShardError(f"{path} is not a manifest ({error!r}): run the same encode again") from error
        if data != manifest.to_bytes():
            raise ShardError(f"{path} does not have the hash that it says: it is damaged; run the same encode again")
        return manifest

    def to_bytes(self) -> bytes:
        """The file: with ``hash``, the xxh3_128 of all the rest."""
        content = asdict(self)
        return json_bytes(content | {"hash": xxhash.xxh3_128_hexdigest(json_bytes(content))})


def create_dataset(path: storage.Location, name: str) -> storage.Place:
    """Makes the folder of a dataset, or checks that the one there has this name, which its keys depend on."""
    root = storage.place(path)
    storage.make_folder(root)
    header = {"schema_version": SCHEMA_VERSION, "name": name}
    if not storage.create_exclusive(root / HEADER, json_bytes(header)):
        found = read_header(root)
        if found.get("name") != name:
            raise DatasetError(f"{root} holds dataset {found.get('name')!r}, not {name!r}: use another folder")
    return root


def read_header(root: storage.Place) -> dict[str, Any]:
    """dataset.json of a dataset; DatasetError if there is none or another schema version wrote it."""
    if not storage.exists(root / HEADER):
        state = f"has no {HEADER}" if storage.exists(root) else "does not exist"
        raise DatasetError(f"{root} {state}: expected the output folder of an encode")
    header = read_json(root / HEADER)
    check_version(header.get("schema_version", 0), root / HEADER)
    return header


def ensure_fingerprint(
    path: storage.Location, bucket: Bucket | str, column: str, fingerprint: Mapping[str, Any]
) -> str:
    """Records how a column of a bucket is made, or checks that it is the recorded way; returns its hash.

    Raises DatasetError, which names each field that differs with both values.
    """
    folder = storage.place(path) / str(bucket) / column
    storage.make_folder(folder)
    if not storage.create_exclusive(folder / FINGERPRINT, json_bytes(fingerprint)):
        recorded = read_json(folder / FINGERPRINT)
        what = f"{folder} was encoded with other settings"
        require_equal(recorded, fingerprint, what, "use those settings or another output folder")
    return fingerprint_hash(fingerprint)


def fingerprint_hash(fingerprint: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json_bytes(fingerprint))


def require_equal(found: Mapping[str, Any], expected: Mapping[str, Any], what: str, advice: str) -> None:
    """Raises DatasetError with each field that differs, as a dotted path, unless both are equal as JSON."""
    differing = [f"{field} is {was}, expected {now}" for field, was, now in sorted(differences(found, expected))]
    if differing:
        raise DatasetError(f"{what}: {'; '.join(differing)}. To go on, {advice}")


def _bucket_entry(found: dict[str, Any], path: storage.Place) -> BucketEntry:
    columns = {}
    for name, column in found["columns"].items():
        shards = [ShardEntry(**shard) for shard in column["shards"]]
        for shard in shards:
            check_tar_name(shard.tar, path)
        columns[name] = ColumnEntry(column["fingerprint"], shards)
    return BucketEntry(**(found | {"columns": columns}))


def read_json(path: storage.Place) -> dict[str, Any]:
    """A file that holds one JSON object; ShardError if it does not."""
    return _json_object(_content(path), path)


def _content(path: storage.Place) -> bytes:
    try:
        return storage.read(path)
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error}") from error


def _json_object(data: bytes, path: storage.Place) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ShardError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise ShardError(f"{path} holds a {type(found).__name__}, expected a JSON object")
    return found


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Equal values give equal bytes, whatever the order of their keys."""
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Of each leaf that differs its dotted path, what it was and what it is: as JSON, or ``absent``."""
    was, is_now = _flat(before), _flat(now)
    leaves = ((path, was.get(path, "absent"), is_now.get(path, "absent")) for path in {**was, **is_now})
    return [leaf for leaf in leaves if leaf[1] != leaf[2]]


def _flat(value: Any, field: str = "") -> dict[str, str]:
    """Dotted path -> JSON text of each leaf."""
    if not isinstance(value, dict) or not value:
        return {field: json.dumps(value, sort_keys=True)}
    inner = (_flat(part, f"{field}.{name}" if field else name) for name, part in value.items())
    return {path: text for leaves in inner for path, text in leaves.items()}
