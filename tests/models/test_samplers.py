"""Samplers against diffusers' DDIM, against exact solutions, and along the paths that training knows."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from models.flow import FlowConfig
from models.objective import ObjectiveConfig, make_objective
from models.samplers import SAMPLERS, Sampler, SamplerName, make_sampler
from models.transformer import Prediction
from tests.models.networks import ddim

TOKENS = 1000
SHAPE = (2, 4, 3, 4, 4)
WITHOUT_NOISE = [(prediction, name) for prediction, names in SAMPLERS.items() for name in names if name != "iddpm"]


def _draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def _objective(prediction: Prediction, shift: float = 1.0) -> ObjectiveConfig:
    flow = FlowConfig((TOKENS,), (shift,)) if prediction == "velocity" else FlowConfig()
    return ObjectiveConfig(prediction, flow=flow)


def _levels(sampler: Sampler, prediction: Prediction) -> Tensor:
    """Training's levels for the timesteps that the model is told, and 0 at the end."""
    counted_from_0 = 0 if prediction == "velocity" else 1
    return torch.cat([(sampler.timesteps.double() + counted_from_0) / 1000, torch.zeros(1)])


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_ddim_is_diffusers(prediction: Prediction, steps: int) -> None:
    scheduler, sampler = ddim(prediction, steps), make_sampler(None, _objective(prediction), steps, TOKENS)
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()
    ours = theirs = _draw(2)
    for index, timestep in enumerate(scheduler.timesteps):
        output = torch.tanh(theirs * (1 + timestep / 1000)) + 0.1 * _draw(7)
        theirs = scheduler.step(output, timestep, theirs, eta=0.0, return_dict=False)[0]
        ours = sampler.step(index, ours, output, [])
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert theirs.std() > 0.1


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0, 4.5])
def test_flows_levels_are_evenly_spaced_before_their_shift(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    for name in SAMPLERS["velocity"]:
        found = make_sampler(name, _objective("velocity", shift), steps, TOKENS).timesteps
        assert torch.allclose(found, scheduler.timesteps, atol=2e-3)


@pytest.mark.parametrize(("prediction", "name"), WITHOUT_NOISE)
@pytest.mark.parametrize("steps", [1, 3, 30, 300])
def test_the_true_output_leads_to_the_data_whatever_the_steps(
    prediction: Prediction, name: SamplerName, steps: int
) -> None:
    """Also where 1000 is no multiple of the steps, and where many of a flow's timesteps begin alike."""
    config, data, noise = _objective(prediction, 4.0), _draw(1).double(), _draw(2).double()
    objective, sampler = make_objective(config), make_sampler(name, config, steps, TOKENS)
    levels = _levels(sampler, prediction)
    assert len(levels) == steps + 1 and levels[0] == pytest.approx(1, abs=2e-6)
    x = objective.noised(data, noise, torch.ones(2, dtype=torch.float64)).float()
    for index, level in enumerate(levels[:-1]):
        signal, spread = (
            objective.noised(torch.full_like(data, share), torch.full_like(data, 1 - share), level.expand(2))
            for share in (1.0, 0.0)
        )
        output = {"velocity": noise - data, "epsilon": noise, "v": signal * noise - spread * data}[prediction]
        x = sampler.step(index, x, torch.cat([output, 1e3 * _draw(5)], 1).float(), [])  # a learned range is ignored
        ahead = objective.noised(data, noise, levels[index + 1].expand(2))
        torch.testing.assert_close(x.double(), ahead, rtol=0, atol=2e-3 if index < steps - 1 else 1e-3)


def _error(prediction: Prediction, name: SamplerName, steps: int) -> float:
    """How far the sampler ends from the exact solution for data that are normal with a spread of 1/2.

    The ideal output is linear in x, and the exact way keeps x in proportion to the spread of noised data.
    """
    config, spread = _objective(prediction), 0.5
    objective, sampler = make_objective(config), make_sampler(name, config, steps, TOKENS)
    one, zero = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)
    x = torch.ones(1, 1, 1, 1, 1)
    levels = _levels(sampler, prediction)
    for index, level in enumerate(levels[:-1]):
        a, b = float(objective.noised(one, zero, level[None])), float(objective.noised(zero, one, level[None]))
        variance = (a * spread) ** 2 + b**2
        data, noise = a * spread**2 / variance * x, b / variance * x  # what is expected of both, given x
        output = {"velocity": noise - data, "epsilon": noise, "v": a * noise - b * data}[prediction]
        x = sampler.step(index, x, output, [])
    first = levels[:1]
    whole = (float(objective.noised(one, zero, first)) * spread) ** 2 + float(objective.noised(zero, one, first)) ** 2
    return abs(float(x) - spread / math.sqrt(whole))


@pytest.mark.parametrize(("prediction", "name"), WITHOUT_NOISE)
def test_errors_fall_as_the_orders_say(prediction: Prediction, name: SamplerName) -> None:
    error, with_twice_the_steps = _error(prediction, name, 20), _error(prediction, name, 40)
    assert 1e-6 < error < 0.1
    if name in ("ddim", "euler"):
        assert 1.7 < error / with_twice_the_steps < 2.5
    else:
        assert error / with_twice_the_steps > 3
        assert error < 0.5 * _error(prediction, SAMPLERS[prediction][0], 20)


def test_iddpm_is_its_authors_formulas() -> None:
    """Nichol & Dhariwal, equations 9, 10 and 15, on the respaced betas of their section 4."""
    steps, sampler = 7, make_sampler("iddpm", _objective("epsilon"), 7, TOKENS)
    timesteps = [999, 832, 666, 500, 333, 166, 0]
    assert sampler.timesteps.tolist() == timesteps
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    generators, again = ([torch.Generator().manual_seed(seed) for seed in (3, 4)] for _ in range(2))
    x = found = _draw(0)
    for index, timestep in enumerate(timesteps):
        output, position = torch.tanh(x * (1 + timestep / 1000)), torch.sin(7 * x)
        found = sampler.step(index, x, torch.cat([output, position], 1), generators)
        now, before = kept[timestep], kept[timesteps[index + 1]] if index < steps - 1 else torch.tensor(1.0)
        beta = 1 - now / before
        mean = (x - beta / (1 - now).sqrt() * output) / (1 - beta).sqrt()
        if index < steps - 1:
            lower, share = beta * (1 - before) / (1 - now), (position + 1) / 2
            variance = (share * beta.log() + (1 - share) * lower.log()).exp()
            noise = torch.stack([torch.randn(SHAPE[1:], generator=generator) for generator in again])
            mean = mean + variance.sqrt() * noise
        torch.testing.assert_close(found, mean.float(), rtol=1e-4, atol=1e-4)
        x = found


@pytest.mark.parametrize(
    ("prediction", "name", "known"),
    [("velocity", "ddim", "euler, unipc"), ("epsilon", "euler", "ddim, dpm++, iddpm"), ("v", "iddpm", "ddim, dpm++")],
)
def test_a_sampler_for_another_prediction(prediction: Prediction, name: SamplerName, known: str) -> None:
    with pytest.raises(ValueError, match=rf"found '{name}', expected one of {known.replace('+', '.')}: the model pred"):
        make_sampler(name, _objective(prediction), 10, TOKENS)


@pytest.mark.parametrize(("prediction", "name"), [("v", "ddim"), ("epsilon", "dpm++"), ("epsilon", "iddpm")])
def test_a_diffusion_has_no_more_steps_than_it_was_trained_on(prediction: Prediction, name: SamplerName) -> None:
    make_sampler(name, _objective(prediction), 1000, TOKENS)
    with pytest.raises(ValueError, match="steps: found 1001, expected at most 1000, those of the training"):
        make_sampler(name, _objective(prediction), 1001, TOKENS)
    make_sampler("euler", _objective("velocity"), 1001, TOKENS)
