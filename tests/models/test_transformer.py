"""The transformer against diffusers' Latte and PixArt, and against itself where it must not change."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.transformer import Transformer, TransformerConfig
from tests.models.networks import (
    SHAPES,
    SMALL,
    assert_close,
    image_model,
    inputs,
    latte,
    random_transformer,
    randomise,
    silence_temporal_attention,
)

SIZES = [SMALL, replace(SMALL, sample_size=64), replace(SMALL, sample_size=128, position_scale=2.0)]
PUBLISHED = replace(SMALL, num_layers=1, num_heads=16, head_dim=72, text_dim=64, sample_size=64)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_equals_latte(shape: tuple[int, int, int]) -> None:
    model, reference = random_transformer(), latte(SMALL, shape[0])
    reference.load_state_dict(model.state_dict())
    latents, timestep, text, mask = inputs(shape=shape)
    expected = reference(latents, timestep, text, return_dict=False)[0]
    assert_close(model(latents, timestep, text, mask), expected)


@pytest.mark.parametrize("config", [*SIZES[1:], PUBLISHED], ids=["512 px", "1024 px", "width 1152"])
@torch.no_grad()
def test_equals_latte_of_other_sizes(config: TransformerConfig) -> None:
    """The reference finds its own position scale from the sample size."""
    model, reference = random_transformer(config), latte(config, 3)
    reference.load_state_dict(model.state_dict())
    latents, timestep, text, mask = inputs(config, shape=(3, 10, 16))
    expected = reference(latents, timestep, text, return_dict=False)[0]
    assert_close(model(latents, timestep, text, mask), expected)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (4, 6, 10), (16, 4, 4)])
@torch.no_grad()
def test_equals_latte_with_captions_masked_or_each_alone_and_unpadded(shape: tuple[int, int, int]) -> None:
    """The reference's pipeline gives no mask, and the reference takes a mask only if it is repeated by frame."""
    model, reference = random_transformer(), latte(SMALL, shape[0])
    reference.load_state_dict(model.state_dict())
    lengths = (7, 1, 4)
    latents, timestep, text, mask = inputs(shape=shape, lengths=lengths)
    found = model(latents, timestep, text, mask)
    arguments = {"encoder_attention_mask": mask.repeat_interleave(shape[0], dim=0), "return_dict": False}
    assert_close(found, reference(latents, timestep, text, **arguments)[0])
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        expected = reference(latents[one], timestep[one], text[one, :length], return_dict=False)[0]
        assert_close(found[one], expected)


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 8, 8), (1, 10, 24)])
@pytest.mark.parametrize("position_scale", [1.0, 0.5, 2.0])
@torch.no_grad()
def test_one_frame_equals_pixart_with_masked_captions(shape: tuple[int, int, int], position_scale: float) -> None:
    config = replace(SMALL, position_scale=position_scale, temporal_init="zero")
    model, reference = image_model(config)
    latents, timestep, text, mask = inputs(shape=shape, lengths=(7, 1, 4))
    expected = reference(latents[:, :, 0], text, timestep, encoder_attention_mask=mask, return_dict=False)[0]
    assert_close(model(latents, timestep, text, mask)[:, :, 0], expected)


@pytest.mark.parametrize(
    "pixels", [(256, 256), (512, 512), (720, 1280), (1280, 720), (1088, 1920)], ids=lambda side: f"{side[0]}x{side[1]}"
)
@torch.no_grad()
def test_one_frame_of_a_real_size_equals_pixart(pixels: tuple[int, int]) -> None:
    model, reference = image_model(replace(SMALL, num_layers=1, temporal_init="zero"))
    shape = (1, pixels[0] // 8, pixels[1] // 8)
    latents, timestep, text, mask = inputs(shape=shape, lengths=(3,))
    expected = reference(latents[:, :, 0], text, timestep, encoder_attention_mask=mask, return_dict=False)[0]
    assert_close(model(latents, timestep, text, mask)[:, :, 0], expected)


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 10, 24)])
@torch.no_grad()
def test_one_frame_equals_pixart_that_is_told_the_size(shape: tuple[int, int, int]) -> None:
    """As PixArt-alpha's 1024 px checkpoint is; its extra weights load by name."""
    config = replace(SMALL, size_conditioning=True, temporal_init="zero")
    model, reference = image_model(config)
    latents, timestep, text, mask = inputs(shape=shape, lengths=(7, 1, 4))
    size = torch.tensor([[1024, 1024], [832, 1216], [1504, 688]])
    told = {"resolution": size.float(), "aspect_ratio": size[:, :1] / size[:, 1:]}
    arguments = {"encoder_attention_mask": mask, "added_cond_kwargs": told, "return_dict": False}
    expected = reference(latents[:, :, 0], text, timestep, **arguments)[0]
    assert_close(model(latents, timestep, text, mask, size=size)[:, :, 0], expected)
    told_alike = model(latents, timestep, text, mask, size=(832, 1216))
    assert_close(told_alike[1:2, :, 0], expected[1:2])
    assert (told_alike[0, :, 0] - expected[0]).abs().max() > 1e-3


@torch.no_grad()
def test_a_256_px_model_on_512_px_positions() -> None:
    """Half the size at half the scale has the positions of the larger sample size, as the docstring says."""
    small = replace(SMALL, sample_size=32, position_scale=0.5)
    large = replace(SMALL, sample_size=64)
    model, other = random_transformer(small), random_transformer(large)
    assert torch.equal(model(*inputs(shape=(2, 32, 32))), other(*inputs(shape=(2, 32, 32))))


@torch.no_grad()
def test_new_temporal_blocks_leave_the_image_model_as_it_is() -> None:
    config = replace(SMALL, temporal_init="zero", temporal_pos="branch")
    model, reference = image_model(config)
    latents, timestep, text, mask = inputs(shape=(5, 8, 12), lengths=(7, 2))
    found = model(latents, timestep, text, mask)
    for frame in range(5):
        arguments = {"encoder_attention_mask": mask, "return_dict": False}
        expected = reference(latents[:, :, frame], text, timestep, **arguments)[0]
        assert_close(found[:, :, frame], expected)


@torch.no_grad()
def test_branch_positions_reach_every_temporal_attention_and_nothing_else() -> None:
    """With temporal attention silenced the positions do not matter; with it on, each block sees them."""
    config = replace(SMALL, temporal_pos="branch")
    arguments = inputs(shape=(4, 4, 4))
    for block in range(config.num_layers):
        model = random_transformer(config)
        silence_temporal_attention(model, but=block)
        near, far = (model(*arguments, frame_interval_s=interval) for interval in (0.125, 0.5))
        assert (near - far).abs().max() > 1e-3
        for parameter in model.temporal_transformer_blocks[block].attn1.to_out.parameters():
            parameter.zero_()
        near, far = (model(*arguments, frame_interval_s=interval) for interval in (0.125, 0.5))
        assert torch.equal(near, far)


@torch.no_grad()
def test_padding_and_neighbours_change_nothing() -> None:
    model = random_transformer(replace(SMALL, pooled_text=True))
    latents, timestep, text, mask = inputs(lengths=(6, 2, 3))
    together = model(latents, timestep, text, mask)
    for row, length in enumerate((6, 2, 3)):
        one = slice(row, row + 1)
        alone = model(latents[one], timestep[one], text[one, :length], mask[one, :length])
        assert_close(together[one], alone, share=1e-5)
        garbage = torch.cat([text[one, :length], torch.full((1, 9, SMALL.text_dim), 50.0)], dim=1)
        padded = model(latents[one], timestep[one], garbage, torch.arange(length + 9)[None] < length)
        assert_close(padded, alone, share=1e-5)


@pytest.mark.parametrize("lengths", [(6, 2), (5, 5)])
@torch.no_grad()
def test_text_that_was_read_before_gives_the_same(lengths: tuple[int, ...]) -> None:
    """Over several timesteps, with nothing of the text computed anew."""
    model = random_transformer(replace(SMALL, pooled_text=True, temporal_pos="branch"))
    latents, timestep, text, mask = inputs(lengths=lengths)
    expected = [model(latents, shift + timestep, text, mask) for shift in (0, 25)]
    context, computed = model.read_text(text, mask), list[nn.Module]()
    for part in (model.caption_projection, model.pooled_text):
        part.register_forward_hook(lambda layer, *_: computed.append(layer))
    for block in model.transformer_blocks:
        for layer in (block.attn2.to_k, block.attn2.to_v):
            layer.register_forward_hook(lambda layer, *_: computed.append(layer))
    for shift, output in zip((0, 25), expected, strict=True):
        assert torch.equal(model(latents, shift + timestep, context), output)
    assert not computed
    model(latents, timestep, text, mask)
    assert len(computed) == 2 + 2 * SMALL.num_layers


@torch.no_grad()
def test_no_mask_is_a_mask_that_hides_nothing() -> None:
    model = random_transformer(replace(SMALL, pooled_text=True))
    latents, timestep, text, mask = inputs(lengths=(5, 5))
    expected = model(latents, timestep, text, mask)
    assert_close(model(latents, timestep, text), expected, share=1e-5)
    assert_close(model(latents, timestep, model.read_text(text)), expected, share=1e-5)


@torch.no_grad()
def test_pooled_text_starts_at_zero_and_then_acts_through_the_timestep() -> None:
    config = replace(SMALL, pooled_text=True)
    fresh = Transformer(config)
    assert fresh.pooled_text is not None
    assert not fresh.pooled_text.weight.any() and not fresh.pooled_text.bias.any()
    plain = random_transformer()
    pooled = Transformer(config).eval()
    missing = pooled.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["pooled_text.weight", "pooled_text.bias"]
    arguments = inputs(lengths=(6, 2))
    assert torch.equal(pooled(*arguments), plain(*arguments))
    randomise(pooled.pooled_text)
    assert (pooled(*arguments) - plain(*arguments)).abs().max() > 1e-3


@pytest.mark.parametrize("temporal_pos", ["stream", "branch", "rope"])
@torch.no_grad()
def test_equal_timesteps_for_all_frames_are_one_timestep(temporal_pos: str) -> None:
    model = random_transformer(replace(SMALL, temporal_pos=temporal_pos, pooled_text=True))
    latents, timestep, text, mask = inputs(shape=(4, 6, 6))
    expected = model(latents, timestep, text, mask)
    assert_close(model(latents, timestep[:, None].expand(2, 4), text, mask), expected, share=1e-5)


@torch.no_grad()
def test_each_frame_takes_its_own_timestep() -> None:
    """Frames that cannot see each other give what each gives alone at its timestep."""
    model = Transformer(replace(SMALL, temporal_init="zero", temporal_pos="branch"))
    _randomise_spatial(model)
    latents, _, text, mask = inputs(shape=(3, 6, 6))
    timesteps = torch.tensor([[0.0, 400.0, 999.0], [10.0, 10.0, 700.0]])
    found = model(latents, timesteps, text, mask)
    for frame in range(3):
        alone = model(latents[:, :, frame : frame + 1], timesteps[:, frame], text, mask)
        assert_close(found[:, :, frame : frame + 1], alone, share=1e-5)


@torch.no_grad()
def test_positions_are_in_seconds() -> None:
    """Every second frame of a video has the positions that those frames had in the whole video."""
    model = random_transformer()
    arguments = inputs(shape=(4, 4, 4))
    plain = model(*arguments)
    assert torch.equal(model(*arguments, frame_interval_s=0.125), plain)
    assert (model(*arguments, frame_interval_s=0.25) - plain).abs().max() > 1e-3
    doubled = random_transformer(replace(SMALL, temporal_pos_per_s=16.0))
    assert torch.equal(doubled(*arguments), model(*arguments, frame_interval_s=0.25))


@torch.no_grad()
def test_each_sample_may_have_its_own_frame_interval() -> None:
    model = random_transformer()
    arguments = inputs(shape=(4, 4, 4))
    found = model(*arguments, frame_interval_s=torch.tensor([0.125, 0.5]))
    for row, interval_s in enumerate((0.125, 0.5)):
        assert_close(found[row], model(*arguments, frame_interval_s=interval_s)[row], share=1e-6)


@pytest.mark.parametrize("temporal_pos", ["stream", "branch", "rope"])
@torch.no_grad()
def test_a_thousand_frames(temporal_pos: str) -> None:
    model = random_transformer(replace(SMALL, temporal_pos=temporal_pos))
    assert model(*inputs(shape=(1001, 4, 6), lengths=(3,))).isfinite().all()


@torch.no_grad()
def test_frames_that_follow_move_no_position() -> None:
    """Frames that do not see each other give the same, however many there are."""
    model = random_transformer()
    for block in model.temporal_transformer_blocks:
        for parameter in block.attn1.to_out.parameters():
            parameter.zero_()
    latents, timestep, text, mask = inputs(shape=(40, 4, 4))
    whole = model(latents, timestep, text, mask)
    assert_close(model(latents[:, :, :7], timestep, text, mask), whole[:, :, :7], share=1e-6)
    assert (model(latents[:, :, 7:14], timestep, text, mask) - whole[:, :, 7:14]).abs().max() > 1e-3


@torch.no_grad()
def test_a_fresh_model_starts_as_pixart_does() -> None:
    torch.manual_seed(0)
    config = replace(SMALL, num_heads=8, head_dim=32, text_dim=300)
    model = Transformer(config)
    state = model.state_dict()
    assert not model(*inputs(config)).any()
    for name, tensor in state.items():
        if name.endswith("bias") or "attn2.to_out" in name or name.startswith("proj_out"):
            assert not tensor.any(), name
        elif name.startswith(("adaln_single", "caption_projection")):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("scale_shift_table"):
            assert tensor.std().item() == pytest.approx(config.width**-0.5, rel=0.2), name
        else:
            fan_in, fan_out = tensor[0].numel(), tensor.shape[0]
            assert tensor.std().item() == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.1), name


@torch.no_grad()
def test_zeroed_temporal_blocks_are_the_identity_when_fresh() -> None:
    model = Transformer(replace(SMALL, temporal_init="zero"))
    for name, tensor in model.temporal_transformer_blocks.state_dict().items():
        assert tensor.any() == ("to_out" not in name and "net.2" not in name and "bias" not in name), name


@torch.no_grad()
def test_half_precision_inputs_are_taken_and_kept_in_the_models_own() -> None:
    model = random_transformer().to(torch.bfloat16)
    latents, timestep, text, mask = inputs()
    output = model(latents, timestep, text.half(), mask)
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), random_transformer()(latents, timestep, text, mask), share=0.2)


def test_latents_that_do_not_divide_into_patches() -> None:
    """Such as those of 1080 x 1920 px, which no multiple of 16 is."""
    with pytest.raises(ValueError, match=r"latents are 135x240; expected multiples of the patch size 2"):
        random_transformer()(*inputs(shape=(1, 135, 240)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal_pos": "both"}, "temporal_pos is 'both'; expected stream or branch or rope"),
        ({"temporal_init": "one"}, "temporal_init is 'one'; expected normal or zero"),
        ({"temporal_attention": "local"}, "temporal_attention is 'local'; expected axial or full"),
        ({"num_heads": 1, "head_dim": 6}, "is 6; expected a multiple of 4"),
        ({"num_heads": 4, "head_dim": 5, "temporal_pos": "rope"}, "head_dim is 5; expected an even number"),
        ({"head_dim": 16, "size_conditioning": True}, "is 32; expected a multiple of 3"),
        ({"num_layers": 0}, "at least 1"),
    ],
)
def test_configs_that_no_network_can_have(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_tokens_are_patches_of_all_frames() -> None:
    assert TransformerConfig().tokens(56, 32, 32) == 14_336


def _randomise_spatial(model: Transformer) -> None:
    """Draws all weights but those of the temporal blocks."""
    temporal = {name: t.clone() for name, t in model.state_dict().items() if name.startswith("temporal")}
    randomise(model)
    model.load_state_dict(temporal, strict=False)
