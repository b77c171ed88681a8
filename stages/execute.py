"""Run shard work on Ray: actors that hold one model each, fed by decode tasks; the only file that imports ray.

An actor makes one shard at a time. Its clips, and then those of the shard it makes next, are decoded ahead, in
order, within a window bounded in bytes, by tasks anywhere in the cluster. An actor or a task that dies, with its
node or alone, is replaced and its work redone; commits make that harmless.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from shards import storage
from shards.errors import DatasetError
from shards.schema import Bucket
from stages.decode import Decoder, Frames, decode_source, hard_deadline
from stages.errors import ConfigError, DecodeError, WorkError, at_least
from stages.metadata import Row
from stages.plan_table import PlannedClip, ShardPlan
from stages.probe import probe_row
from stages.pyav_reader import VideoInfo

if TYPE_CHECKING:  # the decode processes load no torch
    from stages.columns import Decoded, ShardReport

DECODES_A_PROCESS = 500  # then Ray starts a fresh one: decoders leak
HANGING = 2  # times the timeout: the decoder is stuck in one call, and its process is ended
PROBES_A_TASK, PROBE_TASKS_AHEAD = 16, 64
TRANSIENT = ("timeout", "io_error", "decoder_crash")


_Found = TypeVar("_Found")


@dataclass(frozen=True)
class RuntimeConfig:
    """How the job uses its machines; nothing here changes what is written.

    actors: processes that hold a model, 0 for one a GPU (one on a machine without).
    threads: of an actor on a CPU. decoders: processes that decode at once on this machine, 0 for one a core; a
    cluster has its own number. decode_window_mb: decoded frames that wait for one actor, at most.
    clip_timeout_s: for decoding one clip. attempts: for whatever may fail by chance.
    dashboard: show Ray's, at http://127.0.0.1:8265 (a cluster has its own).
    """

    actors: int = 0
    decoders: int = 0
    dashboard: bool = False
    threads: int = 1
    decode_window_mb: int = 256
    clip_timeout_s: float = 120.0
    attempts: int = 3

    def __post_init__(self) -> None:
        at_least(self, 0, "actors", "decoders", "decode_window_mb")
        at_least(self, 1, "threads", "attempts")
        at_least(self, 0.1, "clip_timeout_s")


class Worker(Protocol):
    """What an actor holds: made once a process, then one call a shard."""

    def make_shard(self, plan: ShardPlan, decoded: "Decoded") -> "ShardReport": ...


@contextmanager
def running(runtime: RuntimeConfig) -> Iterator[None]:
    """Within the cluster that RAY_ADDRESS names, else one on this machine that ends with the block."""
    address = os.environ.get("RAY_ADDRESS", "local")
    local: dict[str, Any] = {}
    if address == "local":
        local = {"include_dashboard": runtime.dashboard, "num_cpus": runtime.decoders or None}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster at RAY_ADDRESS={address}: start one, or unset it ({error})") from None
    try:
        yield
    finally:
        ray.shutdown()


def gpus() -> int:
    """Of the whole cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def decoders() -> int:
    """How many decode tasks the cluster runs at once."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def places(runtime: RuntimeConfig) -> int:
    """How many actors work at once."""
    return runtime.actors or gpus() or 1


def run_shards(
    make_worker: Callable[[], Worker], plans: Iterable[ShardPlan], runtime: RuntimeConfig, decoder: Decoder
) -> Iterator["ShardReport"]:
    """Make every shard, on as many actors as there are places for; reports come as shards are finished.

    Raises WorkError when a shard's actor died ``attempts`` times, and whatever ``make_shard`` raised.
    """
    actor_type: Any = ray.remote(num_gpus=1 if gpus() else 0, num_cpus=0, scheduling_strategy="SPREAD")(_ShardActor)
    todo = (_Job(plan) for plan in plans)
    running: dict[Any, _Lane] = {}

    def begin(job: _Job | None, following: _Job | None, actor: Any = None) -> None:
        if job:
            actor = actor or actor_type.remote(make_worker, runtime, decoder)
            reference = actor.make.remote(job.plan, following.plan if following else None)
            running[reference] = _Lane(actor, job, following)

    for _ in range(places(runtime)):
        begin(next(todo, None), next(todo, None))
    while running:
        (done,), _ = ray.wait(list(running))
        lane = running.pop(done)
        try:
            yield ray.get(done)
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            ray.kill(lane.actor)  # if it is out of reach only
            begin(lane.job.again(runtime.attempts, error), lane.following)
        else:
            begin(lane.following or _steal(running.values()), next(todo, None), lane.actor)


@dataclass(frozen=True)
class _Job:
    plan: ShardPlan
    attempt: int = 1

    def again(self, attempts: int, error: RayActorError) -> "_Job":
        if self.attempt == attempts:
            shard = f"shard {self.plan.number} of {self.plan.bucket.name}"
            raise WorkError(f"{shard} ended its worker {attempts} times: {error}") from None
        return _Job(self.plan, self.attempt + 1)


@dataclass
class _Lane:
    """An actor, the shard that it makes, and the one that it makes next, which is decoded ahead."""

    actor: Any
    job: _Job
    following: _Job | None


def _steal(lanes: Iterable[_Lane]) -> _Job | None:
    """When none is left: a shard that another actor was to make next."""
    for lane in lanes:
        if lane.following:
            job, lane.following = lane.following, None
            return job
    return None


class _ShardActor:
    def __init__(self, make_worker: Callable[[], Worker], runtime: RuntimeConfig, decoder: Decoder):
        self._make_worker = make_worker
        self._worker: Worker | None = None
        self._ahead = DecodeAhead(runtime, decoder)

    def make(self, plan: ShardPlan, following: ShardPlan | None) -> "ShardReport":
        if self._worker is None:  # here, not above: what a method raises reaches the driver as it is
            self._worker = self._make_worker()
        return self._worker.make_shard(plan, self._ahead.frames_of(plan, following))


@dataclass(frozen=True)
class _Decode:
    """One clip to decode, and for what."""

    clip: PlannedClip
    bucket: Bucket

    @property
    def pixel_bytes(self) -> int:
        return 3 * self.bucket.frames * self.bucket.height * self.bucket.width


class DecodeAhead:
    """The clips of shard after shard, decoded in order by tasks that run ahead of their use."""

    def __init__(self, runtime: RuntimeConfig, decoder: Decoder):
        self._runtime = runtime
        self._decoder = decoder
        self._submitted: deque[tuple[_Decode, Any]] = deque()

    def frames_of(self, plan: ShardPlan, following: ShardPlan | None = None) -> Iterator[Frames | DecodeError]:
        """Each clip's frames, or why it has none. ``following`` is decoded as soon as the window has room."""
        wanted = [_Decode(clip, shard.bucket) for shard in (plan, following) if shard for clip in shard.clips]
        if [decode for decode, _ in self._submitted] != wanted[: len(self._submitted)]:
            self._submitted.clear()  # another shard than was announced
        coming = deque(wanted[len(self._submitted) :])
        for _ in plan.clips:
            self._submit(coming)
            decode, reference = self._submitted.popleft()
            yield self._result(reference, decode)

    def _submit(self, coming: deque[_Decode]) -> None:
        """Fill the window, with one clip at least."""
        room = self._runtime.decode_window_mb * 1_000_000 - sum(decode.pixel_bytes for decode, _ in self._submitted)
        while coming and (not self._submitted or room >= coming[0].pixel_bytes):
            decode = coming.popleft()
            self._submitted.append((decode, self._start(decode)))
            room -= decode.pixel_bytes

    def _start(self, decode: _Decode) -> Any:
        return _decode.remote(decode, self._runtime.clip_timeout_s, self._decoder)

    def _result(self, reference: Any, decode: _Decode) -> Frames | DecodeError:
        for attempt in range(self._runtime.attempts):
            if attempt:
                reference = self._start(decode)
            try:
                outcome = ray.get(reference)
            except RayError as error:  # a crash, a node that is gone, memory that ran out: its process ended
                outcome = DecodeError("decoder_crash", f"{type(error).__name__} on {decode.clip.source}")
            if not (isinstance(outcome, DecodeError) and outcome.reason in TRANSIENT):
                break
        return outcome


def probe(rows: Iterator[Row], videos: str, runtime: RuntimeConfig) -> Iterator[VideoInfo | DecodeError]:
    """What the file of each row is, in order; found out by tasks, some ahead."""
    pending: deque[tuple[list[Row], Any]] = deque()

    def start(batch: list[Row]) -> Any:
        return _probe.remote(batch, videos, runtime.clip_timeout_s)

    def results() -> Iterator[VideoInfo | DecodeError]:
        batch, reference = pending.popleft()
        try:
            yield from ray.get(reference)
        except RayError:  # a file that ended the process costs no other
            for row in batch:
                yield _alone(start([row]), row)

    while batch := list(islice(rows, PROBES_A_TASK)):
        pending.append((batch, start(batch)))
        if len(pending) == PROBE_TASKS_AHEAD:
            yield from results()
    while pending:
        yield from results()


def _alone(reference: Any, row: Row) -> VideoInfo | DecodeError:
    try:
        return ray.get(reference)[0]
    except RayError as error:
        return DecodeError("decoder_crash", f"{type(error).__name__} on {row.source}")


@ray.remote(num_cpus=1, max_calls=DECODES_A_PROCESS, max_retries=0)
def _probe(rows: list[Row], videos: str, timeout_s: float) -> list[VideoInfo | DecodeError]:
    found = []
    for row in rows:
        with hard_deadline(HANGING * timeout_s):
            found.append(_or_undecodable(partial(probe_row, row, videos)))
    return found


@ray.remote(num_cpus=1, max_calls=DECODES_A_PROCESS, max_retries=0)
def _decode(decode: _Decode, timeout_s: float, decoder: Decoder) -> Frames | DecodeError:
    bucket = decode.bucket
    size = bucket.frames, bucket.height, bucket.width

    def frames() -> Frames:
        with storage.local_copy(storage.place(decode.clip.path)) as path:
            clip = replace(decode.clip, path=str(path))
            return decode_source(clip, *size, timeout_s=timeout_s, decoder=decoder)

    with hard_deadline(HANGING * timeout_s):
        return _or_undecodable(frames)


def _or_undecodable(read: Callable[[], _Found]) -> _Found | DecodeError:
    """Whatever a file does to its decoder costs that file alone."""
    try:
        return read()
    except DecodeError as error:
        return error
    except FileNotFoundError:
        return DecodeError("missing_file", "there is no such file")
    except DatasetError as error:  # of a store that does not answer
        return DecodeError("io_error", str(error))
    except Exception as error:
        return DecodeError("undecodable", f"{type(error).__name__}: {error}")
