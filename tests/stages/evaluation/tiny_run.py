"""A run with a checkpoint of fresh weights, and its dataset of latents that the tiny VAE decodes."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from models.identity import vae_identity
from models.objective import ObjectiveConfig
from models.presets import preset
from models.transformer import Transformer
from models.weights import CheckpointInfo, save_checkpoint
from shards.dataset import compact, create_dataset, ensure_fingerprint, write_null_text
from shards.schema import LATENTS, MEAN, TEXT, Bucket, Sample, make_key, text_column
from shards.writer import write_shard
from stages.shapes.render import caption, combinations
from tests.stages.evaluation.finished_run import metrics_line

SIZE = Bucket(64, 64, 8)
T5 = text_column("t5")
TEXT_ENCODER = {"weights_hash": "bb", "dim": 6}
TOKENS = 3
CLIPS = 48
CLIPS_A_SOURCE = 2


@cache
def vae() -> dict[str, Any]:
    """The identity of the tiny VAE."""
    return vae_identity("tiny")


def write_dataset(folder: Path, clips: int = CLIPS, name: str = "shapes") -> Path:
    """Clips of random latents, smooth enough to be seen, with captions of combinations; two of each source."""
    create_dataset(folder, name)
    shown = [combinations()[number % len(combinations())] for number in range(clips)]
    latents = [_smooth(np.random.default_rng([number, *name.encode()])) for number in range(clips)]
    keys = [make_key(f"clip-{number}", name, number) for number in range(clips)]
    for column, fingerprint in (
        (LATENTS, {"schema_version": 1, "vae": vae(), "sampling": {"fps": 8}}),
        (T5, {"schema_version": 1, "text_encoder": TEXT_ENCODER}),
    ):
        fingerprint_hash = ensure_fingerprint(folder, SIZE, column, fingerprint)
        samples = [
            _latents(keys[n], latents[n], caption(shown[n]), f"{n // CLIPS_A_SOURCE}.mp4")
            if column == LATENTS
            else _text(keys[n], n)
            for n in range(clips)
        ]
        samples.sort(key=lambda sample: sample.key)
        write_shard(folder / SIZE.name / column, 0, samples, fingerprint_hash=fingerprint_hash)
    write_null_text(folder, T5, np.zeros((1, TEXT_ENCODER["dim"]), np.float16))
    compact(folder, {})
    return folder


def _smooth(draw: np.random.Generator) -> np.ndarray:
    coarse = draw.normal(size=(2, vae()["latent_channels"], 2, 2))
    return coarse.repeat(4, 0).repeat(4, 2).repeat(4, 3).astype(np.float16)


def _latents(key: str, latents: np.ndarray, text: str, source: str) -> Sample:
    attributes = {"duration_s": 1.0, "caption": text, "source": source, "start_s": 0.5, "latent_motion": 0.1}
    attributes |= dict.fromkeys(("aesthetic", "umt", "matching_score", "desirable_filtering"))
    return Sample(key, {MEAN: latents}, attributes)


def _text(key: str, number: int) -> Sample:
    text = np.random.default_rng(number).normal(size=(TOKENS, TEXT_ENCODER["dim"])).astype(np.float16)
    return Sample(key, {TEXT: text}, {"tokens": TOKENS, "caption_hash": "00", "caption": None})


def write_run(
    folder: Path,
    shards: Path,
    *,
    seed: int = 0,
    holdout: float = 0.3,
    objective: ObjectiveConfig = ObjectiveConfig("velocity"),  # noqa: B008
    **info: object,
) -> Path:
    """A run's folder with one checkpoint, as train leaves it."""
    torch.manual_seed(seed)
    channels = vae()["latent_channels"]
    outputs = channels * (2 if objective.prediction == "epsilon" else 1)
    layers = {"num_layers": 1, "num_heads": 2, "head_dim": 16}
    sizes = layers | {"text_dim": TEXT_ENCODER["dim"], "in_channels": channels, "out_channels": outputs}
    model = Transformer(preset("tiny", sizes), objective.prediction)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    about = CheckpointInfo(7, model.config, objective, vae(), TEXT_ENCODER, 1 / 8, (SIZE.name,))
    weights = {"model": model.state_dict(), "ema": {key: value * 0.9 for key, value in model.state_dict().items()}}
    checkpoint = folder / "checkpoints" / "step-0000007"
    checkpoint.mkdir(parents=True)
    save_checkpoint(checkpoint, replace(about, **info), weights, torch.zeros(1, TEXT_ENCODER["dim"]))
    settings = {"data": {"shards": str(shards), "text": "t5", "filter": ""}, "validation": {"holdout": holdout}}
    for place in (folder, checkpoint):
        (place / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "metrics.jsonl").write_text(metrics_line(7, 1.0))
    return folder
