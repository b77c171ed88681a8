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
from stages.sampling.denoise import denoise
from tests.models.networks import ddim

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
    """Bounded outputs that depend on all frames, their timesteps and text; a learned range of garbage where there is
    one."""

    def __init__(self, prediction: str):
        super().__init__()
        self.config = TransformerConfig()
        self.garbage = torch.nn.Parameter(torch.tensor(1e3))
        self.range = prediction == "epsilon"

    def read_text(self, text, mask):
        return text, mask

    def forward(self, latents, timestep, context, *, frame_interval_s, size):
        text, mask = context
        told = (text * mask[:, :, None]).sum((1, 2)) / mask.sum(1) / text.shape[2]
        times = timestep.reshape(len(latents), 1, -1, 1, 1) / 1000
        seen = latents * (1 + times)
        output = torch.tanh(seen + seen.mean(2, keepdim=True)) + told[:, None, None, None, None]
        return torch.cat([output, latents * self.garbage], 1) if self.range else output


def _scheduler(prediction: str) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    if prediction == "velocity":
        flow = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        flow.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS).tolist())
        return flow
    return ddim(prediction, STEPS)


@pytest.mark.parametrize("frames_given", [None, ([True, False], [False, False])])
@pytest.mark.parametrize("prediction", OBJECTIVES)
@torch.no_grad()
def test_guided_samples_are_diffusers(prediction: str, frames_given: tuple[list[bool], ...] | None) -> None:
    info = CheckpointInfo(0, TransformerConfig(), OBJECTIVES[prediction], {"spatial_factor": 8}, {}, 1 / 8)
    model = Model(prediction)
    latents = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0))
    is_given = torch.tensor(frames_given or [[False, False]] * 2)
    given = (latents, is_given) if frames_given else None
    found = denoise(model, info, TEXTS, NULL, [3, 4], SHAPE, steps=STEPS, guidance_scale=GUIDANCE, given=given)

    def output(x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(1, len(text), dtype=torch.bool)
        return model(x, timestep, (text[None], mask), frame_interval_s=1 / 8, size=None)[:, :4]

    for text, seed, clip, stays, ours in zip(TEXTS, (3, 4), latents, is_given, found, strict=True):
        scheduler = _scheduler(prediction)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))[None]
        for timestep in scheduler.timesteps:
            x[0, :, stays] = clip[:, stays]
            times = (timestep.float() * ~stays)[None]
            null = output(x, times, NULL)
            guided = null + GUIDANCE * (output(x, times, text) - null)
            x = scheduler.step(guided, timestep, x, return_dict=False)[0]
        assert torch.equal(ours[:, stays], clip[:, stays])
        assert ours[:, ~stays].std() > 0.1
        assert (ours - x[0])[:, ~stays].abs().max() <= 1e-3 * x.abs().max()
