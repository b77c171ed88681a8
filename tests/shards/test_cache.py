import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import xxhash

from shards import object_store
from shards.cache import TarCache
from shards.dataset import Dataset
from shards.errors import DatasetError, ShardError, StoreError
from shards.loader import DataConfig, Loader
from shards.order import SampleOrder
from shards.schema import LATENTS
from shards.storage import create_exclusive, list_folder, place, write_whole
from shards.tars import Tar
from tests.running import ROOT

SIZE = "64x64x8"
TAR_BYTES = 100_000


@pytest.fixture
def put(bucket):
    """Puts a tar of random bytes on the store."""

    def put(number: int) -> tuple[Tar, bytes]:
        data = np.random.default_rng(number).bytes(TAR_BYTES)
        path = place(bucket) / f"{number}.tar"
        create_exclusive(path, data)
        return Tar(path, xxhash.xxh3_128_hexdigest(data), len(data)), data

    return put


def read(cache: TarCache, tar: Tar, offset: int = 0, length: int = TAR_BYTES) -> bytes:
    buffer = bytearray(length)
    return bytes(buffer[: cache.read_into(tar, offset, memoryview(buffer))])


def start(script: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def reader(folder: Path, tar: Tar, before: str = "") -> subprocess.Popen:
    """A process that reads a tar through the cache."""
    return start(f"""
import os
from shards import object_store
from shards.cache import TarCache
from shards.storage import place
from shards.tars import Tar
{before}
cache = TarCache({str(folder)!r}, 10**6)
buffer = bytearray({tar.bytes})
cache.read_into(Tar(place({str(tar.path)!r}), {tar.hash!r}, {tar.bytes}), 0, memoryview(buffer))
import xxhash
print(xxhash.xxh3_128_hexdigest(buffer))
""")


def test_a_tar_is_fetched_once_and_read_at_any_place(put, downloads, tmp_path):
    tar, data = put(0)
    cache = TarCache(str(tmp_path / "cache"), 10**6)
    for offset, length in ((0, TAR_BYTES), (1000, 5000), (TAR_BYTES - 100, 500)):
        assert read(cache, tar, offset, length) == data[offset : offset + length]
    assert downloads(tar.path) == 1
    assert read(TarCache(str(tmp_path / "cache"), 10**6), tar) == data and downloads(tar.path) == 1


def test_the_bound_is_kept_and_what_was_read_least_recently_goes(put, downloads, tmp_path):
    tars = [put(number) for number in range(4)]
    for name in ("mine.tar", ".mine.1.part", "0123"):
        (tmp_path / name).write_text("")
    cache = TarCache(str(tmp_path), 3 * TAR_BYTES)
    for number in (0, 1, 2, 0, 3, 0, 2):  # 1 makes room for 3
        assert read(cache, tars[number][0]) == tars[number][1]
        time.sleep(0.002)  # the clock of the file system
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * TAR_BYTES
    assert [downloads(tar.path) for tar, _ in tars] == [1, 1, 1, 1]
    read(cache, tars[1][0])
    assert downloads(tars[1][0].path) == 2 and len(list(tmp_path.iterdir())) == 3 + len([".lock"]) + len(["mine"] * 3)


def test_tars_that_push_each_other_out_are_read_whole(put, tmp_path):
    tars = [put(number) for number in range(5)]
    cache, wrong, bound, done = TarCache(str(tmp_path), 3 * TAR_BYTES), [], [], threading.Event()

    def work(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(5, size=25):
            if read(cache, tars[number][0]) != tars[number][1]:
                wrong.append(number)

    def watch() -> None:
        while not done.is_set():
            names = {path.name.strip(".").partition(".")[0] for path in tmp_path.glob("*.*")}
            bound.append(len(names) <= 3)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    watcher = threading.Thread(target=watch)
    for thread in [watcher, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert not wrong and len(bound) > 10
    assert len(list(tmp_path.glob("*.tar"))) == 3 and not list(tmp_path.glob("*.part"))


def test_processes_share_one_download(put, downloads, tmp_path):
    tar, _ = put(0)
    slow = "import time; fetch = object_store.fetch\n"
    slow += "object_store.fetch = lambda path, target: (time.sleep(0.5), fetch(path, target))"
    processes = [reader(tmp_path, tar, slow) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == [tar.hash] * 2
    assert downloads(tar.path) == 1


def test_a_kill_in_a_download_leaves_no_tar_and_no_lock(put, downloads, tmp_path):
    (tar, data), (other, _) = put(0), put(1)
    dying = "object_store.fetch = lambda path, target: (target.write_bytes(bytes(1000)), os._exit(9))"
    for killed in (other, tar):
        process = reader(tmp_path, killed, dying)
        assert process.communicate(timeout=60)[0] == "" and process.returncode == 9
        (left,) = tmp_path.glob("*.*.*")  # what the one before had left went
        assert left.name == f".{killed.hash}.tar.{TAR_BYTES}.part"
    assert read(TarCache(str(tmp_path), TAR_BYTES), tar) == data and downloads(tar.path) == 1
    assert {path.name for path in tmp_path.iterdir()} == {f"{tar.hash}.tar", ".lock"}


def test_after_a_failed_download_one_tries_at_a_time(put, tmp_path, monkeypatch):
    (tar, data), fetch = put(0), object_store.fetch
    inside, calls, found = threading.Semaphore(1), [], []

    def failing(path, target):
        assert inside.acquire(blocking=False), "two at once"
        calls.append(1)
        time.sleep(0.005)
        inside.release()
        if len(calls) < 8:
            raise StoreError("the store is silent")
        fetch(path, target)

    def work() -> None:
        while True:
            with suppress(StoreError):
                found.append(read(TarCache(str(tmp_path), 10**6), tar))
                return

    monkeypatch.setattr(object_store, "fetch", failing)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [data] * 4 and len(calls) == 8


def test_a_tar_that_is_damaged_or_gone_on_the_store_is_found(put, tmp_path):
    (tar, data), cache = put(0), TarCache(str(tmp_path), 10**6)
    for damaged in (data[:-1], bytes([data[0] ^ 1]) + data[1:]):
        with write_whole(tar.path) as file:
            file.write(damaged)
        with pytest.raises(ShardError, match=f"{tar.path} has {len(damaged)} bytes and the hash .* says 100000 and"):
            read(cache, tar)
    tar.path.unlink()
    with pytest.raises(FileNotFoundError):
        read(cache, tar)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_copy_that_was_damaged_here_is_fetched_again(bucket, build, tmp_path):
    root = build({SIZE: [3]}, root=f"{bucket}/dataset")
    dataset = Dataset.open(root).through(TarCache(str(tmp_path), 10**6))
    expected = dataset.read(SIZE, 0, LATENTS)["mean.npy"]
    (copy,) = tmp_path.glob("*.tar")
    whole = copy.read_bytes()
    for damaged in (whole[:900] + b"\xff\xff" + whole[902:], whole[:900]):
        copy.write_bytes(damaged)
        with pytest.raises(ShardError, match=f"its copy in {tmp_path} was damaged there and is removed, run again"):
            dataset.read(SIZE, 0, LATENTS)
        assert np.array_equal(dataset.read(SIZE, 0, LATENTS)["mean.npy"], expected)


def test_training_fetches_each_tar_once_and_a_local_dataset_none(bucket, build, tmp_path, downloads):
    shape, folder = {SIZE: [5, 6, 7]}, tmp_path / "cache"
    root = build(shape, root=f"{bucket}/dataset")

    def batches(root, **settings):
        dataset, config = Dataset.open(root), DataConfig(window_shards=2, cache=str(folder), **settings)
        order = SampleOrder({SIZE: dataset.counts_per_shard(SIZE)}, {SIZE: 6}, 7, 2)
        return list(Loader(dataset, config, order, 0, 1).batches(0, 6))

    expected = batches(build(shape))
    assert not folder.exists()
    for one, other in zip(batches(root), expected, strict=True):
        assert one.keys == other.keys and np.array_equal(one.mean, other.mean) and np.array_equal(one.text, other.text)
    names = [name for column in (LATENTS, "text.t5") for name in list_folder(root / SIZE / column)]
    assert sum(name.endswith(".tar") for name in names) == len(list(folder.glob("*.tar"))) == 6
    for column in (LATENTS, "text.t5"):
        for name in list_folder(root / SIZE / column):
            if name.endswith(".tar"):
                assert downloads(root / SIZE / column / name) == 1
    with pytest.raises(DatasetError, match="data.cache_gb is 1e-06, the tars that are read together have .* GB: set"):
        batches(root, cache_gb=1e-6)


def test_the_cache_is_in_the_users_folder_unless_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert TarCache("", 1).folder == tmp_path / "x" / "wisesora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TarCache("", 1).folder == tmp_path / ".cache" / "wisesora"
