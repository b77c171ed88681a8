"""A clip decoded back from its latents beside the frames it was made from: pictures for a person, and decibels."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.compute import default_device
from models.vae import FrozenVAE
from shards.manifest import Manifest
from shards.schema import LATENTS
from stages.browsing.source_frames import Source, SourceReader
from stages.browsing.survey import Picked
from stages.errors import DecodeError
from stages.page import jpeg_uri, mp4_uri
from stages.quality import psnr_db, snr_db

BF16_CLIPS = 4
"""Clips that are encoded once more in bf16, to tell what that would cost."""
SHOWN_PX = 384
"""Larger pictures are scaled down to this for the page; decibels are of the full size."""


@dataclass(frozen=True)
class Compared:
    """A clip for the page. What could not be had is None or empty, and ``note`` says why.

    picture: a data URI that shows the source, if it was there, and to its right the clip decoded back.
    stored_snr_db, bf16_snr_db: of the stored latents, and of latents computed in bf16, against fp32.
    """

    clip: Picked
    picture: str = ""
    moving: bool = False
    width: int = 0
    height: int = 0
    note: str = ""
    psnr_db: float | None = None
    stored_snr_db: float | None = None
    bf16_snr_db: float | None = None


class Comparer:
    """Holds the dataset's VAE in fp32, and in bf16 for the first few clips."""

    def __init__(self, vae: str, manifest: Manifest, reader: SourceReader):
        self._made = {name: entry.columns[LATENTS].fingerprint for name, entry in manifest.buckets.items()}
        batch_frames = min(made["batch_frames"] for made in self._made.values())
        self._vae = FrozenVAE.load(vae, default_device(), torch.float32, batch_frames)
        self._bf16 = FrozenVAE.load(vae, default_device(), torch.bfloat16, batch_frames)
        self._bf16_left = BF16_CLIPS
        self._reader = reader

    def compare(self, clip: Picked, source: Source | None) -> Compared:
        """``source`` is None for a clip that the plan does not know."""
        if clip.latents is None:
            return Compared(clip, note=clip.fault)
        sampling = self._made[clip.bucket.name]["sampling"]
        decoded = self._vae.decode(clip.latents)
        frames, note = self._source(clip, source, sampling)
        shown = decoded if frames is None else np.concatenate([frames, decoded], axis=2)
        compared = self._shown(Compared(clip, note=note), shown, sampling["fps"], pictures=1 if frames is None else 2)
        return compared if frames is None else self._measured(compared, clip.latents, frames, decoded)

    def _source(self, clip: Picked, source: Source | None, sampling: dict[str, Any]) -> tuple[np.ndarray | None, str]:
        """The frames that the clip was made from, or why there are none."""
        if source is None:
            return None, "The plan does not say which file it was made from."
        try:
            return self._reader.clip(source, clip.bucket, sampling["fps"], sampling["decoder"]), ""
        except DecodeError as error:
            if error.reason == "missing_file":
                return None, f"The source is gone: {source.path}"
            return None, f"The source cannot be decoded again, {error.reason}: {error}"

    def _measured(self, compared: Compared, stored: np.ndarray, frames: np.ndarray, decoded: np.ndarray) -> Compared:
        exact = self._vae.encode(frames)
        bf16 = None
        if self._bf16_left:
            self._bf16_left -= 1
            bf16 = snr_db(self._bf16.encode(frames), exact)
        return replace(
            compared, psnr_db=psnr_db(decoded, frames), stored_snr_db=snr_db(stored, exact), bf16_snr_db=bf16
        )

    def _shown(self, compared: Compared, frames: np.ndarray, fps: float, pictures: int) -> Compared:
        height, width = frames.shape[1:3]
        scale = min(1.0, SHOWN_PX * pictures / max(height * pictures, width))
        size = max(2, round(scale * width) // 2 * 2), max(2, round(scale * height) // 2 * 2)  # as H.264 needs
        if size != (width, height):
            frames = np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in frames])
        moving = len(frames) > 1
        picture = mp4_uri(frames, fps) if moving else jpeg_uri(frames[0])
        return replace(compared, picture=picture, moving=moving, width=size[0], height=size[1])
