"""Feature networks by both conventions, and a fixed statistic of latents."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stages.errors import ConfigError
from stages.evaluation.features import FeatureNetwork, in_spreads, latent_moments

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")
FRAMES = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), np.uint8)
CPU = torch.device("cpu")


class Plain(torch.nn.Module):
    """Means over time and space, a number a channel, and how large the video is."""

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return video.mean((2, 3, 4))


class LikeI3D(torch.nn.Module):
    """StyleGAN-V's signature: scales, resizes and returns features only if told to."""

    def forward(
        self, video: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        if not (rescale and resize and return_features):
            return video.sum()
        return (video * 2 / 255 - 1).mean((2, 3, 4))


class Tokens(torch.nn.Module):
    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return video.flatten(2).transpose(1, 2)


def _network(tmp_path: Path, module: torch.nn.Module) -> FeatureNetwork:
    torch.jit.script(module).save(str(tmp_path / "network.pt"))
    return FeatureNetwork(str(tmp_path / "network.pt"), CPU)


def test_a_plain_network_gets_values_of_0_to_1(tmp_path: Path) -> None:
    found = _network(tmp_path, Plain())(FRAMES)
    assert found.dtype == np.float64 and found == pytest.approx(FRAMES.mean((0, 1, 2)) / 255, rel=1e-5)


def test_a_network_with_the_arguments_of_i3d_gets_them(tmp_path: Path) -> None:
    found = _network(tmp_path, LikeI3D())(FRAMES)
    assert found == pytest.approx(FRAMES.mean((0, 1, 2)) / 127.5 - 1, abs=1e-5)


def test_tokens_are_averaged(tmp_path: Path) -> None:
    assert _network(tmp_path, Tokens())(FRAMES) == pytest.approx(FRAMES.mean((0, 1, 2)) / 255, rel=1e-5)


def test_what_is_no_feature_network_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file at .*gone.pt: give features="):
        FeatureNetwork(str(tmp_path / "gone.pt"), CPU)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ConfigError, match="text.pt is no TorchScript file"):
        FeatureNetwork(str(tmp_path / "text.pt"), CPU)
    with pytest.raises(ConfigError, match=r"network.pt cannot take videos \[1, 3, 4, 6, 8\]"):
        _network(tmp_path, torch.nn.Conv3d(5, 1, 1))(FRAMES)


def test_the_statistic_of_latents_is_moments() -> None:
    latents = np.random.default_rng(0).normal(size=(5, 2, 4, 6)).astype(np.float16)
    found, z = latent_moments(latents).reshape(7, 2), latents.astype(np.float64)
    for channel in range(2):
        quarters = [z[:, channel, y : y + 2, x : x + 3].mean() for y in (0, 2) for x in (0, 3)]
        contrast = np.mean([z[t, channel].std() for t in range(5)])
        detail = np.sqrt(np.mean((z[:, channel, :, 1:] - z[:, channel, :, :-1]) ** 2))
        motion = np.sqrt(np.mean((z[1:, channel] - z[:-1, channel]) ** 2))
        assert found[:, channel] == pytest.approx([*quarters, contrast, detail, motion])
    assert (latent_moments(latents[:1]).reshape(7, 2)[6] == 0).all()


def test_spreads_are_those_of_the_real_clips() -> None:
    samples, real = np.array([[2.0, 5.0]]), np.array([[1.0, 3.0], [3.0, 3.0]])
    scaled = in_spreads(samples, real)
    assert scaled[0].tolist() == [[2, 5]] and scaled[1].tolist() == [[1, 3], [3, 3]]
    assert in_spreads(samples, real * 4)[0].tolist() == [[0.5, 5]]
