"""Prompts to videos with trained weights; the text encoder, the transformer and the VAE take turns in memory."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from models.latents import LatentStats
from models.loading import load_transformer
from models.objective import make_objective
from models.text import TextEncoder, text_encoder_identity
from models.transformer import Transformer
from models.vae import FrozenVAE, vae_identity
from models.weights import CheckpointInfo, find_checkpoint, read_info, read_null_text
from shards.schema import Bucket
from stages.errors import ConfigError, at_least
from stages.output import output_folder, progress_bar, save_settings, save_summary
from stages.video import contact_sheet, write_mp4

SHEET_ROWS = 24


@dataclass(frozen=True)
class SampleConfig:
    """What is sampled, from which weights, and how.

    text_prompt: a prompt, a list of them, or the path of a file with one prompt a line.
    ckpt: a run or checkpoint folder; by default the newest run in ``outputs``.
    pretrained_model_path: the VAE and the text encoder that the shards were made with.
    height, width, frames: pixels and frames; by default the largest bucket that the checkpoint was trained on.
    Sample i of the list has the seed ``seed + i``.
    """

    text_prompt: str | list[str] = ""
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
    """Make one .mp4 a prompt, a contact sheet and summary.json; returns the summary."""
    prompts = read_prompts(config.text_prompt)
    checkpoint = choose_checkpoint(config.ckpt)
    info = read_info(checkpoint)
    shape = latent_shape(config, info)
    output = output_folder(config.output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    save_settings(output, config)

    check_models(config.pretrained_model_path, info)
    requests = _encode_prompts(config, prompts, info, device)
    latents = _denoise_all(config, requests, checkpoint, info, shape, device)
    videos = _decode(config, latents, info, device)

    fps = 1 / info.frame_interval_s
    rows: list[dict[str, Any]] = []
    for number, (request, frames) in enumerate(zip(requests, videos, strict=True)):
        file = f"{number:04d}-{_slug(request.prompt)}.mp4"
        write_mp4(output / file, frames, fps)
        rows.append({"file": file, "prompt": request.prompt, "seed": request.seed})
    contact_sheet(output / "contact_sheet.png", videos[:SHEET_ROWS], [row["prompt"] for row in rows[:SHEET_ROWS]])
    summary = {"samples": rows, "checkpoint": str(checkpoint)}
    save_summary(output, summary)
    return summary


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
        raise ConfigError('no prompts: give --prompt "a red ball moves left", or text_prompt= a list or a file of them')
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
    for what, found, trained in (
        ("VAE", vae_identity(path), info.vae),
        ("text encoder", text_encoder_identity(path, info.text_encoder["max_tokens"]), info.text_encoder),
    ):
        differing = [
            f"{key} {value!r}, not {trained.get(key)!r}" for key, value in found.items() if value != trained.get(key)
        ]
        if differing:
            raise ConfigError(
                f"pretrained_model_path={path} has another {what} than the checkpoint: {'; '.join(differing)}"
            )


def _denoise_all(
    config: SampleConfig,
    requests: list[Request],
    checkpoint: Path,
    info: CheckpointInfo,
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> list[torch.Tensor]:
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
    return latents


@torch.no_grad()
def denoise(
    model: Transformer,
    info: CheckpointInfo,
    texts: Sequence[torch.Tensor],
    null_text: torch.Tensor,
    seeds: Sequence[int],
    shape: tuple[int, int, int, int],
    *,
    steps: int,
    guidance_scale: float,
    given: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Normalised latents [B, C, T, h, w] from noise by the objective's steps under classifier-free guidance.

    texts: B of [L, D], any lengths; null_text [L0, D]. Each sample's noise comes from its own seed, and text
    is masked to its own length, so that a sample does not depend on its batch. Guidance acts on all channels.
    given: normalised latents [B, C, T, h, w] and a mask [B, T], true on the frames that are not made but stay as
    they are there, at level 0 throughout; for a checkpoint that was trained so (`CheckpointInfo.conditioning`).
    """
    device = next(model.parameters()).device
    count = len(texts)
    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)
    made = torch.ones(count, dtype=torch.bool, device=device)  # [B], or [B, T] where frames are given
    if given is not None:
        made = ~given[1].to(device)
        x = torch.where(_over(made), x, given[0].to(x))
    guided = guidance_scale != 1
    text, mask = pad([*texts, *([null_text] * count if guided else [])], device)
    size = (shape[2] * info.vae["spatial_factor"], shape[3] * info.vae["spatial_factor"])
    objective = make_objective(info.objective)
    levels = objective.schedule(steps, model.config.tokens(*shape[1:])).tolist()
    for level, following in pairwise(levels):
        inputs = torch.cat([x, x]) if guided else x
        timestep = objective.timestep(level * (torch.cat([made, made]) if guided else made))
        output = model(inputs, timestep, text, mask, frame_interval_s=info.frame_interval_s, size=size).float()
        if guided:
            conditional, unconditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        x = torch.where(_over(made), objective.step(x, output, level, following), x)
    return x


def _over(made: torch.Tensor) -> torch.Tensor:
    """[B] or [B, T] as [B, 1, 1 or T, 1, 1]."""
    return made.reshape(len(made), 1, -1, 1, 1)


def pad(texts: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """B texts [L, D] of any lengths -> zero-padded float32 [B, Lmax, D] and mask [B, Lmax], true on real tokens."""
    padded = torch.nn.utils.rnn.pad_sequence([text.float() for text in texts], batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    return padded.to(device), (torch.arange(padded.shape[1]) < lengths[:, None]).to(device)


def _decode(
    config: SampleConfig, latents: list[torch.Tensor], info: CheckpointInfo, device: torch.device
) -> list[np.ndarray]:
    vae = FrozenVAE.load(config.pretrained_model_path, device)
    stats = LatentStats.of(info.vae)
    videos = []
    with progress_bar(len(latents), "decode", "video") as bar:
        for sample_latents in latents:
            videos.append(vae.decode(stats.denormalise(sample_latents).transpose(0, 1)))  # [T, C, h, w]
            bar.update()
    return videos


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"


def describe(config: SampleConfig) -> str:
    """What ``sample`` would do, in a line."""
    prompts = read_prompts(config.text_prompt)
    checkpoint = choose_checkpoint(config.ckpt)
    shape = latent_shape(config, read_info(checkpoint))
    return f"{len(prompts)} videos of latents {list(shape)} from {checkpoint}, {config.steps} steps each"
