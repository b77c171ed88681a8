"""The nearest training clip against a plain search, copies found and named, and the yardstick of real clips."""

import numpy as np
import pytest

from shards.dataset import Dataset
from shards.schema import LATENTS, MEAN
from stages.evaluation import nearest
from stages.evaluation.nearest import measure_nearest, nearest_clips, signature
from tests.stages.evaluation.tiny_run import CLIPS, SIZE, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(write_dataset(tmp_path_factory.mktemp("data") / "shards"))


def latents_of(dataset: Dataset, row: int) -> np.ndarray:
    return dataset.read(SIZE, row, LATENTS)[MEAN]


def test_signatures_multiply_to_the_correlation() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 4, 3, 8, 8))  # small enough to be taken as they are
    centred = [(clip - clip.mean((0, 2, 3), keepdims=True)).ravel() for clip in (first, second)]
    expected = np.corrcoef(*centred)[0, 1]
    assert signature(first) @ signature(second) == pytest.approx(expected, abs=1e-5)
    assert signature(first) @ signature(3 * first + 5) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("read_at_once", [1, 7, 64])
def test_the_nearest_is_that_of_a_plain_search(
    dataset: Dataset, read_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "READ_AT_ONCE", read_at_once)
    draw, rows = np.random.default_rng(0), list(range(3, CLIPS))
    mixed = [latents_of(dataset, row) + draw.normal(size=(8, 4, 8, 8)) for row in (5, 9, 0, 30)]
    queries, sources = np.stack([signature(clip) for clip in mixed]), [None, None, None, "nobody.mp4"]
    known = np.stack([signature(latents_of(dataset, row)) for row in rows])
    distance, row_of = nearest_clips(dataset, SIZE, rows, queries, sources)
    apart = 1 - queries @ known.T
    assert distance == pytest.approx(apart.min(1), abs=1e-6)
    assert row_of.tolist() == [rows[place] for place in apart.argmin(1)] and row_of[:2].tolist() == [5, 9]


def test_clips_of_its_own_source_are_not_looked_at(dataset: Dataset) -> None:
    index = dataset.index(SIZE)
    source = index["source"][0].as_py()
    query = signature(latents_of(dataset, 0))[None]
    rows = range(CLIPS)
    distance, row_of = nearest_clips(dataset, SIZE, rows, query, [None])
    assert distance[0] == pytest.approx(0, abs=1e-6) and row_of[0] == 0
    distance, row_of = nearest_clips(dataset, SIZE, rows, query, [source])
    assert distance[0] > 0.1 and index["source"][row_of.item(0)].as_py() != source


def test_copies_are_found_and_named(dataset: Dataset) -> None:
    """Of 20 samples 4 are training clips, made brighter and noisy; real clips are unlike each other."""
    index, draw = dataset.index(SIZE), np.random.default_rng(1)
    real = np.stack([signature(latents_of(dataset, row)) for row in range(CLIPS)])
    copies = [1.1 * latents_of(dataset, row) + 0.3 + 0.1 * draw.normal(size=(8, 4, 8, 8)) for row in (7, 2, 40, 41)]
    fresh = [draw.normal(size=(2, 4, 2, 2)).repeat(4, 0).repeat(4, 2).repeat(4, 3) for _ in range(16)]
    samples = np.stack([signature(clip) for clip in (*copies, *fresh)])
    names = [f"{number}.mp4" for number in range(20)]
    prompts = [f"prompt {number // 2}" for number in range(20)]
    found = measure_nearest(dataset, SIZE, 1000, (samples, names, prompts), (real, index["source"].to_pylist()))
    assert found is not None and found.training == CLIPS
    assert (found.samples.samples, found.samples.groups) == (20, 10), "samples of one prompt are one group"
    assert 4 <= found.nearer.count <= 7 and found.nearer.total == 20  # of 16 that are no copies about one is as near
    assert {(pair.sample, pair.clip) for pair in found.pairs[:4]} == {
        (f"{number}.mp4", index["key"][row].as_py()) for number, row in enumerate((7, 2, 40, 41))
    }
    assert max(pair.distance for pair in found.pairs[:4]) < 0.1 < found.threshold < found.real.value
    assert (found.pairs[0].start_s, len(found.pairs)) == (0.5, 8)
    distances = [pair.distance for pair in found.pairs]
    assert distances == sorted(distances)


def test_training_clips_of_one_source_are_no_yardstick(dataset: Dataset) -> None:
    index = dataset.index(SIZE)
    only = Dataset.open(dataset.path, filter=f"source == '{index['source'][0].as_py()}'")
    query = signature(latents_of(dataset, 0))[None]
    assert measure_nearest(only, SIZE, 10, (query, ["a.mp4"], ["a"]), (query, [index["source"][0].as_py()])) is None
