"""What is sampled, from which weights, and how."""

from dataclasses import dataclass
from typing import Literal

from stages.errors import at_least

Format = Literal["mp4", "gif", "png", "latents"]


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

    samples_per_prompt: each prompt so many times, one after the other.
    names: of the files: numbered (``0000-a-red-ball.mp4``), or what VBench's evaluator looks for
      (``vbench/PROMPT-INDEX.mp4``, in a folder that has nothing else).
    formats: of the samples: H.264 in an .mp4, a .gif, an animated .png without loss; ``latents`` is one file of all.
    fps: frames a second of the files; by default as the model was trained. It does not change what is made.
    ckpt_hash: of the checkpoint's files, as an .mp4 records it; others are refused.
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

    samples_per_prompt: int = 1
    names: Literal["numbered", "vbench"] = "numbered"
    formats: tuple[Format, ...] = ("mp4",)
    fps: float | None = None
    ckpt_hash: str = ""

    def __post_init__(self) -> None:
        at_least(self, 1, "height", "width", "frames", "steps", "batch_size")
        at_least(self, 0, "seed", "guidance_scale")
        if self.seed >= 2**63:
            raise ValueError(f"seed: found {self.seed}, expected less than 2**63")
        at_least(self, 1, "samples_per_prompt")
        if not self.formats:
            raise ValueError("formats: found none, expected at least one, such as mp4")
        if self.fps is not None and not 0 < self.fps <= 240:
            raise ValueError(f"fps: found {self.fps:g}, expected more than 0 and at most 240")
