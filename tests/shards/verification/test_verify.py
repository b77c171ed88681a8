"""Verification: whole datasets are found whole, and whatever is done to a file is found and named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from shards.dataset import Dataset
from shards.errors import DatasetError
from shards.null_text import null_text_bytes
from shards.schema import LATENTS, MEAN, Reject, Sample, encode_record
from shards.verification.fault import Fault, Note, Tally
from shards.verification.verify import describe, verify
from shards.writer import commit_path, parquet_bytes, read_commit, write_shard

SIZE, LONG = "64x64x8", "64x64x16"
TEXT_COLUMN = "text.t5"
NULL = f"null.{TEXT_COLUMN}.safetensors"


def faults(root: Path) -> list[Fault]:
    return [finding for finding in verify(root) if isinstance(finding, Fault)]


def notes(root: Path) -> list[Note]:
    found = list(verify(root))
    assert not [finding for finding in found if isinstance(finding, Fault)]
    return [finding for finding in found if isinstance(finding, Note)]


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def tar_of(root: Path, number: int = 0, column: str = LATENTS) -> Path:
    (tar,) = (root / SIZE / column).glob(f"{number:06d}-*.tar")
    return tar


@pytest.fixture
def root(build: Callable[..., Path]) -> Path:
    """Two shards of two columns, and a reject."""
    return build({SIZE: [3, 2]}, rejects=[Reject("a", "timeout", "slow")], std=True)


def test_a_whole_dataset_has_no_fault_and_all_of_it_is_read(build: Callable[..., Path]) -> None:
    root = build({SIZE: [3, 0, 2], LONG: [1]}, texts=["t5", "new"], rejects=[Reject("a", "timeout", "")])
    tars, tally = [], Tally()
    tally.after_tar = lambda: tars.append(tally.records)
    assert not [finding for finding in verify(root, tally) if isinstance(finding, Fault)]
    files = [path for path in root.rglob("*") if path.is_file()]
    assert tally.files == len(files)
    assert tally.records == tars[-1] == 6 * 3 and len(tars) == 4 * 3
    assert tally.tar_bytes == sum(path.stat().st_size for path in files if path.suffix == ".tar")
    told, shards = describe(root)
    assert shards == len(tars) and f"{SIZE}/text.new: 3 shards" in told


def test_a_flipped_bit_in_a_tar_names_the_key_or_the_trailer(root: Path) -> None:
    """Name, .npy header, payload and padding of both members of each record, and the trailer."""
    whole = tar_of(root).read_bytes()
    rows = [row for row in Dataset.open(root).index(SIZE).to_pylist() if row["shard"] == 0]
    end = rows[-1]["latents.offset"] + rows[-1]["latents.length"]
    assert end == len(whole) - 1024
    for position in [*range(3, len(whole), 211), end, len(whole) - 1]:
        flip(tar_of(root), position, position % 8)
        (fault,) = faults(root)
        holders = [row["key"] for row in rows if row["latents.offset"] <= position]
        assert fault.part == ("trailer" if position >= end else holders[-1])
        assert fault.path == tar_of(root) and fault.path in fault.redo
        tar_of(root).write_bytes(whole)
    assert not faults(root)


def test_a_cut_tar_names_the_first_key_that_is_not_whole(root: Path) -> None:
    whole = tar_of(root).read_bytes()
    rows = Dataset.open(root).index(SIZE).to_pylist()[:3]
    begin, length = rows[1]["latents.offset"], rows[1]["latents.length"]
    for kept, part in (
        (0, rows[0]["key"]),
        (begin, rows[1]["key"]),  # at the border of two records
        (begin + 700, rows[1]["key"]),
        (begin + length - 1, rows[1]["key"]),
        (len(whole) - 1024, "trailer"),
        (len(whole) - 1, "trailer"),
    ):
        tar_of(root).write_bytes(whole[:kept])
        (fault,) = faults(root)
        assert (fault.path, fault.part) == (tar_of(root), part)
    tar_of(root).write_bytes(whole + b"x")
    (fault,) = faults(root)
    assert fault.part == "trailer" and "1 bytes after it" in fault.found


def test_a_flipped_bit_in_any_other_file_is_found(root: Path) -> None:
    (index,) = (root / "index").iterdir()
    own = (root / "dataset.json", root / SIZE / LATENTS / "fingerprint.json", root / NULL, index)
    commits = (commit_path(root / SIZE / column, 0) for column in (LATENTS, TEXT_COLUMN))
    for path in (*own, *commits, root / "manifest.json"):
        whole = path.read_bytes()
        for position in range(0, len(whole), len(whole) // 23):
            flip(path, position, position % 8)
            assert path in {fault.path for fault in faults(root)}, position
            path.write_bytes(whole)


def test_one_fault_does_not_hide_another(root: Path) -> None:
    rows = Dataset.open(root).index(SIZE).to_pylist()
    flip(commit_path(root / SIZE / LATENTS, 0), 30)
    flip(tar_of(root), rows[0]["latents.offset"] + 600)
    flip(tar_of(root), rows[2]["latents.offset"] + 600)
    flip(tar_of(root), tar_of(root).stat().st_size - 1)
    flip(root / SIZE / TEXT_COLUMN / "fingerprint.json", 3)
    os.truncate(tar_of(root, 1, TEXT_COLUMN), 100)
    found = {(fault.path, fault.part) for fault in faults(root)}
    assert found == {
        (commit_path(root / SIZE / LATENTS, 0), "file"),
        (tar_of(root), rows[0]["key"]),
        (tar_of(root), rows[2]["key"]),
        (tar_of(root), "trailer"),
        (root / SIZE / TEXT_COLUMN / "fingerprint.json", "file"),
        (tar_of(root, 1, TEXT_COLUMN), rows[3]["key"]),
    }


def test_without_commit_manifest_and_index_a_tars_name_still_vouches_for_it(root: Path) -> None:
    (index,) = (root / "index").iterdir()
    flip(index, 100)
    (root / "manifest.json").write_text("{")
    flip(commit_path(root / SIZE / LATENTS, 0), 30)
    flip(tar_of(root), 600)
    assert {(fault.path.name, fault.part) for fault in faults(root)} == {
        (index.name, "hash"),
        ("manifest.json", "file"),
        ("000000.parquet", "file"),
        (tar_of(root).name, "hash"),
    }


@pytest.mark.parametrize("column", [LATENTS, TEXT_COLUMN])
def test_a_tar_or_a_commit_that_is_gone(root: Path, column: str) -> None:
    tar, commit = tar_of(root, 1, column), commit_path(root / SIZE / column, 1)
    kept = tar.read_bytes()
    tar.unlink()
    (fault,) = faults(root)
    assert (fault.path, fault.part, fault.found) == (tar, "file", "nothing") and commit in fault.redo
    tar.write_bytes(kept)
    commit.unlink()
    (fault,) = faults(root)
    assert (fault.path, fault.part, fault.found) == (commit, "file", "nothing")


def test_swapped_tars_and_swapped_commits(root: Path) -> None:
    _swap(tar_of(root, 0), tar_of(root, 1))
    assert {fault.path for fault in faults(root)} == {tar_of(root, 0), tar_of(root, 1)}
    _swap(tar_of(root, 0), tar_of(root, 1))
    commits = [commit_path(root / SIZE / LATENTS, number) for number in (0, 1)]
    _swap(*commits)
    found = faults(root)
    for commit in commits:
        assert {"tar", "rows"} <= {fault.part for fault in found if fault.path == commit}


def _swap(first: Path, second: Path) -> None:
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


def test_a_shard_of_another_dataset(root: Path, samples: Callable[..., list]) -> None:
    """Its commit and its tar agree; the index knows other samples, and the fingerprint differs or not."""
    known = read_commit(commit_path(root / SIZE / LATENTS, 1))
    for fingerprint_hash, parts in ((known.fingerprint_hash, {"rows"}), ("f" * 32, {"rows", "fingerprint"})):
        tar_of(root, 1).unlink()
        commit_path(root / SIZE / LATENTS, 1).unlink()
        write_shard(root / SIZE / LATENTS, 1, samples(2, 40), fingerprint_hash=fingerprint_hash)
        found = faults(root)
        commit = commit_path(root / SIZE / LATENTS, 1)
        assert {fault.part for fault in found if fault.path == commit} == parts
        assert all(tar_of(root, 1) in fault.redo for fault in found if fault.path == commit)
        text = commit_path(root / SIZE / TEXT_COLUMN, 1)
        assert [fault.part for fault in found if fault.path == text] == ["keys"]


def test_a_commit_that_says_otherwise_than_the_index(root: Path) -> None:
    """The pages have new checksums, so that only the index can tell."""
    path = commit_path(root / SIZE / TEXT_COLUMN, 0)
    table = pq.read_table(path)
    hashes = pa.array(["ffff", *table["caption_hash"].to_pylist()[1:]])
    changed = table.set_column(table.schema.get_field_index("caption_hash"), "caption_hash", hashes)
    path.write_bytes(parquet_bytes(changed))
    (fault,) = faults(root)
    assert (fault.path, fault.part) == (path, "rows")
    path.write_bytes(parquet_bytes(table.replace_schema_metadata({**table.schema.metadata, b"more": b""})))
    (fault,) = faults(root)  # nothing that is read has changed
    assert (fault.path, fault.part) == (path, "file")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(root: Path, samples: Callable[..., list], bad: float) -> None:
    good = samples(1)[0]
    members = {MEAN: good.members[MEAN].copy()}
    members[MEAN][0, 1, 2, 0] = bad
    known = read_commit(commit_path(root / SIZE / LATENTS, 0)).fingerprint_hash
    write_shard(root / SIZE / LATENTS, 2, [Sample(good.key, members, good.attributes)], fingerprint_hash=known)
    (fault,) = faults(root)
    assert fault.part == good.key and "not finite" in fault.found


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda sample: Sample("other", sample.members, {}), "other names"),
        (lambda sample: Sample(sample.key, {MEAN: sample.members[MEAN][:1]}, {}), "shape"),
    ],
)
def test_a_record_that_is_not_its_rows(
    root: Path,
    samples: Callable[..., list],
    change: Callable[[Sample], Sample],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checksums agree: a writer that went wrong, as it would look."""
    monkeypatch.setattr("shards.writer.encode_record", lambda sample: encode_record(change(sample)))
    known = read_commit(commit_path(root / SIZE / LATENTS, 0)).fingerprint_hash
    write_shard(root / SIZE / LATENTS, 2, samples(1, 20), fingerprint_hash=known)
    (fault,) = faults(root)
    assert fault.part == samples(1, 20)[0].key and told in fault.found


def test_a_null_text_must_be_there_and_fit(root: Path) -> None:
    path = root / NULL
    for data, found in (
        (b"", "not a null text"),
        (null_text_bytes(np.full((1, 5), 0.5, np.float16)), "5"),
        (null_text_bytes(np.full((1, 6), np.inf, np.float16)), "not finite"),
        (safetensors.numpy.save({"embedding": np.zeros((2, 6), np.float16), "mask": np.ones(1, bool)}), "mask"),
        (safetensors.numpy.save({"embedding": np.zeros((1, 6), np.float16), "mask": np.ones(1, bool)}), "checksum"),
    ):
        path.write_bytes(data)
        (fault,) = faults(root)
        assert fault.path == path and found in fault.found and fault.redo == (path,)
    path.unlink()
    (fault,) = faults(root)
    assert (fault.path, fault.found) == (path, "nothing")


def test_a_plan_cannot_be_made_again(root: Path) -> None:
    (root / "plan").mkdir()
    parts = [root / "plan" / f"{number:06d}.parquet" for number in range(3)]
    for number, part in enumerate(parts):
        part.write_bytes(parquet_bytes(pa.table({"clip": list(range(number, 1000))})))
    assert not faults(root)
    flip(parts[1], 200)
    (fault,) = faults(root)
    assert (fault.path, fault.redo) == (parts[1], ()) and fault.advice == "restore it from a copy"
    parts[1].unlink()
    (fault,) = faults(root)
    assert (fault.path, fault.redo) == (parts[2], ()) and "000001" in fault.expected


def test_what_is_left_over_is_noted_and_is_no_fault(root: Path) -> None:
    garbage = [
        root / SIZE / LATENTS / "000001-01234567.tar",
        root / SIZE / LATENTS / ".000001.tar.abc.tmp",
        root / ".manifest.json.abc.tmp",
        root / "index" / "64x64x8-01234567.parquet",
    ]
    for path in garbage:
        path.write_bytes(b"x")
    assert {note.path for note in notes(root)} == set(garbage)


def test_a_dataset_that_is_not_finished_is_checked_as_far_as_it_goes(root: Path, samples: Callable[..., list]) -> None:
    known = read_commit(commit_path(root / SIZE / LATENTS, 0)).fingerprint_hash
    write_shard(root / SIZE / LATENTS, 2, samples(2, 10), fingerprint_hash=known)
    (note,) = notes(root)
    assert note.path == root / SIZE / LATENTS and "1 of 3 shards are not in the manifest" in note.message
    flip(tar_of(root, 2), 600)
    (fault,) = faults(root)
    assert fault.path == tar_of(root, 2) and fault.part == samples(2, 10)[0].key
    flip(tar_of(root, 2), 600)
    (root / "manifest.json").unlink()
    assert [fault.path.name for fault in faults(root)] == ["manifest.json"]
    shutil.rmtree(root / "index")
    assert any(note.path == root / "manifest.json" for note in notes(root))


def test_a_manifest_that_says_otherwise_than_the_commits(root: Path) -> None:
    path = root / "manifest.json"
    whole = json.loads(path.read_text())

    def change(*where: str | int, to: object) -> list[Fault]:
        changed = json.loads(json.dumps(whole))
        target = changed
        for name in where[:-1]:
            target = target[name]
        target[where[-1]] = to
        path.write_text(json.dumps(changed, sort_keys=True, indent=2) + "\n")
        return faults(root)

    bucket: tuple[str, ...] = ("buckets", SIZE)
    for where, to in (
        (("name",), "other"),
        ((*bucket, "statuses", "written"), 4),
        ((*bucket, "columns", LATENTS, "fingerprint", "fps"), 9),
        ((*bucket, "columns", TEXT_COLUMN, "shards", 1, "tar_hash"), "0" * 32),
        ((*bucket, "columns", TEXT_COLUMN, "shards", 1, "samples"), 3),
        ((*bucket, "index"), "../dataset.json"),
        ((*bucket, "samples"), 6),
        (("buckets", "../x"), whole["buckets"][SIZE]),
        (("totals",), {"clips": 9, "written": 5, "filtered": 1, "duplicates": 1, "pending": 0, "rejected": {"a": 1}}),
    ):
        found = change(*where, to=to)
        assert found and all(path in fault.redo for fault in found), (where, found)


def test_what_is_no_dataset_is_the_users_mistake(tmp_path: Path, root: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(DatasetError, match="expected the output folder of an encode"):
            list(verify(path))
    for name in ("dataset.json", "manifest.json"):
        newer = json.loads((root / name).read_text()) | {"schema_version": 2}
        (root / name).write_text(json.dumps(newer))
        if name == "dataset.json":
            assert any(fault.path == root / name for fault in faults(root))  # of one file alone: damage
    with pytest.raises(DatasetError, match="schema version 2"):
        list(verify(root))


def test_a_fault_is_told_in_one_line(root: Path) -> None:
    flip(tar_of(root, 0, TEXT_COLUMN), 600)
    (fault,) = faults(root)
    told = str(fault)
    key = Dataset.open(root).index(SIZE)["key"][0].as_py()
    assert told.startswith(f"fault: {tar_of(root, 0, TEXT_COLUMN)}: {key}: found checksum ")
    assert "--repair" in told and "\n" not in told
