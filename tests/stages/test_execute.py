"""Shards on Ray with workers that are plain objects: order, deaths, errors."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pytest

from shards.errors import DatasetError, StoreError
from shards.schema import Bucket
from stages import execute
from stages.columns import Decoded, ShardReport
from stages.decoding.decode import Frames
from stages.errors import DecodeError, WorkError
from stages.execute import DecodeAhead, RuntimeConfig, run_shards
from stages.planning.plan import PlannedClip, ShardPlan
from tests.videos import numbered, write_video

BUCKET = Bucket(32, 32, 4)
ATTEMPTS = 2


class Worker:
    """Decodes its clips and notes what came; ends its process on shard 1, ``deaths`` times in all."""

    def __init__(self, folder: Path, deaths: int = 0):
        self.folder = folder
        self.deaths = deaths
        (folder / f"worker-{os.getpid()}").touch()

    def make_shard(self, plan: ShardPlan, decoded: Decoded) -> ShardReport:
        if plan.number == 1 and len(list(self.folder.glob("death-*"))) < self.deaths:
            (self.folder / f"death-{os.getpid()}").touch()
            os._exit(1)
        statuses = [
            f"{clip.key} {outcome.reason if isinstance(outcome, DecodeError) else outcome.pixels.shape}"
            for clip, outcome in zip(plan.clips, decoded, strict=True)
        ]
        return ShardReport(plan.bucket.name, plan.number, Counter(statuses))


class Refusing:
    def make_shard(self, plan: ShardPlan, decoded: Decoded) -> ShardReport:
        raise DatasetError(f"shard {plan.number} is not ours")


class Unlucky(Worker):
    """An object store fails its shard 1, after the first clip, ``failures`` times."""

    def __init__(self, folder: Path, failures: int):
        super().__init__(folder)
        self.failures = failures

    def make_shard(self, plan: ShardPlan, decoded: Decoded) -> ShardReport:
        if plan.number == 1 and self.failures:
            self.failures -= 1
            next(decoded)
            raise StoreError("s3://bucket/shard: no answer")
        return super().make_shard(plan, decoded)


class Slow(Worker):
    """Goes on after its second clip when it is told to."""

    def make_shard(self, plan: ShardPlan, decoded: Decoded) -> ShardReport:
        taken = [next(decoded), next(decoded)]
        end = time.monotonic() + 30
        while not (self.folder / "go").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        return super().make_shard(plan, chain(taken, decoded))


@pytest.fixture
def plans(tmp_path: Path) -> list[ShardPlan]:
    """Three shards of three clips, the middle one of each broken."""
    good = str(write_video(tmp_path / "good.mp4", numbered(24), rate=24))
    (tmp_path / "bad.mp4").write_bytes(b"no video")

    def clip(key: str, path: str) -> PlannedClip:
        return PlannedClip(key, key, "video", path, 0.0, 0.0, 8.0, 1.0, "a caption", None, None, None, None)

    names = [(f"{number}a", f"{number}b", f"{number}c") for number in range(3)]
    paths = (good, str(tmp_path / "bad.mp4"), good)
    return [ShardPlan(BUCKET, number, tuple(map(clip, keys, paths))) for number, keys in enumerate(names)]


def reports(make_worker: object, plans: list[ShardPlan], window_mb: int = 256) -> dict[int, list[str]]:
    runtime = RuntimeConfig(actors=2, attempts=ATTEMPTS, decode_window_mb=window_mb)
    return {report.number: list(report.statuses) for report in run_shards(make_worker, plans, runtime, "pyav")}  # type: ignore[arg-type]


def expected() -> dict[int, list[str]]:
    return {n: [f"{n}a (4, 32, 32, 3)", f"{n}b undecodable", f"{n}c (4, 32, 32, 3)"] for n in range(3)}


@pytest.mark.parametrize("window_mb", [256, 0])
def test_every_clip_comes_in_order_or_says_why_not(window_mb: int, ray: None, plans: list[ShardPlan], tmp_path: Path):
    assert reports(partial(Worker, tmp_path), plans, window_mb) == expected()


def test_no_actor_takes_a_second_shard_before_each_has_a_first(
    ray: None, plans: list[ShardPlan], tmp_path: Path
) -> None:
    done = list(run_shards(partial(Worker, tmp_path), plans, RuntimeConfig(actors=3), "pyav"))
    assert len(done) == len(list(tmp_path.glob("worker-*"))) == 3


def test_the_clips_of_unfinished_shards_are_told(ray: None, plans: list[ShardPlan], tmp_path: Path) -> None:
    told = []

    def watch(clips: int) -> None:
        told.append(clips)
        if clips == 4:  # two of each actor
            (tmp_path / "go").touch()

    done = list(run_shards(partial(Slow, tmp_path), plans, RuntimeConfig(actors=2), "pyav", watch))
    assert len(done) == 3 and 4 in told and max(told) <= 6


def test_the_shard_of_a_worker_that_died_is_made_again(ray: None, plans: list[ShardPlan], tmp_path: Path) -> None:
    assert reports(partial(Worker, tmp_path, ATTEMPTS - 1), plans) == expected()
    assert len(list(tmp_path.glob("death-*"))) == ATTEMPTS - 1


def test_a_shard_that_always_ends_its_worker_stops_the_job(ray: None, plans: list[ShardPlan], tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="shard 1 of 32x32x4 failed 2 times") as caught:
        reports(partial(Worker, tmp_path, 99), plans)
    end = time.monotonic() + 30
    while any(psutil.pid_exists(int(path.name.partition("-")[2])) for path in tmp_path.glob("worker-*")):
        assert time.monotonic() < end, f"a worker is left by {caught.value}"
        time.sleep(0.05)


def test_a_shard_that_an_object_store_fails_is_made_again_by_the_same_worker(
    ray: None, plans: list[ShardPlan], tmp_path: Path
) -> None:
    assert reports(partial(Unlucky, tmp_path, ATTEMPTS - 1), plans) == expected()
    assert len(list(tmp_path.glob("worker-*"))) == 2
    with pytest.raises(WorkError, match="shard 1 of 32x32x4 failed 2 times: s3://bucket/shard: no answer"):
        reports(partial(Unlucky, tmp_path, ATTEMPTS), plans)


def test_what_a_worker_raises_reaches_the_driver_as_it_is(ray: None, plans: list[ShardPlan]) -> None:
    with pytest.raises(DatasetError, match=r"^shard \d is not ours$"):
        reports(Refusing, plans)


def test_decoding_loads_no_torch() -> None:
    code = "import sys, stages.execute; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_frames_are_uint8_of_the_final_size(ray: None, plans: list[ShardPlan]) -> None:
    first, second, third = DecodeAhead(RuntimeConfig(), "pyav").frames_of(plans[0])
    assert isinstance(first, Frames) and isinstance(third, Frames)
    assert first.pixels.dtype == np.uint8 and np.array_equal(first.pixels, third.pixels)
    assert isinstance(second, DecodeError)


def test_the_clips_of_the_next_shard_are_decoded_while_one_is_made(ray: None, plans: list[ShardPlan]) -> None:
    ahead = DecodeAhead(RuntimeConfig(), "pyav")
    for _ in ahead.frames_of(plans[0], plans[1]):
        pass
    waiting = list(ahead._submitted)
    assert [job.clip.key for job, *_ in waiting] == ["1a", "1b", "1c"]
    assert len(list(ahead.frames_of(plans[1]))) == 3 and not ahead._submitted


@pytest.mark.parametrize(("read", "item", "reason"), [(time.sleep, 60, "timeout"), (os._exit, 1, "decoder_crash")])
def test_what_hangs_and_what_crashes_are_told_apart(read: Callable, item: int, reason: str, ray: None) -> None:
    timeout_s = 0.5
    for _ in range(execute.decoders()):  # that it waits for a place is no time of its own
        execute._decode.remote(time.sleep, [3 * timeout_s], 60)
    found = execute._alone(read, item, "a.mp4", timeout_s)
    assert isinstance(found, DecodeError) and (found.reason, "a.mp4" in str(found)) == (reason, True)


def test_a_shard_that_was_not_announced_gets_its_own_clips(ray: None, plans: list[ShardPlan]) -> None:
    ahead = DecodeAhead(RuntimeConfig(), "pyav")
    assert len(list(ahead.frames_of(plans[0], plans[1]))) == 3
    swapped = ShardPlan(BUCKET, 2, plans[2].clips[::-1][1:])  # broken, good
    first, second = ahead.frames_of(swapped)
    assert isinstance(first, DecodeError) and isinstance(second, Frames)
