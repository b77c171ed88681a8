"""What training keeps of the forward pass for the backward pass: a dial of memory against time.

Counted in model widths D a token and a pair of blocks (spatial and temporal), text and edges apart:

  none       all that is dear to compute: 27, as norms, modulations and GELUs are computed again
  selective  block inputs, attention and the linear layer after it, the MLP's second layer: 10
  block      the inputs of blocks: 2, and while a block goes backward, its own 23
  pair       the inputs of pairs: 1, and while a pair goes backward, its own 43
  offload    as pair, with the inputs in the host's memory

None of them changes a result.
"""

from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

ActivationMemory = Literal["none", "selective", "block", "pair", "offload"]
Unit = Literal["block", "pair"]

_UNITS: dict[ActivationMemory, Unit] = {
    "none": "block", "selective": "block", "block": "block", "pair": "pair", "offload": "pair",
}  # fmt: skip
# Smaller tensors are kept all the same: to fill them again would cost more time than their memory is worth.
SMALLEST_FORGOTTEN_BYTES = 4 * 2**20
_lean: ContextVar[bool] = ContextVar("lean", default=False)


def keep(memory: ActivationMemory, unit: Unit, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """``function(*args, **kwargs)``, a block or a pair of blocks, of which ``memory`` says what is kept."""
    if not torch.is_grad_enabled() or _UNITS[memory] != unit:
        return function(*args, **kwargs)
    if memory == "none":
        return _with_lean(True, function, *args, **kwargs)
    on_host = save_on_cpu(pin_memory=torch.cuda.is_available()) if memory == "offload" else nullcontext()
    with on_host:  # of the checkpoint's own inputs: what is saved within it is not kept
        return _recomputed(function, *args, selective=memory == "selective", **kwargs)


def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, chunk_tokens: int) -> Tensor:
    """A token-wise function of x [..., D], so many tokens at a time; each chunk is computed again when its turn comes.

    So that the inner activations of one chunk alone are in memory at any time.
    """
    call = partial(_recomputed, function) if torch.is_grad_enabled() else function
    return torch.cat([call(chunk) for chunk in x.flatten(0, -2).split(chunk_tokens)]).view_as(x)


def through(costly: Callable[[Tensor], Tensor], cheap: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """``costly(cheap(*sources))``, where `keep` asks for it without keeping what lies between, as large as its first
    source.

    Its memory is given back when ``costly`` is done, and filled again just before ``costly`` goes backward; so
    ``costly`` may be any modules that save it, and ZeRO may do with their weights as it does. Compiled code is left
    alone, as the compiler chooses itself what is cheaper to compute again.
    """
    if torch.compiler.is_compiling() or not _lean.get() or sources[0].nbytes < SMALLEST_FORGOTTEN_BYTES:
        return costly(cheap(*sources))
    between = _Forgotten.apply(cheap, *sources)
    result = costly(between)
    node = between.grad_fn
    if node is not None:  # otherwise all sources are frozen
        storage = between.untyped_storage()
        result.register_hook(partial(_restore, node, storage, storage.nbytes()))
        storage.resize_(0)
    return result


class _Forgotten(torch.autograd.Function):
    """A cheap function whose value is restored, with a graph of its own, before its gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, cheap: Callable[..., Tensor], *sources: Tensor) -> Tensor:
        ctx.cheap = cheap
        ctx.save_for_backward(*sources)
        return cheap(*sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (value, sources), ctx.restored = ctx.restored, None
        found = iter(torch.autograd.grad(value, [source for source in sources if source.requires_grad], gradients))
        return None, *(next(found) if source.requires_grad else None for source in sources)


def _restore(node: Any, storage: torch.UntypedStorage, size: int, _: Tensor) -> None:
    sources = [source.detach().requires_grad_(source.requires_grad) for source in node.saved_tensors]
    with torch.enable_grad():
        value = node.cheap(*sources)
    storage.resize_(size)
    storage.copy_(value.untyped_storage())
    node.restored = value, sources


def _with_lean(lean: bool, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    before = _lean.set(lean)
    try:
        return function(*args, **kwargs)
    finally:
        _lean.reset(before)


def _recomputed(function: Callable[..., Tensor], *args: Any, selective: bool = False, **kwargs: Any) -> Tensor:
    """Without the generators' states, as nothing here draws."""
    contexts = partial(create_selective_checkpoint_contexts, _Choice()) if selective else noop_context_fn
    call = partial(_with_lean, False, function)
    return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)


class _Choice:
    """Which results `selective` keeps: those that save the most arithmetic for their size.

    In D² a kept width, the MLP's second layer saves 4, attention in proportion to its keys, every other linear layer 1,
    of which those after an attention are taken. Under ZeRO-3 linear layers are computed again all the same:
    DeepSpeed's own add their bias in place, to what would be kept.
    """

    def __init__(self) -> None:
        self._attended = False

    def __call__(self, _: SelectiveCheckpointContext, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = attends = "_scaled_dot_product" in operation.name()
        if operation is torch.ops.aten.addmm.default:
            inputs, outputs = args[2].shape
            kept = outputs < inputs or (outputs == inputs and self._attended)
        if attends or operation is torch.ops.aten.addmm.default:
            self._attended = attends
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
