"""AdamW that also keeps the exponential moving average (EMA) of the weights, and the learning-rate schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from stages.errors import ConfigError, at_least


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimiser; ``lr`` decays from its peak to ``final_lr_share`` of it at the last step.

    group_lr: another peak rate for parameters by name: pattern (of `fnmatch`) -> rate, the first that matches counts;
    0 freezes them: no gradient, no moments, no average of their own.
    clip_norm: the gradient's norm is clipped to it; 0 does not. clip_sigmas: also to the mean and so many standard
    deviations of its past norms (see `stages.training.guard`); 0 does not, 3 to 5 are usual.
    """

    lr: float = 1e-4
    group_lr: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 1000
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final_lr_share: float = 0.0
    clip_norm: float = 1.0
    clip_sigmas: float = 0.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        at_least(self, 0, "lr", "weight_decay", "warmup_steps", "clip_norm", "clip_sigmas")
        for pattern, lr in self.group_lr.items():
            if lr < 0:
                raise ValueError(f"group_lr of {pattern!r}: found {lr}, expected at least 0")
        for name in ("ema_decay", "final_lr_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected 0 to 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: found {self.betas}, expected two numbers from 0 to below 1")


class EmaAdamW(torch.optim.AdamW):
    """AdamW whose per-parameter state holds ``ema``, the moving average of the parameter after each step.

    Kept as optimiser state it is averaged on whatever the optimiser is given: under ZeRO the fp32 partition
    that each rank owns. The decay warms up as min(ema_decay, (1 + n) / (10 + n)) after n steps.
    """

    def __init__(self, params: Any, config: OptimizerConfig):
        super().__init__(params, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
        self.ema_decay = config.ema_decay

    def init_state(self, params: list[torch.Tensor]) -> None:
        """Make every state tensor now, so that a checkpoint can be loaded before the first step."""
        for param in params:
            self.state[param] = {
                "step": torch.zeros((), device=param.device),  # where the fused kernel counts
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
                    n = state["step"].double()  # stays on the device: nothing waits for it
                    weight = 1 - ((1 + n) / (10 + n)).clamp(max=self.ema_decay)
                    state["ema"].lerp_(param, weight.to(param.dtype))
        return loss


def parameter_groups(model: torch.nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Freezes what ``config.group_lr`` freezes, and groups the others: ``params``, and their rate as ``peak_lr``.

    Raises ConfigError for a pattern that decides about no parameter, or when nothing is left to train.
    """
    unused = set(config.group_lr)
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        pattern = next((pattern for pattern in config.group_lr if fnmatchcase(name, pattern)), None)
        unused.discard(pattern or "")
        lr = config.lr if pattern is None else config.group_lr[pattern]
        parameter.requires_grad_(pattern is None or lr > 0)
        if parameter.requires_grad:
            groups.setdefault(lr, []).append(parameter)
    if unused:
        raise ConfigError(
            f"optimizer.group_lr: no parameter is left for {min(unused)!r}; the first pattern that matches a name "
            f"counts, and names are such as {', '.join(name for name, _ in list(model.named_parameters())[:4])}"
        )
    if not groups:
        raise ConfigError("optimizer.group_lr freezes every parameter: leave one to train")
    return [{"params": parameters, "peak_lr": lr} for lr, parameters in groups.items()]


def lr_share(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The share of its peak that a rate has at step ``step`` (from 0): a linear warm-up, then the decay to the end."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    share = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.final_lr_share + (1 - config.final_lr_share) * share
