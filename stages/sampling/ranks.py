"""The processes that share the samples of a command: those that ``deepspeed`` or ``torchrun`` started, or one alone.

Only where there are several is DeepSpeed loaded, which joins them as in training.
"""

import torch
import torch.distributed as dist

from models.compute import default_device
from stages.launched import world


def join() -> torch.device:
    """Join the others; returns the device of this process."""
    if world() > 1:
        from stages.engine import start_ranks

        return start_ranks().device
    return default_device()


def sequence_group(ranks_a_video: int) -> dist.ProcessGroup | None:
    """The neighbouring ranks, so many with this one, that share a video; None for one. Every process must call."""
    if ranks_a_video == 1:
        return None
    from stages.engine import sequence_group

    return sequence_group(ranks_a_video)


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' tensors, which lie on the CPU; every process must call."""
    if world() > 1:
        from stages.engine import sum_on_hosts

        sum_on_hosts(tensor)
    return tensor
