"""The transformer's parts: position embeddings written out, and how attention is called."""

import pytest
import torch

from models.layers import sincos, spatial_positions
from tests.models.networks import SMALL, assert_close, inputs, random_transformer


def test_sincos_of_far_positions_keeps_its_digits() -> None:
    positions = torch.tensor([0.0, 1.0, 2047.0, 100_000.25])
    found = sincos(positions, 6)
    for row, position in enumerate(positions.tolist()):
        angles = torch.tensor([position / 10_000 ** (k / 3) for k in range(3)], dtype=torch.float64)
        expected = torch.cat([angles.sin(), angles.cos()]).float()
        assert (found[row] - expected).abs().max() < 1e-6


def test_spatial_positions_of_a_grid_written_out() -> None:
    found = spatial_positions(2, 3, 4, base=6, scale=2.0, device=torch.device("cpu"))
    cells = [(row * 1.5, column * 1.0) for row in range(2) for column in range(3)]
    down, across = torch.tensor(cells).T
    assert torch.allclose(found, torch.stack([across.sin(), across.cos(), down.sin(), down.cos()], dim=1))


@pytest.mark.parametrize("grid", [(8, 8), (34, 60), (5, 9)])
def test_spatial_positions_span_the_same_range_at_every_size(grid: tuple[int, int]) -> None:
    """Twice the patches along a side lie on, and halfway between, those of the smaller grid."""
    small, large = (
        spatial_positions(grid[0] * factor, grid[1] * factor, 16, base=16, scale=1.0, device=torch.device("cpu"))
        for factor in (1, 2)
    )
    large = large.view(2 * grid[0], 2 * grid[1], 16)
    assert torch.allclose(large[::2, ::2].flatten(0, 1), small, atol=1e-6)
    assert not torch.allclose(large[1::2, 1::2].flatten(0, 1), small, atol=1e-2)


@torch.no_grad()
def test_more_heads_than_one_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = random_transformer(), inputs()
    expected = model(*arguments)
    monkeypatch.setattr("models.layers.MAX_HEADS_PER_CALL", 5)
    assert_close(model(*arguments), expected, share=1e-6)


def test_text_keys_and_values_are_projected_once_a_sample() -> None:
    model, rows = random_transformer(), []
    for block in model.transformer_blocks:
        for layer in (block.attn2.to_k, block.attn2.to_v):
            layer.register_forward_hook(lambda layer, args, out: rows.append(out.numel() // out.shape[-1]))
    model(*inputs(shape=(7, 4, 4), lengths=(5, 3)))
    assert rows == [2 * 5] * (2 * SMALL.num_layers)
