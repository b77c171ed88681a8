"""What diffusers' own pipelines make of a model's weights, for tests and benchmarks to hold samples against.

What LattePipeline asks of a scheduler, it asks of diffusion's: of a flow's it needs to be told that all channels are
the prediction, and that neither inputs nor noise are scaled. diffusers' UniPC cuts a flow's timesteps to whole
numbers, and its DDPM steps beside timesteps that are evenly spaced from first to last: here both keep to their own.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
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

from models.flow import FlowConfig
from models.objective import ObjectiveConfig
from models.samplers import SAMPLERS, SamplerName
from models.transformer import Prediction, Transformer
from models.weights import CheckpointInfo
from stages.sampling.config import DenoiseConfig
from stages.sampling.denoise import Request, denoise
from tests.models.networks import SMALL, latte, pixart, random_transformer

BETAS: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
STEPS, SHIFT, SEED, GUIDANCE = 20, 3.0, 5, 4.0
FRAMES, SIDE = 3, 8
# As long as each other: LattePipeline shows the model no mask.
TEXT, NULL = (torch.randn(5, SMALL.text_dim, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
PREDICTIONS: tuple[Prediction, ...] = ("velocity", "epsilon")
VIDEOS = [(prediction, name) for prediction in PREDICTIONS for name in SAMPLERS[prediction]]
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


@torch.no_grad()
def videos_of_latte(prediction: Prediction, name: SamplerName) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and LattePipeline's latents of random weights, after STEPS guided steps."""
    model = random_transformer(replace(SMALL, out_channels=8 if prediction == "epsilon" else 4))
    # LattePipeline guides the learned variance too, which is made to be looked at without guidance.
    guidance_scale = 1.0 if name == "iddpm" else GUIDANCE
    found = _ours(model, prediction, name, FRAMES, Request(TEXT, NULL, SEED), guidance_scale)
    expected = latte_pipeline(model, name, FRAMES, SHIFT)(
        negative_prompt=None, prompt_embeds=TEXT[None], negative_prompt_embeds=NULL[None], num_inference_steps=STEPS,
        guidance_scale=guidance_scale, video_length=FRAMES, height=8 * SIDE, width=8 * SIDE,
        generator=[torch.Generator().manual_seed(SEED)], output_type="latent",
    ).frames  # fmt: skip
    return found, expected


@torch.no_grad()
def frames_of_pixart(name: SamplerName) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and PixArtAlphaPipeline's latents of one frame; it masks text, so that prompts may have any length."""
    model = random_transformer()
    for parameter_name, parameter in model.temporal_transformer_blocks.named_parameters():
        if ".to_out." in parameter_name or ".net.2." in parameter_name:
            parameter.zero_()
    found = _ours(model, "epsilon", name, 1, Request(TEXT, NULL[:2], SEED), GUIDANCE)
    padded = torch.cat([NULL[:2], torch.zeros(3, SMALL.text_dim)])
    expected = pixart_pipeline(model, name)(
        negative_prompt=None, prompt_embeds=TEXT[None], prompt_attention_mask=torch.ones(1, 5),
        negative_prompt_embeds=padded[None], negative_prompt_attention_mask=torch.tensor([[1, 1, 0, 0, 0]]),
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=8 * SIDE, width=8 * SIDE,
        use_resolution_binning=False, generator=[torch.Generator().manual_seed(SEED)], output_type="latent",
    ).images  # fmt: skip
    return found[:, :, 0], expected


def _ours(
    model: Transformer, prediction: Prediction, name: SamplerName, frames: int, request: Request, scale: float
) -> torch.Tensor:
    flow = FlowConfig((1,), (SHIFT,)) if prediction == "velocity" else FlowConfig()
    info = CheckpointInfo(0, model.config, ObjectiveConfig(prediction, flow), {"spatial_factor": 8}, {}, 1 / 8)
    config = DenoiseConfig(sampler=name, steps=STEPS, guidance_scale=scale)
    return denoise(model, info, [request], (4, frames, SIDE, SIDE), config)


def _quiet(pipeline: Any) -> Any:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
