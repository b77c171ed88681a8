"""Rectified flow against formulas in float64, against diffusers' scheduler, and along its own path."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from models.flow import FlowConfig, RectifiedFlow

SHAPE = (3, 4, 5, 6, 7)
TOKENS = 128


def _flow(shift: float = 1.0, **settings: float) -> RectifiedFlow:
    """With one shift whatever the tokens."""
    return RectifiedFlow(FlowConfig(shift_tokens=(1,), shift_values=(shift,), **settings))


def _draw(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1, 1.0),
        (256, 1.0),
        (1916, math.sqrt(3)),  # the geometric mean of two anchors, as is 43,348
        (14_336, 3.0),
        (43_348, math.sqrt(18)),
        (131_072, 6.0),
        (1_044_480, 6.0),
    ],
)
def test_shift_is_log_linear_between_its_anchors_and_constant_outside(tokens: int, expected: float) -> None:
    assert RectifiedFlow(FlowConfig()).shift(tokens) == pytest.approx(expected, rel=1e-4)


def test_shift_equals_interpolation_of_the_logarithms() -> None:
    config = FlowConfig(shift_tokens=(10, 100, 5000, 80_000), shift_values=(0.5, 4.0, 2.0, 9.0))
    for tokens in [1, 10, 11, 64, 100, 101, 777, 5000, 6000, 80_000, 90_000]:
        log_shift = np.interp(np.log(tokens), np.log(config.shift_tokens), np.log(config.shift_values))
        assert RectifiedFlow(config).shift(tokens) == pytest.approx(math.exp(log_shift), rel=1e-12)


def test_one_anchor_is_one_shift_for_all() -> None:
    config = FlowConfig(shift_tokens=(128,), shift_values=(4.0,))
    assert [RectifiedFlow(config).shift(tokens) for tokens in (1, 128, 10_000)] == [4.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("tokens", "values"),
    [((), ()), ((1, 2), (1.0,)), ((2, 1), (1.0, 2.0)), ((2, 2), (1.0, 2.0)), ((0,), (1.0,)), ((1,), (0.0,))],
)
def test_anchors_that_make_no_curve(tokens: tuple, values: tuple) -> None:
    with pytest.raises(ValueError, match="shift_tokens .* shift_values"):
        FlowConfig(shift_tokens=tokens, shift_values=values)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.0])
def test_sigmas_equal_the_formulas_in_float64(shift: float) -> None:
    normal = _draw(0, (1000,))
    found = _flow(shift, logit_mean=0.3, logit_std=1.2).levels(normal, TOKENS)
    level = 1 / (1 + np.exp(-(0.3 + 1.2 * normal.double().numpy())))
    # Esser et al. derive the shift from the ratio of noise to data, which it multiplies.
    ratio = shift * level / (1 - level)
    assert np.abs(found.double().numpy() - ratio / (1 + ratio)).max() < 1e-6


def test_sigmas_follow_the_logit_normal_distribution() -> None:
    levels = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64).tolist()
    draws = torch.tensor([NormalDist().inv_cdf(level) for level in levels])
    found = _flow(3.0).levels(draws, TOKENS)
    below = (found < 0.75).double().mean().item()
    assert below == pytest.approx(0.5, abs=0.002)  # the median 1/2 moves to 3/4 under a shift of 3


def test_noised_latents_are_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10).tolist())
    data, noise, rows = _draw(1), _draw(2), [0, 4, 9]
    expected = scheduler.scale_noise(data, scheduler.timesteps[rows], noise)
    assert torch.allclose(_flow().noised(data, noise, scheduler.sigmas[rows]), expected, atol=1e-6)


def test_noised_latents_and_loss_in_float64() -> None:
    data, noise, sigma = _draw(1), _draw(2), torch.tensor([0.0, 0.37, 1.0])
    found = _flow().noised(data, noise, sigma)
    for row, level in enumerate(sigma.tolist()):
        expected = (1 - level) * data[row].double() + level * noise[row].double()
        assert (found[row] - expected).abs().max() < 1e-6
    prediction = _draw(3)
    errors = (prediction.double() - (noise.double() - data.double())) ** 2
    loss = _flow().loss(prediction, data, noise, sigma)
    assert loss.shape == (3, 5)
    assert torch.allclose(loss.double(), errors.mean((1, 3, 4)), rtol=1e-5)


def test_loss_of_half_precision_is_taken_in_float32() -> None:
    prediction, nothing = _draw(3).half() * 300, torch.zeros(SHAPE)
    expected = prediction.double().square().mean(dim=(1, 3, 4))
    assert torch.allclose(_flow().loss(prediction, nothing, nothing, torch.ones(3)).double(), expected, rtol=1e-5)


def test_frames_at_noise_levels_of_their_own() -> None:
    data, noise, sigma = _draw(1), _draw(2), torch.rand(3, 5, generator=torch.Generator().manual_seed(3))
    found = _flow().noised(data, noise, sigma)
    for frame in range(5):
        part = slice(frame, frame + 1)
        expected = _flow().noised(data[:, :, part], noise[:, :, part], sigma[:, frame])
        assert torch.equal(found[:, :, part], expected)


def test_the_velocity_is_the_derivative_of_the_path() -> None:
    data, noise = _draw(1).double(), _draw(2).double()
    ends = [_flow().noised(data, noise, torch.full((3,), sigma, dtype=torch.float64)) for sigma in (0.4, 0.6)]
    assert torch.allclose((ends[1] - ends[0]) / 0.2, noise - data)
