"""What browsing reads of a dataset: some samples picked by chance, numbers of all of them, and faults by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from shards import storage
from shards.dataset import Dataset
from shards.errors import DatasetError, ShardError
from shards.manifest import Manifest
from shards.schema import CAPTION, KEY, LATENTS, MEAN, SHARD, TEXT_PREFIX, TOKENS, Bucket, index_field
from stages.quality import ChannelSums

NOT_CHARTED = ("start_s",)
"""Numbers of a clip that say nothing of a dataset."""


@dataclass(frozen=True)
class Text:
    """One text column's view of a clip."""

    column: str
    caption: str
    tokens: int


@dataclass(frozen=True)
class Picked:
    """A sample to look at. ``latents`` is float16 [T, C, h, w], or None where ``fault`` says why."""

    bucket: Bucket
    key: str
    shard: int
    source: str
    start_s: float
    texts: list[Text]
    facts: dict[str, Any]  # what else the index knows of the clip
    latents: np.ndarray | None
    fault: str


@dataclass
class Survey:
    """What was read. ``numbers``: name -> all clips' values, missing ones left out."""

    picked: list[Picked] = field(default_factory=list)
    sums: ChannelSums = field(default_factory=ChannelSums)
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def survey(shards: storage.Location, manifest: Manifest, clips: int, sampled: int, seed: int) -> Survey:
    """Reads one bucket after the other. clips: how many to pick; sampled: whose latents are added up, at least those.

    What is damaged becomes a fault, and the rest is read.
    """
    found = Survey()
    counts = {name: entry.samples for name, entry in manifest.buckets.items()}
    shown, added = deal(counts, clips), deal(counts, max(clips, sampled))
    values: dict[str, list[np.ndarray]] = {}
    for name, count in counts.items():
        rows = np.random.default_rng([seed, *name.encode()]).choice(count, added[name], replace=False).tolist()
        try:
            dataset = Dataset.open(shards, buckets=[name])
        except (ShardError, DatasetError) as error:
            found.faults.append(f"bucket {name}: {error}")
            continue
        for column, numbers in _numbers(dataset.index(name)).items():
            values.setdefault(column, []).append(numbers)
        for place, row in enumerate(rows):
            latents, fault = _latents(dataset, name, row, found)
            if place < shown[name]:
                found.picked.append(_picked(dataset, name, row, latents, fault))
    for column, parts in values.items():
        whole = np.concatenate(parts)
        found.numbers[column] = whole[np.isfinite(whole)]
        found.missing[column] = len(whole) - len(found.numbers[column])
    return found


def deal(counts: Mapping[str, int], wanted: int) -> dict[str, int]:
    """How many of ``wanted`` each name gets when they are dealt in turn, none more than its count."""
    dealt = dict.fromkeys(counts, 0)
    left = min(wanted, sum(counts.values()))
    while left:
        for name, count in counts.items():
            if left and dealt[name] < count:
                dealt[name] += 1
                left -= 1
    return dealt


def _latents(dataset: Dataset, bucket: str, row: int, found: Survey) -> tuple[np.ndarray | None, str]:
    """The mean of a sample, which is added up, or why there is none."""
    try:
        latents = dataset.read(bucket, row, LATENTS)[MEAN]
    except ShardError as error:
        found.faults.append(str(error))
        return None, str(error)
    found.sums.add(latents)
    return latents, ""


def _numbers(index: pa.Table) -> dict[str, np.ndarray]:
    """The columns of an index that are worth a chart, NaN where a clip has none."""
    tokens = [name for name in index.column_names if name.startswith(TEXT_PREFIX) and name.endswith(f".{TOKENS}")]
    floats = [field.name for field in index.schema if field.type == pa.float64() and field.name not in NOT_CHARTED]
    return {name: index[name].to_numpy().astype(np.float64) for name in [*floats, *tokens]}


def _picked(dataset: Dataset, bucket: str, row: int, latents: np.ndarray | None, fault: str) -> Picked:
    values = dataset.index(bucket).slice(row, 1).to_pylist()[0]
    own = {name: value for name, value in values.items() if "." not in name}
    key, shard, source, start_s = own.pop(KEY), own.pop(SHARD), own.pop("source"), own.pop("start_s")
    caption = own.pop(CAPTION)
    texts = []
    for column in dataset.columns(bucket):
        if column != LATENTS:
            its_own = values[index_field(column, CAPTION)]
            texts.append(Text(column, caption if its_own is None else its_own, values[index_field(column, TOKENS)]))
    return Picked(Bucket.parse(bucket), key, shard, source, start_s, texts, own, latents, fault)
