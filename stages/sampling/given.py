"""Frames that are given to a sample rather than made: pictures and videos, as the VAE's latents.

Files are read, scaled and cropped by the encode's own code, at the rate that the checkpoint was trained at.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from models.latents import LatentStats
from models.source import hash_files
from models.vae import FrozenVAE
from models.weights import CheckpointInfo
from stages.decoding.decode import decode_clip
from stages.decoding.picture import decode_image
from stages.decoding.pyav_reader import probe
from stages.decoding.source_file import source_file
from stages.errors import ConfigError, DecodeError
from stages.sampling.config import GivenToOne
from stages.sampling.denoise import Given
from stages.training.given_frames import MASKS

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class GivenFrames:
    """How many frames of a video are given at its start and at its end, and the files that they are from."""

    start: int
    end: int
    config: GivenToOne

    def pixels(self, height: int, width: int, fps: float) -> np.ndarray:
        """All given frames in the order of the video, uint8 [start + end, height, width, 3].

        Raises ConfigError for a file that is not what it should be.
        """
        given = self.config
        if given.video:
            last = _frames(given.video, self.start, height, width, fps, from_end=True)
            return np.concatenate([last, _frames(given.video, self.end, height, width, fps, from_end=False)])
        pictures = [given.first, given.first if given.loop else given.last][: self.start + self.end]
        return np.concatenate([_picture(path, height, width) for path in pictures])


def hashed(given: GivenToOne) -> GivenToOne:
    """With the hash of its files. Raises ConfigError for files that are missing, or others than it says."""
    files = [path for path in (given.first, given.last, given.video) if path]
    if not files:
        return given
    try:
        with ExitStack() as held:
            found = hash_files([Path(held.enter_context(source_file(path))) for path in files])
    except (DecodeError, OSError) as error:
        raise ConfigError(f"given: found {', '.join(files)}, which cannot be read: {error}") from None
    if given.files_hash not in ("", found):
        raise ConfigError(
            f"given: {', '.join(files)} has the hash {found}, expected {given.files_hash}: its content or its name is "
            "another now; give the file that was meant, or given.files_hash= (empty) to take this one"
        )
    return replace(given, files_hash=found)


def given_frames(config: GivenToOne, frames: int, info: CheckpointInfo) -> GivenFrames | None:
    """What is given of one sample of so many latent frames; None where nothing is.

    Raises ConfigError unless the checkpoint was trained with so many frames given.
    """
    if not config:
        return None
    if config.video:
        start = config.video_frames or max(2 - config.loop, frames // 4)
        end = start if config.loop else 0
    else:
        start, end = 1, 1 if config.last or config.loop else 0
    found = GivenFrames(start, end, config)
    known = [ends for mask in info.conditioning for ends in MASKS[mask](frames) if sum(ends) < frames]
    if (start, end) not in known:
        masks = ", ".join(info.conditioning) or "none"
        raise ConfigError(
            f"given: found {start} frames at the start and {end} at the end, of {frames}; the checkpoint was trained "
            f"with the masks {masks}: give other frames, or train with conditioning (docs/train.md, given frames)"
        )
    return found


def encode_given(
    wanted: Sequence[GivenFrames | None], vae: FrozenVAE, info: CheckpointInfo, shape: tuple[int, int, int, int]
) -> list[Given | None]:
    """Of each sample what is given, as latents [C, T, h, w] of this shape."""
    size = (shape[2] * info.vae["spatial_factor"], shape[3] * info.vae["spatial_factor"])
    given: list[Given | None] = [None] * len(wanted)
    for number, frames in enumerate(wanted):
        if frames is not None:
            raw = vae.encode(frames.pixels(*size, 1 / info.frame_interval_s))
            given[number] = _placed(frames, raw, info, shape)
    return given


def _placed(frames: GivenFrames, raw: np.ndarray, info: CheckpointInfo, shape: tuple[int, int, int, int]) -> Given:
    """raw: the VAE's latents of the given frames, [start + end, C, h, w]."""
    is_given = torch.zeros(shape[1], dtype=torch.bool)
    is_given[: frames.start] = True
    is_given[shape[1] - frames.end :] = True
    latents = torch.zeros(shape)
    latents[:, is_given] = LatentStats.of(info.vae).normalise(torch.from_numpy(raw)).transpose(0, 1)
    return Given(latents, is_given)


def _picture(path: str, height: int, width: int) -> np.ndarray:
    try:
        with source_file(path) as local:
            return decode_image(local, height, width)
    except DecodeError as error:
        raise ConfigError(f"given: {path} is no picture that can be read: {error}") from None


def _frames(path: str, count: int, height: int, width: int, fps: float, *, from_end: bool) -> np.ndarray:
    """The last or the first ``count`` frames of a video."""
    if not count:
        return np.empty((0, height, width, 3), np.uint8)
    try:
        with source_file(path) as local:
            start_s = max(0.0, probe(local).duration_s - count / fps) if from_end else 0.0
            return decode_clip(
                local, start_s=start_s, frames=count, fps=fps, height=height, width=width, timeout_s=TIMEOUT_S
            )
    except DecodeError as error:
        raise ConfigError(f"given.video: {path} does not give {count} frames at {fps:g} fps: {error}") from None
