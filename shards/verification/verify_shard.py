"""Checking one shard of one column: its commit against the manifest and the index, then its tar against the commit."""

import re
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from shards import storage
from shards.errors import DatasetError, ShardError
from shards.manifest import MANIFEST, ShardEntry
from shards.schema import KEY
from shards.verification.fault import Fault, Finding, Tally, damage
from shards.verification.verify_tar import ExpectedTar, verify_tar
from shards.writer import Commit, commit_path, read_commit


@dataclass(frozen=True, eq=False)
class ExpectedShard:
    """What the rest of the dataset says of a shard; None where it does not know the shard, or is damaged itself.

    ``folder`` is BUCKET/COLUMN. ``rows`` are those of the index, in the fields of a commit.
    """

    root: storage.Place
    folder: storage.Place
    number: int
    fingerprint_hash: str | None
    entry: ShardEntry | None
    rows: pa.Table | None

    @property
    def path(self) -> storage.Place:
        return commit_path(self.folder, self.number)


@dataclass(frozen=True, eq=False)
class FoundShard:
    """The commit, if it is readable, and the names of the tars that are the shard's own."""

    commit: Commit | None
    tars: frozenset[str]


def verify_shard(shard: ExpectedShard, tally: Tally) -> Generator[Finding, None, FoundShard]:
    """Every fault of a shard. A commit that is damaged does not hide its tar, of which others know too."""
    tally.files += 1
    commit, error = _read(shard)
    tars = _own_tars(shard, commit)
    redo = (shard.path, *(shard.folder / name for name in sorted(tars)))
    if commit is None:
        yield Fault(shard.path, "file", error, "the commit of a shard", redo)
    else:
        yield from _commit_faults(shard, commit, redo)
    for name in sorted(tars):
        yield from verify_tar(_expected_tar(shard, commit, name, redo), tally)
    return FoundShard(commit, tars)


def _read(shard: ExpectedShard) -> tuple[Commit | None, str]:
    try:
        return read_commit(shard.path), ""
    except (ShardError, DatasetError) as error:
        return None, damage(shard.path, error)


def _own_tars(shard: ExpectedShard, commit: Commit | None) -> frozenset[str]:
    known = commit or shard.entry
    if known:
        return frozenset([known.tar])
    names = storage.list_folder(shard.folder)
    return frozenset(name for name in names if re.fullmatch(rf"{shard.number:06d}-[0-9a-f]{{8}}\.tar", name))


def _commit_faults(shard: ExpectedShard, commit: Commit, redo: tuple[storage.Place, ...]) -> Iterator[Fault]:
    def fault(part: str, found: Any, expected: Any) -> Fault:
        return Fault(shard.path, part, f"{found}", f"{expected}", redo)

    if commit.fingerprint_hash != shard.fingerprint_hash:
        yield fault("fingerprint", commit.fingerprint_hash, f"{shard.fingerprint_hash}, that of the column")
    name = f"{shard.number:06d}-{commit.tar_hash[:8]}.tar"
    if commit.tar != name:
        yield fault("tar", commit.tar, f"{name}, by its number and its hash")
    keys = commit.table[KEY].to_pylist()
    if keys != sorted(set(keys)):
        yield fault("rows", "keys that are not in order", "each key once, in ascending order")
    same_rows = shard.rows is None or _same(commit.written, shard.rows)
    if not same_rows:
        yield fault("rows", "rows that are not those of the index", "its rows of this shard")
    found = ShardEntry.of(commit)
    if shard.entry and shard.entry.commit_hash != found.commit_hash:
        if same_rows:  # otherwise it is told above
            yield fault("file", f"the hash {found.commit_hash}", f"{shard.entry.commit_hash}, as the manifest says")
    elif shard.entry and shard.entry != found:
        manifest = shard.root / MANIFEST
        part = f"{shard.folder.parent.name}/{shard.folder.name}/{shard.number:06d}"
        yield Fault(manifest, part, f"{asdict(shard.entry)}", f"{asdict(found)}, as its commit says", (manifest,))


def _same(written: pa.Table, indexed: pa.Table) -> bool:
    """Whether a commit's rows are those of the index, in the fields that both have."""
    return written.select(indexed.column_names).equals(indexed)


def _expected_tar(
    shard: ExpectedShard, commit: Commit | None, name: str, redo: tuple[storage.Place, ...]
) -> ExpectedTar:
    known = commit or shard.entry
    rows = commit.written if commit else shard.rows
    return ExpectedTar(
        path=shard.folder / name,
        column=shard.folder.name,
        hash_start=known.tar_hash if known else name.partition("-")[2].removesuffix(".tar"),
        size_bytes=known.tar_bytes if known else None,
        rows=None if rows is None else rows.to_pylist(),
        redo=redo,
    )
