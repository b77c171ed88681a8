"""What a run is set up to predict: as it is told, or else as the weights that it starts from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.diffusion import DiffusionConfig
from models.flow import FlowConfig
from models.objective import ObjectiveConfig
from models.weights import CheckpointInfo, save_checkpoint
from stages.errors import ConfigError
from stages.train import StepConfig, TrainConfig, with_prediction
from tests.models.networks import SMALL, latte, random_transformer


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Latte's weights, and a checkpoint that predicts v."""
    folder = tmp_path_factory.mktemp("weights")
    latte(SMALL, 2).save_pretrained(folder / "latte")
    (folder / "v").mkdir()
    info = CheckpointInfo(1, SMALL, ObjectiveConfig("v"), {}, {}, 1 / 8)
    null = torch.zeros(1, 20), torch.ones(1, dtype=torch.bool)
    save_checkpoint(folder / "v", info, {"ema": random_transformer().state_dict()}, null)
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
    config = TrainConfig(objective=ObjectiveConfig(set_to), train=StepConfig(init_from=path))
    found = with_prediction(config, sources[resumed] if resumed else None)
    assert found == replace(config, objective=ObjectiveConfig(expected))


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
        with_prediction(TrainConfig(objective=objective, train=StepConfig(init_from=path)), None)
