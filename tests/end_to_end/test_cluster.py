"""Encoding on a Ray cluster of several nodes, one of which dies in the middle."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.end_to_end.conftest import SMALL, hashes
from tests.running import ROOT, command, environment, wait_for


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that only decodes, and two more nodes, which say that they have a GPU."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(num_cpus=1, num_gpus=1)
    nodes.wait_for_nodes()
    yield nodes
    nodes.shutdown()


def test_a_node_that_dies_costs_nothing(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    settings = ["--input", "shapes", f"output={folder}", f"data.videos={shards.parent / 'data'}", *SMALL]
    process = subprocess.Popen(
        [*command("encode"), *settings], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env=environment() | {"RAY_ADDRESS": cluster.address},
    )  # fmt: skip
    wait_for(process, lambda: any(folder.glob("*/latents/*.parquet")))
    cluster.remove_node(sorted(cluster.worker_nodes, key=lambda node: node.unique_id)[0], allow_graceful=False)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert hashes(folder) == hashes(shards)
