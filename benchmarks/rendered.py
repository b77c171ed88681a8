"""A dataset of random samples, as large as real ones, to read from."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.dataset import Dataset, compact, create_dataset, ensure_fingerprint, write_null_text
from shards.loader import DataConfig, Loader
from shards.order import SampleOrder
from shards.schema import LATENTS, MEAN, TEXT, Bucket, Sample, make_key
from shards.writer import write_shard

TEXT_COLUMN = "text.t5"
VAE = {"latent_channels": 4, "spatial_factor": 8, "temporal_factor": 1, "scaling_factor": 0.18215, "shift_factor": None}


@dataclass(frozen=True)
class Samples:
    """Latents [frames, 4, height / 8, width / 8] and captions [text_tokens, text_dim], both float16."""

    bucket: Bucket
    shards: int
    per_shard: int
    text_tokens: int = 20
    text_dim: int = 4096

    @property
    def count(self) -> int:
        return self.shards * self.per_shard

    def render(self, folder: Path) -> Dataset:
        root = create_dataset(folder, "benchmark")
        told: dict[str, dict[str, Any]]
        told = {LATENTS: {"vae": VAE, "sampling": {"fps": 8}}, TEXT_COLUMN: {"text_encoder": {"dim": self.text_dim}}}
        for column, fingerprint in told.items():
            fingerprint_hash = ensure_fingerprint(root, self.bucket, column, fingerprint)
            for number in range(self.shards):
                samples = self._shard(number * self.per_shard, column)
                write_shard(root / self.bucket.name / column, number, samples, fingerprint_hash=fingerprint_hash)
        write_null_text(root, TEXT_COLUMN, np.zeros((1, self.text_dim), np.float16))
        compact(root, {})
        return Dataset.open(root)

    def _shard(self, start: int, column: str) -> Iterator[Sample]:
        draw, numbers = np.random.default_rng(start), range(start, start + self.per_shard)
        for key in sorted(make_key("clip", "benchmark", number) for number in numbers):
            if column == LATENTS:
                shape = self.bucket.frames, 4, self.bucket.height // 8, self.bucket.width // 8
                latents = draw.standard_normal(shape, np.float32).astype(np.float16)
                about = {"duration_s": 7.0, "caption": "", "source": key, "start_s": 0.0, "aesthetic": None}
                about |= {"umt": None, "matching_score": None, "desirable_filtering": None, "latent_motion": 0.0}
                yield Sample(key, {MEAN: latents}, about)
            else:
                text = draw.standard_normal((self.text_tokens, self.text_dim), np.float32).astype(np.float16)
                yield Sample(key, {TEXT: text}, {"tokens": self.text_tokens, "caption_hash": "", "caption": None})


def loader_of(dataset: Dataset, bucket: Bucket, batch: int, config: DataConfig) -> Loader:
    """All of it, in training's order, for one rank."""
    name = bucket.name
    order = SampleOrder({name: dataset.counts_per_shard(name)}, {name: batch}, seed=0, window_shards=4)
    return Loader(dataset, config, order, 0, 1)
