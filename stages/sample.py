"""Prompts to videos with trained weights; the text encoder, the transformer and the VAE take turns in memory."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from models.latents import LatentStats
from models.loading import load_transformer
from models.text import TextEncoder, text_encoder_identity
from models.vae import FrozenVAE, vae_identity
from models.weights import CheckpointInfo, find_checkpoint, read_info, read_null_text
from shards.schema import Bucket
from stages.contact_sheet import contact_sheet
from stages.denoise import denoise
from stages.errors import ConfigError, at_least
from stages.output import output_folder, progress_bar, save_settings, save_summary
from stages.sampled_latents import SampledLatents
from stages.video import write_mp4

SHEET_ROWS = 24


@dataclass(frozen=True)
class SampleConfig:
    """What is sampled, from which weights, and how.

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


@dataclass(frozen=True)
class Request:
    """One video to make."""

    prompt: str
    seed: int
    text: torch.Tensor  # [L, D]


def sample(config: SampleConfig) -> dict[str, Any]:
    """Make one .mp4 a sample, a contact sheet and summary.json; returns the summary."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source: dict[str, Any]
    if from_latents(config):
        samples = read_latents(config)
        source = {"latents": config.latents, "step": samples.step}
        output = output_folder(config.output)
    else:
        prompts, checkpoint = read_prompts(config.text_prompt), choose_checkpoint(config.ckpt)
        output = output_folder(config.output)
        samples = _sample_prompts(config, prompts, checkpoint, device)
        source = {"checkpoint": str(checkpoint)}
    save_settings(output, config)

    videos = _decode(config.pretrained_model_path, samples, device)
    rows: list[dict[str, Any]] = []
    for number, (prompt, seed, frames) in enumerate(zip(samples.prompts, samples.seeds, videos, strict=True)):
        file = f"{number:04d}-{_slug(prompt)}.mp4"
        write_mp4(output / file, frames, samples.fps)
        rows.append({"file": file, "prompt": prompt, "seed": seed})
    contact_sheet(videos[:SHEET_ROWS], samples.prompts[:SHEET_ROWS]).save(output / "contact_sheet.png")
    summary = {"samples": rows, **source}
    save_summary(output, summary)
    return summary


def from_latents(config: SampleConfig) -> bool:
    """Whether latents are decoded, rather than prompts sampled. Raises ConfigError where both are asked for."""
    if config.latents and config.text_prompt:
        raise ConfigError(f"found text_prompt and latents ({config.latents}), expected one of them: leave one out")
    return bool(config.latents)


def read_latents(config: SampleConfig) -> SampledLatents:
    """The samples in ``latents``. Raises ConfigError unless the VAE is theirs."""
    samples = SampledLatents.read(Path(config.latents))
    path = config.pretrained_model_path
    _require_same("VAE", path, vae_identity(path), samples.vae, config.latents)
    return samples


def read_prompts(source: str | Sequence[str]) -> list[str]:
    """The prompts that ``text_prompt`` names. Raises ConfigError when there are none."""
    if isinstance(source, str):
        file = Path(source)
        is_file = source.endswith(".txt") or (len(source) < 256 and file.is_file())
        if is_file and not file.is_file():
            raise ConfigError(f"no prompt file at {file}: give text_prompt= a file of prompts or a prompt")
        source = _lines(file) if is_file else [source]
    prompts = [text.strip() for text in source if text.strip()]
    if not prompts:
        raise ConfigError(
            'no prompts: give --prompt "a red ball moves left", text_prompt= a list or a file of them, '
            "or latents= a file of a run's samples folder"
        )
    return prompts


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text ({error}): save it as UTF-8") from None


def choose_checkpoint(path: str) -> Path:
    """The checkpoint at ``path``, a run's newest, or the newest of all runs in ``outputs``."""
    if path:
        return find_checkpoint(path)
    everywhere = sorted(Path("outputs").glob("**/checkpoints/step-*"), key=lambda folder: folder.stat().st_mtime)
    if not everywhere:
        raise ConfigError("no checkpoint under outputs: train first, or give ckpt= a run or checkpoint folder")
    return everywhere[-1]


def latent_shape(config: SampleConfig, info: CheckpointInfo) -> tuple[int, int, int, int]:
    """[C, T, h, w] of the latents of the asked or trained size. Raises ConfigError for sizes that cannot be."""
    trained = max(map(Bucket.parse, info.buckets), key=lambda bucket: bucket.height * bucket.width * bucket.frames)
    height, width = config.height or trained.height, config.width or trained.width
    frames = config.frames or trained.frames
    vae, patch = info.vae, info.transformer.patch_size
    multiple = vae["spatial_factor"] * patch
    if height % multiple or width % multiple:
        raise ConfigError(f"found height x width {height}x{width}, expected multiples of {multiple} (VAE x patch)")
    if (frames - 1) % vae["temporal_factor"]:
        raise ConfigError(f"frames: found {frames}, expected 1 + a multiple of {vae['temporal_factor']} (the VAE's)")
    latent_frames = (frames - 1) // vae["temporal_factor"] + 1
    return (vae["latent_channels"], latent_frames, height // vae["spatial_factor"], width // vae["spatial_factor"])


def _encode_prompts(
    config: SampleConfig, prompts: list[str], info: CheckpointInfo, device: torch.device
) -> list[Request]:
    max_tokens = info.text_encoder["max_tokens"]
    encoder = TextEncoder.load(config.pretrained_model_path, device, max_tokens=max_tokens)
    texts = encoder.encode(prompts)
    return [
        Request(prompt, config.seed + number, torch.from_numpy(text))
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]


def check_models(path: str, info: CheckpointInfo) -> None:
    """Raises ConfigError unless the VAE and text encoder are those that made the training data."""
    text_encoder = text_encoder_identity(path, info.text_encoder["max_tokens"])
    _require_same("VAE", path, vae_identity(path), info.vae, "the checkpoint")
    _require_same("text encoder", path, text_encoder, info.text_encoder, "the checkpoint")


def _require_same(what: str, path: str, found: Mapping[str, Any], made: Mapping[str, Any], by: str) -> None:
    differing = [f"{key} {value!r}, not {made.get(key)!r}" for key, value in found.items() if value != made.get(key)]
    if differing:
        raise ConfigError(f"pretrained_model_path={path} has another {what} than {by}: {'; '.join(differing)}")


def _sample_prompts(config: SampleConfig, prompts: list[str], checkpoint: Path, device: torch.device) -> SampledLatents:
    info = read_info(checkpoint)
    shape = latent_shape(config, info)
    check_models(config.pretrained_model_path, info)
    requests = _encode_prompts(config, prompts, info, device)
    latents = LatentStats.of(info.vae).denormalise(_denoise_all(config, requests, checkpoint, info, shape, device))
    seeds = [request.seed for request in requests]
    return SampledLatents(latents, prompts, seeds, info.step, info.vae, 1 / info.frame_interval_s)


def _denoise_all(
    config: SampleConfig,
    requests: list[Request],
    checkpoint: Path,
    info: CheckpointInfo,
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> torch.Tensor:
    """Normalised latents, [N, C, T, h, w]."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = load_transformer(checkpoint, weights=config.weights).to(device, dtype)
    null_text, _ = read_null_text(checkpoint)
    batches = [requests[i : i + config.batch_size] for i in range(0, len(requests), config.batch_size)]
    latents: list[torch.Tensor] = []
    with progress_bar(len(requests), "denoise", "video") as bar:
        for batch in batches:
            latents += denoise(
                model,
                info,
                [request.text for request in batch],
                null_text,
                [request.seed for request in batch],
                shape,
                steps=config.steps,
                guidance_scale=config.guidance_scale,
            ).cpu()
            bar.update(len(batch))
    return torch.stack(latents)


def _decode(pretrained_model_path: str, samples: SampledLatents, device: torch.device) -> list[np.ndarray]:
    """Of each sample its frames, uint8 [T, H, W, 3]."""
    vae = FrozenVAE.load(pretrained_model_path, device)
    videos = []
    with progress_bar(len(samples.latents), "decode", "video") as bar:
        for latents in samples.latents:
            videos.append(vae.decode(latents.transpose(0, 1)))  # [T, C, h, w]
            bar.update()
    return videos


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"


def describe(config: SampleConfig) -> str:
    """What ``sample`` would do, in a line."""
    if from_latents(config):
        samples = read_latents(config)
        return f"{len(samples.prompts)} videos of latents {list(samples.latents.shape[1:])} from {config.latents}"
    prompts = read_prompts(config.text_prompt)
    checkpoint = choose_checkpoint(config.ckpt)
    shape = latent_shape(config, read_info(checkpoint))
    return f"{len(prompts)} videos of latents {list(shape)} from {checkpoint}, {config.steps} steps each"
