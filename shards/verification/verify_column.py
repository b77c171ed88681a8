"""Checking one column of a bucket: its fingerprint, its shards one by one, and what is left over beside them."""

import re
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from shards import storage
from shards.errors import DatasetError, ShardError
from shards.manifest import FINGERPRINT, MANIFEST, ColumnEntry, fingerprint_hash, json_bytes, read_json
from shards.schema import KEY, LATENTS, MESSAGE, SHAPE, STATUS, commit_schema, index_field
from shards.verification.fault import Fault, Finding, Note, Tally, damage
from shards.verification.verify_shard import ExpectedShard, verify_shard
from shards.writer import Commit, commit_path, committed_numbers, read_commit

_VOTES = 3  # commits that are asked which fingerprint is the right one


@dataclass(frozen=True, eq=False)
class Index:
    """A bucket's index, and the shard of each of its rows."""

    table: pa.Table
    shards: np.ndarray  # [rows] int32, ascending

    def rows(self, column: str, number: int) -> pa.Table:
        """What it says of a shard of a column, in the fields of the column's commit."""
        begin, end = np.searchsorted(self.shards, [number, number + 1]).tolist()
        fields = [name for name in commit_schema(column).names if name not in (KEY, STATUS, MESSAGE)]
        found = self.table.select([KEY, *(index_field(column, name) for name in fields)])
        return found.slice(begin, end - begin).rename_columns([KEY, *fields])


class Column:
    """One column of a bucket, in its folder or in the manifest, and what was found in it.

    ``statuses`` counts the clips of the shards that the manifest knows; None if a commit of theirs is unreadable.
    ``widths`` are those of its text.
    """

    def __init__(self, root: storage.Place, bucket: str, name: str, entry: ColumnEntry | None):
        self.name, self.entry, self.folder = name, entry, root / bucket / name
        self._root, self._bucket = root, bucket
        self._entries = {shard.number: shard for shard in (entry.shards if entry else ())}
        self.numbers = sorted({*committed_numbers(self.folder)} | {*self._entries})
        self.statuses: Counter[str] | None = Counter()
        self.widths: set[int] = set()
        self._fingerprint_hash: str | None = None
        self._tars: set[str] = set()

    def verify_fingerprint(self, tally: Tally) -> Iterator[Finding]:
        """The file, the manifest and the commits know it; what most of them say is right."""
        path = self.folder / FINGERPRINT
        tally.files += 1
        own = None
        try:
            recorded = read_json(path)
            own = fingerprint_hash(recorded)
            if storage.read(path) != json_bytes(recorded):
                yield Fault(path, "file", "JSON laid out in another way", "the file as it was written", (path,))
        except (ShardError, ValueError) as error:
            yield Fault(path, "file", damage(path, error), "a fingerprint", (path,))
        listed = fingerprint_hash(self.entry.fingerprint) if self.entry else None
        votes = [vote for vote in (*self._votes(), listed, own) if vote]
        if not votes:
            return
        ((self._fingerprint_hash, _),) = Counter(votes).most_common(1)
        expected = f"{self._fingerprint_hash}, as others say"
        if own not in (None, self._fingerprint_hash):
            yield Fault(path, "fingerprint", f"{own}", expected, (path,))
        if listed not in (None, self._fingerprint_hash):
            manifest, part = self._root / MANIFEST, f"{self._bucket}/{self.name} fingerprint"
            yield Fault(manifest, part, f"{listed}", expected, (manifest,))

    def verify_shard(self, number: int, index: Index | None, tally: Tally) -> Generator[Finding, None, Commit | None]:
        """Every fault of one shard; returns its commit, if it is readable."""
        entry = self._entries.get(number)
        rows = index.rows(self.name, number) if index and entry else None
        shard = ExpectedShard(self._root, self.folder, number, self._fingerprint_hash, entry, rows)
        found = yield from verify_shard(shard, tally)
        self._tars |= found.tars
        if entry and found.commit is None:
            self.statuses = None
        elif entry and found.commit and self.statuses is not None:
            self.statuses.update(found.commit.table[STATUS].to_pylist())
        if found.commit and self.name != LATENTS:
            self.widths |= {shape[-1] for shape in found.commit.written[SHAPE].to_pylist()}
        return found.commit

    def leftovers(self) -> Iterator[Note]:
        """Shards that wait to be compacted, and files that nobody reads."""
        waiting = len(self.numbers) - len(self._entries)
        if waiting:
            message = f"{waiting} of {len(self.numbers)} shards are not in the manifest yet: run the same encode again"
            yield Note(self.folder, message)
        for name in storage.list_folder(self.folder):
            if name not in self._tars and name != FINGERPRINT and not re.fullmatch(r"[0-9]{6,}\.parquet", name):
                yield Note(self.folder / name, "no commit names it: left over, it may be removed")

    def _votes(self) -> Iterator[str]:
        for number in self.numbers[:_VOTES]:
            with suppress(ShardError, DatasetError):  # told with its shard
                yield read_commit(commit_path(self.folder, number)).fingerprint_hash
