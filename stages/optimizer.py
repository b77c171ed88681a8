"""AdamW that also keeps the exponential moving average (EMA) of the weights, and the learning-rate schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from stages.errors import at_least


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimiser; ``lr`` decays from its peak to ``final_lr_share`` of it at the last step.

    clip_norm: the gradient's norm is clipped to it; 0 does not. clip_sigmas: also to the mean and so many standard
    deviations of its past norms (see `stages.guard`); 0 does not, 3 to 5 are usual.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 1000
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final_lr_share: float = 0.0
    clip_norm: float = 1.0
    clip_sigmas: float = 0.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        at_least(self, 0, "lr", "weight_decay", "warmup_steps", "clip_norm", "clip_sigmas", "ema_decay")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: found {self.betas}, expected two numbers from 0 to below 1")


class EmaAdamW(torch.optim.AdamW):
    """AdamW whose per-parameter state holds ``ema``, the moving average of the parameter after each step.

    Kept as optimiser state it is averaged on whatever the optimiser is given: under ZeRO the fp32 partition
    that each rank owns. The decay warms up as min(ema_decay, (1 + n) / (10 + n)) after n steps.
    """

    def __init__(self, params: Any, config: OptimizerConfig):
        super().__init__(params, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
        self.ema_decay = config.ema_decay

    def init_state(self, params: list[torch.Tensor]) -> None:
        """Make every state tensor now, so that a checkpoint can be loaded before the first step."""
        for param in params:
            self.state[param] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(param, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(param, requires_grad=False),
                "ema": param.detach().clone(),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    n = float(state["step"])
                    state["ema"].lerp_(param, 1 - min(self.ema_decay, (1 + n) / (10 + n)))
        return loss


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The rate of optimiser step ``step`` (from 0): a linear warm-up, then the decay over the steps left."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    share = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * share)
