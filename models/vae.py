"""The frozen VAE: frames to latents and back, through diffusers' AutoencoderKL.

Shapes: N frames, H x W pixels, C latent channels, h x w latent size.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError

from models.errors import WeightsError
from models.identity import vae_config, vae_identity
from models.source import resolve_model
from models.vae_bands import decode_in_bands

MOST_SIZES = 64
"""Of frames, that a process can compile an encoder for."""


class FrozenVAE:
    """A VAE that never learns and whose answer for a frame depends on that frame alone.

    Every batch that runs has exactly ``batch_frames`` frames: the input is cut, and the last batch is filled up with
    zeros whose results are dropped. Libraries choose their kernels by shape, so only a fixed shape gives a
    frame the same latent whatever else is encoded with it.

    Latents are unscaled: what the encoder says, without ``scaling_factor`` and ``shift_factor``.

    ``identity`` is what a dataset records of it: see `models.identity`. ``channels_last`` and ``compiled`` choose other
    kernels, which round in another order: the layout of pictures in memory, and torch.compile for the encoder, once
    for each size of frames. ``band_rows`` bounds the memory of a decode: see `models.vae_bands`.
    """

    def __init__(
        self,
        model: AutoencoderKL,
        identity: dict[str, Any],
        batch_frames: int,
        *,
        channels_last: bool = False,
        compiled: bool = False,
        band_rows: int | None = None,
    ):
        if batch_frames < 1:
            raise ValueError(f"batch_frames is {batch_frames}; it must be at least 1")
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._model = model.eval().requires_grad_(False).to(memory_format=self._layout)
        if compiled:
            # One compilation for any size would make the bytes depend on which sizes came first.
            model.encoder.compile(dynamic=False, fullgraph=True)
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SIZES)
        if band_rows is not None:
            decode_in_bands(model.decoder, band_rows)
        self.batch_frames = batch_frames
        self.identity = identity

    @classmethod
    def load(
        cls,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_frames: int = 8,
        *,
        channels_last: bool = False,
        compiled: bool = False,
        band_rows: int | None = None,
    ) -> "FrozenVAE":
        """Load ``tiny``, a folder or a hub id; WeightsError when it is absent or not a whole AutoencoderKL."""
        folder = resolve_model(name, "vae")
        identity = vae_identity(name)
        model = _load_model(folder, dtype).to(device)
        return cls(model, identity, batch_frames, channels_last=channels_last, compiled=compiled, band_rows=band_rows)

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """The posterior's mean of each frame: uint8 [N, H, W, 3] -> float32 [N, C, h, w], unscaled."""
        return self.encode_posterior(frames)[0]

    def encode_posterior(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The posterior's mean and standard deviation: uint8 [N, H, W, 3] -> two float32 [N, C, h, w], unscaled."""
        return next(self.encode_clips([frames]))

    def encode_clips(self, clips: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """``encode_posterior`` of each clip, in order; all clips have frames of one size.

        Batches go on from one clip into the next, so that short clips fill them too. Reads ahead by one batch.
        """
        lengths: deque[int] = deque()
        moments: deque[torch.Tensor] = deque()  # of frames whose clip is not complete
        for batch in _batches(self._checked(clips, lengths), self.batch_frames):
            moments.append(self._run(torch.from_numpy(batch), self._encode_batch))
            while lengths and sum(map(len, moments)) >= lengths[0]:
                whole, rest = torch.cat(tuple(moments)).tensor_split([lengths.popleft()])
                moments = deque([rest])
                mean, std = whole.chunk(2, dim=1)
                yield mean.numpy(), std.numpy()

    def _checked(self, clips: Iterable[np.ndarray], lengths: deque[int]) -> Iterator[np.ndarray]:
        factor = self.identity["spatial_factor"]
        for frames in clips:
            if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
                raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [N, H, W, 3], N > 0")
            if frames.shape[1] % factor or frames.shape[2] % factor:
                size = f"{frames.shape[1]} x {frames.shape[2]}"
                raise ValueError(f"frames are {size}; expected multiples of {factor} pixels")
            lengths.append(len(frames))
            yield frames

    def decode(self, latents: np.ndarray | torch.Tensor) -> np.ndarray:
        """Pictures of unscaled latents: [N, C, h, w] -> uint8 [N, H, W, 3]."""
        tensor = torch.tensor(latents) if isinstance(latents, np.ndarray) else latents
        if tensor.ndim != 4 or tensor.shape[1] != self.identity["latent_channels"]:
            expected = f"[N, {self.identity['latent_channels']}, h, w]"
            raise ValueError(f"latents are {list(tensor.shape)}; expected {expected}")
        return self._run(tensor, self._decode_batch).numpy()

    def _encode_batch(self, frames: torch.Tensor) -> torch.Tensor:
        pixels = frames.permute(0, 3, 1, 2).to(self._model.dtype) / 127.5 - 1  # [n, 3, H, W] in -1..1
        posterior = self._model.encode(pixels.contiguous(memory_format=self._layout)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()  # [n, 2C, h, w]

    def _decode_batch(self, latents: torch.Tensor) -> torch.Tensor:
        pixels = self._model.decode(latents.to(self._model.dtype)).sample.float()  # [n, 3, H, W]
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)

    @torch.inference_mode()
    def _run(self, items: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Apply a function of whole batches to any number of items; the result lies on the CPU."""
        if len(items) == 0:
            raise ValueError("there are no frames")
        done = [function(batch.to(self._model.device)).cpu() for batch in self._full_batches(items)]
        return torch.cat(done)[: len(items)].contiguous()

    def _full_batches(self, items: torch.Tensor) -> Iterator[torch.Tensor]:
        for batch in items.split(self.batch_frames):
            missing = self.batch_frames - len(batch)
            yield torch.cat([batch, batch.new_zeros(missing, *batch.shape[1:])]) if missing else batch


def _batches(clips: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The frames of all clips, [size, H, W, 3] at a time; the last may have fewer."""
    parts: list[np.ndarray] = []
    room = size
    for clip in clips:
        while len(clip):
            part, clip = clip[:room], clip[room:]
            parts.append(part)
            room -= len(part)
            if not room:
                yield np.concatenate(parts)  # a copy: Ray's arrays are read-only
                parts, room = [], size
    if parts:
        yield np.concatenate(parts)


def empty_vae(name: str) -> AutoencoderKL:
    """The network without its weights; raises WeightsError as ``load`` does."""
    with torch.device("meta"):
        return AutoencoderKL.from_config(vae_config(name))


def _load_model(folder: Path, dtype: torch.dtype) -> AutoencoderKL:
    try:
        model, report = AutoencoderKL.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{folder} could not be loaded as an AutoencoderKL: {error}") from error
    if report["missing_keys"] or report["unexpected_keys"]:
        raise WeightsError(
            f"{folder}: the weights are not those of its config: {len(report['missing_keys'])} tensors are missing, "
            f"{len(report['unexpected_keys'])} unexpected {[*report['missing_keys'], *report['unexpected_keys']][:3]}"
        )
    return model
