import itertools
import time
from collections import Counter

import numpy as np
import pytest

from shards.errors import DatasetError
from shards.order import FixedOrder, SampleOrder, batch_sizes

A, B, C = "64x64x16", "64x64x8", "128x64x8"
MIXED = ({A: [5, 0, 7, 3], B: [4, 4, 4, 4, 1], C: [2]}, {A: 4, B: 3, C: 5})


def streams(order: SampleOrder, steps: int) -> dict[str, np.ndarray]:
    """Each bucket's stream of rows, put together from the batches of the first steps by their positions."""
    found: dict[str, dict[int, int]] = {}
    for step in range(steps):
        bucket, rows, positions = order.batch(step)
        assert len(rows) == len(positions) == order.batch_size[bucket]
        assert not found.get(bucket, {}).keys() & set(positions.tolist())
        found.setdefault(bucket, {}).update(zip(positions.tolist(), rows.tolist(), strict=True))
    return {bucket: np.array([rows[at] for at in sorted(rows)]) for bucket, rows in found.items()}


@pytest.mark.parametrize("window_shards", [1, 2, 100])
@pytest.mark.parametrize(
    ("counts", "batch_size"),
    [MIXED, ({A: [10]}, {A: 10}), ({A: [3, 1]}, {A: 7}), ({A: [1]}, {A: 4}), ({A: [0, 0, 6, 0]}, {A: 4})],
)
def test_every_pass_has_every_sample_once(counts, batch_size, window_shards):
    order = SampleOrder(counts, batch_size, 3, window_shards)
    steps = next(step for step in itertools.count() if order.epoch(step) >= 6)
    rows = streams(order, steps)
    assert rows.keys() == counts.keys()
    for bucket, stream in rows.items():
        total = sum(counts[bucket])
        assert len(stream) == 6 * total // batch_size[bucket] * batch_size[bucket]
        passes = [stream[at : at + total] for at in range(0, len(stream) - total + 1, total)]
        assert len(passes) >= 4
        assert all(sorted(one) == list(range(total)) for one in passes)


def test_passes_and_seeds_differ():
    def passes(seed: int) -> list[tuple[int, ...]]:
        stream = streams(SampleOrder({A: [10] * 6}, {A: 10}, seed, 2), 24)[A]
        return [tuple(stream[at : at + 60]) for at in range(0, 240, 60)]

    assert len({*passes(0), *passes(1), *passes(-1)}) == 12
    assert passes(0) == passes(0)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    steps = np.random.default_rng(0).integers(0, 400, 100).tolist()
    used = SampleOrder(*MIXED, seed=5, window_shards=2)
    found = {step: used.batch(step) for step in steps}
    shuffled = SampleOrder(*({name: part[name] for name in (C, B, A)} for part in MIXED), seed=5, window_shards=2)
    for step in sorted(steps):
        fresh = SampleOrder(*MIXED, seed=5, window_shards=2).batch(step)
        for other in (used.batch(step), shuffled.batch(step), fresh):
            assert other.bucket == found[step].bucket
            assert np.array_equal(other.rows, found[step].rows)
            assert np.array_equal(other.positions, found[step].positions)


def test_the_order_stays_the_same_between_versions():
    """Another order would break every training in progress: a resume would read other samples."""
    order = SampleOrder({A: [3, 2], B: [4]}, {A: 2, B: 2}, seed=1, window_shards=1)
    found = [(name, rows.tolist(), positions.tolist()) for name, rows, positions in map(order.batch, range(4))]
    assert found == [
        (B, [1, 0], [5, 7]),
        (B, [3, 2], [1, 3]),
        (A, [1, 4], [4, 6]),
        (A, [2, 0], [0, 2]),
    ]


def test_few_shards_are_read_at_a_time():
    counts = np.array([7, 3, 2, 9, 4, 8, 5, 5, 6])
    shard_of = np.repeat(np.arange(len(counts)), counts)
    stream = streams(SampleOrder({A: counts}, {A: 1}, 2, 3), 4 * counts.sum())[A]
    seen = []
    for at in range(0, len(stream), counts.sum()):
        shards = shard_of[stream[at : at + counts.sum()]]
        first = {int(shard): int(np.argmax(shards == shard)) for shard in np.unique(shards)}
        last = {shard: len(shards) - 1 - int(np.argmax(shards[::-1] == shard)) for shard in first}
        open_at = [sum(first[s] <= place <= last[s] for s in first) for place in range(len(shards))]
        assert max(open_at) == 3  # never more than the window
        shards_in_order = sorted(first, key=first.__getitem__)
        seen.append(tuple(frozenset(shards_in_order[start : start + 3]) for start in (0, 3, 6)))
    assert len(set(seen)) == 4  # other shards share a window in each pass


def test_positions_are_unique_over_all_buckets():
    order = SampleOrder(*MIXED, seed=0, window_shards=2)
    positions = np.concatenate([order.batch(step).positions for step in range(500)])
    assert len(np.unique(positions)) == len(positions) and positions.dtype == np.int64


def test_epochs_hold_each_buckets_share_in_a_mixed_order():
    counts, batch_size = MIXED
    order = SampleOrder(counts, batch_size, seed=0, window_shards=2)
    step, orders = 0, set()
    for epoch in range(12):
        expected = {
            name: (epoch + 1) * sum(counts[name]) // size - epoch * sum(counts[name]) // size
            for name, size in batch_size.items()
        }
        steps = range(step, step + sum(expected.values()))
        assert {order.epoch(one) for one in steps} == {epoch}
        buckets = [order.batch(one).bucket for one in steps]
        assert Counter(buckets) == Counter(expected)
        orders.add(tuple(buckets))
        step = steps.stop
    assert len(orders) > 6  # of batches of three buckets, shuffled anew in each epoch


def test_samples_are_counted_as_they_are_taken():
    order = SampleOrder(*MIXED, seed=5, window_shards=2)
    batches = [Counter({order.batch(step).bucket: len(order.batch(step).rows)}) for step in range(150)]
    taken = list(itertools.accumulate(batches, initial=Counter()))
    assert len({order.epoch(step) for step in range(150)}) > 10
    for step in np.random.default_rng(0).permutation(151).tolist():
        found = SampleOrder(*MIXED, seed=5, window_shards=2).samples_before(step)
        assert {name: count for name, count in found.items() if count} == taken[step]


def test_a_budget_of_tokens_gives_each_bucket_its_batch():
    tokens = {"image": 256, "short": 4096, "long": 14_336, "huge": 100_000}
    assert batch_sizes(tokens, 65_536, 1) == {"image": 256, "short": 16, "long": 4, "huge": 1}
    assert batch_sizes(tokens, 65_536, 3) == {"image": 255, "short": 15, "long": 3, "huge": 3}
    assert batch_sizes(tokens, 14_335, 1)["long"] == 1 == batch_sizes(tokens, 14_336, 1)["long"]
    assert batch_sizes(tokens, 28_671, 1)["long"] == 1 != batch_sizes(tokens, 28_672, 1)["long"]


def test_it_seeks_far_at_once():
    order = SampleOrder({A: [1000] * 50, B: [1000] * 20}, {A: 64, B: 32}, seed=0, window_shards=8)
    started = time.perf_counter()
    batches = [order.batch(step) for step in (10**6, 10**9, 10**12)]
    assert sum(order.samples_before(10**12).values()) > 10**13
    assert time.perf_counter() - started < 1
    for _, rows, positions in batches:
        assert len(set(rows.tolist())) == len(rows) and rows.max() < 50_000 and positions.min() > 10**6


def test_what_cannot_be_ordered_is_refused():
    for counts, batch_size, window_shards, message in (
        ({A: [0, 0], B: []}, {A: 1, B: 1}, 1, "nothing to train on"),
        ({A: [1]}, {B: 1}, 1, "for buckets"),
        ({A: [1]}, {A: 0}, 1, "at least 1"),
        ({A: [1]}, {A: 1}, 0, "at least 1"),
    ):
        with pytest.raises(DatasetError, match=message):
            SampleOrder(counts, batch_size, 0, window_shards)
    with pytest.raises(ValueError, match="found -1"):
        SampleOrder({A: [1]}, {A: 1}, 0, 1).batch(-1)


def test_a_bucket_without_samples_is_passed_over():
    order = SampleOrder({A: [0], B: [3]}, {A: 2, B: 2}, 0, 1)
    assert {order.batch(step).bucket for step in range(20)} == {B}


def test_a_fixed_order_gives_each_row_once_in_full_batches():
    rows = {B: [5, 2, 9], A: list(range(10, 18)), "32x32x1": []}
    order = FixedOrder(rows, {A: 4, B: 2, "32x32x1": 3})
    batches = [order.batch(step) for step in range(len(order))]
    assert [batch.bucket for batch in batches] == [A, A, B, B] and order.batch_size == {A: 4, B: 2}
    seen, positions = {A: [], B: []}, []
    for bucket, batch_rows, batch_positions in batches:
        assert len(batch_rows) == len(batch_positions) == order.batch_size[bucket]
        assert set(batch_rows) <= set(rows[bucket])
        seen[bucket] += batch_rows[batch_positions >= 0].tolist()
        positions += batch_positions[batch_positions >= 0].tolist()
    assert seen == {A: rows[A], B: rows[B]} and positions == list(range(11))
