"""What a step takes where pictures and clips are mixed, and where a budget of tokens sets the batches."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shards.loader import DataConfig
from stages.errors import ConfigError
from stages.train import StepConfig, TrainConfig, check, describe, open_source
from tests.stages.mixed_dataset import COUNTS, mixed_dataset

# Latents are 8 x 8 and 8 x 16, patches 2 x 2: 16 tokens a frame, and 32.
TOKENS = {"64x64x1": 16, "64x64x8": 128, "64x128x8": 256}
BUDGET = {"64x64x1": 72, "64x64x8": 8, "64x128x8": 4}  # of 1152 tokens, in multiples of 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_dataset(tmp_path_factory.mktemp("mixed") / "shards")


def config(shards: Path, filter: str = "", **train) -> TrainConfig:
    train = {"batch_tokens": 1152, "batch_multiple": 4, "steps": 40} | train
    return TrainConfig(
        data=DataConfig(shards=str(shards), filter=filter), model={"preset": "tiny"}, train=StepConfig(**train)
    )


def test_a_budget_of_tokens_gives_pictures_large_batches(shards: Path) -> None:
    source = open_source(config(shards))
    assert source.sample_tokens == TOKENS and source.order.batch_size == BUDGET
    same = open_source(config(shards, batch_tokens=None, batch_size=4))
    assert same.order.batch_size == dict.fromkeys(TOKENS, 4)
    told = describe(config(shards), 1)
    assert "72 of 64x64x1 (1152 tokens)" in told and "8 of 64x64x8 (1024 tokens)" in told


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks(shards: Path) -> None:
    wholes = list(open_source(config(shards)).loader.batches(0, 20))
    assert {len(batch.keys) for batch in wholes} == set(BUDGET.values())
    for world in (2, 4):
        sources = [open_source(config(shards), rank, world) for rank in range(world)]
        for whole, *parts in zip(wholes, *(source.loader.batches(0, 20) for source in sources), strict=True):
            assert [key for part in parts for key in part.keys] == whole.keys
            assert len({(part.mean.shape, part.text.shape) for part in parts}) == 1  # no rank has more to do
            assert np.array_equal(np.concatenate([part.mean for part in parts]), whole.mean)


def test_an_epoch_mixes_pictures_and_clips_and_takes_every_sample_once(shards: Path) -> None:
    order = open_source(config(shards, batch_tokens=None, batch_size=1)).order
    total = sum(map(sum, COUNTS.values()))
    drawn = [order.batch(step) for step in range(total)]
    assert len({(bucket, *rows.tolist()) for bucket, rows, _ in drawn}) == total
    assert order.epoch(total - 1) == 0 and order.epoch(total) == 1
    first = Counter(bucket for bucket, _, _ in drawn[: total // 2])
    assert all(0 < first[bucket] < sum(counts) for bucket, counts in COUNTS.items())


def test_a_bucket_that_the_filter_empties_has_no_batch(shards: Path) -> None:
    source = open_source(config(shards, filter="duration_s < 0.5"))
    assert source.order.batch_size == {"64x64x1": 72}
    assert next(source.loader.batches(0, 1)).mean.shape == (72, 1, 4, 8, 8)


@pytest.mark.parametrize(
    ("train", "world", "message"),
    [
        ({"batch_tokens": None}, 1, "batch_size None and train.batch_tokens None, expected one of them"),
        ({"batch_size": 8}, 1, "batch_size 8 and train.batch_tokens 1152, expected one of them"),
        ({}, 3, "train.batch_multiple: found 4, expected a multiple of 3"),
        ({"gradient_accumulation": 4}, 2, "train.batch_multiple: found 4, expected a multiple of 8"),
        ({"batch_tokens": None, "batch_size": 6}, 4, "train.batch_size: found 6, expected a multiple of 4"),
    ],
)
def test_batches_that_cannot_be_are_refused(shards: Path, train: dict, world: int, message: str) -> None:
    check(config(shards, gradient_accumulation=2), 2)
    with pytest.raises(ConfigError) as error:
        check(config(shards, **train), world)
    assert message in str(error.value)
