"""The sampler's loop, for each objective, against diffusers' schedulers with guidance written out."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from models.diffusion import DiffusionConfig
from models.flow import FlowConfig
from models.objective import ObjectiveConfig
from models.transformer import TransformerConfig
from models.weights import CheckpointInfo
from stages.sampling.config import DenoiseConfig
from stages.sampling.denoise import Given, Request, denoise, guided
from tests.models.networks import SMALL, ddim, random_transformer

STEPS, GUIDANCE, SHAPE = 10, 3.0, (4, 2, 4, 4)
SHIFT = 4.0
TEXTS = [torch.full((3, 6), 0.2), torch.full((1, 6), -0.4)]
NULLS = [torch.full((2, 6), 0.05), torch.full((4, 6), -0.1)]  # a negative prompt each
SEEDS = (3, 4)
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

    def forward(self, latents, timestep, context, *, frame_interval_s, size, cache=None):
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
    latents = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0))
    stays = torch.tensor(frames_given or [[False, False]] * 2)
    given = [Given(clip, frames) for clip, frames in zip(latents, stays, strict=True)] if frames_given else [None, None]
    found = _denoise(prediction, DenoiseConfig(steps=STEPS, guidance_scale=GUIDANCE), given)

    for text, null, seed, clip, stay, ours in zip(TEXTS, NULLS, SEEDS, latents, stays, found, strict=True):
        expected = _by_diffusers(prediction, text, null, seed, clip, stay, lambda *both: _guided(*both[:2]))
        assert torch.equal(ours[:, stay], clip[:, stay])
        assert ours[:, ~stay].std() > 0.1
        assert (ours - expected)[:, ~stay].abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("low", "high", "guides"), [(0.3, 0.75, 4), (0.0, 0.0, 0), (0.0, 1.0, 10)])
@torch.no_grad()
def test_guidance_acts_in_its_interval_alone_and_costs_nothing_elsewhere(low: float, high: float, guides: int) -> None:
    config = DenoiseConfig(steps=STEPS, guidance_scale=GUIDANCE, guidance_interval=(low, high))
    model = Model("epsilon")
    rows: list[int] = []
    model.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    found = _denoise("epsilon", config, model=model)
    assert (rows.count(4), rows.count(2)) == (guides, STEPS - guides)

    def output(conditional: torch.Tensor, null: torch.Tensor, timestep: int) -> torch.Tensor:
        return _guided(conditional, null) if 1000 * low <= timestep <= 1000 * high else conditional

    nothing = torch.zeros(2, dtype=torch.bool)
    for text, null, seed, ours in zip(TEXTS, NULLS, SEEDS, found, strict=True):
        expected = _by_diffusers("epsilon", text, null, seed, ours, nothing, output)
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_rescale_is_diffusers(rescale: float) -> None:
    conditional, null = (torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    beside = torch.full_like(conditional, 5.0)
    config = DenoiseConfig(guidance_scale=GUIDANCE, guidance_rescale=rescale)
    found = guided(torch.cat([conditional, beside], 1), torch.cat([null, -beside], 1), config, channels=4)
    expected = rescale_noise_cfg(_guided(conditional, null), conditional, guidance_rescale=rescale)
    torch.testing.assert_close(found[:, :4], expected)
    assert torch.equal(found[:, 4:], beside)  # a variance is the conditional branch's


@pytest.mark.parametrize("sampler", ["ddim", "iddpm"])
@torch.no_grad()
def test_a_samples_bits_depend_on_its_own_input_alone(sampler: str) -> None:
    """Among batches of one size, whatever else is in them and wherever it is; the noise of each step as well."""
    model, info = random_transformer(replace(SMALL, text_dim=6)), _info("epsilon")
    texts = [torch.randn(length, 6, generator=torch.Generator().manual_seed(length)) for length in (3, 9, 1, 14)]
    requests = [Request(text, NULLS[0], seed) for seed, text in enumerate(texts)]
    config = DenoiseConfig(sampler=sampler, steps=3)  # type: ignore[arg-type]
    together = denoise(model, info, requests, SHAPE, config)
    assert not torch.allclose(together[0], together[1], atol=0.1)
    alone = denoise(model, info, requests[2:3] * 4, SHAPE, config)
    assert torch.equal(alone[0], together[2]) and torch.equal(alone[3], together[2])
    turned = denoise(model, info, requests[::-1], SHAPE, config)
    assert torch.equal(turned.flip(0), together)


@pytest.mark.parametrize("settings", [{"guidance_scale": 1.0}, {"guidance_interval": (0.3, 0.7)}], ids=str)
@pytest.mark.parametrize("count", [3, 5])
def test_also_where_the_rows_of_a_step_are_odd(count: int, settings: dict) -> None:
    """Kernels of a CPU take rows in twos, and round the last of an odd number otherwise."""
    model, info = random_transformer(replace(SMALL, text_dim=6)), _info("epsilon")
    requests = [Request(torch.full((1 + seed, 6), seed / 9), NULLS[0], seed) for seed in range(count)]
    config = DenoiseConfig(steps=6, **settings)
    together = denoise(model, info, requests, (4, 3, 4, 6), config)
    for number, request in enumerate(requests):
        assert torch.equal(denoise(model, info, [request] * count, (4, 3, 4, 6), config)[0], together[number])


def _by_threshold(
    thresholds: Sequence[float | None], **settings: object
) -> tuple[dict[float | None, torch.Tensor], dict[float | None, int]]:
    """For each the latents, and how often the last pair of a network of three was run. Its outputs change slowly."""
    network = replace(SMALL, num_layers=3, out_channels=4)
    model, info = random_transformer(network), _info("velocity")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.5
    runs: list[int] = []
    model.transformer_blocks[-1].register_forward_hook(lambda _, inputs, output: runs.append(len(inputs[0])))
    texts = [torch.randn(length, 20, generator=torch.Generator().manual_seed(length)) for length in (3, 9, 1)]
    requests = [Request(text, texts[-1], seed) for seed, text in enumerate(texts)]
    latents, counts = {}, {}
    for threshold in thresholds:
        runs.clear()
        config = DenoiseConfig(steps=30, step_cache=threshold, **settings)  # type: ignore[arg-type]
        latents[threshold] = denoise(model, info, requests, (4, 2, 8, 8), config)
        counts[threshold] = len(runs)
    return latents, counts


def test_a_step_cache_saves_the_more_and_errs_the_more_the_higher_its_threshold() -> None:
    latents, counts = _by_threshold((None, 0.0, 0.05, 0.1, 0.2))
    assert torch.equal(latents[0.0], latents[None])
    assert 30 == counts[None] == counts[0.0] > counts[0.05] > 15 > counts[0.1] > counts[0.2]
    differs = [float((found - latents[None]).norm() / latents[None].norm()) for found in latents.values()]
    assert differs == sorted(differs) and 0 < differs[2] <= 0.005 and differs[3] <= 0.03


def test_a_step_cache_begins_anew_where_guidance_begins_and_ends() -> None:
    _, counts = _by_threshold((9.0,))
    assert counts == {9.0: 1}
    _, counts = _by_threshold((9.0,), guidance_interval=(0.2, 0.8))
    assert counts == {9.0: 3}


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_no_step_cache_has_such_a_threshold(threshold: float) -> None:
    with pytest.raises(ValueError, match="step_cache: found .*, expected at least 0"):
        DenoiseConfig(step_cache=threshold)


def _info(prediction: str) -> CheckpointInfo:
    return CheckpointInfo(0, TransformerConfig(), OBJECTIVES[prediction], {"spatial_factor": 8}, {}, 1 / 8)


def _denoise(
    prediction: str, config: DenoiseConfig, given: Sequence[Given | None] = (None, None), model: Model | None = None
) -> torch.Tensor:
    requests = [Request(*each) for each in zip(TEXTS, NULLS, SEEDS, given, strict=True)]
    return denoise(model or Model(prediction), _info(prediction), requests, SHAPE, config)  # type: ignore[arg-type]


def _guided(conditional: torch.Tensor, null: torch.Tensor) -> torch.Tensor:
    return null + GUIDANCE * (conditional - null)


def _by_diffusers(
    prediction: str,
    text: torch.Tensor,
    null: torch.Tensor,
    seed: int,
    clip: torch.Tensor,
    stays: torch.Tensor,
    combined: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
) -> torch.Tensor:
    """One sample by diffusers' scheduler and two calls of the model a step; the frames that stay are the clip's."""
    scheduler, model = _scheduler(prediction), Model(prediction)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))[None]
    for timestep in scheduler.timesteps:
        x[0, :, stays] = clip[:, stays]
        times = (timestep.float() * ~stays)[None]
        conditional, unconditional = (
            model(x, times, (it[None], torch.ones(1, len(it), dtype=torch.bool)), frame_interval_s=1 / 8, size=None)
            for it in (text, null)
        )
        output = combined(conditional[:, :4], unconditional[:, :4], int(timestep))
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
    return x[0]
