"""Guard rails of a run: steps that are skipped, and clipping that follows the gradients' past norms."""

import math
from dataclasses import dataclass, replace

from stages.training.optimizer import OptimizerConfig

MIN_NORMS = 20
WINDOW = 100


@dataclass(frozen=True)
class Guard:
    """What the guard rails remember from step to step; a checkpoint holds it, so that a resume is exact.

    A step whose loss or gradient is not finite is skipped: weights, moments, average and Adam's own count of steps
    stay as they were.

    Adaptive clipping clips to mean + clip_sigmas * sqrt(variance) of the past norms. The n-th norm counts as x, at
    most the limit that was in force for it, so that an outlier moves the limit by a bounded share of sigma:

        w = 1 / min(n, WINDOW);  d = x - mean;  mean += w d;  variance = (1 - w) (variance + w d^2)

    These are the plain mean and variance of the first WINDOW norms (Welford, 1962) and exponential averages from
    there. The limit is in force after MIN_NORMS norms; until then optimizer.clip_norm alone is.
    """

    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    norms: int = 0
    norm_mean: float = 0.0
    norm_variance: float = 0.0

    def clip_norm(self, config: OptimizerConfig) -> float:
        """The norm that the next gradient is clipped to; infinite where nothing limits it."""
        return min(config.clip_norm or math.inf, self._adaptive_limit(config))

    def after(self, norm: float | None, config: OptimizerConfig) -> "Guard":
        """After a step with this gradient norm before clipping; None: it was skipped."""
        if norm is None:
            return replace(self, skipped_steps=self.skipped_steps + 1, skipped_in_a_row=self.skipped_in_a_row + 1)
        count = self.norms + 1
        weight = 1 / min(count, WINDOW)
        difference = min(norm, self._adaptive_limit(config)) - self.norm_mean
        return replace(
            self,
            skipped_in_a_row=0,
            norms=count,
            norm_mean=self.norm_mean + weight * difference,
            norm_variance=(1 - weight) * (self.norm_variance + weight * difference**2),
        )

    def _adaptive_limit(self, config: OptimizerConfig) -> float:
        if not config.clip_sigmas or self.norms < MIN_NORMS:
            return math.inf
        return self.norm_mean + config.clip_sigmas * math.sqrt(self.norm_variance)
