"""How much memory a training step takes, by arithmetic; a test holds it against PyTorch's own account of a step.

Activations are counted in model widths D a token, of 2 bytes in bf16 and 4 in fp32. Each pair of blocks keeps some from
its forward pass to its backward pass (`models.activations`). On top comes, once, what the last layers and the block or
pair that is going backward hold. The MLPs' wide ones, of mlp_ratio D each, exist for a chunk of tokens alone where the
MLPs work in chunks.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from models.activations import ActivationMemory
from models.transformer import TransformerConfig

ATTENTIONS = 3  # of a pair; each keeps, beside its output, 4 bytes a token and head
LOGSUMEXP_BYTES = 4
GPU_SLACK_BYTES = 4e9  # CUDA itself, the libraries' workspaces, DeepSpeed's buckets, gaps between allocations: assumed


class _Widths(NamedTuple):
    """Of a token: of every pair, and once beside them; of these, ``wide`` ones are mlp_ratio times as wide."""

    pair: int
    pair_wide: int
    once: int
    once_wide: int


_WIDTHS: dict[ActivationMemory, _Widths] = {
    "none": _Widths(19, 2, 3, 4),
    "selective": _Widths(10, 0, 9, 3),
    "block": _Widths(2, 0, 14, 3),
    "pair": _Widths(1, 0, 27, 5),
    "offload": _Widths(0, 0, 28, 5),
}


@dataclass(frozen=True)
class StepMemory:
    """What decides about the activations of a rank.

    samples: of one micro-batch; tokens, text_tokens: of one of them (PixArt-alpha's limit of text, where not known).
    """

    model: TransformerConfig
    samples: int
    tokens: int
    text_tokens: int = 120
    activation_memory: ActivationMemory = "none"
    mlp_chunk_tokens: int | None = None
    precision: str = "bf16"

    @property
    def activation_bytes(self) -> float:
        """At their peak. Options of the model beyond PixArt's and Latte's are not counted."""
        model, widths, tokens = self.model, _WIDTHS[self.activation_memory], self.samples * self.tokens
        pairs = model.num_layers
        kept_pairs = pairs if widths.pair > 2 else 1  # of which attentions are kept
        chunk = min(self.mlp_chunk_tokens or tokens, tokens)
        narrow, wide = pairs * widths.pair + widths.once, widths.once_wide
        if chunk < tokens:  # no pair keeps a wide one; the chunks' results are there twice while they are joined
            narrow += 1
        else:
            wide += pairs * widths.pair_wide
        text = self._text_numbers(pairs if self.activation_memory == "none" else 1)
        numbers = model.width * (tokens * narrow + chunk * model.mlp_ratio * wide) + text
        attentions = ATTENTIONS * kept_pairs * tokens * model.num_heads * LOGSUMEXP_BYTES
        return numbers * _number_bytes(self.precision) + attentions

    def _text_numbers(self, pairs: int) -> int:
        """The text, three layers of it, and its keys and values in so many pairs."""
        return self.samples * self.text_tokens * (self.model.text_dim + (3 + 2 * pairs) * self.model.width)


def zero_of(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """``zero_optimization`` of a ``deepspeed`` section; ZeRO-1 where it says nothing of it."""
    return settings.get("zero_optimization", {"stage": 1})


def state_bytes(settings: Mapping[str, Any], precision: str, world: int) -> float:
    """How many bytes a parameter takes on a rank: weights and gradient, and in fp32 its master, moments and average.

    Of ZeRO-1 on, the latter are divided by the ranks, of ZeRO-2 on the gradients too, and with ZeRO-3 the weights.
    settings: the ``deepspeed`` section.
    """
    stage = zero_of(settings)["stage"]
    size = _number_bytes(precision)
    return size / (world if stage == 3 else 1) + size / (world if stage >= 2 else 1) + 16 / world


def _number_bytes(precision: str) -> int:
    return 2 if precision == "bf16" else 4


def room_bytes(world: int) -> float:
    """The memory that a rank can use here: of its GPU, or its share of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory - GPU_SLACK_BYTES
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world


def peak_of(steps: Mapping[str, StepMemory], states: float, room: float) -> str:
    """A rank's peak in words, and what will not fit into ``room``; steps: by bucket; states: bytes."""
    bucket, step = max(steps.items(), key=lambda one: one[1].activation_bytes)
    activations = step.activation_bytes
    text = (
        f"by arithmetic {(states + activations) / 1e9:.2f} GB a rank: weights, gradients, moments and average "
        f"{states / 1e9:.2f} GB, activations of {step.samples} of {bucket} {activations / 1e9:.2f} GB "
        f"(train.activation_memory: {step.activation_memory})"
    )
    if states + activations <= room:
        return text
    policy = _first_that_fits(step, room - states)
    way_out = f"train.activation_memory={policy} does" if policy else "take smaller batches, or ZeRO-3 on more ranks"
    return f"{text}\nthis DOES NOT FIT into the {room / 1e9:.1f} GB that a rank has here: {way_out}"


def _first_that_fits(step: StepMemory, room: float) -> ActivationMemory | None:
    """The policy that computes the least again."""
    steps = (replace(step, activation_memory=policy) for policy in _WIDTHS)
    return next((step.activation_memory for step in steps if step.activation_bytes <= room), None)
