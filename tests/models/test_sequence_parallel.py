"""A video that ranks share, against the same video on one rank, in float64."""

import json
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from models.transformer import Transformer, TransformerConfig
from tests.models.sequence_run import CASES, SMALL
from tests.running import run

SCRIPT = Path(__file__).with_name("sequence_run.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("ranks")
    run(sys.executable, SCRIPT, folder)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_share_a_video_compute_what_one_rank_does(case: str, found: dict[str, list[float]]) -> None:
    """Every rank has the whole output; the mean over all ranks, of two groups or one, is the whole gradient."""
    output, gradient = found[case]
    assert output < 1e-12 and gradient < 1e-12


def test_full_temporal_attention_cannot_be_shared() -> None:
    model = Transformer(TransformerConfig(**SMALL, temporal_attention="full"))
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="temporal_attention is 'full'; expected 'axial'"):
            model.shard_sequence(dist.group.WORLD)
    finally:
        dist.destroy_process_group()
