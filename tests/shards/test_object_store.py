"""The same datasets on an S3 server: moto's, which keeps conditions and multipart uploads as Amazon's does."""

import pickle
import subprocess
import sys
import threading

import boto3
import numpy as np
import pytest
import s3fs
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from shards import storage
from shards.dataset import Dataset, create_dataset, ensure_fingerprint
from shards.errors import DatasetError, ShardError, StoreError
from shards.loader import DataConfig, Loader
from shards.order import SampleOrder
from shards.schema import LATENTS
from shards.storage import create_exclusive, list_folder, place, walk, write_whole
from shards.writer import commit_path, committed_numbers, read_commit, write_shard
from tests.running import ROOT

SIZE, LONG = "64x64x8", "64x64x16"
MIB = 2**20


def keys(bucket: str) -> list[str]:
    """What the server holds, by a client that is not ours."""
    found = boto3.client("s3").list_objects_v2(Bucket=bucket.removeprefix("s3://"))
    return [entry["Key"] for entry in found.get("Contents", [])]


def test_a_dataset_on_a_store_is_the_one_that_a_folder_would_hold(bucket, build, tmp_path):
    shape = {SIZE: [3, 0, 2], LONG: [2]}
    local, remote = build(shape, std=True), build(shape, std=True, root=f"{bucket}/deep/dataset")
    files = {str(path.relative_to(local)): path.read_bytes() for path in local.rglob("*") if path.is_file()}
    assert {key.removeprefix("deep/dataset/") for key in keys(bucket)} == files.keys() and len(files) > 20
    assert all(storage.read(remote / name) == data for name, data in files.items())
    here, there = Dataset.open(local), Dataset.open(str(remote))
    assert there.manifest == here.manifest and there.index(SIZE).equals(here.index(SIZE))
    for row in range(5):
        for column in (LATENTS, "text.t5"):
            found, expected = there.read(SIZE, row, column), here.read(SIZE, row, column)
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_batches_from_a_store_are_those_of_a_folder(bucket, build, tmp_path):
    shape = {SIZE: [5, 6]}
    roots = [build(shape), build(shape, root=f"{bucket}/dataset")]
    batches = []
    for root in roots:
        config = DataConfig(cache=str(tmp_path / "cache"))
        loader = Loader(Dataset.open(root), config, SampleOrder({SIZE: [5, 6]}, {SIZE: 4}, 7, 2), 0, 1)
        batches.append(list(loader.batches(0, 6)))
    for one, other in zip(*batches, strict=True):
        assert one.keys == other.keys and np.array_equal(one.mean, other.mean) and np.array_equal(one.text, other.text)


def test_a_tar_above_the_part_size_comes_in_parts_and_whole(bucket, monkeypatch, tmp_path):
    used = []
    upload = s3fs.S3FileSystem._upload_file_part_concurrent
    monkeypatch.setattr(
        s3fs.S3FileSystem, "_upload_file_part_concurrent", lambda *args, **more: used.append(1) or upload(*args, **more)
    )
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 * MIB)  # the least S3 takes
    data = np.random.default_rng(0).bytes(11 * MIB)
    with write_whole(place(bucket) / "big", final_name=lambda: "big.tar") as file:
        file.write(data)
        assert keys(bucket) == []
    assert keys(bucket) == ["big.tar"] and used
    assert storage.read(place(bucket) / "big.tar") == data
    head = boto3.client("s3").head_object(Bucket=bucket.removeprefix("s3://"), Key="big.tar")
    assert head["ETag"].strip('"').endswith("-3")  # three parts


@pytest.mark.parametrize("dies_at", ["upload_part 2", "complete_multipart_upload None"])
def test_a_writer_killed_in_an_upload_leaves_nothing_visible(dies_at, bucket, tmp_path):
    script = f"""
import os, sys, s3fs.core
from shards.storage import place, write_whole
s3fs.core.calculate_chunksize = lambda size, chunksize=None: 5 * 2**20
call = s3fs.S3FileSystem._call_s3
async def dying(self, method, *args, **more):
    if f"{{method}} {{more.get('PartNumber')}}" == sys.argv[1]:
        os._exit(9)
    return await call(self, method, *args, **more)
s3fs.S3FileSystem._call_s3 = dying
with write_whole(place({bucket!r}) / "a.tar") as file:
    file.write(bytes(11 * 2**20))
"""
    command = [sys.executable, "-c", script]
    assert subprocess.run([*command, dies_at], cwd=ROOT, timeout=60).returncode == 9
    uploads = boto3.client("s3").list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))["Uploads"]
    assert [upload["Key"] for upload in uploads] == ["a.tar"]
    assert keys(bucket) == [] and list_folder(place(bucket)) == [] and not storage.exists(place(bucket) / "a.tar")
    with pytest.raises(FileNotFoundError):
        storage.read(place(bucket) / "a.tar")
    subprocess.run([*command, "never"], cwd=ROOT, timeout=60, check=True)
    assert keys(bucket) == ["a.tar"] and storage.read(place(bucket) / "a.tar") == bytes(11 * MIB)


def test_a_writer_that_fails_leaves_nothing(bucket, samples):
    def stream():
        yield from samples(3)
        raise OSError("worker lost")

    with pytest.raises(OSError, match="worker lost"):
        write_shard(f"{bucket}/a/latents", 0, stream(), fingerprint_hash="f")
    assert keys(bucket) == []


def test_the_first_commit_wins(bucket, samples):
    folder = place(bucket) / "a" / LATENTS
    other = samples(2, start=10)

    def slow():
        yield samples(1)[0]
        write_shard(folder, 0, other, fingerprint_hash="f")  # another worker, faster

    commit = write_shard(folder, 0, slow(), fingerprint_hash="f")
    assert commit.written["key"].to_pylist() == [sample.key for sample in other]
    assert commit == read_commit(commit_path(folder, 0)) and committed_numbers(folder) == [0]
    assert storage.exists(folder / commit.tar)
    with pytest.raises(DatasetError, match="fingerprint f, expected g"):
        write_shard(folder, 0, [], fingerprint_hash="g")


def test_of_several_creators_one_wins(bucket):
    start, won = threading.Barrier(6), []

    def create(number: int) -> None:
        start.wait()
        won.append((create_exclusive(place(bucket) / "a", bytes([number]) * 1000), number))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (number for first, number in won if first)
    assert len(won) == 6 and storage.read(place(bucket) / "a") == bytes([winner]) * 1000


def test_headers_and_fingerprints_are_kept(bucket):
    create_dataset(bucket, "shapes")
    with pytest.raises(DatasetError, match="holds dataset 'shapes', not 'other'"):
        create_dataset(bucket, "other")
    ensure_fingerprint(bucket, SIZE, LATENTS, {"fps": 8})
    with pytest.raises(DatasetError, match="fps is 8, expected 9"):
        ensure_fingerprint(bucket, SIZE, LATENTS, {"fps": 9})


def test_what_another_process_wrote_is_seen_at_once(bucket):
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    folder = place(bucket) / "a"
    for number in range(3):
        assert list_folder(folder) == [f"{before}" for before in range(number)]
        assert not storage.exists(folder / str(number))
        client.put_object(Bucket=name, Key=f"a/{number}", Body=b"x")
        assert storage.exists(folder / str(number))
    client.put_object(Bucket=name, Key="a/0", Body=b"new")
    assert storage.read(folder / "0") == b"new"
    client.delete_object(Bucket=name, Key="a/0")
    assert list_folder(folder) == ["1", "2"] and list(walk(folder)) == ["1", "2"]


def test_a_folder_is_listed_and_walked_as_a_local_one(bucket, tmp_path):
    names = ["b.mp4", "a/z.mp4", "a/b/c.txt", "a.d/x", ".hidden", "a/.hidden/y", "é ü/1"]
    for root in (place(bucket) / "top", tmp_path / "top"):
        for name in names:
            storage.make_folder((root / name).parent)
            with write_whole(root / name) as file:
                file.write(name.encode())
        create_exclusive(root / "a" / "b.more", b"")
    here, there = tmp_path / "top", place(bucket) / "top"
    assert list(walk(there)) == list(walk(here)) == ["b.mp4", "a/b.more", "a/z.mp4", "a/b/c.txt", "a.d/x", "é ü/1"]
    for inside in ("", "a", "a/b", "none", "b.mp4"):
        assert list_folder(there / inside) == list_folder(here / inside)
    with pytest.raises(DatasetError, match="no folder at s3://.*/none"):
        walk(place(bucket) / "none")


def test_ranges_and_streams(bucket):
    path, data = place(bucket) / "clip.mp4", bytes(range(100))
    create_exclusive(path, data)
    for offset, length in ((10, 5), (95, 10), (100, 1), (200, 10), (0, 100), (3, 0)):
        buffer = bytearray(length)
        count = storage.read_into(path, offset, memoryview(buffer))
        assert buffer[:count] == data[offset : offset + length]
    with pytest.raises(FileNotFoundError):
        storage.read_into(path.with_name("none"), 0, memoryview(bytearray(1)))
    with storage.open_read(f"{bucket}/clip.mp4") as stream:
        assert stream.read(7) == data[:7] and stream.read() == data[7:]


def test_paths_survive_pickling(bucket):
    create_exclusive(place(bucket) / "a", b"content")
    again = pickle.loads(pickle.dumps(place(bucket) / "a"))
    assert again == place(bucket) / "a" and storage.read(again) == b"content"
    assert str(again) == f"{bucket}/a" and place(again) is again


def test_a_damaged_tar_on_a_store_is_found(bucket, build):
    root = build({SIZE: [2]}, root=f"{bucket}/dataset")
    dataset = Dataset.open(root)
    (name,) = (name for name in list_folder(root / SIZE / LATENTS) if name.endswith(".tar"))
    tar = root / SIZE / LATENTS / name
    whole = storage.read(tar)
    with write_whole(tar) as file:
        file.write(whole[:700] + b"\xff" + whole[701:1000])
    with pytest.raises(ShardError, match=f"{tar}: the record of .* is cut, 1000 of"):
        dataset.read(SIZE, 0, LATENTS)
    with pytest.raises(ShardError, match=f"{tar}: the record of .* is cut, 0 of"):
        dataset.read(SIZE, 1, LATENTS)
    with write_whole(tar) as file:
        file.write(whole[:700] + b"\xff" + whole[701:])
    with pytest.raises(ShardError, match="the tar is damaged"):
        dataset.read(SIZE, 0, LATENTS)
    boto3.client("s3").delete_object(Bucket=bucket.removeprefix("s3://"), Key=f"dataset/{SIZE}/latents/{name}")
    with pytest.raises(ShardError, match=f"{tar}, which holds .*, does not exist"):
        dataset.read(SIZE, 0, LATENTS)


def test_what_the_store_refuses_is_one_clear_line(bucket, monkeypatch):
    with pytest.raises(DatasetError, match="s3://no-such-bucket/a/dataset.json: .* make the bucket first"):
        create_dataset("s3://no-such-bucket/a", "name")
    with (
        pytest.raises(DatasetError, match="make the bucket first"),
        write_whole(place("s3://no-such-bucket/a")) as file,
    ):
        file.write(b"x")
    with pytest.raises(DatasetError, match="s3://no-such-bucket/a does not exist"):
        Dataset.open("s3://no-such-bucket/a")
    assert list_folder(place("s3://no-such-bucket/a")) == []
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    s3fs.S3FileSystem.clear_instance_cache()
    for use in (
        lambda: create_dataset(bucket, "name"),
        lambda: Dataset.open(bucket),
        lambda: list(walk(place(bucket))),
    ):
        with pytest.raises(DatasetError, match="the store answers 'Unable to locate credentials': check") as caught:
            use()
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match="the store answers 'Could not connect to the endpoint URL"):
        Dataset.open(bucket)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("AccessDenied", DatasetError),
        ("SignatureDoesNotMatch", DatasetError),
        ("SlowDown", StoreError),
        ("InternalError", StoreError),
        ("RequestTimeout", StoreError),  # of which fsspec leaves no word
    ],
)
def test_what_may_go_well_another_time_is_told_from_what_will_not(code, error, bucket, monkeypatch):
    async def failing(*_, **__):
        raise translate_boto_error(ClientError({"Error": {"Code": code, "Message": code}}, "GetObject"))

    create_exclusive(place(bucket) / "a", b"content")
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", failing)
    answer = {"RequestTimeout": "FSTimeoutError"}.get(code, code)
    with pytest.raises(error, match=f"{bucket}/a: the store answers .*{answer}"):
        storage.read(place(bucket) / "a")
    with pytest.raises(error, match=f"{bucket}/b: the store answers .*{answer}"):
        create_exclusive(place(bucket) / "b", b"content")
