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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset

from benchmarks.rendered import TEXT_COLUMN, Samples, loader_of
from benchmarks.table import Row, report
from shards.dataset import Dataset
from shards.loader import DataConfig, Loader
from shards.schema import LATENTS, MEAN, TEXT, Bucket

PACKAGES = ("numpy", "pyarrow", "webdataset", "xxhash")
SAMPLES = Samples(Bucket(256, 256, 56), shards=6, per_shard=128)
BATCH = 8
BLOCK_BYTES = 1 << 20
TURNS = 27


def loader() -> list[Row]:
    """MB/s of each way to read one and the same dataset."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = SAMPLES.render(Path(folder) / "dataset")
        ours = loader_of(dataset, SAMPLES.bucket, BATCH, DataConfig(read_threads=1))
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
                assert samples == SAMPLES.count, f"{name} read {samples} samples"
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


def _raw(tars: list[Path], buffer: mmap.mmap) -> int:
    """Every byte of every tar, into one buffer that is used again and again."""
    for tar in tars:
        with open(tar, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return SAMPLES.count


def _batches(loader: Loader) -> int:
    return sum(len(batch.keys) for batch in loader.batches(0, SAMPLES.count // BATCH))


def _reads(dataset: Dataset) -> int:
    rows = np.random.default_rng(0).permutation(SAMPLES.count)
    for row in rows:
        dataset.read(SAMPLES.bucket, row, LATENTS)
        dataset.read(SAMPLES.bucket, row, TEXT_COLUMN)
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
