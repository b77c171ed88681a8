"""Starting a model from another's weights: what is taken, what is told, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models import loading
from models.errors import WeightsError
from models.loading import load_into, load_transformer, open_pretrained
from models.transformer import Transformer
from tests.models.networks import SMALL, assert_close, inputs, latte, pixart, randomise
from tests.models.originals import XL_LIKE, pixart_positions, pixart_state, save_pth

WEIGHTS = "diffusion_pytorch_model.safetensors"
FROM_PIXART = replace(XL_LIKE, temporal_pos="branch", temporal_init="zero")


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return randomise(pixart(XL_LIKE))


def _folder(reference: nn.Module, path: Path) -> Path:
    reference.save_pretrained(path)
    return path


def _pth(reference: nn.Module, path: Path) -> Path:
    return save_pth(path, pixart_state(reference) | {"pos_embed": pixart_positions(reference)})


SOURCES = pytest.mark.parametrize("save", [_folder, _pth])


def _frames_are_pixarts(model: nn.Module, reference: nn.Module, channels: int = 8) -> None:
    latents, timestep, text, mask = inputs(XL_LIKE, shape=(3, 8, 12), lengths=(7, 2))
    with torch.no_grad():
        found = model.eval()(latents, timestep, text, mask)
        for frame in range(3):
            arguments = {"encoder_attention_mask": mask, "return_dict": False}
            expected = reference(latents[:, :, frame], text, timestep, **arguments)[0]
            assert_close(found[:, :, frame], expected[:, :channels])


@SOURCES
def test_a_video_model_starts_as_pixart_frame_by_frame(save: Callable, reference: nn.Module, tmp_path: Path) -> None:
    model = Transformer(replace(FROM_PIXART, pooled_text=True), "epsilon")
    report = load_into(model, save(reference, tmp_path / "source"))
    _frames_are_pixarts(model, reference)
    new = {name for name in model.state_dict() if name.startswith(("temporal_transformer_blocks.", "pooled_text."))}
    assert set(report.missing) == new and report.unexpected == ()
    assert report.notes == ("a PixArt with spatial positions to 8",)


@SOURCES
def test_a_model_without_variance_takes_the_prediction_alone(
    save: Callable, reference: nn.Module, tmp_path: Path
) -> None:
    model = Transformer(replace(FROM_PIXART, out_channels=4))
    report = load_into(model, save(reference, tmp_path / "source"))
    _frames_are_pixarts(model, reference, channels=4)
    assert report.notes[1:] == (
        "the variance half of its output is left out",
        "it predicts epsilon, this model is trained for velocity",
    )


@torch.no_grad()
def test_a_model_with_variance_starts_from_one_without(tmp_path: Path) -> None:
    reference = randomise(latte(replace(XL_LIKE, out_channels=4), 3))
    model = Transformer(XL_LIKE, "epsilon").eval()
    report = load_into(model, _folder(reference, tmp_path))
    latents, timestep, text, mask = inputs(XL_LIKE)
    found = model(latents, timestep, text, mask)
    assert_close(found[:, :4], reference(latents, timestep, text, return_dict=False)[0])
    assert not found[:, 4:].any()
    assert report.notes[1:] == ("the variance half of the output is new",)


@SOURCES
def test_pixart_opens_as_a_model_that_leaves_frames_to_it(save: Callable, reference: nn.Module, tmp_path: Path) -> None:
    model = load_transformer(save(reference, tmp_path / "source"))
    assert model.prediction == "epsilon" and model.config == FROM_PIXART
    _frames_are_pixarts(model, reference)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_published_folders_hold_what_diffusers_has_no_place_for(reference: nn.Module, tmp_path: Path) -> None:
    """PixArt's empty caption, which a run then trains with; Latte's, which was never used."""
    left_over = {"caption_projection.y_embedding": torch.randn(120, 20)}
    for network, expected in ((reference, left_over["caption_projection.y_embedding"]), (latte(XL_LIKE, 3), None)):
        folder = _folder(network, tmp_path / type(network).__name__)
        save_file(load_file(folder / WEIGHTS) | left_over, folder / WEIGHTS)
        model = load_transformer(folder)
        report = load_into(model, folder)
        assert report.unexpected == ()
        assert (report.null_text is None) == (expected is None)
        assert expected is None or torch.equal(report.null_text, expected)


@SOURCES
def test_positions_of_another_range_are_refused_with_what_to_set(save: Callable, tmp_path: Path) -> None:
    """A 256 px model from 512 px weights."""
    source = save(pixart(replace(XL_LIKE, sample_size=64)), tmp_path / "source")
    with pytest.raises(WeightsError) as refused:
        load_into(Transformer(replace(FROM_PIXART, sample_size=32)), source)
    assert (
        "sample_size 32 with position_scale 1 puts spatial positions from 0 to 16, and the weights know 0 to 32: "
        "set sample_size=64 with position_scale=1, or position_scale=0.5 with the sample_size as it is"
    ) in str(refused.value)
    for told in ({"sample_size": 32, "position_scale": 0.5}, {"sample_size": 64}):
        load_into(Transformer(replace(FROM_PIXART, **told)), source)


@pytest.mark.parametrize("interpolation_scale", [None, 0.5])
def test_a_folder_without_a_scale_follows_diffusers_rule(interpolation_scale: float | None, tmp_path: Path) -> None:
    config = replace(XL_LIKE, sample_size=128, position_scale=interpolation_scale)  # type: ignore[arg-type]
    source = open_pretrained(_folder(pixart(config), tmp_path))
    assert source.config.position_scale == (interpolation_scale or 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "num_layers is 3, not 2"),
        ({"num_layers": 1}, "num_layers is 1, not 2"),
        ({"num_heads": 4, "head_dim": 36}, "num_heads is 4, not 2"),
        ({"temporal_pos": "branch"}, "temporal_pos is branch, not stream"),
        ({"in_channels": 16}, "pos_embed.proj.weight is .*144, 4, 2, 2.*, not .*144, 16, 2, 2"),
        ({"out_channels": 2}, "proj_out.weight is"),
    ],
)
def test_another_network_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    folder = _folder(latte(XL_LIKE, 3), tmp_path)
    with pytest.raises(WeightsError, match=message):
        load_into(Transformer(replace(XL_LIKE, **change)), folder)


def test_a_latte_that_lacks_temporal_blocks_is_refused(tmp_path: Path) -> None:
    folder = _folder(latte(XL_LIKE, 3), tmp_path)
    tensors = load_file(folder / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if "temporal_transformer_blocks.1" not in name}, folder / WEIGHTS)
    for opened in (load_transformer, lambda path: load_into(Transformer(XL_LIKE), path)):
        with pytest.raises(WeightsError, match="temporal_transformer_blocks.1"):
            opened(folder)


def test_a_whole_latte_gives_every_parameter(tmp_path: Path) -> None:
    reference = randomise(latte(SMALL, 3))
    model = Transformer(SMALL, "epsilon")
    report = load_into(model, _folder(reference, tmp_path))
    assert report.matched_share == 1 and not report.unexpected
    assert all(torch.equal(tensor, reference.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = randomise(latte(SMALL, 3))
    asked: list[tuple[str, str]] = []

    def resolve(name: str, part: str) -> Path:
        asked.append((name, part))
        return _folder(reference, tmp_path / "cache" / "transformer")

    monkeypatch.setattr(loading, "resolve_model", resolve)
    monkeypatch.chdir(tmp_path)
    assert load_transformer("maxin-cn/Latte-1").config == SMALL
    (tmp_path / "owner").mkdir()
    _folder(reference, tmp_path / "owner" / "local")
    load_transformer("owner/local")
    assert asked == [("maxin-cn/Latte-1", "transformer")]


def test_what_a_model_takes_over(reference: nn.Module, tmp_path: Path) -> None:
    sources = {
        "PixArt": _folder(reference, tmp_path / "pixart"),
        "Latte": _folder(latte(XL_LIKE, 3), tmp_path / "latte"),
    }
    positions = {"sample_size", "position_scale"}
    taken = {kind: set(open_pretrained(path).takes_over) for kind, path in sources.items()}
    assert taken["PixArt"] == positions | {"temporal_pos", "temporal_init", "size_conditioning"}
    assert taken["Latte"] == positions | {"temporal_pos"}
