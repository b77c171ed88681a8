"""What a run takes from the weights it starts from: settings of the model, and the empty caption."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.diffusion import DiffusionConfig
from models.flow import FlowConfig, RectifiedFlow
from models.latents import LatentStats
from models.objective import ObjectiveConfig
from models.transformer import Transformer
from models.weights import CheckpointInfo, save_checkpoint
from shards.loader import Batch
from shards.schema import Bucket
from stages.errors import ConfigError
from stages.training.loss import LatentLoss
from stages.training.start import model_settings, objective_settings, start_from
from tests.models.networks import SMALL, latte, pixart, random_transformer
from tests.models.originals import XL_LIKE, pixart_positions, pixart_state, save_pth

PIXART_512 = replace(XL_LIKE, sample_size=64)
NULL_TEXT = torch.linspace(0, 1, 60).reshape(3, 20)


def _pixart(path: Path, **extra: torch.Tensor) -> str:
    return str(save_pth(path / "PixArt.pth", pixart_state(pixart(PIXART_512)) | extra))


def _checkpoint(folder: Path, **changes: Any) -> str:
    config = replace(SMALL, **changes)
    folder.mkdir(parents=True)
    info = CheckpointInfo(3, config, ObjectiveConfig("velocity"), {"hash": "v"}, {"hash": "t"}, 1 / 8)
    weights = {"ema": random_transformer(config).state_dict()}
    save_checkpoint(folder, info, weights, NULL_TEXT)
    return str(folder)


def test_without_other_weights_the_model_section_stays(tmp_path: Path) -> None:
    resumed = Path(_checkpoint(tmp_path / "step-3"))
    assert model_settings({"preset": "tiny"}, None, resumed) == {"preset": "tiny"}


def test_a_model_section_that_says_nothing_takes_pixarts_positions(tmp_path: Path) -> None:
    path = _pixart(tmp_path, pos_embed=pixart_positions(pixart(PIXART_512)))
    taken = {"sample_size": 64, "position_scale": 1.0, "temporal_pos": "branch", "temporal_init": "zero"}
    taken |= {"size_conditioning": False}
    assert model_settings({"preset": "XL/2"}, path, None) == {"preset": "XL/2"} | taken


def test_what_the_model_section_says_stays(tmp_path: Path) -> None:
    path = _pixart(tmp_path, pos_embed=pixart_positions(pixart(PIXART_512)))
    given = {"temporal_pos": "stream", "position_scale": 0.5}
    assert model_settings(given, path, None) == given | {"temporal_init": "zero", "size_conditioning": False}


def test_a_file_without_positions_needs_a_size(tmp_path: Path) -> None:
    path = _pixart(tmp_path)
    with pytest.raises(ConfigError, match="PixArt.pth does not say .*: set model.sample_size to the latent size"):
        model_settings({"preset": "XL/2"}, path, None)
    taken = {"temporal_pos": "branch", "temporal_init": "zero", "size_conditioning": False}
    assert model_settings({"sample_size": 64}, path, None) == {"sample_size": 64} | taken


def test_latte_keeps_its_way_with_time(tmp_path: Path) -> None:
    latte(XL_LIKE, 3).save_pretrained(tmp_path)
    taken = {"sample_size": 16, "position_scale": 1.0, "temporal_pos": "stream"}
    assert model_settings({}, str(tmp_path), None) == taken


def test_of_our_own_everything_but_sizes_of_layers(tmp_path: Path) -> None:
    options = {"sample_size": 24, "temporal_pos": "branch", "pooled_text": True, "temporal_pos_per_s": 4.0}
    path = _checkpoint(tmp_path / "step-3", **options)
    taken = model_settings({"preset": "tiny"}, path, None)
    assert options.items() <= taken.items() and not {"num_layers", "text_dim", "patch_size"} & taken.keys()


def test_a_run_that_goes_on_needs_the_first_weights_no_more(tmp_path: Path) -> None:
    resumed = Path(_checkpoint(tmp_path / "step-3", sample_size=24))
    assert model_settings({}, str(tmp_path / "removed.pth"), resumed)["sample_size"] == 24


def test_the_empty_caption_comes_with_the_weights(tmp_path: Path) -> None:
    report = start_from(_checkpoint(tmp_path / "step-3"), Transformer(SMALL), {"hash": "v"}, {"hash": "t"})
    assert report.null_text is not None and torch.equal(report.null_text, NULL_TEXT)
    embedding = torch.randn(120, 20)
    path = _pixart(tmp_path, **{"y_embedder.y_embedding": embedding})
    report = start_from(path, Transformer(PIXART_512, "epsilon"), {}, {})
    assert report.null_text is not None and torch.equal(report.null_text, embedding)


def test_weights_of_another_text_encoder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another text encoder than these shards: hash 't', here 'other'"):
        start_from(_checkpoint(tmp_path / "step-3"), Transformer(SMALL), {"hash": "v"}, {"hash": "other"})


@pytest.mark.parametrize("null_length", [2, 5, 9])
def test_an_empty_caption_of_any_length_takes_the_place_of_a_dropped_one(null_length: int) -> None:
    """PixArt's has 120 tokens, most captions fewer; the mask is the empty caption's own."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Model(torch.nn.Module):
        def forward(
            self, latents: torch.Tensor, _: Any, text: torch.Tensor, mask: torch.Tensor | None, **__: Any
        ) -> Any:
            seen.append((text, torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask))
            return latents

    null = torch.randn(null_length, 3)
    text = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    text_mask = np.arange(5)[None] < np.array([[5], [3]])
    batch = Batch(
        step=0, bucket=Bucket(16, 16, 1), frame_stride=1, keys=["a", "b"], positions=np.arange(2),
        mean=np.zeros((2, 1, 4, 2, 2), np.float32), std=None, text=text, text_mask=text_mask,
    )  # fmt: skip
    for share in (0.0, 1.0):
        loss = LatentLoss(
            RectifiedFlow(FlowConfig()), LatentStats(1.0, 0.0), null,
            frame_interval_s=1 / 8, caption_dropout=share, seed=0, device=torch.device("cpu"),
        )  # fmt: skip
        loss.training(Model(), batch, 1)
    (kept, kept_mask), (dropped, dropped_mask) = seen
    for row in range(2):
        assert torch.equal(kept[row][kept_mask[row]], torch.from_numpy(text[row][text_mask[row]]))
        assert torch.equal(dropped[row][dropped_mask[row]], null)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Latte's weights, and a checkpoint that predicts v."""
    folder = tmp_path_factory.mktemp("weights")
    latte(SMALL, 2).save_pretrained(folder / "latte")
    (folder / "v").mkdir()
    info = CheckpointInfo(1, SMALL, ObjectiveConfig("v"), {}, {}, 1 / 8)
    save_checkpoint(folder / "v", info, {"ema": random_transformer().state_dict()}, NULL_TEXT)
    return {"latte": folder / "latte", "v": folder / "v"}


@pytest.mark.parametrize(
    ("set_to", "init_from", "resumed", "expected"),
    [
        (None, None, None, "velocity"),
        (None, "latte", None, "epsilon"),
        (None, "v", None, "v"),
        (None, "latte", "v", "v"),
        ("velocity", "latte", None, "velocity"),
        ("epsilon", None, None, "epsilon"),
        ("v", "latte", None, "v"),
    ],
)
def test_the_prediction(set_to, init_from, resumed, expected: str, sources: dict[str, Path]) -> None:
    path = str(sources[init_from]) if init_from else None
    found = objective_settings(ObjectiveConfig(set_to), path, sources[resumed] if resumed else None)
    assert found == ObjectiveConfig(expected)


@pytest.mark.parametrize(
    ("init_from", "objective", "message"),
    [
        ("latte", ObjectiveConfig(flow=FlowConfig(logit_mean=1.0)), "objective.flow: prediction epsilon has no use"),
        (None, ObjectiveConfig(diffusion=DiffusionConfig(5.0)), "objective.diffusion: prediction velocity has no use"),
    ],
)
def test_settings_of_another_kind_than_what_was_found(init_from, objective, message, sources) -> None:
    path = str(sources[init_from]) if init_from else None
    with pytest.raises(ConfigError, match=f"{message}.*or set objective.prediction"):
        objective_settings(objective, path, None)
