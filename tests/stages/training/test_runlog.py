"""What a run tells: its rates, and videos in TensorBoard."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shards.loader import Batch
from shards.schema import Bucket
from stages.training import runlog
from stages.training.runlog import Rates, RunLog
from tests.models.networks import SMALL
from tests.models.test_flops import counted

SHAPE, LENGTHS = (3, 4, 6), (5, 5)
PEAK_FLOPS_PER_S = 1e9


def batch() -> Batch:
    """This rank's two samples, their captions padded from 5 to 9 tokens for the sake of another rank's."""
    frames, *sides = SHAPE
    mask = np.arange(9) < np.array(LENGTHS)[:, None]
    mean = np.zeros((2, frames, SMALL.in_channels, *sides), np.float16)
    return Batch(0, Bucket(32, 48, 3), 1, ["a", "b"], np.arange(2), mean, None, np.zeros((2, 9, 20)), mask)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is, in seconds."""
    now = [100.0]
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: now[0])
    return now


def test_rates_of_all_ranks_and_the_use_of_this_ranks_device(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlog, "peak_flops_per_s", lambda device: PEAK_FLOPS_PER_S)
    rates = Rates(torch.device("cpu"))
    for _ in range(2):
        rates.add(SMALL, batch(), clips=8, waited_s=0.5)
    clock[0] += 4
    flops_of_a_step = counted(SMALL, SHAPE, LENGTHS)[1]
    assert rates.report() == {
        "clips_per_s": 4.0,
        "tokens_per_s": 4.0 * 3 * 2 * 3,
        "data_wait_share": 0.25,
        "mfu": pytest.approx(2 * flops_of_a_step / 4 / PEAK_FLOPS_PER_S),
    }


def test_a_device_without_a_known_peak_has_no_mfu(clock: list[float]) -> None:
    rates = Rates(torch.device("cpu"))
    clock[0] += 1
    assert rates.report()["mfu"] is None


def test_a_video_in_tensorboard_is_a_gif_of_its_frames_at_its_rate(tmp_path: Path) -> None:
    colours = np.array([[200, 10, 10], [10, 200, 10], [10, 10, 200], [0, 0, 0], [250, 250, 250]], np.uint8)
    frames = np.repeat(np.repeat(colours[:, None, None], 20, axis=1), 30, axis=2)  # [5, 20, 30, 3]
    log = RunLog(tmp_path, 0, 10)
    log.play("samples", frames, 8, 7)
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    (found,) = board.Images("samples")
    assert (found.step, found.width, found.height) == (7, 30, 20)
    with Image.open(io.BytesIO(found.encoded_image_string)) as gif:
        assert (gif.format, gif.n_frames, gif.info["loop"]) == ("GIF", 5, 0)
        shown, duration_ms = [], 0
        for place in range(5):
            gif.seek(place)
            shown.append(np.asarray(gif.convert("RGB")))
            duration_ms += gif.info["duration"]
    assert np.abs(np.stack(shown).astype(int) - frames).max() <= 2
    assert duration_ms == pytest.approx(1000 * 5 / 8, abs=10)
