"""Motion, flicker, frozen frames, sharpness and drift on clips in which they are known."""

import numpy as np
import pytest
import torch

from stages.evaluation.motion import measure_clip, optical_flow
from stages.shapes.render import Combination, ShapesConfig, render_frames

CPU = torch.device("cpu")
SIDE = 64


def texture(draw: np.random.Generator, side: int, cycles: int = 6) -> np.ndarray:
    """A smooth periodic picture of 0 to 255, [side, side]: shifts of it are exact, also by parts of a pixel."""
    spectrum = np.zeros((side, side), complex)
    spectrum[1 : 1 + cycles, 1 : 1 + cycles] = draw.normal(size=(cycles, cycles, 2)) @ (1, 1j)
    spectrum[1 : 1 + cycles, -cycles:] = draw.normal(size=(cycles, cycles, 2)) @ (1, 1j)
    picture = np.fft.ifft2(spectrum).real
    return 127.5 + 90 * picture / np.abs(picture).max()


def shifted(picture: np.ndarray, x_px: float, y_px: float) -> np.ndarray:
    """Its content moved right and down."""
    y, x = (np.fft.fftfreq(side)[:, None] for side in picture.shape)
    return np.fft.ifft2(np.fft.fft2(picture) * np.exp(-2j * np.pi * (x.T * x_px + y * y_px))).real


def video(pictures: list[np.ndarray]) -> np.ndarray:
    return np.stack([np.repeat(p.round().clip(0, 255).astype(np.uint8)[..., None], 3, 2) for p in pictures])


@pytest.mark.parametrize("shift", [(1.0, 0.0), (-2.5, 1.5), (0.3, -0.4), (5.0, 4.0)])
def test_the_flow_is_the_displacement(shift: tuple[float, float]) -> None:
    first = texture(np.random.default_rng(0), SIDE, cycles=3)  # a period is far longer than the largest shift
    pair = [torch.from_numpy(p)[None, None].float() for p in (first, shifted(first, *shift))]
    flow = optical_flow(*pair)[0, :, 12:-12, 12:-12]  # what leaves the picture cannot be followed
    for found, expected in zip(flow, shift, strict=True):
        assert float(found.mean()) == pytest.approx(expected, abs=0.05)
        assert float((found - expected).abs().quantile(0.95)) < 0.1


def test_the_flow_of_what_stands_still_or_has_no_edge_is_zero() -> None:
    grey = torch.full((1, 1, 40, 56), 90.0)
    assert optical_flow(grey, grey + 20).abs().max() < 1e-3
    still = torch.from_numpy(texture(np.random.default_rng(1), SIDE))[None, None].float()
    assert optical_flow(still, still).abs().max() < 1e-4


def test_motion_grows_with_the_speed_of_a_rendered_shape() -> None:
    """The same clip, and every second frame of it: twice as fast."""
    settings = ShapesConfig()
    for direction in ("left", "down"):
        frames = render_frames(Combination("red", "ball", direction), settings, np.random.default_rng(3))
        assert len(frames) >= 8
        slow, fast = (measure_clip(clip, CPU)["motion"] for clip in (frames, frames[::2]))
        assert 1.5 < fast / slow < 2.5 and slow > 0.05
    assert measure_clip(np.repeat(frames[:1], 8, 0), CPU)["motion"] < 1e-4


def test_flicker_is_neither_motion_nor_a_fade() -> None:
    picture = texture(np.random.default_rng(2), SIDE)
    moving = measure_clip(video([shifted(picture, 2 * t, t) for t in range(8)]), CPU)
    fading = measure_clip(video([0.6 * picture + 8 * t for t in range(8)]), CPU)
    flickering = measure_clip(video([0.8 * picture + 10 * (t % 2) for t in range(8)]), CPU)
    assert flickering["flicker"] > 6
    assert moving["flicker"] < 0.15 * flickering["flicker"]
    assert fading["flicker"] < 0.25 * flickering["flicker"]
    still = measure_clip(video([picture] * 8), CPU)
    assert still["flicker"] == pytest.approx(0, abs=1e-4)


def test_frames_that_repeat_are_frozen_and_small_things_that_move_are_not() -> None:
    draw = np.random.default_rng(3)
    frames = np.repeat(video([texture(draw, SIDE)]), 9, 0)
    noisy = (frames.astype(int) + draw.integers(0, 2, frames.shape)).clip(0, 255).astype(np.uint8)
    assert measure_clip(frames, CPU)["frozen"] == 1
    assert measure_clip(noisy, CPU)["frozen"] == 1, "noise of a level is no motion"
    for t in range(5, 9):
        frames[t, 20:23, t * 5 : t * 5 + 3] = 255
    assert measure_clip(frames, CPU)["frozen"] == 4 / 8


def test_sharpness_is_the_variance_of_the_laplacian_and_falls_with_blur() -> None:
    sharp = np.random.default_rng(4).integers(0, 256, (3, 20, 24), np.uint8)
    grey = sharp.astype(float)
    laplacian = (
        grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * grey[:, 1:-1, 1:-1]
    )
    expected = np.mean([frame.var(ddof=1) for frame in laplacian])
    found = measure_clip(np.repeat(sharp[..., None], 3, 3), CPU)["sharpness"]
    assert found == pytest.approx(expected, rel=1e-4)
    blurred = (grey[:, :, 1:] + grey[:, :, :-1]) / 2
    assert measure_clip(video(list(blurred)), CPU)["sharpness"] < 0.5 * found


def test_a_drift_of_colour_is_its_distance() -> None:
    frames = np.full((8, 16, 16, 3), 100, np.uint8)
    frames[6:, :, :] = (103, 104, 100)
    assert measure_clip(frames, CPU)["colour_drift"] == pytest.approx(5)
    assert measure_clip(frames[::-1].copy(), CPU)["colour_drift"] == pytest.approx(5)
    assert measure_clip(frames[:6], CPU)["colour_drift"] == 0


def test_a_picture_has_a_sharpness_alone() -> None:
    assert list(measure_clip(np.zeros((1, 16, 16, 3), np.uint8), CPU)) == ["sharpness"]
