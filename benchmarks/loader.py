"""How fast samples are read, with all checks, against a bare read of the same tars and against stock WebDataset.

python -m benchmarks.loader            half a minute on 2 cores; 0.5 GB in a temporary folder, and so in the page cache

Samples are as long as those of 256x256x56: latents [56, 4, 32, 32] and 20 tokens [20, 4096], both float16. One
thread each; the arms take turns, and the best of 27 turns counts. All arms read the very same tars, all of their
bytes; the bare read goes from front to back into one buffer that fits a whole tar and is used for all of them. The
loader reads in its shuffled order, and hands each batch over from its thread.
"""

import gc
import mmap
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from benchmarks.table import Row, report
from shards.dataset import Dataset, compact, create_dataset, ensure_fingerprint, write_null_text
from shards.loader import DataConfig, Loader
from shards.order import SampleOrder
from shards.schema import LATENTS, MEAN, TEXT, Bucket, Sample, make_key
from shards.writer import write_shard

PACKAGES = ("numpy", "pyarrow", "webdataset", "xxhash")
BUCKET, TEXT_COLUMN = Bucket(256, 256, 56), "text.t5"
SHARDS, SAMPLES_PER_SHARD, BATCH = 6, 128, 8
BLOCK_BYTES = 1 << 20
TURNS = 27
FINGERPRINTS: dict[str, dict[str, Any]] = {
    LATENTS: {
        "schema_version": 1,
        "vae": {
            "weights_hash": "none", "latent_channels": 4, "spatial_factor": 8, "temporal_factor": 1,
            "scaling_factor": 0.18215, "shift_factor": None,
        },
        "sampling": {"fps": 8},
    },
    TEXT_COLUMN: {"schema_version": 1, "text_encoder": {"weights_hash": "none", "dim": 4096}},
}  # fmt: skip


def loader() -> list[Row]:
    """MB/s of each way to read one and the same dataset."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = rendered_dataset(Path(folder), BUCKET, SHARDS, SAMPLES_PER_SHARD)
        ours = _loader(dataset)
        tars = sorted(Path(folder).rglob("*.tar"))
        # A page begins where such a buffer does: the kernel copies there at up to twice the speed of elsewhere.
        whole, block = mmap.mmap(-1, max(tar.stat().st_size for tar in tars)), mmap.mmap(-1, BLOCK_BYTES)
        arms: dict[str, Callable[[], int]] = {
            "raw read, each tar into memory": lambda: _raw(tars, whole),
            "Loader.batches, checked": lambda: _batches(ours),
            "Dataset.read, checked": lambda: _reads(dataset),
            "stock webdataset, decoded, unchecked": lambda: _stock(tars),
            "raw read through 1 MiB that stays in the CPU's cache": lambda: _raw(tars, block),
        }
        seconds = {name: float("inf") for name in arms}
        for _ in range(TURNS):
            for name, arm in arms.items():
                started = time.perf_counter()
                samples = arm()
                seconds[name] = min(seconds[name], time.perf_counter() - started)
                assert samples == SHARDS * SAMPLES_PER_SHARD, f"{name} read {samples} samples"
        total = sum(tar.stat().st_size for tar in tars)
    rates = {name: total / 1e6 / elapsed for name, elapsed in seconds.items()}
    (raw, batches, single, stock, cached), names = rates.values(), list(rates)
    return [
        Row(names[0], raw, "MB/s"),
        Row(names[1], batches, "MB/s", names[0], batches / raw, ">= 0.6", batches / raw >= 0.6),
        Row(names[2], single, "MB/s", names[0], single / raw),
        Row(names[3], stock, "MB/s"),
        Row(names[1], batches, "MB/s", names[3], batches / stock, ">= 3", batches / stock >= 3),
        Row(names[4], cached, "MB/s"),
        Row(names[1], batches, "MB/s", names[4], batches / cached),
    ]


def rendered_dataset(folder: Path, bucket: Bucket, shards: int, samples_per_shard: int) -> Dataset:
    """Random numbers of 256 x 256 pixels, each with 20 tokens of text of width 4096; to read, or to train on."""
    root = create_dataset(folder / "dataset", "benchmark")
    for column, fingerprint in FINGERPRINTS.items():
        fingerprint_hash = ensure_fingerprint(root, bucket, column, fingerprint)
        for number in range(shards):
            places = range(number * samples_per_shard, (number + 1) * samples_per_shard)
            samples = _samples(places, bucket.frames, column)
            write_shard(root / bucket.name / column, number, samples, fingerprint_hash=fingerprint_hash)
    write_null_text(root, TEXT_COLUMN, np.zeros((1, 4096), np.float16))
    compact(root, {})
    return Dataset.open(root)


def _samples(places: range, frames: int, column: str) -> Iterator[Sample]:
    draw = np.random.default_rng(places.start)
    for key in sorted(make_key("clip", "benchmark", number) for number in places):
        if column == LATENTS:
            latents = draw.standard_normal((frames, 4, 32, 32), np.float32).astype(np.float16)
            about = {"duration_s": 7.0, "caption": "", "source": key, "start_s": 0.0, "aesthetic": None, "umt": None}
            about |= {"matching_score": None, "desirable_filtering": None, "latent_motion": 0.0}
            yield Sample(key, {MEAN: latents}, about)
        else:
            text = draw.standard_normal((20, 4096), np.float32).astype(np.float16)
            yield Sample(key, {TEXT: text}, {"tokens": 20, "caption_hash": "", "caption": None})


def _raw(tars: list[Path], buffer: mmap.mmap) -> int:
    """Every byte of every tar, into one buffer that is used again and again."""
    for tar in tars:
        with open(tar, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return SHARDS * SAMPLES_PER_SHARD


def _loader(dataset: Dataset) -> Loader:
    name = BUCKET.name
    order = SampleOrder({name: dataset.counts_per_shard(name)}, {name: BATCH}, seed=0, window_shards=4)
    return Loader(dataset, DataConfig(read_threads=1), order, 0, 1)


def _batches(loader: Loader) -> int:
    return sum(len(batch.keys) for batch in loader.batches(0, SHARDS * SAMPLES_PER_SHARD // BATCH))


def _reads(dataset: Dataset) -> int:
    rows = np.random.default_rng(0).permutation(SHARDS * SAMPLES_PER_SHARD)
    for row in rows:
        dataset.read(BUCKET, row, LATENTS)
        dataset.read(BUCKET, row, TEXT_COLUMN)
    return len(rows)


def _stock(tars: list[Path]) -> int:
    columns = [[str(tar) for tar in tars if tar.parent.name == column] for column in (LATENTS, TEXT_COLUMN)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        latents, texts = (webdataset.WebDataset(names, shardshuffle=False).decode() for names in columns)
        count = sum(1 for latent, text in zip(latents, texts, strict=True) if latent[MEAN].size and text[TEXT].size)
        gc.collect()
    return count


if __name__ == "__main__":
    report("loader", loader(), PACKAGES)
