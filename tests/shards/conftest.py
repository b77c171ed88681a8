"""Small datasets made of random numbers, through the public entry points."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from shards import storage
from shards.dataset import compact, create_dataset, ensure_fingerprint, write_null_text
from shards.schema import LATENTS, MEAN, STD, TEXT, Bucket, Reject, Sample, make_key, text_column
from shards.writer import write_shard

LATENTS_FINGERPRINT = {"schema_version": 1, "vae": {"weights_hash": "aa", "latent_channels": 4}, "fps": 8}
TEXT_FINGERPRINT = {"schema_version": 1, "text_encoder": {"weights_hash": "bb", "dim": 6}}


def _latents(key: str, seed: int, std: bool) -> Sample:
    draw = np.random.default_rng(seed)
    members = {MEAN: draw.normal(size=(2, 4, 3, 3)).astype(np.float16)}
    if std:
        members[STD] = draw.random(size=(2, 4, 3, 3)).astype(np.float16)
    attributes = {
        "duration_s": 1.0 + seed,
        "caption": f"clip {seed}",
        "source": f"{key}.mp4",
        "start_s": 0.5,
        "aesthetic": None if seed % 2 else 4.75,
        "umt": None,
        "matching_score": 0.5,
        "desirable_filtering": "desirable",
        "latent_motion": 0.25,
    }
    return Sample(key, members, attributes)


def _text(key: str, seed: int, column: str) -> Sample:
    draw = np.random.default_rng([seed, *column.encode()])
    text = draw.normal(size=(1 + seed % 7, 6)).astype(np.float16)
    return Sample(key, {TEXT: text}, {"tokens": len(text), "caption_hash": f"{seed:04x}", "caption": None})


def make_samples(count: int, start: int = 0, *, column: str = LATENTS, std: bool = False):
    """``count`` samples of a column, keys ascending; equal ``start``, equal keys in every column."""
    keys = sorted((make_key(f"vid.{seed}", "test", seed), seed) for seed in range(start, start + count))
    if column == LATENTS:
        return [_latents(key, seed, std) for key, seed in keys]
    return [_text(key, seed, column) for key, seed in keys]


@pytest.fixture
def samples() -> Callable[..., list[Sample]]:
    return make_samples


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., storage.Place]:
    """A finished dataset: bucket -> samples of each shard, with one text column or more."""

    def build(
        shards: Mapping[str, Sequence[int]],
        *,
        name: str = "dataset",
        texts: Sequence[str] = ("t5",),
        rejects: Sequence[Reject] = (),
        std: bool = False,
        null_tokens: int = 1,
        root: storage.Location | None = None,
    ) -> storage.Place:
        root = create_dataset(root or tmp_path / name, "tests")
        start = 0
        for bucket, counts in shards.items():
            columns = {LATENTS: LATENTS_FINGERPRINT} | {text_column(text): TEXT_FINGERPRINT for text in texts}
            hashes = {
                column: ensure_fingerprint(root, Bucket.parse(bucket), column, fingerprint)
                for column, fingerprint in columns.items()
            }
            for number, count in enumerate(counts):
                for column, fingerprint_hash in hashes.items():
                    found = make_samples(count, start, column=column, std=std)
                    refused = rejects if column == LATENTS and number == 0 else ()
                    folder = root / bucket / column
                    write_shard(folder, number, found, refused, fingerprint_hash=fingerprint_hash)
                start += count
        for text in texts:
            write_null_text(root, text_column(text), np.full((null_tokens, 6), 0.5, np.float16))
        compact(root, {"clips": start + len(rejects), "written": start})
        return root

    return build
