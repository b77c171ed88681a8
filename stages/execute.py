"""Run shard work on Ray: actors that hold one model each, fed by decode tasks; the only file that imports ray.

An actor makes one shard at a time and decodes its clips ahead, in order, within a window bounded in bytes.
An actor or a decode task that dies is replaced and its work redone; commits make that harmless.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from shards.schema import Bucket
from stages.decode import Decoder, Frames, decode_source, hard_deadline
from stages.errors import ConfigError, DecodeError, WorkError, at_least
from stages.plan import PlannedClip, ShardPlan

if TYPE_CHECKING:  # the decode processes load no torch
    from stages.columns import Decode, ShardReport

DECODES_A_PROCESS = 500  # then Ray starts a fresh one: decoders leak
HANGING = 2  # times the timeout: the decoder is stuck in one call, and its process is ended
TRANSIENT = ("timeout", "io_error", "decoder_crash")


@dataclass(frozen=True)
class RuntimeConfig:
    """How the job uses its machines; nothing here changes what is written.

    actors: processes that hold a model, 0 for one a GPU (one on a machine without).
    threads: of an actor on a CPU. decode_window_mb: decoded frames that wait for one actor, at most.
    clip_timeout_s: for decoding one clip. attempts: for whatever may fail by chance.
    """

    actors: int = 0
    threads: int = 1
    decode_window_mb: int = 256
    clip_timeout_s: float = 120.0
    attempts: int = 3

    def __post_init__(self) -> None:
        at_least(self, 0, "actors", "decode_window_mb")
        at_least(self, 1, "threads", "attempts")
        at_least(self, 0.1, "clip_timeout_s")


class Worker(Protocol):
    """What an actor holds: made once a process, then one call a shard."""

    def make_shard(self, plan: ShardPlan, decode: "Decode") -> "ShardReport": ...


def start() -> None:
    """Join the cluster that RAY_ADDRESS names, else start one on this machine that ends with this process."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster at RAY_ADDRESS={address}: start one, or unset it ({error})") from None


def stop() -> None:
    ray.shutdown()


def run_shards(
    make_worker: Callable[[], Worker], plans: Sequence[ShardPlan], runtime: RuntimeConfig, decoder: Decoder
) -> Iterator["ShardReport"]:
    """Make every shard, on as many actors as there are places for; reports come as shards are finished.

    Raises WorkError when a shard's actor died ``attempts`` times, and whatever ``make_shard`` raised.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    places = min(len(plans), runtime.actors or gpus or 1)
    actor_type: Any = ray.remote(num_gpus=1 if gpus else 0, num_cpus=0)(_ShardActor)
    waiting = deque((plan, 1) for plan in plans)
    running: dict[Any, tuple[Any, ShardPlan, int]] = {}

    def begin(actor: Any) -> None:
        plan, attempt = waiting.popleft()
        running[actor.make.remote(plan)] = (actor, plan, attempt)

    for _ in range(places):
        begin(actor_type.remote(make_worker, runtime, decoder))
    while running:
        (done,), _ = ray.wait(list(running))
        actor, plan, attempt = running.pop(done)
        try:
            yield ray.get(done)
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            if attempt == runtime.attempts:
                raise WorkError(
                    f"shard {plan.number} of {plan.bucket.name} ended its worker {attempt} times: {error}"
                ) from None
            waiting.appendleft((plan, attempt + 1))
            actor = actor_type.remote(make_worker, runtime, decoder)
        if waiting:
            begin(actor)


class _ShardActor:
    def __init__(self, make_worker: Callable[[], Worker], runtime: RuntimeConfig, decoder: Decoder):
        self._make_worker = make_worker
        self._worker: Worker | None = None
        self._runtime = runtime
        self._decoder = decoder

    def make(self, plan: ShardPlan) -> "ShardReport":
        if self._worker is None:  # here, not above: what a method raises reaches the driver as it is
            self._worker = self._make_worker()
        task = _DecodeTask(plan.bucket, self._runtime, self._decoder)
        return self._worker.make_shard(plan, task.decode_ahead)


@dataclass(frozen=True)
class _DecodeTask:
    """How the clips of a shard are decoded."""

    bucket: Bucket
    runtime: RuntimeConfig
    decoder: Decoder

    def decode_ahead(self, clips: Sequence[PlannedClip]) -> Iterator[Frames | DecodeError]:
        """Each clip's frames, or why it has none, in order."""
        clip_bytes = 3 * self.bucket.frames * self.bucket.height * self.bucket.width
        ahead = max(1, self.runtime.decode_window_mb * 1_000_000 // clip_bytes)
        pending: deque[Any] = deque()
        submitted = iter(clips)
        for clip in clips:
            while len(pending) < ahead and (following := next(submitted, None)):
                pending.append(_decode.remote(following, self))
            yield self._result(pending.popleft(), clip)

    def _result(self, reference: Any, clip: PlannedClip) -> Frames | DecodeError:
        for attempt in range(self.runtime.attempts):
            if attempt:
                reference = _decode.remote(clip, self)
            try:
                outcome = ray.get(reference)
            except RayError as error:  # a crash, a node that is gone, memory that ran out: its process ended
                outcome = DecodeError("decoder_crash", f"{type(error).__name__} on {clip.source}")
            if not (isinstance(outcome, DecodeError) and outcome.reason in TRANSIENT):
                break
        return outcome


@ray.remote(num_cpus=1, max_calls=DECODES_A_PROCESS, max_retries=0)
def _decode(clip: PlannedClip, task: _DecodeTask) -> Frames | DecodeError:
    bucket, timeout_s = task.bucket, task.runtime.clip_timeout_s
    try:
        with hard_deadline(HANGING * timeout_s):
            return decode_source(
                clip, bucket.frames, bucket.height, bucket.width, timeout_s=timeout_s, decoder=task.decoder
            )
    except DecodeError as error:
        return error
    except Exception as error:  # whatever a file does to its decoder costs that clip alone
        return DecodeError("undecodable", f"{type(error).__name__}: {error}")
