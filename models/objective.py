"""What training asks of the model: one interface for all kinds of objectives.

Shapes: B batch, C channels, T frames, h w height and width. A level says how noisy latents are, 0 data and 1
the noisiest; it is [B], or [B, T] for frames at levels of their own. Nothing here draws random numbers: the
caller does.
"""

from dataclasses import dataclass, field
from typing import Protocol, get_args

from torch import Tensor

from models.diffusion import Diffusion, DiffusionConfig
from models.flow import FlowConfig, RectifiedFlow
from models.transformer import Prediction


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model predicts, and the settings of that kind of objective.

    prediction: "velocity" (rectified flow), "epsilon" (DDPM with a learned range, as PixArt-alpha and Latte) or
      "v" (with zero terminal signal-to-noise ratio). None leaves it to where the weights come from.
    flow: settings of "velocity". diffusion: settings of "epsilon" and "v".

    Raises ValueError for settings that the prediction has no use for.
    """

    prediction: Prediction | None = None
    flow: FlowConfig = field(default_factory=FlowConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    def __post_init__(self) -> None:
        known = get_args(Prediction)
        if self.prediction not in (None, *known):
            raise ValueError(f"prediction is {self.prediction!r}; expected {' or '.join(known)}")
        other = {"velocity": "diffusion", "epsilon": "flow", "v": "flow"}.get(self.prediction or "")
        if other and getattr(self, other) != type(getattr(self, other))():
            raise ValueError(f"{other}: prediction {self.prediction} has no use for these settings, remove them")


class Objective(Protocol):
    """Noised latents for training, and the loss of the model's output."""

    @property
    def prediction(self) -> Prediction:
        """What the model predicts."""

    def out_channels(self, channels: int) -> int:
        """How many channels the model must give for latents of ``channels``."""

    def levels(self, normal: Tensor, tokens: int) -> Tensor:
        """Levels to train at, from standard-normal draws of the same shape; ``tokens`` of the whole video."""

    def timestep(self, level: Tensor) -> Tensor:
        """What the model is told, of the level's shape: about 1000 at the noisiest, 0 at data."""

    def noised(self, data: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Data and noise [B, C, T, h, w] -> the point between them at the level; data itself at level 0."""

    def loss(self, output: Tensor, data: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """The loss of each frame, [B, T] float32, from the model's output [B, C', T, h, w] at the level."""


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a config with a prediction describes."""
    assert config.prediction is not None
    if config.prediction == "velocity":
        return RectifiedFlow(config.flow)
    return Diffusion(config.prediction, config.diffusion)
