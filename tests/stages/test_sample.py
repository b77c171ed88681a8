"""The sampler's loop, for each objective, against diffusers' schedulers with guidance written out."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from models.diffusion import DiffusionConfig
from models.flow import FlowConfig
from models.objective import ObjectiveConfig
from models.transformer import TransformerConfig
from models.weights import CheckpointInfo
from stages.denoise import denoise

STEPS, GUIDANCE, SHAPE = 10, 3.0, (4, 2, 4, 4)
SHIFT = 4.0
TEXTS = [torch.full((3, 6), 0.2), torch.full((1, 6), -0.4)]
NULL = torch.full((2, 6), 0.05)
OBJECTIVES = {
    "velocity": ObjectiveConfig("velocity", flow=FlowConfig((1,), (SHIFT,))),
    "epsilon": ObjectiveConfig("epsilon", diffusion=DiffusionConfig(5.0)),
    "v": ObjectiveConfig("v"),
}


class Model(torch.nn.Module):
    """Bounded outputs that depend on latents, timestep and text; a learned range of garbage where there is one."""

    def __init__(self, prediction: str):
        super().__init__()
        self.config = TransformerConfig()
        self.garbage = torch.nn.Parameter(torch.tensor(1e3))
        self.range = prediction == "epsilon"

    def forward(self, latents, timestep, text, mask, *, frame_interval_s, size):
        told = (text * mask[:, :, None]).sum((1, 2)) / mask.sum(1) / text.shape[2]
        output = (
            torch.tanh(latents * (1 + timestep[:, None, None, None, None] / 1000)) + told[:, None, None, None, None]
        )
        return torch.cat([output, latents * self.garbage], 1) if self.range else output


def _scheduler(prediction: str) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    if prediction == "velocity":
        flow = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        flow.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS).tolist())
        return flow
    v = prediction == "v"
    ddim = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, prediction_type="v_prediction" if v else "epsilon",
        rescale_betas_zero_snr=v, timestep_spacing="trailing",
    )  # fmt: skip
    ddim.set_timesteps(STEPS)
    return ddim


@pytest.mark.parametrize("prediction", OBJECTIVES)
@torch.no_grad()
def test_guided_samples_are_diffusers(prediction: str) -> None:
    info = CheckpointInfo(0, TransformerConfig(), OBJECTIVES[prediction], {"spatial_factor": 8}, {}, 1 / 8)
    model = Model(prediction)
    found = denoise(model, info, TEXTS, NULL, [3, 4], SHAPE, steps=STEPS, guidance_scale=GUIDANCE)

    def output(x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(1, len(text), dtype=torch.bool)
        return model(x, timestep.reshape(1).float(), text[None], mask, frame_interval_s=1 / 8, size=None)[:, :4]

    for text, seed, ours in zip(TEXTS, (3, 4), found, strict=True):
        scheduler = _scheduler(prediction)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))[None]
        for timestep in scheduler.timesteps:
            null = output(x, timestep, NULL)
            guided = null + GUIDANCE * (output(x, timestep, text) - null)
            x = scheduler.step(guided, timestep, x, return_dict=False)[0]
        assert ours.std() > 0.1
        assert (ours - x[0]).abs().max() <= 1e-3 * x.abs().max()
