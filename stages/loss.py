"""The training loss of a batch of stored latents: noise, timestep and caption dropout, each a pure function
of (seed, position), so that a resume or another number of ranks changes nothing."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from models import flow
from models.latents import LatentStats
from shards.loader import Batch


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch of b samples."""

    sigma: torch.Tensor  # [b] standard normal
    dropout: torch.Tensor  # [b] uniform
    noise: torch.Tensor  # [b, C, T, h, w] standard normal
    posterior: torch.Tensor | None  # the same shape, where the dataset stores a posterior's std


def draw(seed: int, positions: np.ndarray, shape: torch.Size, *, posterior: bool) -> Draws:
    """One generator a sample, seeded by (seed, its position in the endless stream of samples)."""
    rows = []
    for position in positions:
        digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        rows.append(
            (
                torch.randn((), generator=generator),
                torch.rand((), generator=generator),
                torch.randn(shape, generator=generator),
                torch.randn(shape, generator=generator) if posterior else torch.empty(0),
            )
        )
    sigma, dropout, noise, sampled = (torch.stack(column) for column in zip(*rows, strict=True))
    return Draws(sigma, dropout, noise, sampled if posterior else None)


class FlowLoss:
    """Rectified-flow loss with classifier-free caption dropout (Ho & Salimans, 2022).

    A dropped caption becomes the null text with the null's own mask, never the null under the caption's mask.
    """

    def __init__(
        self,
        config: flow.FlowConfig,
        stats: LatentStats,
        null_text: torch.Tensor,  # [L0, D], all of it true tokens
        *,
        frame_interval_s: float,
        caption_dropout: float,
        seed: int,
        device: torch.device,
    ):
        self.config = config
        self.stats = stats
        self.null_text = null_text.to(device, torch.float32)
        self.frame_interval_s = frame_interval_s
        self.caption_dropout = caption_dropout
        self.seed = seed
        self.device = device

    def __call__(self, model: torch.nn.Module, batch: Batch, tokens: int) -> torch.Tensor:
        """The mean loss over the batch, a scalar; ``tokens`` is what the model cuts a sample into."""
        latents = self._to_device(batch.mean).transpose(1, 2)  # [b, T, C, h, w] -> [b, C, T, h, w]
        draws = draw(self.seed, batch.positions, latents.shape[1:], posterior=batch.std is not None)
        if batch.std is not None and draws.posterior is not None:
            std = self._to_device(batch.std).transpose(1, 2)
            latents = latents + std * draws.posterior.to(self.device)
        latents = self.stats.normalise(latents)
        noise = draws.noise.to(self.device)
        sigma = flow.sigmas(self.config, draws.sigma.to(self.device), flow.shift_for(self.config, tokens))
        text, mask = self._drop_captions(batch, draws.dropout)
        predicted = model(
            flow.noised(latents, noise, sigma),
            flow.timestep(sigma),
            text,
            mask,
            frame_interval_s=self.frame_interval_s,
        )
        return flow.loss(predicted, flow.velocity(latents, noise)).mean()

    def _drop_captions(self, batch: Batch, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        text = self._to_device(batch.text)  # [b, L, D]
        mask = torch.from_numpy(batch.text_mask).to(self.device)
        dropped = (uniform < self.caption_dropout).to(self.device)
        length = self.null_text.shape[0]
        lacking = max(0, length - mask.shape[1])  # the null of PixArt-alpha's weights is longer than the dataset's
        text = torch.nn.functional.pad(text, (0, 0, 0, lacking))
        mask = torch.nn.functional.pad(mask, (0, lacking))
        null = torch.zeros_like(text[0])
        null[:length] = self.null_text
        null_mask = torch.arange(mask.shape[1], device=self.device) < length
        text = torch.where(dropped[:, None, None], null, text)
        return text, torch.where(dropped[:, None], null_mask, mask)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.float()
