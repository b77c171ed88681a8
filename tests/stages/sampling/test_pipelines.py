"""Each sampler against diffusers' own pipeline, on the same weights, text and noise."""

from dataclasses import replace

import pytest
import torch

from models.flow import FlowConfig
from models.objective import ObjectiveConfig
from models.samplers import SAMPLERS
from models.transformer import Prediction, TransformerConfig
from models.weights import CheckpointInfo
from stages.sampling.config import DenoiseConfig
from stages.sampling.denoise import Request, denoise
from tests.models.networks import SMALL, assert_close, random_transformer
from tests.stages.sampling.pipelines import latte_pipeline, pixart_pipeline

STEPS, SHIFT, SEED = 20, 3.0, 5
FRAMES, SIDE = 3, 8
# As long as each other: LattePipeline shows the model no mask.
TEXT, NULL = (torch.randn(5, SMALL.text_dim, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
VIDEOS = [(prediction, name) for prediction in ("velocity", "epsilon") for name in SAMPLERS[prediction]]  # type: ignore[index]


@pytest.mark.parametrize(("prediction", "name"), VIDEOS)
@torch.no_grad()
def test_videos_are_those_of_lattes_pipeline(prediction: Prediction, name: str) -> None:
    model = random_transformer(replace(SMALL, out_channels=8 if prediction == "epsilon" else 4))
    # LattePipeline guides the learned variance too, which is made to be looked at without guidance.
    guidance_scale = 1.0 if name == "iddpm" else 4.0
    found = _ours(model, prediction, name, FRAMES, guidance_scale)
    generator = torch.Generator().manual_seed(SEED)
    expected = latte_pipeline(model, name, FRAMES, SHIFT)(
        negative_prompt=None, prompt_embeds=TEXT[None], negative_prompt_embeds=NULL[None], num_inference_steps=STEPS,
        guidance_scale=guidance_scale, video_length=FRAMES, height=8 * SIDE, width=8 * SIDE, generator=[generator],
        output_type="latent",
    ).frames  # fmt: skip
    assert_close(found, expected)


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
@torch.no_grad()
def test_a_frame_is_that_of_pixarts_pipeline(name: str) -> None:
    """Which masks text: prompts of any length."""
    model = random_transformer(replace(SMALL, temporal_init="zero"))
    for name_of, parameter in model.temporal_transformer_blocks.named_parameters():
        if ".to_out." in name_of or ".net.2." in name_of:
            parameter.zero_()
    found = _ours(model, "epsilon", name, 1, 4.0, null=NULL[:2])
    padded = torch.cat([NULL[:2], torch.zeros(3, SMALL.text_dim)])
    expected = pixart_pipeline(model, name)(
        negative_prompt=None, prompt_embeds=TEXT[None], prompt_attention_mask=torch.ones(1, 5),
        negative_prompt_embeds=padded[None], negative_prompt_attention_mask=torch.tensor([[1, 1, 0, 0, 0]]),
        num_inference_steps=STEPS, guidance_scale=4.0, height=8 * SIDE, width=8 * SIDE, use_resolution_binning=False,
        generator=[torch.Generator().manual_seed(SEED)], output_type="latent",
    ).images  # fmt: skip
    assert_close(found[:, :, 0], expected)


def _ours(
    model: torch.nn.Module, prediction: Prediction, name: str, frames: int, scale: float, null: torch.Tensor = NULL
) -> torch.Tensor:
    objective = ObjectiveConfig(prediction, **{"flow": FlowConfig((1,), (SHIFT,))} if prediction == "velocity" else {})
    info = CheckpointInfo(0, TransformerConfig(), objective, {"spatial_factor": 8}, {}, 1 / 8)
    config = DenoiseConfig(sampler=name, steps=STEPS, guidance_scale=scale)  # type: ignore[arg-type]
    return denoise(model, info, [Request(TEXT, null, SEED)], (4, frames, SIDE, SIDE), config)  # type: ignore[arg-type]
