"""What --dry-run says of a run before it is spent."""

import re
import resource
from pathlib import Path

import numpy as np
import pytest

from models.errors import WeightsError
from stages import execute
from stages.encode_config import EncodeConfig
from stages.estimate import describe
from stages.execute import RuntimeConfig
from stages.planning.plan import ClipConfig
from stages.shapes.render import ShapesConfig


def refuse() -> None:
    raise WeightsError("no such weights")


def test_the_memory_of_a_worker_is_its_own(tmp_path: Path) -> None:
    ballast = np.ones(60_000_000)  # what the planning process has is no matter of the workers
    config = EncodeConfig(
        "shapes",
        str(tmp_path / "shards"),
        clip=ClipConfig(height=64, width=64, frames=8),
        shapes=ShapesConfig(clips=4),
        runtime=RuntimeConfig(decode_window_mb=50),
    )
    told = describe(config)
    found = re.search(r"a worker, at its peak: (.*) GB of memory for latents, (.*) GB for text; and 0.05 GB for", told)
    assert found, told
    own_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    assert all(0.1 < float(said) < own_gb - ballast.nbytes / 2e9 for said in found.groups()), (told, own_gb)
    assert "4 clips to encode" in told and not (tmp_path / "shards").exists()


def test_what_a_measurement_raises_reaches_the_driver_as_it_is() -> None:
    with execute.running(RuntimeConfig()), pytest.raises(WeightsError, match="^no such weights$"):
        execute.in_worker(refuse)
