"""The training loss of a batch of stored latents: noise, timestep, caption dropout and given frames, each a pure
function of (seed, position), so that a resume or another number of ranks changes nothing."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from models.latents import LatentStats
from models.objective import Objective
from shards.loader import Batch
from stages.training.given_frames import TEXT_ALONE, ConditioningConfig


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch of b samples."""

    level: torch.Tensor  # [b] standard normal, which the objective makes a noise level of
    dropout: torch.Tensor  # [b] uniform
    noise: torch.Tensor  # [b, C, T, h, w] standard normal
    posterior: torch.Tensor | None  # the same shape, where the dataset stores a posterior's std


def draw(seed: int, positions: np.ndarray, shape: torch.Size, *, posterior: bool) -> Draws:
    """One generator a sample, seeded by (seed, its position in the endless stream of samples)."""
    rows = []
    for position in positions:
        generator = _generator(f"{seed}/{position}")
        rows.append(
            (
                torch.randn((), generator=generator),
                torch.rand((), generator=generator),
                torch.randn(shape, generator=generator),
                torch.randn(shape, generator=generator) if posterior else torch.empty(0),
            )
        )
    level, dropout, noise, sampled = (torch.stack(column) for column in zip(*rows, strict=True))
    return Draws(level, dropout, noise, sampled if posterior else None)


def draw_given(config: ConditioningConfig, seed: int, positions: np.ndarray, frames: int) -> torch.Tensor:
    """Which frames of b samples are given, [b, T] bool; from generators of their own, so that no other draw changes."""
    generators = [_generator(f"given frames/{seed}/{position}") for position in positions]
    return torch.stack([config.draw(frames, generator) for generator in generators])


def held_out_noise(keys: list[str], level: float, shape: torch.Size) -> torch.Tensor:
    """[b, C, T, h, w] standard normal, the same for a sample and a level in every run."""
    return torch.stack([torch.randn(shape, generator=_generator(f"held out/{level:g}/{key}")) for key in keys])


def _generator(name: str) -> torch.Generator:
    digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class LatentLoss:
    """An objective's loss with classifier-free caption dropout (Ho & Salimans, 2022).

    A dropped caption becomes the null text with the null's own mask, never the null under the caption's mask.
    conditioning: which frames of which samples are given in training.
    """

    def __init__(
        self,
        objective: Objective,
        stats: LatentStats,
        null_text: torch.Tensor,  # [L0, D], all of it true tokens
        *,
        frame_interval_s: float,  # of the stored clips
        caption_dropout: float,
        seed: int,
        device: torch.device,
        conditioning: ConditioningConfig = TEXT_ALONE,
    ):
        self.objective = objective
        self.stats = stats
        self.null_text = null_text.to(device, torch.float32)
        self.frame_interval_s = frame_interval_s
        self.caption_dropout = caption_dropout
        self.seed = seed
        self.device = device
        self.conditioning = conditioning

    def training(self, model: torch.nn.Module, batch: Batch, tokens: int) -> torch.Tensor:
        """The mean over the batch at random levels, a scalar; ``tokens`` is what the model cuts a sample into.

        A sample's own loss is the mean over the frames that it is asked for.
        """
        latents = self._to_device(batch.mean).float().transpose(1, 2)  # [b, T, C, h, w] -> [b, C, T, h, w]
        draws = draw(self.seed, batch.positions, latents.shape[1:], posterior=batch.std is not None)
        if batch.std is not None and draws.posterior is not None:
            std = self._to_device(batch.std).float().transpose(1, 2)
            latents = latents + std * self._to_device(draws.posterior)
        text, mask = self._with_captions(batch, draws.dropout < self.caption_dropout)
        level = self.objective.levels(draws.level, tokens)
        given = draw_given(self.conditioning, self.seed, batch.positions, latents.shape[2])
        if given.any():  # otherwise one level a sample, which costs the model less
            level = level[:, None].masked_fill(given, 0)  # [b, T]
        losses = self._of_frames(model, batch, self.stats.normalise(latents), draws.noise, level, text, mask)
        asked = ~self._to_device(given)
        weight = asked * asked.shape[1] / asked.sum(1, keepdim=True)  # exactly 1 where all frames are asked for
        return (losses * weight).mean()

    def held_out(self, model: torch.nn.Module, batch: Batch, level: float) -> torch.Tensor:
        """Each sample's, [b], at one level: of the mean latents, with fixed noise and every caption."""
        latents = self.stats.normalise(self._to_device(batch.mean).float().transpose(1, 2))
        noise = held_out_noise(batch.keys, level, latents.shape[1:])
        levels = torch.full((len(batch.keys),), level)
        text, mask = self._with_captions(batch, torch.zeros(len(batch.keys), dtype=torch.bool))
        return self._of_frames(model, batch, latents, noise, levels, text, mask).mean(1)

    def _of_frames(
        self,
        model: torch.nn.Module,
        batch: Batch,
        latents: torch.Tensor,
        noise: torch.Tensor,
        level: torch.Tensor,
        text: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """[b, T], from normalised latents and noise [b, C, T, h, w], levels [b] or [b, T] and the text."""
        noise = self._to_device(noise)
        output = model(
            self.objective.noised(latents, noise, level),
            self._to_device(self.objective.timestep(level)),
            text,
            mask,
            frame_interval_s=self.frame_interval_s * batch.frame_stride,
            size=(batch.bucket.height, batch.bucket.width),
        )
        return self.objective.loss(output, latents, noise, level)

    def _with_captions(self, batch: Batch, dropped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The text [b, L, D] that the model reads, and its mask [b, L]; None where nothing is padded, which lets more
        kernels attend to it. dropped: [b] bool, on the host as all that decides the mask."""
        text, mask = self._to_device(batch.text).float(), torch.as_tensor(batch.text_mask)
        if dropped.any():
            length = self.null_text.shape[0]
            lacking = max(0, length - mask.shape[1])  # the null of PixArt-alpha's weights is longer than the dataset's
            text = torch.nn.functional.pad(text, (0, 0, 0, lacking))
            mask = torch.nn.functional.pad(mask, (0, lacking))
            null = torch.zeros_like(text[0])
            null[:length] = self.null_text
            text = torch.where(self._to_device(dropped)[:, None, None], null, text)
            mask = torch.where(dropped[:, None], torch.arange(mask.shape[1]) < length, mask)
        return text, None if mask.all() else self._to_device(mask)

    def _to_device(self, values: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Without waiting for the device, which may still be at the step before."""
        tensor = torch.as_tensor(values)
        if self.device.type == "cuda":
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)  # contiguous, as a batch is not
            tensor = pinned.copy_(tensor)
        return tensor.to(self.device, non_blocking=True)
