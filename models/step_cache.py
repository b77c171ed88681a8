"""Steps of sampling at which most blocks are not run, as what they see has hardly changed since they last were.

Source: ParaAttention's first-block cache, as in diffusers' `apply_first_block_cache`, after TeaCache
(arXiv:2411.19108). What the first pair of blocks adds to its input tells how much a step differs from the last one
that was computed; where it hardly does, what the other pairs added then is added again.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class StepCache:
    """Of one batch while it is denoised: the same rows at each step; another number of them begins anew.

    ``threshold``: other pairs are needed where the mean absolute change of what the first one adds is at least this
    share of its mean absolute value. Each row decides and remembers for itself, so that it does not depend on the
    others; the pairs run for all unless no row needs them. Two tensors of the blocks' size are kept.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._by_first = self._by_others = torch.empty(0)  # what they added, [B, T, N, D]

    def through(self, pairs: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """[B, T, N, D] -> [B, T, N, D]: what the pairs make of x one after the other, or nearly so."""
        if self._by_first.shape != x.shape:
            self._by_first = self._by_others = torch.zeros_like(x)
        first, *others = pairs
        between = output = first(x)
        by_first = between - x
        held = self._hardly_differs(by_first)[:, None, None, None]
        if not held.all():
            for pair in others:
                output = pair(output)
        self._by_first = torch.where(held, self._by_first, by_first)
        self._by_others = torch.where(held, self._by_others, output - between)
        return torch.where(held, between + self._by_others, output)

    def _hardly_differs(self, by_first: Tensor) -> Tensor:
        """[B] bool; false on rows of which nothing is known yet, which are zero."""
        change, size = (each.abs().float().flatten(1).mean(1) for each in (by_first - self._by_first, self._by_first))
        return change < self.threshold * size
