"""From noise to data in steps: diffusers' schedulers, set up for what a model predicts and how it was trained.

By name:
  ddim    DDIM with eta 0 (Song et al., arXiv:2010.02502)
  dpm++   DPM-Solver++(2M) (Lu et al., arXiv:2211.01095)
  iddpm   ancestral sampling with the learned variance (Nichol & Dhariwal, arXiv:2102.09672)
  euler   Euler's steps along the velocity
  unipc   UniPC of order 2 (Zhao et al., arXiv:2302.04867)

Those that draw no noise start from the noisiest timestep and space the others evenly ("trailing" of Lin et al.,
arXiv:2305.08891, table 2), a flow's before its shift; iddpm's include the first and the last, as its authors' do.

diffusers is loaded where a sampler is made: it takes seconds, which a training without samples need not wait.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from models.diffusion import FIRST_BETA, LAST_BETA, STEPS
from models.flow import TIMESTEPS, RectifiedFlow
from models.objective import ObjectiveConfig
from models.transformer import Prediction

SamplerName = Literal["ddim", "dpm++", "iddpm", "euler", "unipc"]

SAMPLERS: dict[Prediction, tuple[SamplerName, ...]] = {
    "velocity": ("euler", "unipc"),
    "epsilon": ("ddim", "dpm++", "iddpm"),
    "v": ("ddim", "dpm++"),
}
"""Which samplers there are for what a model predicts, the default first."""

TRAINED_BETAS = {
    "num_train_timesteps": STEPS,
    "beta_schedule": "linear",
    "beta_start": FIRST_BETA,
    "beta_end": LAST_BETA,
}


NO_SIGNAL = 1e-12  # instead of 0, which has no logarithm; diffusers' 2**-24 would differ from training by 2e-4


class Sampler:
    """One way from noise to data; its steps are taken once, in order.

    timesteps: what the model is told at each step, [steps] float32, 1000 (or 999) the noisiest.
    """

    def __init__(self, scheduler: Any, timesteps: Tensor, *, draws_noise: bool = False):
        self.timesteps = timesteps.float()
        self._scheduler = scheduler
        self._draws_noise = draws_noise

    def step(self, index: int, x: Tensor, output: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Latents [B, C, T, h, w] after step ``index``, from those before it and the model's output [B, C', T, h, w].

        generators: one a sample, for what noise the sampler draws.
        """
        timestep = self._scheduler.timesteps[index]
        if self._draws_noise:
            return self._scheduler.step(output, timestep, x, generator=list(generators), return_dict=False)[0]
        return self._scheduler.step(output[:, : x.shape[1]], timestep, x, return_dict=False)[0]


def make_sampler(name: SamplerName | None, objective: ObjectiveConfig, steps: int, tokens: int) -> Sampler:
    """A sampler for a model of this objective and a video of so many tokens; by default the objective's first.

    Raises ValueError for a sampler that the prediction has not, and for more steps than a diffusion was trained on.
    """
    assert objective.prediction is not None
    known = SAMPLERS[objective.prediction]
    if name is not None and name not in known:
        raise ValueError(
            f"sampler: found {name!r}, expected one of {', '.join(known)}: the model predicts {objective.prediction}"
        )
    check_steps("steps", objective.prediction, steps)
    if objective.prediction == "velocity":
        return _flow_sampler(name or known[0], steps, RectifiedFlow(objective.flow).shift(tokens))
    return _diffusion_sampler(name or known[0], objective.prediction, steps)


def check_steps(setting: str, prediction: Prediction, steps: int) -> None:
    """Raises ValueError for more steps than a diffusion was trained on; a flow takes any number."""
    if prediction != "velocity" and steps > STEPS:
        raise ValueError(f"{setting}: found {steps}, expected at most {STEPS}, those of the training")


def _flow_sampler(name: SamplerName, steps: int, shift: float) -> Sampler:
    import diffusers

    scheduler: Any
    if name == "euler":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    else:
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    scheduler.set_begin_index(0)  # UniPC's timesteps are cut to whole numbers, and two may be equal
    return Sampler(scheduler, TIMESTEPS * scheduler.sigmas[:-1])


def _diffusion_sampler(name: SamplerName, prediction: Prediction, steps: int) -> Sampler:
    import diffusers

    scheduler: Any
    if name == "iddpm":
        scheduler = diffusers.DDPMScheduler(**TRAINED_BETAS, variance_type="learned_range", clip_sample=False)
        timesteps = np.linspace(STEPS - 1, 0, steps).round()
    else:
        # Of order 1 it is DDIM (Lu et al., section 4), on any timesteps: diffusers' DDIMScheduler steps beside its
        # own where 1000 is no multiple of the steps.
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **TRAINED_BETAS,
            solver_order=1 if name == "ddim" else 2,
            prediction_type="v_prediction" if prediction == "v" else "epsilon",
            rescale_betas_zero_snr=prediction == "v",
        )
        if prediction == "v":
            scheduler.alphas_cumprod[-1] = NO_SIGNAL
        timesteps = np.linspace(STEPS, 0, steps + 1)[:-1].round() - 1
    scheduler.set_timesteps(timesteps=timesteps.astype(int).tolist())
    return Sampler(scheduler, scheduler.timesteps, draws_noise=name == "iddpm")
