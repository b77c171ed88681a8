"""Steps that take most of what the last one computed: which, and what comes of it, against diffusers' own."""

from dataclasses import replace

import pytest
import torch
from diffusers import CacheMixin
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from torch import Tensor

from models.step_cache import StepCache
from models.transformer import Transformer
from tests.models.networks import SMALL, assert_close, image_model, inputs, random_transformer

DEEP = replace(SMALL, num_layers=3)
CALLS = 8


def _calls(latents: Tensor, paces: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Latents and timesteps [B] that each row changes at its own pace from call to call, and by a leap amid them."""
    way = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(1))
    shares = [paces * (0.05 * call + (2 if call > CALLS // 2 else 0)) for call in range(CALLS)]
    return [(latents + share.reshape(-1, 1, 1, 1, 1) * way, 700 - 20 * share) for share in shares]


def _runs(model: Transformer) -> list[int]:
    """A list that grows whenever the last pair is run."""
    runs: list[int] = []
    model.transformer_blocks[-1].register_forward_hook(lambda _, inputs, output: runs.append(1))
    return runs


@pytest.mark.parametrize(("threshold", "computed"), [(0.2, 6), (0.3, 4), (0.5, 3), (9.0, 1)])
@torch.no_grad()
def test_a_picture_is_that_of_diffusers_first_block_cache(threshold: float, computed: int) -> None:
    model, reference = image_model(replace(DEEP, temporal_init="zero"))
    latents, _, text, _ = inputs(shape=(1, 8, 12), lengths=(5,))
    apply_first_block_cache(reference, FirstBlockCacheConfig(threshold))
    cache, runs = StepCache(threshold), _runs(model)
    for moved, timestep in _calls(latents, torch.ones(1)):
        found = model(moved, timestep, text, cache=cache)
        with CacheMixin.cache_context(reference, "one"):
            assert_close(found[:, :, 0], reference(moved[:, :, 0], text, timestep).sample)
    assert len(runs) == computed


@torch.no_grad()
def test_a_row_decides_for_itself() -> None:
    """To the bit, wherever it is and whether or not the others need more steps than it does."""
    model = random_transformer(DEEP)
    latents, _, text, _ = inputs(shape=(2, 8, 8), lengths=(5, 5, 5, 5))
    paces = torch.tensor([0.1, 0.25, 0.5, 0.8])
    runs = _runs(model)

    def outputs(rows: list[int]) -> tuple[Tensor, int]:
        runs.clear()
        cache, of_rows = StepCache(0.3), torch.tensor(rows)
        calls = _calls(latents[of_rows], paces[of_rows])
        found = torch.stack([model(*call, text[of_rows], cache=cache) for call in calls])
        return found, len(runs)

    together, computed = outputs([0, 1, 2, 3])
    turned, _ = outputs([2, 0, 3, 1])
    assert torch.equal(turned, together[:, [2, 0, 3, 1]])
    computed_alone = []
    for row in range(4):
        alone, count = outputs([row] * 4)
        assert torch.equal(alone[:, 1], together[:, row])
        computed_alone.append(count)
    assert (computed_alone, computed) == ([3, 4, 6, 8], 8)


@torch.no_grad()
def test_other_rows_begin_anew() -> None:
    model = random_transformer(DEEP)
    latents, timestep, text, _ = inputs(shape=(2, 8, 8), lengths=(5, 5, 5))
    cache, runs = StepCache(9.0), _runs(model)
    for count, computed in ((3, 1), (3, 1), (1, 2), (1, 2), (3, 3)):
        arguments = latents[:count], timestep[:count], text[:count]
        found = model(*arguments, cache=cache)
        assert len(runs) == computed
        assert_close(found, model(*arguments))
        del runs[-1]


def test_ranks_that_share_a_video_have_no_cache() -> None:
    model = random_transformer(DEEP)
    model.sequence_group = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="cache: found one, expected none where the ranks share a video"):
        model(*inputs(), cache=StepCache(0.1))
