"""What a dataset is made from: the settings of ``encode``, its input, and what is recorded of how it is made."""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from models.identity import text_encoder_identity, vae_identity
from models.text_lengths import LENGTHS
from shards import storage
from shards.schema import SCHEMA_VERSION, Bucket
from stages.captions import captions_hash
from stages.columns import TextConfig, VaeConfig
from stages.decoding.decode import POLICY, Decoder
from stages.errors import ConfigError, at_least
from stages.execute import RuntimeConfig
from stages.planning.metadata import Row, read_folder, read_internvid
from stages.planning.panda import read_panda
from stages.planning.plan import ClipConfig, PlanConfig, bucket_sizes
from stages.shapes.render import ShapesConfig, render_dataset

InputKind = Literal["internvid", "panda70m", "folder", "shapes"]


@dataclass(frozen=True)
class InputConfig:
    """Where the clips are. name is part of every key; by default the kind of input.

    filter: what a clip must be, such as ``aesthetic >= 4.75 and duration_s >= 2``, of any column of the metadata.
    """

    metadata: str = ""
    videos: str = ""
    name: str = ""
    filter: str = ""


@dataclass(frozen=True)
class EncodeConfig:
    """Everything a dataset is made from.

    decoder: PyAV times every container right and sees damage; decord does neither for all, see stages.decoding.decode.
    shard_clips: clips planned for a shard, the unit of work. max_failed_share: of the clips that were to be
    encoded (a missing file is no failure), above which the job stops. shapes: what ``input: shapes`` renders.
    """

    input: InputKind = "internvid"
    output: str = ""
    data: InputConfig = field(default_factory=InputConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    text_encoder: TextConfig = field(default_factory=TextConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    decoder: Decoder = "pyav"
    shard_clips: int = 256
    max_failed_share: float = 0.5
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        at_least(self, 1, "shard_clips")
        at_least(self, 0, "max_failed_share")

    @property
    def name(self) -> str:
        """Of the dataset."""
        return self.data.name or self.input

    def located(self) -> "EncodeConfig":
        """The same with whole local paths, which workers and later runs find from any working folder."""
        data = replace(self.data, metadata=_located(self.data.metadata), videos=_located(self.data.videos))
        vae = replace(self.vae, name=_located_model(self.vae.name))
        text = replace(self.text_encoder, captions=_located(self.text_encoder.captions))
        text = replace(text, name=_located_model(text.name))
        return replace(self, output=_located(self.output), data=data, vae=vae, text_encoder=text)

    @property
    def planning(self) -> PlanConfig:
        return PlanConfig(self.clip, self.shard_clips, self.data.filter)


def _located(path: str) -> str:
    return path if not path or "://" in path else os.path.abspath(storage.local_path(path))


def _located_model(name: str) -> str:
    """A folder's whole path; a hub id and ``tiny`` stay."""
    path = _located(name)
    return path if name != "tiny" and os.path.isdir(path) else name


@dataclass(frozen=True)
class Identities:
    """What is recorded of the VAE and of the text encoder."""

    vae: dict[str, Any]
    text: dict[str, Any]

    @classmethod
    def of(cls, config: EncodeConfig) -> "Identities":
        """Raises ConfigError for frames that the VAE cannot halve down to whole latents."""
        vae = vae_identity(config.vae.name)
        factor = vae["spatial_factor"]
        for height, width in bucket_sizes(config.clip):
            if height % factor or width % factor:
                raise ConfigError(f"clip: found frames of {height}x{width}, expected multiples of the VAE's {factor}")
        return cls(vae, text_encoder_identity(config.text_encoder.name, config.text_encoder.max_tokens))


def read_rows(config: EncodeConfig) -> tuple[Iterable[Row], str]:
    """The rows of the metadata, and the folder of the videos. Raises ConfigError where there are none."""
    data = config.data
    if config.input == "shapes":
        if "://" in config.output and not data.videos:
            raise ConfigError("data.videos not set: shapes are rendered to a local folder, give data.videos=FOLDER")
        folder = Path(data.videos or Path(config.output).parent / "data")
        metadata, videos = render_dataset(folder, config.shapes)
        return read_internvid(str(metadata), str(videos)), str(videos)
    needed = ("metadata", "videos") if config.input == "internvid" else ("videos",)
    missing = [name for name in needed if not getattr(data, name)]
    if missing:
        names = " and ".join(f"data.{name}" for name in missing)
        raise ConfigError(f"{names} not set: give {missing[0]!r} as data.{missing[0]}=PATH")
    if config.input == "folder":
        return read_folder(data.videos), data.videos
    read = read_internvid if config.input == "internvid" else read_panda
    return read(data.metadata, data.videos), data.videos


def latents_fingerprint(config: EncodeConfig, vae: dict[str, Any], bucket: Bucket) -> dict[str, Any]:
    """All that decides the bytes of a bucket's latents."""
    return {
        "schema_version": SCHEMA_VERSION,
        "vae": vae,
        "batch_frames": config.vae.batch_frames,
        "compute": config.vae.compute,
        "stored": "float16 mean and std" if config.vae.store_std else "float16 mean",
        "clip": asdict(bucket),
        "sampling": {"fps": config.clip.fps, "decoder": config.decoder, **POLICY},
    }


CAPTIONS = "captions"


def text_fingerprint(config: EncodeConfig, text_encoder: dict[str, Any]) -> dict[str, Any]:
    """All that decides the bytes of text embeddings; but for CAPTIONS, all that decides one caption's."""
    given = config.text_encoder.captions
    return {
        "schema_version": SCHEMA_VERSION,
        "text_encoder": text_encoder,
        "lengths": list(LENGTHS),
        "batch_tokens": config.text_encoder.batch_tokens,
        "compute": config.text_encoder.precision,
        "stored": "float16",
        CAPTIONS: captions_hash(given) if given else "of the metadata",
    }
