"""Run shard work on Ray: actors that hold one model each, fed by decode tasks; the only file that imports ray.

An actor makes one shard at a time. Its clips, and then those of the shard it makes next, are decoded ahead, in
order, within a window bounded in bytes, by tasks anywhere in the cluster. An actor or a task that dies, with its
node or alone, is replaced and its work redone; a shard that an object store fails is begun again. Commits make that
harmless.
"""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from shards.errors import StoreError
from stages.columns import Decoded, ShardReport
from stages.decoding.decode import Decoder, Frames
from stages.decoding.decode_job import DecodeJob, each, frames_of, group_of
from stages.decoding.pyav_reader import VideoInfo
from stages.errors import ConfigError, DecodeError, WorkError, at_least
from stages.planning.metadata import Row
from stages.planning.plan_table import ShardPlan
from stages.planning.probe import probe_row

DECODES_A_PROCESS = 500  # then Ray starts a fresh one: decoders leak
TASK_BYTES = 32_000_000  # of frames that one task decodes, at most
PROBES_A_TASK, PROBE_TASKS_AHEAD = 16, 64
WATCH_S = 1.0
_WATCH = "watch"
TRANSIENT = ("timeout", "io_error", "decoder_crash")

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class RuntimeConfig:
    """How the job uses its machines; nothing here changes what is written.

    actors: processes that hold a model, 0 for one a GPU (one on a machine without).
    threads: of an actor on a CPU. decoders: processes that decode at once on this machine, 0 for one a core; a
    cluster has its own number. decode_window_mb: decoded frames that wait for one actor, at most.
    clip_timeout_s: for decoding one clip. attempts: for whatever may fail by chance.
    """

    actors: int = 0
    decoders: int = 0
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

    def make_shard(self, plan: ShardPlan, decoded: Decoded) -> ShardReport: ...


@contextmanager
def running(runtime: RuntimeConfig) -> Iterator[None]:
    """Within the cluster that this process has joined or RAY_ADDRESS names, else one here that ends with the block."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    local: dict[str, Any] = {}
    if address == "local":
        local = {"include_dashboard": False, "num_cpus": runtime.decoders or None}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster at RAY_ADDRESS={address} ({error}): start one, or unset it; "
            "if it is there, it may ask for a token, which RAY_AUTH_MODE=token sends"
        ) from None
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


def in_worker(work: Callable[[], _Found]) -> _Found:
    """What ``work`` gives in a process of its own with what an actor has: a GPU, where there are any."""
    task: Any = ray.remote(num_gpus=1 if gpus() else 0, num_cpus=0, max_calls=1)(_call)
    try:
        return ray.get(task.remote(work))
    except RayTaskError as error:
        raise error.cause from None


def _call(work: Callable[[], _Found]) -> _Found:
    return work()


def run_shards(
    make_worker: Callable[[], Worker],
    plans: Iterable[ShardPlan],
    runtime: RuntimeConfig,
    decoder: Decoder,
    watch: Callable[[int], object] = lambda clips: None,
) -> Generator[ShardReport, None, None]:
    """Make every shard, on as many actors as there are places for; reports come as shards are finished.

    ``watch`` is told between them how many clips of unfinished shards have been decoded and taken.

    Raises WorkError when a shard's actor died, or an object store failed it, ``attempts`` times, and whatever else
    ``make_shard`` raised. To be closed by who takes no more of them.
    """
    options: dict[str, Any] = {"scheduling_strategy": "SPREAD", "concurrency_groups": {_WATCH: 1}}
    actor_type: Any = ray.remote(num_gpus=1 if gpus() else 0, num_cpus=0, **options)(_ShardActor)
    crew = _Crew(partial(actor_type.remote, make_worker, runtime, decoder), plans, runtime)
    try:
        while crew.lanes:
            finished, _ = ray.wait(list(crew.lanes), timeout=WATCH_S)
            if not finished:
                watch(_taken(crew.lanes.values()))
            elif report := crew.settle(finished[0]):
                yield report
    finally:
        crew.end()


@dataclass(frozen=True)
class _Job:
    plan: ShardPlan
    attempt: int = 1

    def again(self, attempts: int, error: Exception) -> "_Job":
        if self.attempt == attempts:
            shard = f"shard {self.plan.number} of {self.plan.bucket.name}"
            raise WorkError(f"{shard} failed {attempts} times: {error}") from None
        return _Job(self.plan, self.attempt + 1)


@dataclass
class _Lane:
    """An actor, the shard that it makes, and the one that it makes next, which is decoded ahead."""

    actor: Any
    job: _Job
    following: _Job | None
    taken: int = 0  # clips of the shard, when it was last asked


class _Crew:
    """Actors at work, by the reference to the report of the shard that each makes, and the shards that none has yet.

    start: makes an actor.
    """

    def __init__(self, start: Callable[[], Any], plans: Iterable[ShardPlan], runtime: RuntimeConfig):
        self.lanes: dict[Any, _Lane] = {}
        self._start, self._attempts = start, runtime.attempts
        self._todo = (_Job(plan) for plan in plans)
        for job in list(islice(self._todo, places(runtime))):  # none has a second one before all have a first
            self._begin(start(), job, next(self._todo, None))

    def settle(self, reference: Any) -> ShardReport | None:
        """The report that has come, its actor being at the next shard; None where the shard is begun again."""
        lane = self.lanes[reference]
        try:
            report = ray.get(reference)
        except RayTaskError as error:
            if not isinstance(error.cause, StoreError):
                raise error.cause from None
            again = lane.job.again(self._attempts, error.cause)
            del self.lanes[reference]
            self._begin(lane.actor, again, lane.following)
            return None
        except RayActorError as error:
            del self.lanes[reference]
            ray.kill(lane.actor)  # if it is out of reach only
            self._begin(self._start(), lane.job.again(self._attempts, error), lane.following)
            return None
        del self.lanes[reference]
        job = lane.following or self._steal()
        if job:
            self._begin(lane.actor, job, next(self._todo, None))
        else:
            ray.kill(lane.actor)  # its GPU may be what the successor of a dead one waits for
        return report

    def end(self) -> None:
        for lane in self.lanes.values():  # a cluster may outlive what went wrong
            ray.kill(lane.actor)

    def _begin(self, actor: Any, job: _Job, following: _Job | None) -> None:
        reference = actor.make.remote(job.plan, following.plan if following else None)
        self.lanes[reference] = _Lane(actor, job, following)

    def _steal(self) -> _Job | None:
        """When none is left: a shard that another actor was to make next."""
        for lane in self.lanes.values():
            if lane.following:
                job, lane.following = lane.following, None
                return job
        return None


def _taken(lanes: Collection[_Lane]) -> int:
    """How many clips of the shards that are being made were taken; of an actor that is silent, when last it was not."""
    asked = {lane.actor.taken.remote(): lane for lane in lanes}
    answers, _ = ray.wait(list(asked), num_returns=len(asked), timeout=WATCH_S)
    for answer in answers:
        with suppress(RayError):  # it died, as its shard will tell
            asked[answer].taken = ray.get(answer)
    return sum(lane.taken for lane in lanes)


class _ShardActor:
    def __init__(self, make_worker: Callable[[], Worker], runtime: RuntimeConfig, decoder: Decoder):
        self._make_worker = make_worker
        self._worker: Worker | None = None
        self._ahead = DecodeAhead(runtime, decoder)
        self._taken = 0

    def make(self, plan: ShardPlan, following: ShardPlan | None) -> ShardReport:
        self._taken = 0
        if self._worker is None:  # here, not above: what a method raises reaches the driver as it is
            self._worker = self._make_worker()
        return self._worker.make_shard(plan, self._counted(self._ahead.frames_of(plan, following)))

    def _counted(self, decoded: Decoded) -> Decoded:
        for frames in decoded:
            self._taken += 1
            yield frames

    @ray.method(concurrency_group=_WATCH)  # answers while a shard is made
    def taken(self) -> int:
        return self._taken


class DecodeAhead:
    """The clips of shard after shard, decoded in order by tasks that run ahead of their use."""

    def __init__(self, runtime: RuntimeConfig, decoder: Decoder):
        self._runtime = runtime
        self._read = partial(frames_of, timeout_s=runtime.clip_timeout_s, decoder=decoder)
        self._submitted: deque[tuple[DecodeJob, Any, int]] = deque()  # the last: how often it is tried again

    def frames_of(self, plan: ShardPlan, following: ShardPlan | None = None) -> Iterator[Frames | DecodeError]:
        """Each clip's frames, or why it has none. ``following`` is decoded as soon as the window has room."""
        wanted = [DecodeJob(clip, shard.bucket) for shard in (plan, following) if shard for clip in shard.clips]
        if [job for job, *_ in self._submitted] != wanted[: len(self._submitted)]:
            self._submitted.clear()  # another shard than was announced
        coming = deque(wanted[len(self._submitted) :])
        for _ in plan.clips:
            self._submit(coming)
            yield self._result(*self._submitted.popleft())

    def _submit(self, coming: deque[DecodeJob]) -> None:
        """Fill the window, with one clip at least."""
        window = self._runtime.decode_window_mb * 1_000_000
        room = window - sum(job.pixel_bytes for job, *_ in self._submitted)
        while group := group_of(coming, min(window, TASK_BYTES)):
            room -= sum(job.pixel_bytes for job in group)
            if room < 0 and self._submitted:
                return
            for _ in group:
                coming.popleft()
            again = self._runtime.attempts - (len(group) == 1)  # another clip of the group may end its process
            for job, reference in zip(group, self._start(group), strict=True):
                self._submitted.append((job, reference, again))

    def _start(self, group: list[DecodeJob]) -> list[Any]:
        task = _decode.options(num_returns=len(group))
        references: Any = task.remote(self._read, group, self._runtime.clip_timeout_s)
        return references if len(group) > 1 else [references]

    def _result(self, job: DecodeJob, reference: Any, again: int) -> Frames | DecodeError:
        source = job.clip.source
        try:
            outcome = ray.get(reference)
        except RayError as error:
            outcome = _crash(error, source)
        for _ in range(again):
            if not (isinstance(outcome, DecodeError) and outcome.reason in TRANSIENT):
                break
            outcome = _alone(self._read, job, source, self._runtime.clip_timeout_s)
        return outcome


def _crash(error: RayError, source: str) -> DecodeError:
    """For the file that ended a process; or its node is gone, or its memory ran out."""
    return DecodeError("decoder_crash", f"{type(error).__name__} on {source}")


def _alone(read: Callable[[_Item], _Found], item: _Item, source: str, timeout_s: float) -> _Found | DecodeError:
    """What ``read`` gives for one item in a task of its own, or why it does not.

    All that is seen of a process that hung is that it ended, as of one that crashed: the time tells them apart.
    """
    signs: Any = _read_alone.remote(read, item, timeout_s)
    began = math.inf
    try:
        ray.get(next(signs))
        began = time.monotonic()
        return ray.get(next(signs))
    except RayError as error:
        if time.monotonic() - began > timeout_s:
            return DecodeError("timeout", f"its decoder heeded no {timeout_s:g} s and was ended, on {source}")
        return _crash(error, source)


def probe(rows: Iterator[Row], videos: str, runtime: RuntimeConfig) -> Iterator[VideoInfo | DecodeError]:
    """What the file of each row is, in order; found out by tasks, some ahead."""
    pending: deque[tuple[list[Row], Any]] = deque()
    read = partial(probe_row, videos_folder=videos)

    def results() -> Iterator[VideoInfo | DecodeError]:
        batch, reference = pending.popleft()
        try:
            yield from ray.get(reference)
        except RayError:  # a file that ended the process costs no other
            for row in batch:
                yield _alone(read, row, row.source, runtime.clip_timeout_s)

    while batch := list(islice(rows, PROBES_A_TASK)):
        pending.append((batch, _probe.remote(read, batch, runtime.clip_timeout_s)))
        if len(pending) == PROBE_TASKS_AHEAD:
            yield from results()
    while pending:
        yield from results()


@ray.remote(num_cpus=1, max_calls=DECODES_A_PROCESS, max_retries=0)
def _probe(
    read: Callable[[Row], VideoInfo | DecodeError], rows: list[Row], timeout_s: float
) -> list[VideoInfo | DecodeError]:
    return each(read, rows, timeout_s)


@ray.remote(num_cpus=1, max_calls=DECODES_A_PROCESS, max_retries=0)
def _decode(read: Callable[[DecodeJob], Frames], group: list[DecodeJob], timeout_s: float) -> Any:
    """The outcome of each; that itself of a single one, as Ray wants it."""
    outcomes = each(read, group, timeout_s)
    return outcomes if len(outcomes) > 1 else outcomes[0]


@ray.remote(num_cpus=1, max_calls=DECODES_A_PROCESS, max_retries=0, num_returns="streaming")
def _read_alone(read: Callable[[Any], Any], item: Any, timeout_s: float) -> Iterator[Any]:
    """None when it begins, then the outcome."""
    yield None
    yield from each(read, [item], timeout_s)
