"""The options that no published checkpoint has: against diffusers' parts, and off until they are asked for."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention as ReferenceAttention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, apply_rotary_emb, get_1d_rotary_pos_embed
from torch import Tensor, nn
from torch.nn import functional

from models.layers import Attention, TemporalBlock, sincos
from models.transformer import Transformer
from tests.models.networks import (
    SMALL,
    assert_close,
    inputs,
    random_transformer,
    randomise,
    silence_temporal_attention,
)

WIDTH, HEADS = SMALL.width, SMALL.num_heads
EVERYTHING = replace(
    SMALL,
    temporal_pos="rope",
    temporal_attention="full",
    qk_norm=True,
    pooled_text=True,
    size_conditioning=True,
    fps_conditioning=True,
)
SIZE = (512, 288)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ({"temporal_pos": "rope"}, set()),
        ({"temporal_attention": "full"}, set()),
        ({"qk_norm": True}, {"transformer_blocks.#.attn1.norm_#", "temporal_transformer_blocks.#.attn1.norm_#"}),
        ({"fps_conditioning": True}, {"adaln_single.emb.fps_embedder.linear_#"}),
        (
            {"size_conditioning": True},
            {"adaln_single.emb.resolution_embedder.linear_#", "adaln_single.emb.aspect_ratio_embedder.linear_#"},
        ),
    ],
)
def test_an_option_adds_its_own_parameters_alone(option: dict[str, Any], names: set[str]) -> None:
    plain, model = Transformer(SMALL).state_dict(), Transformer(replace(SMALL, **option)).state_dict()
    assert plain.keys() <= model.keys()
    added = {name.rsplit(".", 1)[0] for name in model.keys() - plain.keys()}
    assert {".".join("#" if part.isdigit() else part for part in name.split(".")) for name in added} == {
        name.replace("norm_#", f"norm_{side}").replace("linear_#", f"linear_{number}")
        for name in names
        for side, number in (("q", 1), ("k", 2))
    }


@pytest.mark.parametrize("option", ["size_conditioning", "fps_conditioning"])
@torch.no_grad()
def test_a_new_condition_starts_without_influence(option: str) -> None:
    model, plain = Transformer(replace(SMALL, **{option: True})).eval(), random_transformer()
    model.load_state_dict(plain.state_dict(), strict=False)
    arguments, told = inputs(), {"size": SIZE, "frame_interval_s": 1 / 24}
    assert torch.equal(model(*arguments, **told), plain(*arguments, **told))
    randomise(model.adaln_single.emb)
    plain.adaln_single.emb.load_state_dict(model.adaln_single.emb.state_dict(), strict=False)
    assert (model(*arguments, **told) - plain(*arguments, **told)).abs().max() > 1e-2


def test_a_size_that_is_needed_and_missing() -> None:
    with pytest.raises(ValueError, match="conditioned on size; expected size= height and width in pixels"):
        random_transformer(EVERYTHING)(*inputs())


@torch.no_grad()
def test_the_frame_rate_moves_the_timesteps_embedding() -> None:
    """Conditioning on a rate is adding its embedding, by diffusers' parts, to the timestep's last bias."""
    model = random_transformer(replace(SMALL, fps_conditioning=True))
    reference = TimestepEmbedding(256, WIDTH)
    reference.load_state_dict(model.adaln_single.emb.fps_embedder.state_dict())
    arguments = inputs(lengths=(5, 3))
    intervals = torch.tensor([1 / 8, 1 / 30])
    found = model(*arguments, frame_interval_s=intervals)
    for row, interval_s in enumerate(intervals.tolist()):
        plain = random_transformer()
        plain.load_state_dict(model.state_dict(), strict=False)
        features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.tensor([1 / interval_s]))
        plain.adaln_single.emb.timestep_embedder.linear_2.bias += reference(features)[0]
        assert_close(found[row], plain(*arguments, frame_interval_s=interval_s)[row])


@torch.no_grad()
def test_normalised_attention_equals_diffusers() -> None:
    module = Attention(WIDTH, HEADS, qk_norm=True)
    reference = ReferenceAttention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS, bias=True, qk_norm="rms_norm", eps=1e-6)
    assert all((weight == 1).all() for norm in (module.norm_q, module.norm_k) for weight in norm.parameters())
    randomise(module)
    reference.load_state_dict(module.state_dict(), strict=False)
    x = _draw(3, 7, WIDTH)
    assert_close(module(x[:, :, None], x[:, :, None])[:, :, 0], reference(x))


@torch.no_grad()
def test_rotary_attention_equals_diffusers() -> None:
    module = randomise(Attention(WIDTH, HEADS))
    reference = ReferenceAttention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS, bias=True, processor=_Rotary())
    reference.load_state_dict(module.state_dict(), strict=False)
    x, positions = _draw(3, 7, WIDTH), torch.arange(7) * 1.5 + 40
    rotation = sincos(positions, WIDTH // HEADS)[None, :, None]
    found = module(x[:, :, None], x[:, :, None], rotation=rotation)[:, :, 0]
    assert_close(found, reference(x, positions=positions))
    # Distances count, not positions.
    later = sincos(positions + 100, WIDTH // HEADS)[None, :, None]
    assert_close(module(x[:, :, None], x[:, :, None], rotation=later)[:, :, 0], found)
    assert (module(x[:, :, None], x[:, :, None])[:, :, 0] - found).abs().max() > 1e-2


class _Rotary:
    """Attention in diffusers' words, with its rotary embedding."""

    def __call__(self, attention: nn.Module, x: Tensor, positions: Tensor, **_: object) -> Tensor:
        heads = [layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (attention.to_q, attention.to_k)]
        table = get_1d_rotary_pos_embed(
            WIDTH // HEADS, positions.numpy(), use_real=True, repeat_interleave_real=False, freqs_dtype=torch.float64
        )
        query, key = (apply_rotary_emb(head, table, use_real_unbind_dim=-2) for head in heads)
        value = attention.to_v(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return attention.to_out[0](attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("full", [False, True])
@torch.no_grad()
def test_a_temporal_block_sees_a_place_or_the_whole_video(full: bool) -> None:
    """Diffusers' block over the sequences that each kind of attention makes of [B, T, N] tokens."""
    block = randomise(TemporalBlock(WIDTH, HEADS, 4, qk_norm=False, full=full))
    reference = BasicTransformerBlock(
        WIDTH, HEADS, WIDTH // HEADS, attention_bias=True, activation_fn="gelu-approximate", norm_eps=1e-6,
        num_embeds_ada_norm=1, norm_type="ada_norm_single", norm_elementwise_affine=False,
    ).eval()  # fmt: skip
    assert not reference.load_state_dict(block.state_dict(), strict=False).unexpected_keys
    batch, frames, places = 2, 4, 3
    x, vectors = _draw(batch, frames, places, WIDTH), _draw(batch, 6, WIDTH, seed=1)
    found = block(x, vectors[:, None])
    if full:
        expected = reference(x.flatten(1, 2), timestep=vectors).view_as(x)
    else:
        columns = [reference(x[:, :, place], timestep=vectors) for place in range(places)]
        expected = torch.stack(columns, dim=2)
    assert_close(found, expected)


@torch.no_grad()
def test_full_attention_turns_every_token_of_a_frame_by_the_frames_time() -> None:
    full = randomise(TemporalBlock(WIDTH, HEADS, 4, qk_norm=True, full=True))
    line = TemporalBlock(WIDTH, HEADS, 4, qk_norm=True, full=False)
    line.load_state_dict(full.state_dict())
    batch, frames, places = 2, 4, 3
    x, vectors = _draw(batch, frames, places, WIDTH), _draw(batch, 1, 6, WIDTH, seed=1)
    times = torch.tensor([[0.0, 1, 2, 3], [0, 4, 8, 12]])
    found = full(x, vectors, rotation=sincos(times, WIDTH // HEADS)[:, :, None])
    of_tokens = times[:, :, None].expand(batch, frames, places).flatten(1)  # the time of each of T*N tokens
    one_line = line(x.flatten(1, 2)[:, :, None], vectors, rotation=sincos(of_tokens, WIDTH // HEADS)[:, :, None])
    assert_close(found, one_line.view_as(x), share=1e-6)


@pytest.mark.parametrize("attention", ["axial", "full"])
@torch.no_grad()
def test_rotary_positions_are_seconds_and_reach_every_block(attention: str) -> None:
    config = replace(SMALL, temporal_pos="rope", temporal_attention=attention)
    arguments = inputs(shape=(4, 4, 4))
    for block in range(config.num_layers):
        model = random_transformer(config)
        silence_temporal_attention(model, but=block)
        near, far = (model(*arguments, frame_interval_s=interval) for interval in (0.125, 0.5))
        assert (near - far).abs().max() > 1e-3
    model, quick = random_transformer(config), random_transformer(replace(config, temporal_pos_per_s=32.0))
    each = model(*arguments, frame_interval_s=torch.tensor([0.125, 0.5]))
    assert_close(each[1], quick(*arguments)[1], share=1e-6)
    assert_close(each[0], model(*arguments)[0], share=1e-6)


@torch.no_grad()
def test_a_batch_gives_what_each_sample_gives_alone_with_every_option() -> None:
    model = random_transformer(EVERYTHING)
    lengths = (6, 2, 3)
    latents, timestep, text, mask = inputs(lengths=lengths)
    intervals, sizes = torch.tensor([1 / 8, 1 / 24, 1 / 4]), torch.tensor([[256, 256], [512, 288], [720, 1280]])
    together = model(latents, timestep, text, mask, frame_interval_s=intervals, size=sizes)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = model(
            latents[one],
            timestep[one],
            text[one, :length],
            mask[one, :length],
            frame_interval_s=float(intervals[row]),
            size=(int(sizes[row, 0]), int(sizes[row, 1])),
        )
        assert_close(together[one], alone, share=1e-5)


@torch.no_grad()
def test_each_frame_may_have_its_own_timestep_with_every_option() -> None:
    model = random_transformer(EVERYTHING)
    latents, timestep, text, mask = inputs(shape=(4, 6, 6))
    expected = model(latents, timestep, text, mask, size=SIZE)
    assert_close(model(latents, timestep[:, None].expand(2, 4), text, mask, size=SIZE), expected, share=1e-5)


@torch.no_grad()
def test_half_precision_with_every_option() -> None:
    arguments = inputs()
    expected = random_transformer(EVERYTHING)(*arguments, size=SIZE)
    found = random_transformer(EVERYTHING).to(torch.bfloat16)(*arguments, size=SIZE)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected, share=0.2)


def test_every_option_learns() -> None:
    model = random_transformer(EVERYTHING)
    model(*inputs(), size=SIZE).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@torch.no_grad()
def test_zeroed_temporal_blocks_are_the_identity_with_every_option() -> None:
    arguments = inputs(shape=(4, 6, 6))
    model = Transformer(replace(EVERYTHING, temporal_init="zero"))
    assert not model(*arguments, size=SIZE).any()
    x, vectors = _draw(2, 4, 3, WIDTH), _draw(2, 1, 6, WIDTH, seed=1)
    assert torch.equal(model.temporal_transformer_blocks[0](x, vectors), x)
    assert not torch.equal(Transformer(EVERYTHING).temporal_transformer_blocks[0](x, vectors), x)
