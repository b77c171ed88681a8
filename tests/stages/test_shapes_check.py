"""The checker: always right on rendered clips, at chance on shuffled prompts, and unmoved by blur and noise."""

from pathlib import Path

import numpy as np
import pytest

from models.vae import FrozenVAE
from stages.errors import ConfigError
from stages.evaluation.intervals import Proportion
from stages.shapes.check import Observed, check_file, check_video, score
from stages.shapes.render import (
    COLOURS,
    Combination,
    ShapesConfig,
    caption,
    combinations,
    held_out,
    render_frames,
    seen,
    shape_coverage,
)
from stages.video import write_mp4

CONFIG = ShapesConfig()


def clip(combination: Combination, seed: int) -> np.ndarray:
    return render_frames(combination, CONFIG, np.random.default_rng(seed))


def expected(combination: Combination) -> Observed:
    return Observed(combination.colour, combination.shape, combination.direction)


@pytest.fixture(scope="module")
def truth() -> list[tuple[Combination, np.ndarray]]:
    return [(c, clip(c, 100 * k + seed)) for k, c in enumerate(combinations()) for seed in range(3)]


def test_rendered_files_are_read_right_every_time(tmp_path: Path):
    for number, combination in enumerate(combinations()):
        write_mp4(tmp_path / "clip.mp4", clip(combination, number), CONFIG.fps, crf=CONFIG.crf)
        assert check_file(tmp_path / "clip.mp4") == expected(combination)


def test_rendered_frames_are_read_right_every_time(truth: list[tuple[Combination, np.ndarray]]):
    assert all(check_video(frames) == expected(c) for c, frames in truth)


def test_blur_noise_and_a_shifted_background_change_nothing(truth: list[tuple[Combination, np.ndarray]]):
    rng = np.random.default_rng(0)
    for combination, frames in truth[::3]:
        padded = np.pad(frames.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        blurred = np.mean([padded[:, i : i + 64, j : j + 64] for i in range(3) for j in range(3)], axis=0)
        noisy = 20 + 0.8 * blurred + rng.normal(0, 8, frames.shape)
        assert check_video(noisy.clip(0, 255).astype(np.uint8)) == expected(combination)


def test_the_tiny_vae_keeps_what_the_checker_reads(truth: list[tuple[Combination, np.ndarray]]):
    vae = FrozenVAE.load("tiny")
    some = truth[::3]
    restored = vae.decode(vae.encode(np.concatenate([frames for _, frames in some])))
    observed = [check_video(frames) for frames in restored.reshape(len(some), CONFIG.frames, *restored.shape[1:])]
    result = score((caption(c), o) for (c, _), o in zip(some, observed, strict=True))
    for split in (result.seen, result.held_out):
        assert split.colour_and_direction.value == 1.0
        assert split.shape.value >= 0.9


def test_shuffled_prompts_fall_to_chance(truth: list[tuple[Combination, np.ndarray]]):
    prompts = [caption(c) for c, _ in truth] * 10
    observed = [check_video(frames) for _, frames in truth] * 10
    np.random.default_rng(0).shuffle(prompts)
    result = score(zip(prompts, observed, strict=True))
    for split in (result.seen, result.held_out):
        assert split.colour.value == pytest.approx(1 / 6, abs=0.05)
        assert split.direction.value == pytest.approx(1 / 4, abs=0.06)
        assert split.colour_and_direction.value == pytest.approx(1 / 24, abs=0.03)


def test_empty_still_and_aslant_clips_show_no_direction():
    frames = clip(Combination("red", "ball", "left"), 0)
    assert check_video(np.full_like(frames, 30)) == Observed(None, None, None)
    assert check_video(np.repeat(frames[:1], 8, axis=0)) == Observed("red", "ball", None)
    for step_px in ((5, 5), (0.4, 0)):
        places = [(12 + step_px[0] * t, 14 + step_px[1] * t) for t in range(8)]
        covers = [shape_coverage("ball", place, 8, 64)[..., None] for place in places]
        moving = np.stack([(cover * COLOURS["red"]).astype(np.uint8) for cover in covers])
        assert check_video(moving) == Observed("red", "ball", None)


def test_a_shape_of_many_colours_has_none():
    frames = clip(Combination("red", "square", "up"), 0)
    columns = np.abs(frames.astype(int) - frames[0, 0, 0]).max(axis=3).any(axis=(0, 1)).nonzero()[0]
    for part, order in enumerate(([0, 1, 2], [1, 0, 2], [1, 2, 0])):
        third = np.array_split(columns, 3)[part]
        frames[:, :, third] = frames[:, :, third][..., order]
    assert check_video(frames).colour is None


def test_a_shape_that_vanishes_for_some_frames_still_moves_its_way():
    frames = clip(Combination("cyan", "ball", "down"), 3)
    frames[[0, 5]] = frames[0, 0, 0]
    assert check_video(frames) == Observed("cyan", "ball", "down")


def test_score_counts_each_attribute_apart_for_seen_and_held_out():
    one, unseen = seen()[0], held_out()[0]
    wrong = Observed(one.colour, None, "left" if one.direction != "left" else "right")
    result = score([(caption(one), expected(one)), (caption(one), wrong), (caption(unseen), expected(unseen))])
    all_of, half = Proportion(2, 2), Proportion(1, 2)
    assert (result.seen.colour, result.seen.shape, result.seen.direction) == (all_of, half, half)
    assert (result.seen.colour_and_direction, result.seen.all_three) == (half, half)
    assert result.held_out.all_three == Proportion(1, 1)
    with pytest.raises(ConfigError, match="not a caption"):
        score([("a dog runs", wrong)])


def test_frames_of_another_type_or_number_are_refused():
    with pytest.raises(ValueError, match="expected uint8"):
        check_video(np.zeros((8, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="expected uint8"):
        check_video(np.zeros((1, 64, 64, 3), np.uint8))
