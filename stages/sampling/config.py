"""What is sampled, from which weights, and how."""

import os
from dataclasses import dataclass, field, fields, replace
from typing import Literal, TypeVar

from models.samplers import SamplerName
from shards import storage
from stages.errors import at_least
from stages.sampling.prompts import one_each

Format = Literal["mp4", "gif", "png", "latents"]
Part = TypeVar("Part", bound="DecodeConfig")

MOST_TOGETHER = 8
"""Samples in a batch, unless batch_size says otherwise."""


def whole_path(path: str) -> str:
    """Of what is there on this machine; a hub id, a URL and the like as it is."""
    local = storage.local_path(path)
    return str(local.absolute()) if path and os.path.exists(local) else path


@dataclass(frozen=True)
class DenoiseConfig:
    """How noise becomes latents.

    sampler: see `models.samplers`; by default that of what the model predicts: euler, or ddim.
    guidance_scale: of classifier-free guidance (Ho & Salimans, arXiv:2207.12598); 1 is none.
    guidance_interval: the noise levels, from 0 (data) to 1 (noise), at which guidance acts (Kynkäänniemi et al.,
      arXiv:2404.07724); elsewhere a step costs half.
    guidance_rescale: how much of the spread that guidance adds is taken back (Lin et al., arXiv:2305.08891,
      section 3.4, who take 0.7); 0 is none.
    step_cache: the threshold of `models.step_cache`, below which a step takes most of what the last one computed; None
      computes every step.
    """

    sampler: SamplerName | None = None
    steps: int = 30
    guidance_scale: float = 4.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    step_cache: float | None = None

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")
        at_least(self, 0, "guidance_scale", "guidance_rescale", "step_cache")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval: found {low:g} to {high:g}, expected two rising levels from 0 to 1")
        if self.guidance_rescale > 1:
            raise ValueError(f"guidance_rescale: found {self.guidance_rescale:g}, expected at most 1")


@dataclass(frozen=True)
class GivenConfig:
    """Frames that are given rather than made, from files: one for all prompts, or a list with one for each.

    first: a picture to begin with. last: one to end with, beside ``first``. video: one to go on from, with its last
    ``video_frames`` frames, by default a quarter of the frames to make. loop: end as it begins: with ``first`` again,
    or with the frames that ``video`` begins with, so that both together go round. files_hash: of the files that are
    given to a sample, as an .mp4 records it; others are refused.

    Raises ValueError for files that do not go together.
    """

    first: str | list[str] = ""
    last: str | list[str] = ""
    video: str | list[str] = ""
    video_frames: int | None = None
    loop: bool = False
    files_hash: str = ""

    def __post_init__(self) -> None:
        at_least(self, 1, "video_frames")
        if self.video and (self.first or self.last):
            raise ValueError("video: found beside first or last, expected either the one or the others")
        if self.last and (self.loop or not self.first):
            raise ValueError("last: expected first beside it, and no loop")
        if self.loop and not (self.first or self.video):
            raise ValueError("loop: expected first or video beside it")

    def __bool__(self) -> bool:
        return bool(self.first or self.video)

    def located(self) -> "GivenConfig":
        """With whole paths, so that what is recorded holds from any folder."""
        first, last, video = (
            [whole_path(path) for path in paths] if isinstance(paths, list) else whole_path(paths)
            for paths in (self.first, self.last, self.video)
        )
        return replace(self, first=first, last=last, video=video)

    def of_each(self, count: int) -> list["GivenToOne"]:
        """What is given to each of ``count`` samples. Raises ConfigError for another number of files."""
        files = (one_each(f"given.{name}", getattr(self, name), count) for name in ("first", "last", "video"))
        return [self._to_one(*each) for each in zip(*files, strict=True)]

    def _to_one(self, first: str, last: str, video: str) -> "GivenToOne":
        """Where it begins with nothing, nothing is given at its end."""
        if not (first or video):
            return GivenToOne()
        return GivenToOne(first, last if first else "", video, self.video_frames, self.loop, self.files_hash)


@dataclass(frozen=True)
class GivenToOne(GivenConfig):
    """The same of one sample."""

    first: str = ""
    last: str = ""
    video: str = ""


@dataclass(frozen=True)
class TextEncoderConfig:
    """The precision that T5 computes in, and where: "cpu" leaves it in the host's memory; None is the device's."""

    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu"] | None = None


@dataclass(frozen=True)
class DecodeConfig:
    """How latents become files.

    latents: a file of samples that a run left in its ``samples`` folder, or sample by ``formats``; they are decoded by
      the VAE of pretrained_model_path.
    pretrained_model_path: the VAE and the text encoder that the shards were made with.
    vae_batch_frames: frames that the VAE takes at a time, always so many. vae_band_rows: of these, rows that each of
      its decoder's layers takes at a time, for pictures that do not fit (see `models.vae_bands`).
    names: of the files: numbered (``0000-a-red-ball.mp4``), or what VBench's evaluator looks for
      (``vbench/PROMPT-INDEX.mp4``, in a folder that has nothing else).
    formats: of the samples: H.264 in an .mp4, a .gif, an animated .png without loss; ``latents`` is one file of all.
    fps: frames a second of the files; by default as the model was trained. It does not change what is made.
    """

    latents: str = ""
    pretrained_model_path: str = "tiny"
    output: str = "outputs/samples"
    vae_batch_frames: int = 8
    vae_band_rows: int | None = None
    names: Literal["numbered", "vbench"] = "numbered"
    formats: tuple[Format, ...] = ("mp4",)
    fps: float | None = None

    def __post_init__(self) -> None:
        at_least(self, 1, "vae_batch_frames", "vae_band_rows")
        if not self.formats:
            raise ValueError("formats: found none, expected at least one, such as mp4")
        if self.fps is not None and not 0 < self.fps <= 240:
            raise ValueError(f"fps: found {self.fps:g}, expected more than 0 and at most 240")

    @classmethod
    def part_of(cls: type[Part], config: "DecodeConfig") -> Part:
        """Those of another's settings that are of this kind."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    def located(self: Part) -> Part:
        """With whole paths, as `GivenConfig.located`."""
        models = self.pretrained_model_path
        return replace(
            self,
            latents=whole_path(self.latents),
            pretrained_model_path=models if models == "tiny" else whole_path(models),
        )


@dataclass(frozen=True)
class SampleConfig(DenoiseConfig, DecodeConfig):
    """The settings of ``sample``.

    text_prompt: a prompt, a list of them, or the path of a file with one prompt a line. With ``latents`` there is
      none: all but `DecodeConfig` was settled when they were made.
    ckpt: a run or checkpoint folder; by default the newest run in ``outputs``.
    height, width, frames: pixels and frames; by default the largest bucket that the checkpoint was trained on.
    negative_prompt: what guidance leads away from, one for all prompts or a list of one for each; empty, it is the
      empty caption that the checkpoint was trained with.
    given: frames that are not made.
    batch_size: samples that run together, always so many: a batch that is not full is filled up. A sample's bits
      depend on it, but not on what else is sampled. By default all, but at most MOST_TOGETHER.
    compile: torch.compile for the transformer's blocks, once for each length of text and size.
    sequence_parallel: ranks that share each batch of samples, a divisor of all ranks.
    Sample i of the list has the seed ``seed + i``.

    samples_per_prompt: each prompt so many times, one after the other.
    ckpt_hash: of the checkpoint's files, as an .mp4 records it; others are refused.
    """

    text_prompt: str | list[str] = ""
    negative_prompt: str | list[str] = ""
    ckpt: str = ""
    seed: int = 0
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    given: GivenConfig = field(default_factory=GivenConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    batch_size: int | None = None
    sequence_parallel: int = 1
    weights: Literal["ema", "model"] = "ema"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False

    samples_per_prompt: int = 1
    ckpt_hash: str = ""

    @property
    def samples_together(self) -> int:
        """``batch_size``, once `stages.sampling.plan` has set it where it was left out."""
        assert self.batch_size is not None
        return self.batch_size

    def __post_init__(self) -> None:
        DenoiseConfig.__post_init__(self)
        DecodeConfig.__post_init__(self)
        at_least(self, 1, "height", "width", "frames", "batch_size", "sequence_parallel", "samples_per_prompt")
        at_least(self, 0, "seed")
        if self.seed >= 2**63:
            raise ValueError(f"seed: found {self.seed}, expected less than 2**63")
