"""What is sampled, from which weights, and how."""

from dataclasses import dataclass
from typing import Literal

from stages.errors import at_least


@dataclass(frozen=True)
class SampleConfig:
    """The settings of ``sample``.

    text_prompt: a prompt, a list of them, or the path of a file with one prompt a line.
    latents: instead, a file of samples that a run left in its ``samples`` folder. They are decoded by the VAE of
      pretrained_model_path; what else is set here was settled when they were made.
    ckpt: a run or checkpoint folder; by default the newest run in ``outputs``.
    pretrained_model_path: the VAE and the text encoder that the shards were made with.
    height, width, frames: pixels and frames; by default the largest bucket that the checkpoint was trained on.
    Sample i of the list has the seed ``seed + i``.
    """

    text_prompt: str | list[str] = ""
    latents: str = ""
    ckpt: str = ""
    pretrained_model_path: str = "tiny"
    output: str = "outputs/samples"
    seed: int = 0
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int = 30
    guidance_scale: float = 4.0
    batch_size: int = 8
    weights: Literal["ema", "model"] = "ema"
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        at_least(self, 1, "height", "width", "frames", "steps", "batch_size")
        at_least(self, 0, "seed", "guidance_scale")
        if self.seed >= 2**63:
            raise ValueError(f"seed: found {self.seed}, expected less than 2**63")
