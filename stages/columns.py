"""The columns of a dataset, each built shard by shard by a worker that holds one frozen model.

Workers are plain objects: they know nothing of Ray. A text shard is built from its committed latent shard, so
that both hold the same keys in the same order.
"""

import platform
import time
from collections import Counter, deque
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import xxhash

from models.text import TextEncoder, clean_caption
from models.text_lengths import LENGTHS
from models.vae import FrozenVAE
from shards import storage
from shards.dataset import require_equal, write_null_text
from shards.errors import ShardError
from shards.latent_rgb import LatentRgbFit
from shards.schema import (
    CAPTION,
    CAPTION_HASH,
    KEY,
    LATENTS,
    MEAN,
    STATUS,
    STD,
    TEXT,
    TOKENS,
    WRITTEN,
    Bucket,
    Reject,
    Sample,
)
from shards.writer import Commit, commit_path, read_commit, read_samples, write_shard
from stages.captions import Captions
from stages.decoding.decode import Frames
from stages.errors import DecodeError, WorkError, at_least
from stages.planning.plan_table import PlannedClip, ShardPlan
from stages.quality import LEAST_SNR_DB, snr_db

Decoded = Iterator[Frames | DecodeError]
"""For each clip of a shard in order: its frames, or why it has none."""

_Item = TypeVar("_Item")

RECENT_CAPTIONS = 1024
"""Embeddings that a worker keeps, so that captions which come again are encoded once; some 100 MB of T5-XXL's."""


@dataclass(frozen=True)
class VaeConfig:
    """The VAE by name, folder or hub id. batch_frames is the fixed batch that every frame is encoded in.

    channels_last and compile: layouts and kernels that may be faster on a GPU; ``--tune`` tells.
    """

    name: str = "tiny"
    batch_frames: int = 8
    store_std: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_frames")

    @property
    def compute(self) -> str:
        """What decides the bytes beside the weights and the batch: other kernels round in another order."""
        layout = " channels-last" if self.channels_last else ""
        return f"{self.precision}{layout}{' compiled' if self.compile else ''}"


@dataclass(frozen=True)
class TextConfig:
    """The text encoder by name, folder or hub id, and the column that its embeddings go to.

    captions: a JSON-lines file of ``{"key": …, "caption": …}`` that replaces the metadata's captions of these clips.
    batch_tokens: of a batch, padding included: 8 captions of 128 tokens, 64 of 16.
    """

    name: str = "tiny"
    column: str = "t5"
    captions: str = ""
    max_tokens: int = 120
    batch_tokens: int = 1024
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        at_least(self, 1, "max_tokens")
        at_least(self, LENGTHS[-1], "batch_tokens")
        if self.max_tokens > LENGTHS[-1]:
            raise ValueError(f"max_tokens: found {self.max_tokens}, expected at most {LENGTHS[-1]}")


@dataclass(frozen=True)
class Target:
    """Where a worker writes: the dataset, and the fingerprint of the column in each bucket."""

    dataset: storage.Place
    column: str
    fingerprints: dict[Bucket, str]

    def folder(self, bucket: Bucket) -> storage.Place:
        return self.dataset / bucket.name / self.column


@dataclass(frozen=True)
class ShardReport:
    """What became of the clips of one shard of one column, and where the time went.

    statuses: "written" or a reason -> clips. frames: encoded. reused: captions that another column, or a shard just
    before, had encoded. busy_s: in the model. wait_s: for frames.
    """

    bucket: str
    number: int
    statuses: Counter[str]
    frames: int = 0
    reused: int = 0
    busy_s: float = 0.0
    wait_s: float = 0.0


class Stopwatch:
    """Adds up how long items take to come."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, items: Iterator[_Item]) -> Iterator[_Item]:
        while True:
            started = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - started
            yield item


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def load_vae(config: VaeConfig) -> FrozenVAE:
    """The VAE on this process's device, computing as its settings say."""
    return FrozenVAE.load(
        config.name,
        device(),
        dtype(config.precision),
        config.batch_frames,
        channels_last=config.channels_last,
        compiled=config.compile,
    )


def exact(config: VaeConfig) -> VaeConfig:
    """The same VAE in the plainest arithmetic, which the chosen one is compared with."""
    return replace(config, precision="fp32", channels_last=False, compile=False)


class LatentWorker:
    """Builds latent shards: decoded frames through the VAE."""

    def __init__(self, config: VaeConfig, identity: dict[str, Any], target: Target, threads: int):
        torch.set_num_threads(threads)
        self._vae = load_vae(config)
        here = f"{config.name} on {platform.node()}"
        require_equal(self._vae.identity, identity, f"{here} is another VAE", "put the same there")
        self._store_std = config.store_std
        self._target = target
        self._exact = load_vae(exact(config)) if config != exact(config) else None

    def make_shard(self, plan: ShardPlan, decoded: Decoded) -> ShardReport:
        """Encode, write and commit one shard."""
        encoding, waiting = Stopwatch(), Stopwatch()
        rejects: list[Reject] = []
        colours = LatentRgbFit()
        # Those on their way through the VAE, each with its start and its first frame.
        clips: deque[tuple[PlannedClip, float, np.ndarray]] = deque()

        def pictures() -> Iterator[np.ndarray]:
            for clip, frames in zip(plan.clips, waiting.over(decoded), strict=True):
                if isinstance(frames, DecodeError):
                    rejects.append(Reject(clip.key, frames.reason, str(frames)))
                else:
                    clips.append((clip, frames.start_s, frames.pixels[0].copy()))
                    self._check_precision(frames.pixels)
                    yield frames.pixels

        def samples() -> Iterator[Sample]:
            for mean, std in encoding.over(self._vae.encode_clips(pictures())):
                clip, start_s, first_frame = clips.popleft()
                sample = self._sample(clip, start_s, mean, std)
                if isinstance(sample, Sample):
                    colours.add(mean[0], first_frame)
                    yield sample
                else:
                    rejects.append(sample)

        folder, fingerprint = self._target.folder(plan.bucket), self._target.fingerprints[plan.bucket]
        commit = write_shard(folder, plan.number, samples(), rejects, fingerprint_hash=fingerprint, latent_rgb=colours)
        statuses = _statuses(commit)
        frames = statuses[WRITTEN] * plan.bucket.frames
        busy_s = encoding.seconds - waiting.seconds
        return ShardReport(plan.bucket.name, plan.number, statuses, frames, busy_s=busy_s, wait_s=waiting.seconds)

    def _check_precision(self, pixels: np.ndarray) -> None:
        """With the first frames that come: WorkError if the latents are too far from those of fp32."""
        if self._exact is None:
            return
        frames = pixels[: self._exact.batch_frames]
        found_db = snr_db(self._vae.encode(frames), self._exact.encode(frames))
        self._exact = None
        if found_db < LEAST_SNR_DB:
            raise WorkError(
                f"vae.precision: {found_db:.1f} dB between these latents and those of fp32, expected {LEAST_SNR_DB:g}: "
                "set vae.precision=fp32"
            )

    def _sample(self, clip: PlannedClip, start_s: float, mean: np.ndarray, std: np.ndarray) -> Sample | Reject:
        members = {MEAN: mean, STD: std} if self._store_std else {MEAN: mean}  # [T, C, h, w]
        halves = {name: _half(array) for name, array in members.items()}
        if not all(np.isfinite(array).all() for array in halves.values()):
            return Reject(clip.key, "non_finite", "its latents overflow float16 or are not numbers")
        return Sample(clip.key, halves, _attributes(clip, start_s, mean))


class TextWorker:
    """Builds text shards: the captions of a committed latent shard through the text encoder.

    reuse: text columns of each bucket that the same encoder made; a caption that one of them has is not encoded again.
    """

    def __init__(
        self,
        config: TextConfig,
        identity: dict[str, Any],
        target: Target,
        reuse: dict[Bucket, list[str]],
        threads: int,
    ):
        torch.set_num_threads(threads)
        self._encoder = TextEncoder.load(
            config.name, device(), dtype(config.precision), config.max_tokens, config.batch_tokens
        )
        here = f"{config.name} on {platform.node()}"
        require_equal(self._encoder.identity, identity, f"{here} is another encoder", "put the same there")
        self._target = target
        self._reuse = reuse
        self._recent: dict[str, np.ndarray] = {}
        self._captions = Captions(config.captions) if config.captions else None
        write_null_text(target.dataset, target.column, self._encoder.encode([""])[0])

    def make_shard(self, plan: ShardPlan, decoded: Decoded) -> ShardReport:
        """Encode, write and commit one shard; ``decoded`` is not asked."""
        latents = read_commit(commit_path(self._target.dataset / plan.bucket.name / LATENTS, plan.number)).written
        own = dict(zip(latents[KEY].to_pylist(), latents[CAPTION].to_pylist(), strict=True))
        captions = own | (self._captions.of_keys(own) if self._captions else {})
        wanted = {_caption_hash(caption): caption for caption in sorted(captions.values())}
        reused = self._made_before(plan, wanted) | {name: self._recent[name] for name in wanted if name in self._recent}
        left = [caption for name, caption in wanted.items() if name not in reused]
        started = time.perf_counter()
        encoded = self._encoder.encode(left)
        busy_s = time.perf_counter() - started
        embeddings = reused | {_caption_hash(caption): text for caption, text in zip(left, encoded, strict=True)}
        self._recent = dict([*self._recent.items(), *embeddings.items()][-RECENT_CAPTIONS:])
        commit = write_shard(
            self._target.folder(plan.bucket),
            plan.number,
            (_text_sample(key, captions[key], own[key], embeddings) for key in own),
            fingerprint_hash=self._target.fingerprints[plan.bucket],
        )
        return ShardReport(plan.bucket.name, plan.number, _statuses(commit), reused=len(reused), busy_s=busy_s)

    def _made_before(self, plan: ShardPlan, wanted: Container[str]) -> dict[str, np.ndarray]:
        """Caption hash -> [L, D] float16, of those that another column has."""
        found = {}
        for column in self._reuse.get(plan.bucket, []):
            folder = self._target.dataset / plan.bucket.name / column
            if not storage.exists(commit_path(folder, plan.number)):
                continue
            with suppress(ShardError, FileNotFoundError):  # what is damaged there is encoded here
                for row, members in read_samples(folder, read_commit(commit_path(folder, plan.number))):
                    if row[CAPTION_HASH] in wanted:
                        found[row[CAPTION_HASH]] = members[TEXT]
        return found


def _text_sample(key: str, caption: str, own: str, embeddings: dict[str, np.ndarray]) -> Sample:
    text = embeddings[_caption_hash(caption)]
    if not np.isfinite(text).all():
        raise WorkError(f"no finite float16 embedding of {caption!r}: set text_encoder.precision=fp32")
    new = None if caption == own else caption
    return Sample(key, {TEXT: text}, {TOKENS: len(text), CAPTION_HASH: _caption_hash(caption), CAPTION: new})


def _caption_hash(caption: str) -> str:
    """Equal for captions that the text encoder sees as equal."""
    return xxhash.xxh3_64_hexdigest(clean_caption(caption).encode())


def _statuses(commit: Commit) -> Counter[str]:
    return Counter(commit.table[STATUS].to_pylist())


def _half(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # an overflow becomes infinite and is rejected by name
        return array.astype(np.float16)


def _attributes(clip: PlannedClip, start_s: float, mean: np.ndarray) -> dict[str, Any]:
    return {
        "duration_s": clip.duration_s,
        "caption": clip.caption,
        "source": clip.source,
        "start_s": start_s,
        "aesthetic": clip.aesthetic,
        "umt": clip.umt,
        "matching_score": clip.matching_score,
        "desirable_filtering": clip.desirable_filtering,
        "latent_motion": latent_motion(mean),
    }


def latent_motion(mean: np.ndarray) -> float:
    """Mean absolute change between successive latent frames, over the spatial standard deviation.

    mean: [T, C, h, w]. 0 for a still picture or a single frame; a cheap measure of motion to filter by.
    """
    spread = float(mean.std(axis=(2, 3)).mean())
    if len(mean) < 2 or spread == 0:
        return 0.0
    return float(np.abs(np.diff(mean, axis=0)).mean()) / spread
