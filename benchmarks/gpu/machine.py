"""The device that is measured, and how."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """toy: everything tiny, nothing compiled, to try each line of the code on any device; its numbers mean nothing."""

    device: torch.device
    toy: bool

    def seconds(self, work: Callable[[], object], rounds: int = 20) -> float:
        """The median of one call, after three that warm up; two and one for a toy."""
        warm, rounds = (1, 2) if self.toy else (min(3, rounds), rounds)
        taken = []
        for number in range(warm + rounds):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            if number >= warm:
                taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget_peak(self) -> None:
        """Give unused memory back, so that the peak that follows is the work's own."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()  # of pinned blocks, each a power of two: what is larger would come on top
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gb(self) -> float:
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else 0.0

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)
