"""A training step of plain PyTorch on one device, and batches to give it: the model and losses of the trainer, and
what ZeRO-1 does on one rank, without DeepSpeed."""

from dataclasses import dataclass

import numpy as np
import torch

from models.flow import FlowConfig, RectifiedFlow
from models.latents import LatentStats
from models.text_lengths import USUAL_TOKENS
from models.transformer import Transformer, TransformerConfig
from shards.loader import Batch
from shards.schema import Bucket
from stages.training.loss import LatentLoss
from stages.training.optimizer import EmaAdamW, OptimizerConfig

SPATIAL_FACTOR, SD_STATS = 8, LatentStats(scaling_factor=0.18215, shift_factor=0.0)


@dataclass(frozen=True)
class Clips:
    """What a step trains on: ``batch`` clips of a size in pixels."""

    frames: int
    height: int
    width: int
    batch: int = 1
    text_tokens: int = USUAL_TOKENS

    @property
    def name(self) -> str:
        size = f"{self.height}²" if self.height == self.width else f"{self.height} × {self.width}"
        return f"{self.frames} × {size}" + (f", {self.batch} at once" if self.batch > 1 else "")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """T, h, w"""
        return self.frames, self.height // SPATIAL_FACTOR, self.width // SPATIAL_FACTOR


def random_batch(clips: Clips, network: TransformerConfig) -> Batch:
    """As the loader gives it, of random numbers."""
    draw, (frames, height, width) = np.random.default_rng(0), clips.latent_shape
    latents = draw.standard_normal((clips.batch, frames, network.in_channels, height, width), np.float32)
    text = draw.standard_normal((clips.batch, clips.text_tokens, network.text_dim), np.float32)
    return Batch(
        step=0,
        bucket=Bucket(clips.height, clips.width, clips.frames),
        frame_stride=1,
        keys=[str(number) for number in range(clips.batch)],
        positions=np.arange(clips.batch),
        mean=latents.astype(np.float16),
        std=None,
        text=text.astype(np.float16),
        text_mask=np.ones((clips.batch, clips.text_tokens), bool),
    )


def random_loss(network: TransformerConfig, device: torch.device, stats: LatentStats = SD_STATS) -> LatentLoss:
    """The trainer's, with a null text of one token."""
    return LatentLoss(
        RectifiedFlow(FlowConfig()),
        stats,
        torch.zeros(1, network.text_dim),
        frame_interval_s=1 / 8,
        caption_dropout=0.1,
        seed=0,
        device=device,
    )


class TrainingStep:
    """Loss, gradient, EmaAdamW.

    The weights and their gradients are views of two flat tensors of ``dtype``, and the optimiser has a flat fp32 copy
    of the weights, as under ZeRO on one rank.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype, stats: LatentStats = SD_STATS):
        self.model, device = model, model.scale_shift_table.device
        parameters = list(model.parameters())
        self._master = torch.nn.Parameter(torch.cat([part.detach().float().flatten() for part in parameters]))
        self._weights = self._master.detach().to(dtype, copy=True)
        self._gradients = torch.zeros_like(self._weights)
        sizes = [part.numel() for part in parameters]
        views = zip(parameters, self._weights.split(sizes), self._gradients.split(sizes), strict=True)
        for parameter, weights, gradient in views:
            parameter.data = weights.view_as(parameter)
            parameter.grad = gradient.view_as(parameter)
        self._optimizer = EmaAdamW([self._master], OptimizerConfig())
        self._optimizer.init_state([self._master])
        self._loss = random_loss(model.config, device, stats)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The loss, still on the device."""
        self._gradients.zero_()
        loss = self._loss.training(self.model, batch, self.model.config.tokens(*batch.latent_shape))
        loss.backward()
        self._master.grad = self._gradients.float()
        torch.nn.utils.clip_grad_norm_([self._master], 1.0)
        self._optimizer.step()
        self._master.grad = None
        self._weights.copy_(self._master)
        return loss.detach()
