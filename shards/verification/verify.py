"""Checking a whole dataset: everything that was written is read again, once.

Looked at: ``dataset.json``, the manifest, every index, fingerprint, commit, tar and null text, and the plan, each
against the others that know of it, so that a flipped bit that changes what a reader gets is found. Not looked at is
what is told to people, ``config.yaml`` and ``summary.json``, nor what nobody reads: statistics in the footer of a
plan's parquet file, and old indexes that the manifest no longer names. In memory are the index of one bucket, the
commits of one shard and one record.
"""

import re
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from shards import storage
from shards.errors import DatasetError, ShardError
from shards.manifest import HEADER, INDEX, MANIFEST, BucketEntry, Manifest, json_bytes, read_header
from shards.null_text import null_text_path, parse_null_text
from shards.schema import KEY, LATENTS, SCHEMA_VERSION, SHARD, Bucket, index_schema
from shards.verification.fault import Fault, Finding, Note, Tally, damage
from shards.verification.verify_column import Column, Index
from shards.writer import Commit, commit_path

PLAN = "plan"


def verify(dataset: storage.Location, tally: Tally | None = None) -> Iterator[Finding]:
    """Every Fault of a dataset, and a Note for what is left over or not finished; ``tally`` counts what was read.

    Raises DatasetError if there is no dataset, or one of another schema version.
    """
    root, tally = storage.place(dataset), tally or Tally()
    manifest = yield from _verify_heads(root, tally)
    widths: dict[str, set[int]] = {}
    for bucket, entry in _buckets(root, manifest).items():
        columns = yield from _verify_bucket(root, bucket, entry, tally)
        for column in columns:
            widths.setdefault(column.name, set()).update(column.widths)
    for name in sorted(widths.keys() - {LATENTS}):
        yield from _verify_null_text(root, name, widths[name], tally)
    yield from _verify_plan(root, tally)
    yield from _verify_other_indexes(root, manifest)
    yield from _leftovers(root, manifest)


def describe(dataset: storage.Location) -> tuple[str, int]:
    """What ``verify`` would read, in a few lines, and the number of shards; raises DatasetError as it does."""
    root = storage.place(dataset)
    manifest = _heads(root)[1]
    known = manifest if isinstance(manifest, Manifest) else None
    lines, total = [], 0
    for bucket, entry in _buckets(root, known).items():
        for column in _columns(root, bucket, entry):
            size = sum(shard.tar_bytes for shard in (column.entry.shards if column.entry else ()))
            lines.append(f"  {bucket}/{column.name}: {len(column.numbers)} shards, {size / 1e6:.1f} MB in the manifest")
            total += len(column.numbers)
    return "\n".join([f"{total} shards of {root} to read", *lines]), total


def _heads(root: storage.Place) -> tuple[dict[str, Any] | Exception, Manifest | Exception]:
    """dataset.json and the manifest, or what is wrong with each; raises where neither tells a dataset of ours."""
    header: dict[str, Any] | Exception
    manifest: Manifest | Exception
    try:
        header = read_header(root)
    except (ShardError, DatasetError) as error:
        header = error
    try:
        manifest = Manifest.read(root / MANIFEST)
    except (ShardError, DatasetError) as error:
        manifest = error
    if isinstance(header, DatasetError) and isinstance(manifest, Exception):
        raise header
    return header, manifest


def _verify_heads(root: storage.Place, tally: Tally) -> Generator[Finding, None, Manifest | None]:
    header, manifest = _heads(root)
    tally.files += 2
    if isinstance(header, Exception):
        yield Fault(root / HEADER, "file", damage(root / HEADER, header), "the name of the dataset", (root / HEADER,))
    elif storage.read(root / HEADER) != json_bytes(header):
        found = "JSON laid out in another way"
        yield Fault(root / HEADER, "file", found, "the file as it was written", (root / HEADER,))
    if isinstance(manifest, Exception):
        if storage.exists(root / MANIFEST) or storage.list_folder(root / INDEX):
            yield Fault(root / MANIFEST, "file", damage(root / MANIFEST, manifest), "a manifest", (root / MANIFEST,))
        else:
            yield Note(root / MANIFEST, "is not there: the encode has not finished, run it again")
        return None
    expected = {"schema_version": SCHEMA_VERSION, "name": manifest.name}
    if isinstance(header, dict) and header != expected:
        both = (root / HEADER, root / MANIFEST)
        yield Fault(root / HEADER, "name", f"{header}", f"{expected}, as {MANIFEST} says", both)
    for name in manifest.buckets:
        if not _is_bucket(name):
            yield Fault(root / MANIFEST, "buckets", repr(name), "names such as 64x64x8", (root / MANIFEST,))
    yield from _verify_totals(root / MANIFEST, manifest.totals)
    return manifest


def _verify_totals(path: storage.Place, totals: Mapping[str, Any]) -> Iterator[Finding]:
    """Everything is counted: the clips are the sum of what became of them."""
    parts = ("written", "filtered", "duplicates", "pending")
    if totals.keys() >= {"clips", "rejected", *parts}:
        counted = sum(totals[part] for part in parts) + sum(totals["rejected"].values())
        if totals["clips"] != counted:
            yield Fault(path, "totals", f"{totals['clips']} clips", f"{counted}, the sum of the others", (path,))


def _buckets(root: storage.Place, manifest: Manifest | None) -> dict[str, BucketEntry | None]:
    """The buckets in the folder or in the manifest, in order."""
    known = manifest.buckets if manifest else {}
    names = filter(_is_bucket, {*storage.list_folder(root), *known})
    return {name: known.get(name) for name in sorted(names, key=Bucket.parse)}


def _is_bucket(name: str) -> bool:
    try:
        Bucket.parse(name)
    except DatasetError:
        return False
    return True


def _columns(root: storage.Place, bucket: str, entry: BucketEntry | None) -> list[Column]:
    """The columns in a bucket's folder or in the manifest, ``latents`` first."""
    known = entry.columns if entry else {}
    found = {*storage.list_folder(root / bucket), *known}
    names = sorted(name for name in found if name == LATENTS or re.fullmatch(r"text\.[A-Za-z0-9_-]+", name))
    return [Column(root, bucket, name, known.get(name)) for name in names]


def _verify_bucket(
    root: storage.Place, bucket: str, entry: BucketEntry | None, tally: Tally
) -> Generator[Finding, None, list[Column]]:
    """The index, then shard by shard every column; returns the columns."""
    index = (yield from _read_index(root, entry, tally)) if entry else None
    columns = _columns(root, bucket, entry)
    for column in columns:
        yield from column.verify_fingerprint(tally)
    for number in sorted({number for column in columns for number in column.numbers}):
        commits = {}
        for column in columns:
            if number in column.numbers:
                commits[column.name] = yield from column.verify_shard(number, index, tally)
        yield from _verify_keys(root / bucket, commits)
    for column in columns:
        yield from column.leftovers()
    statuses = next((column.statuses for column in columns if column.name == LATENTS), None)
    if entry and statuses is not None and entry.statuses != statuses:
        manifest = root / MANIFEST
        expected = f"{dict(statuses)}, as the commits say"
        yield Fault(manifest, f"{bucket} statuses", f"{entry.statuses}", expected, (manifest,))
    return columns


def _read_index(root: storage.Place, entry: BucketEntry, tally: Tally) -> Generator[Finding, None, Index | None]:
    """The index, unless it is damaged."""
    path, manifest = root / INDEX / entry.index, root / MANIFEST
    if entry.index not in storage.list_folder(root / INDEX):
        yield Fault(path, "file", "nothing", "the index that the manifest names", (manifest,))
        return None
    tally.files += 1
    data = storage.read(path)
    found = xxhash.xxh3_128_hexdigest(data)
    if found != entry.index_hash:
        yield Fault(path, "hash", found, f"{entry.index_hash}, as {MANIFEST} says", (manifest, path))
        return None
    table = pq.read_table(pa.BufferReader(data))
    samples = {sum(shard.samples for shard in column.shards) for column in entry.columns.values()}
    if table.schema != index_schema(sorted(entry.columns)) or samples != {entry.samples} or len(table) != entry.samples:
        found = f"{table.num_rows} rows of {len(table.schema)} fields"
        expected = f"{entry.samples} samples in shards of {sorted(samples)} and the fields of {sorted(entry.columns)}"
        yield Fault(manifest, f"{entry.index} rows", found, expected, (manifest,))
        return None
    if pc.count_distinct(table[KEY]).as_py() != table.num_rows:
        yield Fault(path, "rows", "one key of two samples", "each key once", ())
    return Index(table, table[SHARD].to_numpy())


def _verify_keys(folder: storage.Place, commits: Mapping[str, Commit | None]) -> Iterator[Finding]:
    """The same keys in every column. Text is made from its latents' commit, so the text is at fault."""
    latents = commits.get(LATENTS)
    for column, commit in commits.items():
        if latents and commit and not commit.written[KEY].equals(latents.written[KEY]):
            path = commit_path(folder / column, commit.number)
            found = f"{commit.written.num_rows} keys that are not those of {LATENTS}"
            expected = f"the {latents.written.num_rows} keys of {LATENTS}"
            yield Fault(path, "keys", found, expected, (path, path.parent / commit.tar))


def _verify_null_text(root: storage.Place, column: str, widths: set[int], tally: Tally) -> Iterator[Finding]:
    path = null_text_path(root, column)
    tally.files += 1
    try:
        embedding, _ = parse_null_text(storage.read(path))
    except (OSError, ValueError) as error:
        yield Fault(path, "file", damage(path, error), "the embedding of the empty caption", (path,))
    else:
        if not widths <= {embedding.shape[1]}:
            yield Fault(path, "width", f"{embedding.shape[1]}", f"{sorted(widths)}, as the text is", (path,))


def _verify_plan(root: storage.Place, tally: Tally) -> Iterator[Finding]:
    """The plan is the encode's own: its pages have checksums, and nothing can make it again."""
    names = [name for name in storage.list_folder(root / PLAN) if name.endswith(".parquet")]
    for number, name in enumerate(names):
        path = root / PLAN / name
        tally.files += 1
        try:
            part = pq.ParquetFile(pa.BufferReader(storage.read(path)), page_checksum_verification=True)
            for group in range(part.num_row_groups):
                part.read_row_group(group)
        except (pa.ArrowException, OSError, ValueError) as error:
            yield Fault(path, "file", damage(path, error), "a part of the plan", ())
        if name.partition(".")[0] != f"{number:06d}":
            yield Fault(path, "file", "a part before it that is not there", f"{number:06d}.parquet", ())
            return


def _verify_other_indexes(root: storage.Place, manifest: Manifest | None) -> Iterator[Finding]:
    """Those that the manifest does not name; if it is damaged, what vouches for an index is its own name."""
    named = {entry.index for entry in manifest.buckets.values()} if manifest else set()
    for name in storage.list_folder(root / INDEX):
        path = root / INDEX / name
        if name in named or not name.endswith(".parquet"):
            continue
        if manifest:
            yield Note(path, "an index of an earlier manifest: it may be removed once nobody reads it")
        elif (found := xxhash.xxh3_128_hexdigest(storage.read(path)))[:8] != name.rpartition("-")[2][:8]:
            yield Fault(path, "hash", found, "the hash that its name begins with", (path,))


def _leftovers(root: storage.Place, manifest: Manifest | None) -> Iterator[Note]:
    """The temporary files outside of the columns' folders."""
    for folder in [root, root / PLAN, root / INDEX, *(root / name for name in _buckets(root, manifest))]:
        for name in storage.list_folder(folder):
            if name.startswith(".") and name.endswith(".tmp"):
                yield Note(folder / name, "a file that a kill left unfinished: it may be removed")
