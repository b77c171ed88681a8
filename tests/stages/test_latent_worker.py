"""The worker of the latents column, as a plain object."""

from pathlib import Path

import numpy as np
import pytest

from models.identity import vae_identity
from shards.schema import LATENTS, Bucket
from stages import latent_worker
from stages.columns import Target, VaeConfig
from stages.decoding.decode import Frames
from stages.errors import WorkError
from stages.latent_worker import LatentWorker
from stages.planning.plan_table import PlannedClip, ShardPlan
from tests.videos import numbered

BUCKET = Bucket(32, 32, 4)


@pytest.fixture
def plan() -> ShardPlan:
    clip = PlannedClip("key", "source", "video", "", 0.0, 0.0, 8.0, 1.0, "", None, None, None, None)
    return ShardPlan(BUCKET, 0, (clip,))


@pytest.mark.parametrize("least_db", [20, 200])
def test_bf16_is_used_only_where_it_is_close_to_fp32(
    least_db: int, plan: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_worker, "LEAST_SNR_DB", least_db)
    target = Target(tmp_path, LATENTS, {BUCKET: ""})
    worker = LatentWorker(VaeConfig("tiny", precision="bf16"), vae_identity("tiny"), target, threads=1)
    frames = Frames(np.stack([np.asarray(frame)[:32, :32] for frame in numbered(4)]), 0.0)
    if least_db == 200:
        with pytest.raises(WorkError, match=r"\d dB between .* expected 200: set vae.precision=fp32"):
            worker.make_shard(plan, iter([frames]))
    else:
        assert worker.make_shard(plan, iter([frames])).frames == 4
