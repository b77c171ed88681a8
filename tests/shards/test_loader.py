import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards import storage
from shards.dataset import Dataset, compact, create_dataset, ensure_fingerprint, write_null_text
from shards.errors import DatasetError, ShardError
from shards.loader import Batch, DataConfig, Loader, selection_hash
from shards.manifest import Manifest
from shards.order import SampleOrder
from shards.schema import LATENTS, MEAN, STD, TEXT, Bucket
from shards.writer import write_shard

SIZE, LONG = "64x64x8", "64x64x16"
CONFIG = DataConfig(window_shards=2, prefetch_batches=3, read_threads=2)


def loader(root: Path, rank: int = 0, world: int = 1, config: DataConfig = CONFIG, sizes=None) -> Loader:
    dataset = Dataset.open(root)
    sizes = sizes or {bucket.name: 4 * (1 + number) for number, bucket in enumerate(dataset.buckets)}
    counts = {name: dataset.counts_per_shard(name) for name in sizes}
    return Loader(dataset, config, SampleOrder(counts, sizes, 7, config.window_shards), rank, world)


def assert_equal(one: Batch, other: Batch) -> None:
    assert (one.step, one.bucket, one.keys) == (other.step, other.bucket, other.keys)
    for name in ("positions", "mean", "std", "text", "text_mask"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_batches_hold_what_was_written(build, samples):
    root = build({SIZE: [5, 6], LONG: [9]}, std=True, null_tokens=3)
    latents = {sample.key: sample for sample in samples(20, std=True)}
    texts = {sample.key: sample.members[TEXT] for sample in samples(20, column="text.t5")}
    order = SampleOrder({SIZE: [5, 6], LONG: [9]}, {SIZE: 4, LONG: 8}, 7, 2)
    batches = list(loader(root).batches(0, 12))
    assert [batch.step for batch in batches] == list(range(12))
    assert {batch.bucket for batch in batches} == {Bucket.parse(SIZE), Bucket.parse(LONG)}
    for batch in batches:
        drawn = order.batch(batch.step)
        index = Dataset.open(root).index(drawn.bucket)["key"].to_pylist()
        assert batch.keys == [index[row] for row in drawn.rows]
        assert batch.bucket.name == drawn.bucket and np.array_equal(batch.positions, drawn.positions)
        assert batch.mean.dtype == batch.text.dtype == np.float16 and batch.text_mask.dtype == bool
        longest = max(3, *(len(texts[key]) for key in batch.keys))
        assert batch.text.shape == (len(batch.keys), longest, 6)
        for place, key in enumerate(batch.keys):
            assert np.array_equal(batch.mean[place], latents[key].members[MEAN])
            assert np.array_equal(batch.std[place], latents[key].members[STD])
            assert np.array_equal(batch.text[place][batch.text_mask[place]], texts[key])
            assert batch.text_mask[place].tolist() == [at < len(texts[key]) for at in range(longest)]
            assert not batch.text[place][~batch.text_mask[place]].any()


def test_padding_is_zero_in_memory_that_is_taken_again(build):
    seen = 0
    root = build({SIZE: [8, 8]}, null_tokens=60)  # longer than what a record fills with zeros itself
    for batch in loader(root).batches(0, 40):  # none is kept
        padding = batch.text[~batch.text_mask]
        assert not padding.any()
        seen += len(padding)
    assert seen > 40


def test_the_text_has_room_for_the_null_text(build):
    (batch,) = loader(build({SIZE: [5]}, null_tokens=9)).batches(0, 1)
    assert batch.text.shape == (4, 9, 6) and batch.text_mask.sum(axis=1).max() < 9


def test_without_stored_std_there_is_none(build):
    (batch,) = loader(build({SIZE: [5]})).batches(0, 1)
    assert batch.std is None


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_slices_make_up_the_global_batch(build, world):
    root = build({SIZE: [5, 6], LONG: [9]})
    shares = [list(loader(root, rank, world).batches(0, 10)) for rank in range(world)]
    wholes = list(loader(root).batches(0, 10))
    assert len(wholes) == 10
    for whole, *parts in zip(wholes, *shares, strict=True):
        assert {part.text.shape for part in parts} == {(len(whole.keys) // world, *whole.text.shape[1:])}
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("positions", "mean", "text", "text_mask")
        }
        assert {part.bucket for part in parts} == {whole.bucket} and {part.step for part in parts} == {whole.step}
        assert_equal(replace(whole, keys=[key for part in parts for key in part.keys], **joined), whole)
        assert [key for part in parts for key in part.keys] == whole.keys


def test_starting_later_is_skipping(build):
    root = build({SIZE: [5, 6], LONG: [9]})
    skipped, sought = list(loader(root).batches(0, 12))[7:], list(loader(root).batches(7, 12))
    assert len(skipped) == 5
    for one, other in zip(skipped, sought, strict=True):
        assert_equal(one, other)


def test_starting_later_reads_only_what_is_asked_for(build, monkeypatch):
    root, read = build({SIZE: [5, 6], LONG: [9]}), []
    original = storage.OpenFiles.read_into

    def counted(files: storage.OpenFiles, path: Path, offset: int, buffer: memoryview) -> int:
        read.append(len(buffer))
        return original(files, path, offset, buffer)

    opened = loader(root)
    monkeypatch.setattr(storage.OpenFiles, "read_into", counted)
    batches = list(opened.batches(1_000_000, 1_000_002))
    assert len(read) == sum(2 * len(batch.keys) for batch in batches)  # latents and text of each sample
    assert [batch.keys for batch in batches] == [opened.keys(step) for step in (1_000_000, 1_000_001)]


@pytest.mark.parametrize(("prefetch", "threads"), [(1, 1), (9, 5)])
def test_reading_ahead_changes_nothing(build, prefetch, threads):
    root = build({SIZE: [5, 6]})
    config = replace(CONFIG, prefetch_batches=prefetch, read_threads=threads)
    found, expected = list(loader(root, config=config).batches(0, 5)), list(loader(root).batches(0, 5))
    assert len(found) == 5
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)


def test_micro_batches_make_up_the_batch_and_the_keys_are_known_without_reading(build):
    root = build({SIZE: [5, 6]}, std=True)
    (batch,) = loader(root).batches(3, 4)
    assert loader(root).keys(3) == batch.keys and len(batch.keys) == 4
    parts = batch.split(2)
    assert [part.keys for part in parts] == [batch.keys[:2], batch.keys[2:]]
    for name in ("positions", "mean", "std", "text", "text_mask"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(batch, name))
    assert_equal(batch.split(1)[0], batch)


def test_a_dataset_smaller_than_a_batch_works(build):
    root = build({SIZE: [3]})
    batches = list(loader(root, sizes={SIZE: 8}).batches(0, 3))
    drawn = [key for batch in batches for key in batch.keys]
    assert len(drawn) == 24 and len({position for batch in batches for position in batch.positions}) == 24
    assert all(len({*drawn[at : at + 3]}) == 3 for at in range(0, 24, 3))


def test_an_error_of_a_reading_thread_comes_to_its_step(build):
    root = build({SIZE: [8]})
    expected = list(loader(root).batches(0, 2))
    assert not set(expected[0].keys) & set(expected[1].keys)
    row = next(row for row in Dataset.open(root).index(SIZE).to_pylist() if row["key"] == expected[1].keys[0])
    (tar,) = (root / SIZE / LATENTS).glob("*.tar")
    with open(tar, "r+b") as file:
        file.seek(row["latents.offset"] + 700)
        file.write(b"\xff\xff")
    batches = loader(root).batches(0, 50)
    assert_equal(next(batches), expected[0])
    with pytest.raises(ShardError, match=f"{tar}: the record of {row['key']}"):
        next(batches)
    assert reading_threads() == []


def test_closing_early_leaves_no_thread(build):
    batches = loader(build({SIZE: [8]})).batches(0, 1000)
    assert reading_threads() == []  # nothing starts before the first batch is asked for
    next(batches)
    assert reading_threads()
    batches.close()
    assert reading_threads() == []


def test_no_steps_give_no_batches(build):
    assert list(loader(build({SIZE: [8]})).batches(5, 5)) == []


def test_what_cannot_be_loaded_is_refused_at_once(build):
    root = build({SIZE: [8]}, texts=["t5", "wide"])
    with pytest.raises(DatasetError, match="3 ranks cannot share a batch of 4 samples evenly: use a multiple of 3"):
        loader(root, 0, 3)
    for setting in ("prefetch_batches", "read_threads"):
        with pytest.raises(DatasetError, match=f"data.{setting} is 0: set it to 1 or more"):
            loader(root, config=replace(CONFIG, **{setting: 0}))
    with pytest.raises(DatasetError, match="null.text.other.safetensors does not exist"):
        loader(root, config=replace(CONFIG, text="other"))
    (root / "null.text.wide.safetensors").rename(root / "null.text.other.safetensors")
    with pytest.raises(DatasetError, match="has no column text.other: found latents, text.t5, text.wide"):
        loader(root, config=replace(CONFIG, text="other"))


def test_latents_of_which_some_have_no_std_are_refused(tmp_path, samples):
    root = create_dataset(tmp_path / "mixed", "tests")
    for column in (LATENTS, "text.t5"):
        fingerprint_hash = ensure_fingerprint(root, Bucket.parse(SIZE), column, {})
        for number in range(2):
            found = samples(2, 2 * number, column=column, std=number == 1)
            write_shard(root / SIZE / column, number, found, fingerprint_hash=fingerprint_hash)
    write_null_text(root, "text.t5", np.zeros((1, 6), np.float16))
    compact(root, {})
    with pytest.raises(DatasetError, match="has mean.npy and std.npy of some samples, mean.npy of others"):
        loader(root)


def test_text_of_another_width_than_the_null_text_is_refused(build):
    root = build({SIZE: [8]})
    (root / "null.text.t5.safetensors").unlink()
    write_null_text(root, "text.t5", np.zeros((1, 8), np.float16))
    with pytest.raises(DatasetError, match=r"text.t5 is \[6\] wide, the null text 8"):
        loader(root)


def test_the_selection_hash_tells_what_is_trained_on(build):
    def of(root: Path, buckets=(SIZE, LONG), column: str = "text.t5") -> str:
        return selection_hash(Dataset.open(root), buckets, column)

    shards = {SIZE: [2, 3], LONG: [2]}
    root = build(shards, texts=["t5", "more"])
    hashes = [
        of(root),
        of(root, column="text.more"),
        of(root, [SIZE]),
        of(root, [LONG]),
        of(build({SIZE: [2, 2], LONG: [2]}, name="fewer")),
        of(build(shards, name="std", std=True)),
        of(build({SIZE: [3, 2], LONG: [2]}, name="moved")),
    ]
    assert len(set(hashes)) == 7
    assert of(root) == of(build(shards, name="again")) == of(root, [Bucket.parse(LONG), Bucket.parse(SIZE)])


def mixed(root: Path, text, rank: int = 0, world: int = 1, steps: int = 30, seed: int = 7, **settings) -> list[Batch]:
    config = replace(CONFIG, text=text, **settings)
    dataset = Dataset.open(root, filter=config.filter)
    counts = {bucket.name: dataset.counts_per_shard(bucket) for bucket in dataset.buckets}
    order = SampleOrder(counts, dict.fromkeys(counts, 4), seed, config.window_shards)
    return list(Loader(dataset, config, order, rank, world).batches(0, steps))


def columns_of(batches: list[Batch], texts: dict[str, dict[str, np.ndarray]]) -> dict[int, str]:
    """Position -> the column whose text a sample came with."""
    found = {}
    for batch in batches:
        for key, position, text, mask in zip(batch.keys, batch.positions, batch.text, batch.text_mask, strict=True):
            (found[position],) = [name for name, of in texts.items() if np.array_equal(of[key], text[mask])]
    return found


def test_text_columns_are_mixed_by_their_shares(build, samples):
    root = build({SIZE: [9, 8]}, texts=["t5", "short", "long"])
    texts = {
        name: {sample.key: sample.members[TEXT] for sample in samples(17, column=f"text.{name}")}
        for name in ("t5", "short", "long")
    }
    batches = mixed(root, {"t5": 6, "short": 3, "long": 1}, steps=500)
    found = columns_of(batches, texts)
    shares = {name: list(found.values()).count(name) / 2000 for name in texts}
    assert shares == pytest.approx({"t5": 0.6, "short": 0.3, "long": 0.1}, abs=0.04)
    first = batches[0].keys[0]
    again = {
        found[position]
        for batch in batches
        for key, position in zip(batch.keys, batch.positions, strict=True)
        if key == first
    }
    assert len(again) > 1  # a sample's next time may be another column's
    assert columns_of(mixed(root, {"t5": 6, "short": 3, "long": 1}, seed=8, steps=40), texts) != {
        position: found[position] for position in list(found)[:160]
    }
    for one, other in zip(mixed(root, {"short": 0.3}), mixed(root, "short"), strict=True):
        assert_equal(one, other)


def test_ranks_and_a_later_start_agree_on_the_mixture(build):
    root, text = build({SIZE: [9, 8], LONG: [7]}, texts=["t5", "short"]), {"t5": 0.7, "short": 0.3}
    wholes, shares = mixed(root, text), [mixed(root, text, rank, 2) for rank in range(2)]
    for whole, *parts in zip(wholes, *shares, strict=True):
        assert {part.text.shape[1] for part in parts} == {whole.text.shape[1]}
        assert np.array_equal(np.concatenate([part.text for part in parts]), whole.text)
        assert np.array_equal(np.concatenate([part.text_mask for part in parts]), whole.text_mask)
        assert whole.text_mask.any(axis=0).all()  # no longer than the longest of the chosen
    for one, other in zip(mixed(root, text, prefetch_batches=1, read_threads=1), wholes, strict=True):
        assert_equal(one, other)


def test_a_mixture_that_cannot_be_is_refused(build):
    root = build({SIZE: [8]}, texts=["t5", "short"])
    for text in ({}, {"t5": 0}, {"t5": -1, "short": 1}, {"t5": float("nan")}, {"t5": "half"}):
        with pytest.raises(DatasetError, match="expected names of text columns, with a weight above 0 each"):
            loader(root, config=replace(CONFIG, text=text))
    with pytest.raises(DatasetError, match="has no column text.none: found latents, text.short, text.t5"):
        loader(root, config=replace(CONFIG, text={"t5": 1, "none": 1}))
    manifest = Manifest.read(root / "manifest.json")
    manifest.buckets[SIZE].columns["text.short"].fingerprint["text_encoder"]["weights_hash"] = "cc"
    (root / "manifest.json").write_bytes(manifest.to_bytes())
    with pytest.raises(DatasetError, match='of text.short is not that of text.t5: weights_hash is "cc", expected "bb"'):
        loader(root, config=replace(CONFIG, text={"t5": 1, "short": 1}))


def test_a_filter_leaves_out_what_does_not_hold(build, samples):
    root = build({SIZE: [5, 6], LONG: [9]})  # odd ones have no aesthetic; durations are 1 to 20
    wanted = {sample.key for seed, sample in enumerate(sorted(samples(20), key=lambda s: s.attributes["duration_s"]))
              if seed % 2 == 0 and seed >= 3}  # fmt: skip
    batches = mixed(root, "t5", filter="aesthetic >= 4.75 and duration_s >= 4", steps=20)
    drawn = [key for batch in batches for key in batch.keys]
    assert set(drawn) == wanted and len(wanted) == 8
    latents = {sample.key: sample for sample in samples(20)}
    for batch in batches:
        for key, mean in zip(batch.keys, batch.mean, strict=True):
            assert np.array_equal(mean, latents[key].members[MEAN])
    dataset = Dataset.open(root, filter="duration_s > 5")
    assert [dataset.counts_per_shard(bucket) for bucket in (SIZE, LONG)] == [[0, 6], [9]]
    assert min(dataset.index(SIZE)["duration_s"].to_pylist()) == 6


def test_a_filter_that_is_none_or_leaves_nothing_is_refused(build):
    root = build({SIZE: [5]})
    with pytest.raises(DatasetError, match="'aesthetic > 9' holds for none of the 5 samples of"):
        Dataset.open(root, filter="aesthetic > 9")
    with pytest.raises(DatasetError, match="no column aesthetics; did you mean aesthetic?"):
        Dataset.open(root, filter="aesthetics > 4")
    with pytest.raises(DatasetError, match="data.filter.*expected a condition such as"):
        Dataset.open(root, filter="import os")


def test_the_selection_hash_covers_every_column_and_the_filter(build):
    root = build({SIZE: [5]}, texts=["t5", "short"])

    def of(columns, filter: str = "") -> str:
        return selection_hash(Dataset.open(root, filter=filter), [SIZE], columns)

    assert of(["text.t5"]) == of("text.t5") == of("text.t5", "duration_s > 0")
    assert len({of("text.t5"), of(["text.t5", "text.short"]), of("text.short"), of("text.t5", "duration_s > 2")}) == 4
