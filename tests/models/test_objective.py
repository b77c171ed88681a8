"""One config for all objectives: what it makes, and what it refuses."""

import pytest

from models.diffusion import Diffusion, DiffusionConfig
from models.flow import FlowConfig, RectifiedFlow
from models.objective import ObjectiveConfig, make_objective


@pytest.mark.parametrize(
    ("config", "kind", "channels"),
    [
        (ObjectiveConfig("velocity", flow=FlowConfig(logit_mean=1.0)), RectifiedFlow, 4),
        (ObjectiveConfig("epsilon", diffusion=DiffusionConfig(5.0)), Diffusion, 8),
        (ObjectiveConfig("v"), Diffusion, 4),
    ],
)
def test_the_prediction_chooses(config: ObjectiveConfig, kind: type, channels: int) -> None:
    objective = make_objective(config)
    assert isinstance(objective, kind)
    assert (objective.prediction, objective.out_channels(4)) == (config.prediction, channels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction": "x0"}, "'x0'; expected velocity or epsilon or v"),
        ({"prediction": "velocity", "diffusion": DiffusionConfig(5.0)}, "diffusion: prediction velocity has no use"),
        ({"prediction": "epsilon", "flow": FlowConfig(logit_std=2.0)}, "flow: prediction epsilon has no use"),
        ({"prediction": "v", "flow": FlowConfig((1,), (2.0,))}, "flow: prediction v has no use"),
    ],
)
def test_settings_of_another_kind_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**settings)


def test_settings_may_come_before_the_prediction_is_known() -> None:
    config = ObjectiveConfig(flow=FlowConfig(logit_std=2.0), diffusion=DiffusionConfig(5.0))
    assert config.prediction is None
