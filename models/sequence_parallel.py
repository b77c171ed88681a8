"""Sequence parallelism for a network of spatial and temporal blocks: the ranks of a group share each video.

Source: Dynamic Sequence Parallelism (DSP, arXiv:2403.10266). Spatial blocks look at one frame at a time, so each rank
takes some frames, with all of their tokens; temporal blocks look at one place at a time, so each takes some places, in
all frames. From one to the other one all-to-all moves every number once; gradients come back by the same way. What the
ranks cannot divide evenly they divide unevenly, so that nothing is ever padded.

B batch, T frames of which T_r are this rank's, N tokens of a frame of which N_r are, D width.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SharedVideo:
    """How the ranks of ``group`` share videos of so many frames with so many tokens each.

    Without a group, and where one of its ranks would get no frame or no token, every rank has the whole and nothing is
    sent. All ranks of a group make the same calls.
    """

    def __init__(self, group: dist.ProcessGroup | None, frames: int, tokens: int) -> None:
        ranks = dist.get_world_size(group) if group else 1
        self._group = group if _share_it(ranks, frames, tokens) else None
        self._rank = dist.get_rank(self._group) if self._group else 0
        self._frames, self._tokens = _shares(frames, ranks), _shares(tokens, ranks)

    def own_frames(self, x: Tensor, dim: int) -> Tensor:
        """This rank's of all frames, T along ``dim`` -> T_r; the whole where all frames have one value (1 along it)."""
        if self._group is None or x.shape[dim] == 1:
            return x
        return x.split(self._frames, dim)[self._rank]

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B, T_r, N, D] -> [B, T, N_r, D]"""
        return self._switch(x, 2, self._tokens, 1, self._frames)

    def to_frames(self, x: Tensor) -> Tensor:
        """[B, T, N_r, D] -> [B, T_r, N, D]"""
        return self._switch(x, 1, self._frames, 2, self._tokens)

    def all_frames(self, x: Tensor) -> Tensor:
        """[B, T_r, N, D] -> [B, T, N, D], the same on every rank.

        What comes back to a rank is its part of the gradient of the *sum* of the ranks' losses. So the mean over the
        ranks of the weights' gradients, as data-parallel training takes it, is that of one rank with the whole video.
        """
        if self._group is None:
            return x
        ranks = len(self._frames)
        shapes = [(x.shape[0], frames, *x.shape[2:]) for frames in self._frames]
        return torch.cat(self._exchange(x.flatten().repeat(ranks), [x.numel()] * ranks, shapes), dim=1)

    def _switch(self, x: Tensor, give: int, given: list[int], take: int, taken: list[int]) -> Tensor:
        """Share dimension ``give`` out among the ranks, and get the whole of ``take``, shared so far."""
        if self._group is None:
            return x
        rows = x.transpose(0, give)  # what goes to one rank lies together
        shapes = []
        for size in taken:
            shape = [given[self._rank], *rows.shape[1:]]
            shape[take] = size
            shapes.append(shape)
        received = self._exchange(rows.flatten(), [size * rows[0].numel() for size in given], shapes)
        return torch.cat([part.transpose(0, give) for part in received], dim=take)

    def _exchange(self, sent: Tensor, counts: list[int], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Sends so many numbers of ``sent`` to each rank; returns what each has sent here, of these shapes."""
        sizes = [prod(shape) for shape in shapes]
        received = _AllToAll.apply(sent, counts, sizes, self._group)
        return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


class _AllToAll(torch.autograd.Function):
    """Of a flat tensor so many numbers go to each rank, and so many come from each; gradients go back."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, give: list[int], take: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.give, ctx.take, ctx.group = give, take, group
        received = sent.new_empty(sum(take))
        dist.all_to_all_single(received, sent, take, give, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(gradients[0].contiguous(), ctx.take, ctx.give, ctx.group), None, None, None


def largest_share(ranks: int, frames: int, tokens: int) -> int:
    """Of a video's tokens, how many the rank with the most holds."""
    if not _share_it(ranks, frames, tokens):
        return frames * tokens
    return max(max(_shares(frames, ranks)) * tokens, frames * max(_shares(tokens, ranks)))


def _share_it(ranks: int, frames: int, tokens: int) -> bool:
    return 1 < ranks <= min(frames, tokens)


def _shares(count: int, ranks: int) -> list[int]:
    """As even as can be."""
    ends = [count * rank // ranks for rank in range(ranks + 1)]
    return [end - start for start, end in pairwise(ends)]
