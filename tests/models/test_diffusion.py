"""Epsilon with a learned range, and v, against the papers' equations in float64 and diffusers' scheduler."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from models.diffusion import Diffusion, DiffusionConfig
from tests.models.networks import ddim

SHAPE = (4, 3, 2, 5, 6)
TOKENS = 128

# Ho et al. (2020), section 4, as float64 by t - 1.
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHA_BARS = torch.cumprod(1 - BETAS, 0)


def _draw(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _objective(prediction: str, min_snr_gamma: float | None = None) -> Diffusion:
    return Diffusion(prediction, DiffusionConfig(min_snr_gamma))


def _bound_in_bits(mean_output: Tensor, position: Tensor, x0: Tensor, noise: Tensor, t: int) -> Tensor:
    """Nichol & Dhariwal (2021), equations 4 to 6, 10 to 12 and 15, of one frame at one t from 1 to 1000."""
    beta, bar, before = BETAS[t - 1], ALPHA_BARS[t - 1], ALPHA_BARS[t - 2] if t > 1 else torch.ones(())
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise

    def posterior_mean(start: Tensor) -> Tensor:
        return (before.sqrt() * beta * start + (1 - beta).sqrt() * (1 - before) * x_t) / (1 - bar)

    def posterior_variance(t: int) -> Tensor:
        return (1 - ALPHA_BARS[t - 2]) / (1 - ALPHA_BARS[t - 1]) * BETAS[t - 1]

    share, lowest = (position + 1) / 2, posterior_variance(max(t, 2))
    spread = torch.exp(share * beta.log() + (1 - share) * lowest.log()).sqrt()
    predicted = Normal(posterior_mean((x_t - (1 - bar).sqrt() * mean_output) / bar.sqrt()), spread)
    if t > 1:
        return kl_divergence(Normal(posterior_mean(x0), posterior_variance(t).sqrt()), predicted) / np.log(2)
    edges = [(x0 + side / 255 - predicted.loc) / spread for side in (-1, 1)]
    # The normal's cumulative distribution as in PixArt's trainer: GELU's tanh approximation holds it.
    lower, upper = (torch.nn.functional.gelu(edge, approximate="tanh") / edge for edge in edges)
    probability = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    return -probability.clamp(min=1e-12).log() / np.log(2)


def _reference_loss(output: Tensor, data: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """[B, T] from timesteps [B, T] of 1 to 1000."""
    output, data, noise = output.double(), data.double(), noise.double()
    losses = torch.empty(timesteps.shape, dtype=torch.float64)
    for row, frame in np.ndindex(*timesteps.shape):
        (mean, position), x0, eps = output[row, :, frame].chunk(2), data[row, :, frame], noise[row, :, frame]
        bound = _bound_in_bits(mean, position, x0, eps, int(timesteps[row, frame]))
        losses[row, frame] = ((eps - mean) ** 2).mean() + bound.mean()
    return losses


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_of_epsilon_is_the_papers_in_float64(seed: int) -> None:
    data, noise = _draw(seed), _draw(seed + 10)
    output = torch.cat([noise + 0.3 * _draw(seed + 20), _draw(seed + 30)], 1)
    timesteps = torch.tensor([[1, 2], [3, 1000], [77, 500], [999, 1]])
    expected = _reference_loss(output, data, noise, timesteps)
    found = _objective("epsilon").loss(output, data, noise, timesteps / 1000)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=0)
    mse = (output[:, :3] - noise).double().square().mean((1, 3, 4))
    assert ((expected - mse) > 0.01 * expected).any(), "the bound is too small to be compared"


def test_the_bound_at_the_first_step_is_near_the_true_normals() -> None:
    """In the middle of the pixels' range, where the tanh is good to 1e-3."""
    data, noise = _draw(0).clamp(-0.9, 0.9), _draw(1)
    position = _draw(2)
    found = _objective("epsilon").loss(torch.cat([noise, position], 1), data, noise, torch.full((4,), 0.001))
    low, high = (BETAS[1] * (1 - ALPHA_BARS[0]) / (1 - ALPHA_BARS[1])).log(), BETAS[0].log()
    spread = ((low + (high - low) * (position.double() + 1) / 2) / 2).exp()
    expected = -(2 * Normal(0, spread).cdf(torch.full(SHAPE, 1 / 255).double()) - 1).log2()
    torch.testing.assert_close(found.double(), expected.mean((1, 3, 4)), rtol=1e-3, atol=0)


def test_the_bound_trains_the_range_alone() -> None:
    data, noise = _draw(0), _draw(1)
    output = torch.cat([_draw(2), _draw(3)], 1).requires_grad_()
    _objective("epsilon").loss(output, data, noise, torch.tensor([0.001, 0.002, 0.5, 1.0])).mean().backward()
    expected = 2 * (output.detach()[:, :3] - noise) / noise.numel()
    torch.testing.assert_close(output.grad[:, :3], expected)
    assert (output.grad[:, 3:].abs().amax((1, 2, 3, 4)) > 0).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_noised_latents_are_diffusers(prediction: str) -> None:
    data, noise, timesteps = _draw(1), _draw(2), torch.tensor([0, 1, 499, 999])
    expected = ddim(prediction, 10).add_noise(data, noise, timesteps)
    found = _objective(prediction).noised(data, noise, (timesteps + 1) / 1000)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_v_is_diffusers_and_its_loss_the_squared_error() -> None:
    data, noise, output, timesteps = _draw(1), _draw(2), _draw(3), torch.tensor([0, 1, 499, 999])
    target = ddim("v", 10).get_velocity(data, noise, timesteps)
    found = _objective("v").loss(output, data, noise, (timesteps + 1) / 1000)
    torch.testing.assert_close(found, (output - target).square().mean((1, 3, 4)), rtol=1e-4, atol=0)


def test_v_ends_in_pure_noise_and_epsilon_does_not() -> None:
    data, noise, end = _draw(1), _draw(2), torch.ones(4)
    assert torch.equal(_objective("v").noised(data, noise, end), noise)
    left = (_objective("epsilon").noised(data, noise, end) - noise).abs().max()
    assert 0.001 < left < 0.1


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_frames_at_levels_of_their_own(prediction: str) -> None:
    objective = _objective(prediction)
    data, noise, level = _draw(1), _draw(2), torch.tensor([[0.001, 1.0], [0.5, 0.25], [0.0, 0.8], [0.3, 0.0]])
    output = _draw(3, (4, objective.out_channels(3), *SHAPE[2:]))
    noised, loss = objective.noised(data, noise, level), objective.loss(output, data, noise, level)
    assert loss.shape == level.shape and loss.isfinite().all()
    for frame in range(2):
        parts = [tensor[:, :, frame : frame + 1] for tensor in (output, data, noise)]
        assert torch.equal(noised[:, :, frame : frame + 1], objective.noised(*parts[1:], level[:, frame]))
        torch.testing.assert_close(loss[:, frame : frame + 1], objective.loss(*parts, level[:, frame]))
    assert torch.equal(noised[2, :, 0], data[2, :, 0]) and torch.equal(noised[3, :, 1], data[3, :, 1])
    assert objective.timestep(level).tolist() == [[0, 999], [499, 249], [0, 799], [299, 0]]


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_levels_are_all_timesteps_equally_often(prediction: str) -> None:
    normal = [NormalDist().inv_cdf((place + 0.5) / 3000) for place in range(3000)]
    level = _objective(prediction).levels(torch.tensor([*normal, -40, 40]), TOKENS)
    timesteps = _objective(prediction).timestep(level.float()).long()  # float32 tells all of them apart
    assert torch.bincount(timesteps[:-2]).tolist() == [3] * 1000
    assert timesteps[-2:].tolist() == [0, 999]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_level_is_told_from_its_neighbours(dtype: torch.dtype) -> None:
    level = torch.arange(1001, dtype=dtype) / 1000
    one = torch.ones(1001, 1, 1, 1, 1, dtype=torch.float64)
    signal = _objective("epsilon").noised(one, 0 * one, level).flatten()
    torch.testing.assert_close(signal, torch.cat([torch.ones(1), ALPHA_BARS.sqrt()]), rtol=1e-12, atol=0)


def _data_error(prediction: str, output: Tensor, data: Tensor, noise: Tensor, t: int) -> tuple[Tensor, float]:
    """The squared error of the data that an output stands for, by frame, and the signal-to-noise ratio at t."""
    bars = ddim(prediction, 10).alphas_cumprod.double()
    bar = float(bars[t - 1])
    x_t = bar**0.5 * data.double() + (1 - bar) ** 0.5 * noise.double()
    if prediction == "epsilon":
        start = (x_t - (1 - bar) ** 0.5 * output.double()) / bar**0.5
    else:
        start = bar**0.5 * x_t - (1 - bar) ** 0.5 * output.double()
    return (start - data).square().mean((1, 3, 4)), bar / (1 - bar)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("t", [1, 30, 100, 300, 900, 999])
def test_min_snr_weighs_the_error_of_the_data(prediction: str, t: int) -> None:
    """Hang et al. (2023), equation 7: the weight of the data's squared error is min(SNR, gamma)."""
    data, noise, mean, level = _draw(1), _draw(2), _draw(3), torch.full((4,), t / 1000)
    output = torch.cat([mean, _draw(4)], 1) if prediction == "epsilon" else mean
    weighted, plain = (_objective(prediction, g).loss(output, data, noise, level).double() for g in (5, None))
    error, snr = _data_error(prediction, mean, data, noise, t)
    bound = plain - (mean - noise).double().square().mean((1, 3, 4)) if prediction == "epsilon" else 0
    torch.testing.assert_close(weighted - bound, min(snr, 5) * error, rtol=1e-3, atol=1e-6)


def test_min_snr_gives_the_end_of_v_no_weight() -> None:
    loss = _objective("v", 5).loss(_draw(3), _draw(1), _draw(2), torch.ones(4))
    assert (loss == 0).all()


def test_a_gamma_that_is_no_cap() -> None:
    with pytest.raises(ValueError, match="min_snr_gamma: found 0"):
        DiffusionConfig(min_snr_gamma=0)


def test_output_channels() -> None:
    assert (_objective("epsilon").out_channels(16), _objective("v").out_channels(16)) == (32, 16)
