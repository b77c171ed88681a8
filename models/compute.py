"""What a process computes on, and in which number format."""

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Of the settings -> PyTorch's."""


def default_device() -> torch.device:
    """A GPU where there is one: the process's own, if others share the machine."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
