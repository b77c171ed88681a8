"""Decibels and channels against numbers worked out by hand or by numpy."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from models.identity import vae_identity
from models.source import TINY_FOLDER
from stages.quality import MOST_DB, ChannelSums, Expected, expected_latents, least_and_median, psnr_db, snr_db


def test_psnr_of_a_constant_error():
    frames = np.full((3, 4, 4, 3), 100, np.uint8)
    assert psnr_db(frames + np.uint8(5), frames) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr_db(frames, frames) == MOST_DB
    worst = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert psnr_db(*worst) == 0, "differences of unsigned bytes do not wrap"


def test_psnr_is_of_the_whole_clip():
    """One bad frame among good ones counts by its error, not by its decibels."""
    good, bad = np.full((1, 2, 2, 3), 9, np.uint8), np.full((1, 2, 2, 3), 59, np.uint8)
    assert psnr_db(np.concatenate([good, bad]), np.concatenate([good, good])) == pytest.approx(
        10 * np.log10(255**2 / (50**2 / 2))
    )


def test_snr_of_a_hundredth_is_forty():
    reference = np.random.default_rng(0).normal(size=(2, 4, 3, 3)).astype(np.float32)
    assert snr_db(reference * 1.01, reference) == pytest.approx(40, abs=1e-3)
    assert snr_db(reference, reference) == snr_db(np.zeros(3), np.zeros(3)) == MOST_DB
    assert snr_db(np.ones(3), np.zeros(3)) == -MOST_DB


def test_channels_of_clips_of_several_lengths_are_numpys():
    draw = np.random.default_rng(0)
    clips = [draw.normal([[[3.0]], [[-1.0]]], [[[2.0]], [[0.1]]], (t, 2, 4, 5)).astype(np.float16) for t in (1, 7, 3)]
    sums = ChannelSums()
    for clip in clips:
        sums.add(clip)
    values = np.concatenate(clips).astype(float).transpose(1, 0, 2, 3).reshape(2, -1)
    first, second = sums.channels(Expected([2.0, 0.0], [2.0, 1.0], "a config"))
    assert (first.mean, first.std) == pytest.approx((values[0].mean(), values[0].std()))
    assert (second.place, second.spread) == pytest.approx((values[1].mean(), values[1].std()))
    assert first.place == pytest.approx((values[0].mean() - 2) / 2) and first.spread == pytest.approx(first.std / 2)
    assert (first.far_off, second.far_off) == (False, True)


@pytest.mark.parametrize("mean, std, far_off", [(0.9, 1.0, False), (1.1, 1.0, True), (0, 1.9, False), (0, 2.1, True),
                                                (-1.1, 1.0, True), (0, 0.6, False), (0, 0.4, True)])  # fmt: skip
def test_what_is_far_off(mean: float, std: float, far_off: bool):
    sums = ChannelSums()
    sums.add(np.array([mean - std, mean + std]).reshape(1, 1, 1, 2))
    assert sums.channels(Expected([0.0], [1.0], ""))[0].far_off is far_off


def test_no_clip_has_no_channels():
    assert ChannelSums().channels(Expected([0.0], [1.0], "")) == []


def test_what_a_vae_states(tmp_path: Path):
    shutil.copytree(TINY_FOLDER / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())

    def stated(**changes: object) -> Expected:
        (tmp_path / "vae" / "config.json").write_text(json.dumps(config | changes))
        folder = str(tmp_path / "vae")
        return expected_latents(folder, vae_identity(folder))

    assert stated(scaling_factor=0.25, shift_factor=None) == Expected([0.0] * 4, [4.0] * 4, "scaling_factor 0.25")
    assert stated(scaling_factor=0.5, shift_factor=0.1).mean == [0.1] * 4
    own = stated(latents_mean=[1, 2, 3, 4], latents_std=[5, 6, 7, 8])
    assert (own.mean, own.std) == ([1, 2, 3, 4], [5, 6, 7, 8])


def test_least_and_median_leave_out_what_is_unknown():
    assert least_and_median([None, 3, 1, 7.126]) == {"least": 1, "median": 3}
    assert least_and_median([None]) is None
