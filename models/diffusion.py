"""Denoising diffusion in 1000 steps: epsilon-prediction with a learned range, and v-prediction.

"epsilon" is the objective of PixArt-alpha and Latte: DDPM's linear betas (Ho et al., arXiv:2006.11239), the
mean squared error of the noise, and the variance as a learned position between its bounds, trained with the
variational bound alone (Nichol & Dhariwal, arXiv:2102.09672, equations 15 and 16). As in their trainers, the
bound is in bits and enters with weight 1.
"v" predicts v (Salimans & Ho, arXiv:2202.00512) with betas rescaled to a terminal signal-to-noise ratio of
zero (Lin et al., arXiv:2305.08891, algorithm 1), so that sampling starts from what training has seen.

The level is n / 1000 after n noising steps, and alpha_bar(n) the share of the data's variance that is left:
x_n = sqrt(alpha_bar) data + sqrt(1 - alpha_bar) noise. Papers count timesteps from 0: theirs is n - 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STEPS = 1000
FIRST_BETA, LAST_BETA = 1e-4, 0.02
HALF_PIXEL = 1 / 255  # of 256 values from -1 to 1


@dataclass(frozen=True)
class DiffusionConfig:
    """min_snr_gamma: the cap of min-SNR weighting (Hang et al., arXiv:2303.09556, who take 5); None: no weighting.

    It gives the noisiest levels of v, where the signal-to-noise ratio ends at zero, next to no weight.
    """

    min_snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma: found {self.min_snr_gamma}, expected more than 0")


class Diffusion:
    """The `models.objective.Objective` of models that predict epsilon or v; levels are whole thousandths."""

    def __init__(self, prediction: Literal["epsilon", "v"], config: DiffusionConfig):
        self.prediction = prediction
        alpha_bar = torch.cumprod(1 - torch.linspace(FIRST_BETA, LAST_BETA, STEPS, dtype=torch.float64), 0)
        if prediction == "v":
            alpha_bar = _zero_terminal_snr(alpha_bar)
        # Tables by n, of float64. The last two begin at n = 1: n = 0 stands for frames that bear no loss.
        self._alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar])  # [1001]
        self._weight = self._min_snr_weight(config.min_snr_gamma)  # [1001]
        self._beta = 1 - self._alpha_bar[1:] / self._alpha_bar[:-1]  # [1000]
        posterior = self._beta * (1 - self._alpha_bar[:-1]) / (1 - self._alpha_bar[1:])
        self._posterior = torch.cat([posterior[1:2], posterior[1:]])  # [1000]; the first, zero, has no logarithm

    def out_channels(self, channels: int) -> int:
        """Epsilon comes with the range, channel by channel, after it."""
        return 2 * channels if self.prediction == "epsilon" else channels

    def levels(self, normal: Tensor, tokens: int) -> Tensor:
        """Each of the 1000 equally often, whatever the tokens."""
        uniform = torch.special.ndtr(normal.double())
        return (1 + (STEPS * uniform).floor().clamp(max=STEPS - 1)) / STEPS

    def timestep(self, level: Tensor) -> Tensor:
        """0 to 999, as PixArt's and Latte's weights know it."""
        return ((STEPS * level).round() - 1).clamp(min=0).float()

    def noised(self, data: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        signal, spread = self._signal_and_spread(level, data)
        return signal * data + spread * noise

    def loss(self, output: Tensor, data: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Mean squared error, weighted by min-SNR where that is set; and, for epsilon, the variational bound."""
        mean, position = output.float()[:, : data.shape[1]], output.float()[:, data.shape[1] :]
        target = noise
        if self.prediction == "v":
            signal, spread = self._signal_and_spread(level, data)
            target = signal * noise - spread * data
        error = mean - target
        loss = _over(self._weight[_index(level)], data) * error.square()
        if self.prediction == "epsilon":
            loss = loss + self._bound(error.detach(), position, data, level)
        return loss.mean((1, 3, 4))

    def _signal_and_spread(self, level: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self._alpha_bar[_index(level)]
        return _over(alpha_bar.sqrt(), like), _over((1 - alpha_bar).sqrt(), like)

    def _min_snr_weight(self, gamma: float | None) -> Tensor:
        """min(SNR, gamma) weighs the squared error of the data, which is that of the noise over SNR, and that of v
        over SNR + 1 (Hang et al., section 3.4)."""
        snr = self._alpha_bar / (1 - self._alpha_bar)
        if gamma is None:
            return torch.ones_like(snr)
        return snr.clamp(max=gamma) / (snr if self.prediction == "epsilon" else snr + 1)

    def _bound(self, error: Tensor, position: Tensor, data: Tensor, level: Tensor) -> Tensor:
        """The variational bound's term in bits, element by element (Nichol & Dhariwal, equations 4 to 6).

        error: predicted - true noise, without a gradient, so that the bound trains the variance alone.
        position: -1 puts the variance at its lower bound, that of the posterior, and 1 at its upper, beta.
        """
        index = (_index(level) - 1).clamp(min=0)
        low, high = (_over(table[index].log(), data) for table in (self._posterior, self._beta))
        log_variance = (1 + position) / 2 * high + (1 - position) / 2 * low
        # How far the means are apart follows from the noise's error: subtracting the means would cancel digits.
        beta, alpha_bar = self._beta[index], self._alpha_bar[index + 1]
        apart = _over(beta / ((1 - alpha_bar) * (1 - beta)).sqrt(), data) * error
        divergence = 0.5 * (
            log_variance - low - 1 + (low - log_variance).exp() + apart.square() * (-log_variance).exp()
        )
        first = _over(index == 0, data).bool()
        return torch.where(first, _pixel_bits(data, apart, log_variance), divergence / math.log(2))


def _zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Lin et al., algorithm 1: shifted to end at zero, scaled to begin as before."""
    signal = alpha_bar.sqrt()
    return ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])).square()


def _pixel_bits(data: Tensor, apart: Tensor, log_variance: Tensor) -> Tensor:
    """Bits for the data's pixel value of 256 from -1 to 1 (Ho et al., equation 13), ``apart`` from the mean.

    Latents are no pixels, but PixArt's and Latte's trainers keep this term, and their tanh for the normal's
    cumulative distribution, so it is theirs to the digit.
    """

    def below(offset: Tensor) -> Tensor:
        z = offset * (-log_variance / 2).exp()
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper, lower = below(apart + HALF_PIXEL), below(apart - HALF_PIXEL)
    probability = torch.where(data < -0.999, upper, torch.where(data > 0.999, 1 - lower, upper - lower))
    return -probability.clamp(min=1e-12).log2()


def _index(level: Tensor) -> Tensor:
    """n, on the CPU, where the tables are."""
    return (STEPS * level).round().long().cpu()


def _over(values: Tensor, like: Tensor) -> Tensor:
    """Values [B] or [B, T] as [B, 1, T or 1, 1, 1], of the type and on the device of ``like``."""
    return values.reshape(len(values), 1, -1, 1, 1).to(like, non_blocking=True)
