import gc
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import xxhash

from shards.errors import DatasetError, ShardError
from shards.schema import LATENTS, MEAN, TEXT, Reject, Sample
from shards.writer import commit_path, committed_numbers, read_commit, write_shard
from tests.running import ROOT


def visible(folder: Path) -> dict[str, bytes]:
    """What a reader of a folder can see: everything but the temporary files of a killed writer."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def read_stock(*tars: Path) -> list[dict]:
    """What the stock package reads, with no code of ours."""
    found = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False).decode())
    gc.collect()  # it leaves its files open; let that warning come here, where it is filtered
    return found


@pytest.mark.filterwarnings("ignore:Exception ignored in.*[.]tar:pytest.PytestUnraisableExceptionWarning")
def test_stock_webdataset_reads_the_tars_and_zips_the_columns(tmp_path, samples):
    written = {
        column: [(samples(count, start, column=column), tmp_path / column) for count, start in ((5, 0), (3, 5))]
        for column in (LATENTS, "text.t5")
    }
    tars = {
        column: [
            folder / write_shard(folder, number, found, fingerprint_hash="f").tar
            for number, (found, folder) in enumerate(shards)
        ]
        for column, shards in written.items()
    }
    latents, texts = read_stock(*tars[LATENTS]), read_stock(*tars["text.t5"])
    expected = [sample for found, _ in written[LATENTS] for sample in found]
    assert len(latents) == len(texts) == len(expected) == 8
    for ours, latent, text in zip(expected, latents, texts, strict=True):
        assert ours.key == latent["__key__"] == text["__key__"]
        np.testing.assert_array_equal(latent[MEAN], ours.members[MEAN])
        assert latent[MEAN].dtype == text[TEXT].dtype == np.float16


def test_the_commit_says_what_the_tar_holds(tmp_path, samples):
    found = samples(4, std=True)
    commit = write_shard(tmp_path / LATENTS, 7, found, [Reject("a", "too_short", "0.5 s")], fingerprint_hash="f")
    tar = (tmp_path / LATENTS / commit.tar).read_bytes()
    assert (commit.number, commit.fingerprint_hash, commit.tar_bytes) == (7, "f", len(tar))
    assert commit.tar_hash == xxhash.xxh3_128_hexdigest(tar)
    assert commit.tar == f"000007-{commit.tar_hash[:8]}.tar"
    assert read_commit(commit_path(tmp_path / LATENTS, 7)) == commit
    assert commit.written["key"].to_pylist() == [sample.key for sample in found]
    end = 0
    for row, sample in zip(commit.written.to_pylist(), found, strict=True):
        record = tar[row["offset"] : row["offset"] + row["length"]]
        assert row["offset"] == end and row["checksum"] == xxhash.xxh3_64_intdigest(record)
        assert row["shape"] == [2, 4, 3, 3] and {**row, **sample.attributes} == row
        end += len(record)
    assert tar[end:] == bytes(1024)
    (reject,) = (row for row in commit.table.to_pylist() if row["status"] != "written")
    assert {name for name, value in reject.items() if value is not None} == {"key", "status", "message"}
    assert (reject["key"], reject["status"], reject["message"]) == ("a", "too_short", "0.5 s")


def test_equal_samples_give_equal_files_whatever_the_order_of_the_rejects(tmp_path, samples):
    rejects = [Reject(key, "undecodable", "no frames") for key in ("b", "a", "c")]
    write_shard(tmp_path / "a" / LATENTS, 0, samples(3), rejects, fingerprint_hash="f")
    write_shard(tmp_path / "b" / LATENTS, 0, iter(samples(3)), rejects[::-1], fingerprint_hash="f")
    files = visible(tmp_path / "a" / LATENTS)
    assert len(files) == 2 and files == visible(tmp_path / "b" / LATENTS)


def test_rejects_may_come_while_samples_stream(tmp_path, samples):
    rejects: list[Reject] = []

    def stream():
        for sample in samples(2):
            rejects.append(Reject(f"bad{len(rejects)}", "timeout", "30 s"))
            yield sample

    commit = write_shard(tmp_path / LATENTS, 0, stream(), rejects, fingerprint_hash="f")
    assert commit.table["status"].to_pylist().count("timeout") == 2 and commit.written.num_rows == 2


def test_a_shard_of_rejects_alone_is_a_shard(tmp_path):
    commit = write_shard(tmp_path / LATENTS, 0, [], [Reject("a", "timeout", "")], fingerprint_hash="f")
    assert (commit.table.num_rows, commit.written.num_rows, commit.tar_bytes) == (1, 0, 1024)
    assert committed_numbers(tmp_path / LATENTS) == [0]


def test_an_error_on_the_way_leaves_nothing(tmp_path, samples):
    def stream():
        yield from samples(3)
        raise OSError("worker lost")

    folder = tmp_path / LATENTS
    with pytest.raises(OSError, match="worker lost"):
        write_shard(folder, 0, stream(), fingerprint_hash="f")
    assert list(folder.iterdir()) == [] and committed_numbers(folder) == []


@pytest.mark.parametrize("moment", ["fsync", "replace", "link"])
def test_a_kill_leaves_nothing_visible_and_the_same_again_gives_the_same(tmp_path, samples, moment):
    """Killed while the tar is temporary (fsync, before the rename), and between the tar and its commit."""
    folder, never_killed = tmp_path / "killed" / "text.t5", tmp_path / "whole" / "text.t5"
    script = f"""
import os
import numpy as np
from shards.schema import Sample
from shards.writer import write_shard
os.{moment} = lambda *args, **kwargs: os._exit(9)
text = np.ones((2, 3), np.float16)
found = [Sample(key, {{"text.npy": text}}, {{"tokens": 2, "caption_hash": "0", "caption": None}}) for key in ("a", "b")]
write_shard({str(folder)!r}, 0, found, fingerprint_hash="f")
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 9
    assert committed_numbers(folder) == []
    assert [name for name in visible(folder) if moment != "link"] == []
    text = np.ones((2, 3), np.float16)
    found = [Sample(key, {TEXT: text}, {"tokens": 2, "caption_hash": "0", "caption": None}) for key in ("a", "b")]
    assert write_shard(folder, 0, found, fingerprint_hash="f") == write_shard(
        never_killed, 0, found, fingerprint_hash="f"
    )
    assert visible(folder) == visible(never_killed)


def test_the_first_commit_wins(tmp_path, samples):
    folder = tmp_path / LATENTS
    other = samples(2, start=10)

    def slow():
        yield samples(1)[0]
        write_shard(folder, 0, other, fingerprint_hash="f")  # another worker, faster

    commit = write_shard(folder, 0, slow(), fingerprint_hash="f")
    assert commit.written["key"].to_pylist() == [sample.key for sample in other]
    assert commit == read_commit(commit_path(folder, 0))
    assert (folder / commit.tar).exists()


def test_a_committed_shard_is_not_made_again(tmp_path, samples):
    def untouched():
        raise AssertionError("looked at")
        yield

    first = write_shard(tmp_path / LATENTS, 0, samples(2), fingerprint_hash="f")
    assert write_shard(tmp_path / LATENTS, 0, untouched(), fingerprint_hash="f") == first
    with pytest.raises(DatasetError, match="fingerprint f, expected g"):
        write_shard(tmp_path / LATENTS, 0, untouched(), fingerprint_hash="g")


def test_object_arrays_and_unordered_keys_are_refused(tmp_path, samples):
    first, second = samples(2)
    bad = Sample(first.key, {MEAN: np.array([[[[None]]]], dtype=object)}, first.attributes)
    with pytest.raises(ValueError, match="object"):
        write_shard(tmp_path / LATENTS, 0, [bad], fingerprint_hash="f")
    with pytest.raises(AssertionError, match="ascend"):
        write_shard(tmp_path / LATENTS, 0, [second, first], fingerprint_hash="f")
    with pytest.raises(AssertionError, match="never both"):
        rejects = [Reject(first.key, "timeout", "")]
        write_shard(tmp_path / LATENTS, 0, [first], rejects, fingerprint_hash="f")
    assert committed_numbers(tmp_path / LATENTS) == []


def test_a_folder_that_is_no_local_path_is_refused():
    with pytest.raises(DatasetError, match="pipe:"):
        write_shard("pipe:cat > a", 0, [], fingerprint_hash="f")


def test_a_damaged_commit_is_found(tmp_path, samples):
    write_shard(tmp_path / LATENTS, 0, samples(5), fingerprint_hash="f")
    path = commit_path(tmp_path / LATENTS, 0)
    whole = path.read_bytes()
    for content in (b"", whole[:-10], b"hello"):
        path.write_bytes(content)
        with pytest.raises(ShardError, match=f"{path} is not a readable commit"):
            read_commit(path)


def test_a_flipped_bit_in_the_rows_of_a_commit_never_gives_other_rows(tmp_path, samples):
    commit = write_shard(tmp_path / LATENTS, 0, samples(20), fingerprint_hash="f")
    path = commit_path(tmp_path / LATENTS, 0)
    whole = path.read_bytes()
    columns = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(0).to_dict()["columns"]
    end = max(column["data_page_offset"] for column in columns)
    found = 0
    for position in range(0, end, 11):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            assert replace(read_commit(path), commit_hash=commit.commit_hash) == commit  # a statistic
        except ShardError:
            found += 1
    assert found > end / 11 / 2


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        (
            b'"schema_version": 1',
            b'"schema_version": 2',
            DatasetError,
            "schema version 2, this wisesora reads version 1",
        ),
        (b'"tar": "000000-', b'"tar": "pipe:c-', ShardError, "expected NUMBER-HASH.tar"),
        (b'"tar": "000000-', b'"tar": "../../-', ShardError, "expected NUMBER-HASH.tar"),
    ],
)
def test_a_commit_of_another_version_or_of_a_strange_tar_is_refused(tmp_path, samples, old, new, error, message):
    write_shard(tmp_path / LATENTS, 0, samples(1), fingerprint_hash="f")
    path = commit_path(tmp_path / LATENTS, 0)
    table = pq.read_table(path)
    about = table.schema.metadata[b"wisesora"]
    assert old in about
    pq.write_table(table.replace_schema_metadata({b"wisesora": about.replace(old, new)}), path)
    with pytest.raises(error, match=message):
        read_commit(path)


def test_shards_are_found_by_their_commits_alone(tmp_path, samples):
    folder = tmp_path / LATENTS
    assert committed_numbers(folder) == []
    for number in (10, 2, 1_000_000):
        write_shard(folder, number, samples(1), fingerprint_hash="f")
    os.unlink(commit_path(folder, 10))
    (folder / ".000003.parquet.x.tmp").write_bytes(b"")
    assert committed_numbers(folder) == [2, 1_000_000]
