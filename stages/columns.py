"""The columns of a dataset, each built shard by shard by a worker that holds one frozen model.

Workers are plain objects: they know nothing of Ray. A text shard is built from its committed latent shard, so
that both hold the same keys in the same order.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash

from models.text import LENGTHS, TextEncoder, clean_caption
from models.vae import FrozenVAE
from shards.dataset import require_equal, write_null_text
from shards.schema import CAPTION, CAPTION_HASH, KEY, LATENTS, MEAN, STD, TEXT, TOKENS, Bucket, Reject, Sample
from shards.writer import Commit, commit_path, read_commit, write_shard
from stages.decode import Frames
from stages.errors import DecodeError, WorkError, at_least
from stages.plan import PlannedClip, ShardPlan

Decode = Callable[[Sequence[PlannedClip]], Iterator[Frames | DecodeError]]
"""Gives, for each clip in order, its frames or why it has none."""


@dataclass(frozen=True)
class VaeConfig:
    """The VAE by name, folder or hub id. batch_frames is the fixed batch that every frame is encoded in."""

    name: str = "tiny"
    batch_frames: int = 8
    store_std: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_frames")


@dataclass(frozen=True)
class TextConfig:
    """The text encoder by name, folder or hub id, and the column that its embeddings go to."""

    name: str = "tiny"
    column: str = "t5"
    max_tokens: int = 120
    batch_captions: int = 8
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_captions", "max_tokens")
        if self.max_tokens > LENGTHS[-1]:
            raise ValueError(f"max_tokens: found {self.max_tokens}, expected at most {LENGTHS[-1]}")


@dataclass(frozen=True)
class Target:
    """Where a worker writes: the dataset, and the fingerprint of the column in each bucket."""

    dataset: Path
    column: str
    fingerprints: dict[Bucket, str]

    def folder(self, bucket: Bucket) -> Path:
        return self.dataset / bucket.name / self.column


@dataclass(frozen=True)
class ShardReport:
    """What became of the clips of one shard of one column: status ("written" or a reason) -> clips."""

    bucket: str
    number: int
    statuses: dict[str, int]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


class LatentWorker:
    """Builds latent shards: decoded frames through the VAE."""

    def __init__(self, config: VaeConfig, identity: dict[str, Any], target: Target, threads: int):
        torch.set_num_threads(threads)
        self._vae = FrozenVAE.load(config.name, device(), dtype(config.precision), config.batch_frames)
        require_equal(self._vae.identity, identity, f"{config.name} on this node is another VAE", "put the same there")
        self._store_std = config.store_std
        self._target = target

    def make_shard(self, plan: ShardPlan, decode: Decode) -> ShardReport:
        """Decode, encode, write and commit one shard."""
        rejects: list[Reject] = []
        commit = write_shard(
            self._target.folder(plan.bucket),
            plan.number,
            self._samples(plan, decode, rejects),
            rejects,
            fingerprint_hash=self._target.fingerprints[plan.bucket],
        )
        return _report(plan, commit)

    def _samples(self, plan: ShardPlan, decode: Decode, rejects: list[Reject]) -> Iterator[Sample]:
        for clip, frames in zip(plan.clips, decode(plan.clips), strict=True):
            if isinstance(frames, DecodeError):
                rejects.append(Reject(clip.key, frames.reason, str(frames)))
                continue
            mean, std = self._vae.encode_posterior(frames.pixels)  # [T, C, h, w]
            members = {MEAN: mean, STD: std} if self._store_std else {MEAN: mean}
            halves = {name: _half(array) for name, array in members.items()}
            if not all(np.isfinite(array).all() for array in halves.values()):
                rejects.append(Reject(clip.key, "non_finite", "its latents overflow float16 or are not numbers"))
                continue
            yield Sample(clip.key, halves, _attributes(clip, frames.start_s, mean))


class TextWorker:
    """Builds text shards: the captions of a committed latent shard through the text encoder."""

    def __init__(self, config: TextConfig, identity: dict[str, Any], target: Target, threads: int):
        torch.set_num_threads(threads)
        self._encoder = TextEncoder.load(
            config.name, device(), dtype(config.precision), config.max_tokens, config.batch_captions
        )
        require_equal(
            self._encoder.identity, identity, f"{config.name} on this node is another encoder", "put the same there"
        )
        self._target = target
        write_null_text(target.dataset, target.column, self._encoder.encode([""])[0])

    def make_shard(self, plan: ShardPlan, decode: Decode) -> ShardReport:
        """Encode, write and commit one shard; ``decode`` is not asked."""
        latents = read_commit(commit_path(self._target.dataset / plan.bucket.name / LATENTS, plan.number)).written
        captions = dict(zip(latents[KEY].to_pylist(), latents["caption"].to_pylist(), strict=True))
        commit = write_shard(
            self._target.folder(plan.bucket),
            plan.number,
            self._samples(captions),
            fingerprint_hash=self._target.fingerprints[plan.bucket],
        )
        return _report(plan, commit)

    def _samples(self, captions: dict[str, str]) -> Iterator[Sample]:
        unique = sorted({clean_caption(caption) for caption in captions.values()})
        embeddings = dict(zip(unique, self._encoder.encode(unique), strict=True))
        for key, caption in captions.items():
            cleaned = clean_caption(caption)
            text = embeddings[cleaned]
            if not np.isfinite(text).all():
                raise WorkError(f"no finite float16 embedding of {caption!r}: set text_encoder.precision=fp32")
            attributes = {
                TOKENS: len(text),
                CAPTION_HASH: xxhash.xxh3_64_hexdigest(cleaned.encode()),
                CAPTION: None,
            }
            yield Sample(key, {TEXT: text}, attributes)


def _report(plan: ShardPlan, commit: Commit) -> ShardReport:
    return ShardReport(plan.bucket.name, plan.number, dict(Counter(commit.table["status"].to_pylist())))


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
