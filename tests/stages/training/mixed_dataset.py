"""A finished dataset of pictures and clips made of random numbers, to train on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shards.dataset import compact, create_dataset, ensure_fingerprint, write_null_text
from shards.schema import LATENTS, MEAN, TEXT, Bucket, Sample, make_key, text_column
from shards.writer import write_shard

COUNTS = {"64x64x1": [60, 21], "64x64x8": [9, 10], "64x128x8": [5]}
VAE = {"weights_hash": "aa", "latent_channels": 4, "spatial_factor": 8, "temporal_factor": 1}
VAE |= {"scaling_factor": 0.18, "shift_factor": None}
FINGERPRINTS: dict[str, dict[str, Any]] = {
    LATENTS: {"schema_version": 1, "vae": VAE, "sampling": {"fps": 8}},
    text_column("t5"): {"schema_version": 1, "text_encoder": {"weights_hash": "bb", "dim": 6}},
}


def mixed_dataset(
    folder: Path,
    fingerprints: Mapping[str, dict[str, Any]] = FINGERPRINTS,
    counts: Mapping[str, list[int]] = COUNTS,
) -> Path:
    create_dataset(folder, "mixed")
    for bucket, of_shards in counts.items():
        for column, fingerprint in fingerprints.items():
            fingerprint_hash = ensure_fingerprint(folder, Bucket.parse(bucket), column, fingerprint)
            for shard, count in enumerate(of_shards):
                samples = sorted((_sample(bucket, column, shard, n) for n in range(count)), key=lambda one: one.key)
                write_shard(folder / bucket / column, shard, samples, fingerprint_hash=fingerprint_hash)
    for column in fingerprints.keys() - {LATENTS}:
        write_null_text(folder, column, np.zeros((1, 6), np.float16))
    compact(folder, {})
    return folder


def _sample(bucket: str, column: str, shard: int, number: int) -> Sample:
    key, draw = make_key("clip", bucket, shard, number), np.random.default_rng([shard, number, *column.encode()])
    if column != LATENTS:
        text = draw.normal(size=(1 + number % 5, 6)).astype(np.float16)
        return Sample(key, {TEXT: text}, {"tokens": len(text), "caption_hash": "00", "caption": None})
    size = Bucket.parse(bucket)
    attributes = {"duration_s": size.frames / 8, "caption": "", "source": key, "start_s": 0.0, "latent_motion": 0.0}
    attributes |= dict.fromkeys(("aesthetic", "umt", "matching_score", "desirable_filtering"))
    latents = draw.normal(size=(size.frames, 4, size.height // 8, size.width // 8)).astype(np.float16)
    return Sample(key, {MEAN: latents}, attributes)
