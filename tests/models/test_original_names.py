"""PixArt-alpha's and Latte's own .pth files give what diffusers' models of the same weights give."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.errors import WeightsError
from models.loading import load_into, load_transformer, open_pretrained
from models.transformer import Transformer
from tests.models.networks import assert_close, inputs, latte, pixart, randomise
from tests.models.originals import XL_LIKE, pixart_positions, pixart_state, save_pth


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return randomise(pixart(XL_LIKE))


@pytest.fixture(scope="module")
def state(reference: nn.Module) -> dict[str, Tensor]:
    return pixart_state(reference) | {"pos_embed": pixart_positions(reference)}


def _outputs_agree(path: Path, reference: nn.Module, weights: str = "ema") -> None:
    """Every frame of our model is what the image model makes of it."""
    model = load_transformer(path, weights)
    assert model.prediction == "epsilon" and not model.training
    latents, timestep, text, mask = inputs(XL_LIKE, shape=(3, 8, 12), lengths=(7, 2))
    with torch.no_grad():
        found = model(latents, timestep, text, mask)
        for frame in range(3):
            arguments = {"encoder_attention_mask": mask, "return_dict": False}
            assert_close(found[:, :, frame], reference(latents[:, :, frame], text, timestep, **arguments)[0])


WRAPPINGS = {
    "bare": lambda state: state,
    "published": lambda state: {"state_dict": state},
    "trainer": lambda state: {
        "state_dict": {name: torch.zeros_like(tensor) for name, tensor in state.items()},
        "state_dict_ema": state,
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 2e-5, "betas": (0.9, 0.999)}]},
        "scheduler": {"last_epoch": 3},
        "epoch": 1,
    },
    "DistributedDataParallel": lambda state: {"state_dict": {f"module.{name}": t for name, t in state.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_pixarts_own_file_equals_diffusers(
    wrapping: str, reference: nn.Module, state: dict[str, Tensor], tmp_path: Path
) -> None:
    _outputs_agree(save_pth(tmp_path / "PixArt.pth", WRAPPINGS[wrapping](state)), reference)


def test_the_format_before_zip_files(reference: nn.Module, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    _outputs_agree(tmp_path / "old.pth", reference)


def test_the_weights_in_training_can_be_asked_for(reference: nn.Module, state: dict, tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    path = save_pth(tmp_path / "epoch_1.pth", {"state_dict": state, "state_dict_ema": zeros})
    _outputs_agree(path, reference, "model")


@pytest.mark.parametrize("wrapping", ["bare", "ema"])
@torch.no_grad()
def test_lattes_own_file_equals_diffusers(wrapping: str, tmp_path: Path) -> None:
    """It has diffusers' names; made for 512 px, it does not say so."""
    config = replace(XL_LIKE, sample_size=64)
    reference = randomise(latte(config, 3))
    left_over = {"caption_projection.y_embedding": torch.ones(120, 20), "temp_pos_embed": torch.ones(1, 3, 144)}
    state = reference.state_dict() | left_over
    path = save_pth(tmp_path / "t2v.pt", state if wrapping == "bare" else {"ema": state, "model": {}, "args": None})
    model = load_transformer(path)
    assert model.config == config and model.prediction == "epsilon"
    latents, timestep, text, mask = inputs(config)
    assert_close(model(latents, timestep, text, mask), reference(latents, timestep, text, return_dict=False)[0])
    assert load_into(Transformer(config), path).null_text is None


@pytest.mark.parametrize(("sample_size", "scale"), [(32, 1.0), (64, 1.0), (128, 2.0), (32, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_positions_in_the_file_say_its_size(
    sample_size: int, scale: float, dtype: torch.dtype, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """PixArt-alpha of 256, 512 and 1024 px, and PixArt-Sigma's 256 px."""
    table = pixart_positions(pixart(replace(XL_LIKE, sample_size=sample_size, position_scale=scale)))
    source = open_pretrained(save_pth(tmp_path / "PixArt.pth", state | {"pos_embed": table.to(dtype)}))
    assert (source.config.sample_size, source.config.position_scale) == (sample_size, scale)
    assert source.knows_its_positions


def test_a_file_without_positions_is_only_started_from(state: dict[str, Tensor], tmp_path: Path) -> None:
    bare = {name: tensor for name, tensor in state.items() if name != "pos_embed"}
    path = save_pth(tmp_path / "PixArt.pth", bare)
    assert not open_pretrained(path).knows_its_positions
    with pytest.raises(WeightsError, match="does not say for which size its spatial positions are"):
        load_transformer(path)
    for sample_size in (32, 64):
        assert load_into(Transformer(replace(XL_LIKE, sample_size=sample_size)), path).missing


def test_the_empty_caption_is_the_files_own(state: dict[str, Tensor], tmp_path: Path) -> None:
    embedding = torch.randn(120, 20)
    path = save_pth(tmp_path / "PixArt.pth", state | {"y_embedder.y_embedding": embedding})
    report = load_into(Transformer(XL_LIKE), path)
    assert report.null_text is not None and torch.equal(report.null_text, embedding)
    assert report.unexpected == ()


@torch.no_grad()
def test_the_1024_px_model_is_told_the_size(tmp_path: Path) -> None:
    config = replace(XL_LIKE, num_heads=3, sample_size=128, position_scale=2.0, size_conditioning=True)
    reference = randomise(pixart(config))
    path = save_pth(tmp_path / "PixArt-MS.pth", pixart_state(reference) | {"pos_embed": pixart_positions(reference)})
    reference.save_pretrained(tmp_path / "folder")
    latents, timestep, text, mask = inputs(config, shape=(1, 8, 12), lengths=(7, 2))
    sizes = torch.tensor([[1024.0, 768.0], [512.0, 2048.0]])
    conditions = {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}
    expected = reference(
        latents[:, :, 0], text, timestep, encoder_attention_mask=mask,
        added_cond_kwargs=conditions, return_dict=False,
    )[0]  # fmt: skip
    for source in (path, tmp_path / "folder"):
        found = load_transformer(source)(latents, timestep, text, mask, size=sizes)
        assert_close(found[:, :, 0], expected)

    report = load_into(Transformer(replace(config, size_conditioning=False)), path)
    assert len(report.unexpected) == 8 and all("embedder" in name for name in report.unexpected)
    assert "it is told the size of the picture, which this model is not" in report.notes


def _without(name: str) -> Any:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("blocks.1.mlp.fc2.bias"), r"lacks 1 of its parameters \(transformer_blocks.1.ff.net.2.bias\)"),
        (lambda state: state | {"blocks.0.attn.sr.weight": torch.ones(3)}, r"another model \(blocks.0.attn.sr.weight"),
        (_without("t_block.1.weight"), "neither a PixArt-alpha nor a Latte .*expected 'adaln_single.linear.weight'"),
        (lambda state: {"a": torch.ones(1)}, "neither a PixArt-alpha nor a Latte .*found 1 tensors"),
        (lambda state: state | {"pos_embed": torch.ones(1, 64, 144)}, "positions of a square grid"),
        (lambda state: {"epoch": 3}, "holds no tensors by name"),
        (lambda state: [torch.ones(1)], "holds no tensors by name"),
    ],
)
def test_files_that_are_no_such_model(change: Any, message: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = save_pth(tmp_path / "some.pth", change(state))
    with pytest.raises(WeightsError, match=message):
        load_into(Transformer(XL_LIKE), path)


class _Code:
    def __reduce__(self) -> tuple:
        return (exit, (3,))


def test_a_file_that_would_run_code_is_not_opened(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_pth(tmp_path / "zip.pth", state | {"x": _Code()})
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Code(), protocol=2))
    (tmp_path / "damaged.pth").write_bytes((tmp_path / "zip.pth").read_bytes()[:5000])
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("zip", "plain", "damaged", "empty"):
        with pytest.raises(WeightsError, match=rf"{name}.pth cannot be read as a file of tensors alone \("):
            load_transformer(tmp_path / f"{name}.pth")
