"""The latents column: decoded frames through the VAE.

The worker is a plain object and knows nothing of Ray.
"""

import platform
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from models.compute import PRECISIONS, default_device
from models.vae import FrozenVAE
from shards.dataset import require_equal
from shards.latent_rgb import LatentRgbFit
from shards.schema import MEAN, STD, WRITTEN, Reject, Sample
from shards.writer import write_shard
from stages.columns import Decoded, ShardReport, Target, VaeConfig, statuses_of
from stages.errors import DecodeError, WorkError
from stages.planning.plan_table import PlannedClip, ShardPlan
from stages.quality import LEAST_SNR_DB, snr_db

_Item = TypeVar("_Item")


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


def load_vae(config: VaeConfig) -> FrozenVAE:
    """The VAE on this process's device, computing as its settings say."""
    return FrozenVAE.load(
        config.name,
        default_device(),
        PRECISIONS[config.precision],
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
        statuses = statuses_of(commit)
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
