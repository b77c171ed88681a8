"""What is evaluated, and on how much."""

from dataclasses import dataclass, field
from typing import Literal

from stages.errors import at_least


@dataclass(frozen=True)
class LossConfig:
    """samples: how many clips. levels: at how many noise levels, in the middle of as many equal bins of 0 to 1."""

    samples: int = 256
    levels: int = 10

    def __post_init__(self) -> None:
        at_least(self, 1, "samples", "levels")


@dataclass(frozen=True)
class ClipsConfig:
    """The samples that an evaluation makes, where it is not given some, and the clips that samples are compared with.

    samples: how many are made. real: with how many of the dataset's own clips samples are compared; by default as many
    as there are samples. training: among how many training clips the nearest are sought.
    """

    samples: int = 64
    steps: int = 30
    guidance_scale: float = 4.0
    real: int | None = None
    training: int = 50_000

    def __post_init__(self) -> None:
        at_least(self, 1, "samples", "steps", "real", "training")
        at_least(self, 0, "guidance_scale")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is looked at.

    checkpoint: a run or checkpoint folder. Its weights are measured; where nothing else is said, run and shards are
      those that it names, and the samples are made from it.
    against: another, whose loss is compared with the checkpoint's.
    samples, run, shards: the output folders of sample, of train and of encode.
    output: where report.html, metrics.json and summary.json go.
    pretrained_model_path: the VAE that the shards were made with.
    features: a TorchScript file, a network from videos to features (see `stages.evaluation.features`).
    clip: a folder or hub id of CLIP weights.
    """

    checkpoint: str = ""
    against: str = ""
    samples: str = ""
    run: str = ""
    shards: str = ""
    output: str = "outputs/report"
    pretrained_model_path: str = "tiny"
    features: str = ""
    clip: str = ""
    weights: Literal["ema", "model"] = "ema"
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = 8
    loss: LossConfig = field(default_factory=LossConfig)
    clips: ClipsConfig = field(default_factory=ClipsConfig)

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")
