"""diffusers' own pipelines around a model's weights, for tests and benchmarks to hold samples against.

What LattePipeline asks of a scheduler, it asks of diffusion's: of a flow's it needs to be told that all channels are
the prediction, and that neither inputs nor noise are scaled. diffusers' UniPC cuts a flow's timesteps to whole
numbers, and its DDPM steps beside timesteps that are evenly spaced from first to last: here both keep to their own.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    PixArtAlphaPipeline,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config

from models.transformer import Transformer
from tests.models.networks import latte, pixart

BETAS: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
ALL_CHANNELS = "learned_range"  # the variance_type for which a pipeline leaves the model's channels as they are


class FlowEuler(FlowMatchEulerDiscreteScheduler):
    """Euler's steps, evenly spaced down to 1 / steps before the shift."""

    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0, variance_type: str = ALL_CHANNELS):
        super().__init__(num_train_timesteps, shift)

    def set_timesteps(self, steps: int, device: Any = None) -> None:  # type: ignore[override]
        super().set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample


class FlowUniPC(UniPCMultistepScheduler):
    """UniPC on the same levels."""

    def set_timesteps(self, steps: int, device: Any = None) -> None:  # type: ignore[override]
        super().set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        self.timesteps = 1000 * self.sigmas[:-1]


class Ancestral(DDPMScheduler):
    """From the noisiest timestep to the first."""

    def set_timesteps(self, steps: int, device: Any = None) -> None:  # type: ignore[override]
        super().set_timesteps(timesteps=np.linspace(999, 0, steps).round().astype(int).tolist())


def _flow_unipc(shift: float) -> FlowUniPC:
    scheduler = FlowUniPC(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.register_to_config(variance_type=ALL_CHANNELS)
    return scheduler


SCHEDULERS: dict[str, Callable[[float], Any]] = {
    "ddim": lambda shift: DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"),
    "dpm++": lambda shift: DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing"),
    "iddpm": lambda shift: Ancestral(**BETAS, clip_sample=False, variance_type="learned_range"),
    "euler": lambda shift: FlowEuler(shift=shift),
    "unipc": _flow_unipc,
}


def latte_pipeline(model: Transformer, sampler: str, frames: int, shift: float = 1.0) -> LattePipeline:
    """LattePipeline with our weights in diffusers' transformer; it needs its prompt as embeddings."""
    video = latte(model.config, frames)
    video.load_state_dict(model.state_dict())
    return _quiet(LattePipeline(None, None, None, video, SCHEDULERS[sampler](shift)))


def pixart_pipeline(model: Transformer, sampler: str) -> PixArtAlphaPipeline:
    """PixArtAlphaPipeline with our spatial weights in diffusers' transformer, for one frame."""
    image = pixart(model.config)
    image.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "temporal" not in name})
    return _quiet(PixArtAlphaPipeline(None, None, None, image, SCHEDULERS[sampler](1.0)))


def _quiet(pipeline: Any) -> Any:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
