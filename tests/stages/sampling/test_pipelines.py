"""Each sampler against diffusers' own pipeline, on the same weights, text and noise."""

import pytest

from models.samplers import SamplerName
from models.transformer import Prediction
from tests.models.networks import assert_close
from tests.stages.sampling.pipelines import FRAMES, VIDEOS, frames_of_pixart, videos_of_latte


@pytest.mark.parametrize(("prediction", "name"), VIDEOS)
def test_videos_are_those_of_lattes_pipeline(prediction: Prediction, name: SamplerName) -> None:
    found, expected = videos_of_latte(prediction, name)
    assert found.shape[2] == FRAMES
    assert_close(found, expected)


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_a_frame_is_that_of_pixarts_pipeline(name: SamplerName) -> None:
    assert_close(*frames_of_pixart(name))
