"""The index of a dataset in memory once a node, for all ranks."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards import storage
from shards.dataset import Dataset
from shards.node_tables import NodeTables


def test_one_process_makes_each_table_and_both_have_it(tmp_path: Path) -> None:
    barrier, made = threading.Barrier(2), []

    def make(rank: int, number: int) -> pa.Table:
        made.append((rank, number))
        pieces = [pa.chunked_array([[number, 2], [3]]), pa.chunked_array([["a"], [None, "ü"]])]
        return pa.table(pieces, names=["rows", "words"])

    def process(rank: int) -> list[pa.Table]:
        share = NodeTables(tmp_path, lambda: barrier.wait(5) and None, first=rank == 0)
        return [share(lambda number=number: make(rank, number)) for number in range(3)]

    with ThreadPoolExecutor(2) as processes:
        first, second = processes.map(process, range(2))
    assert made == [(0, 0), (0, 1), (0, 2)]
    assert first == second == [make(0, number) for number in range(3)]
    assert not list(tmp_path.iterdir())


def test_a_mapped_table_takes_no_memory_and_is_not_copied(tmp_path: Path) -> None:
    rows = 1_000_000
    before = pa.total_allocated_bytes()
    share = NodeTables(tmp_path, lambda: None, first=True)
    table = share(lambda: pa.table({"rows": pa.chunked_array([np.arange(rows // 2)] * 2)}))
    numbers = table["rows"].to_numpy()
    assert pa.total_allocated_bytes() - before < rows
    assert not numbers.flags.owndata and numbers[rows // 2 - 1] == rows // 2 - 1


def test_a_dataset_is_the_same_through_shared_tables(build: Callable[..., storage.Place], tmp_path: Path) -> None:
    root = build({"64x64x8": [3, 2], "32x32x8": [2]})
    (tmp_path / "node").mkdir()
    share = NodeTables(tmp_path / "node", lambda: None, first=True)
    chosen = {"text": "text.t5", "filter": "duration_s >= 2"}
    alone, shared = Dataset.open(root, **chosen), Dataset.open(root, **chosen, share=share)
    for bucket in alone.buckets:
        assert shared.index(bucket) == alone.index(bucket)
        assert shared.counts_per_shard(bucket) == alone.counts_per_shard(bucket)
        for row in range(alone.index(bucket).num_rows):
            for column in ("latents", "text.t5"):
                own, mapped = alone.read(bucket, row, column), shared.read(bucket, row, column)
                assert own.keys() == mapped.keys()
                assert all(np.array_equal(own[name], mapped[name]) for name in own)
    assert alone.index("64x64x8").num_rows == 4
