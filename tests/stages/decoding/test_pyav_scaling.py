"""Scaling what a bucket shows of a frame, against scaling all of it."""

from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest

from stages.decoding.decode import decode_clip
from stages.decoding.pyav_scaling import unseen_px
from tests.videos import write_planes, write_video


def noise(height: int, width: int, count: int = 2) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (count, height // 4, width // 4, 3), np.uint8)
    return coarse.repeat(4, 1).repeat(4, 2)


def scaled_whole(path: Path, scaled: tuple[int, int], height: int, width: int) -> np.ndarray:
    with av.open(str(path)) as container:
        first = next(container.decode(video=0))
    flags = 0x4 | 0x2000 | 0x40000 | 0x80000
    whole = first.reformat(scaled[1], scaled[0], "rgb24", interpolation=flags).to_ndarray()
    whole = np.rot90(whole, first.rotation // 90)
    top, left = (whole.shape[0] - height) // 2, (whole.shape[1] - width) // 2
    return whole[top : top + height, left : left + width].astype(int)


def assert_as_scaled_whole(path: Path, scaled: tuple[int, int], height: int, width: int) -> None:
    shown = decode_clip(str(path), start_s=0, frames=1, fps=8, height=height, width=width, timeout_s=30)[0]
    difference = np.abs(shown - scaled_whole(path, scaled, height, width))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.03


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv410p", "yuv411p", "yuv422p10le", "gray", "bgra"])
@pytest.mark.parametrize(
    ("size", "scaled", "bucket"),
    [((240, 640), (96, 256), (96, 96)), ((640, 240), (256, 96), (96, 96)), ((320, 480), (120, 180), (120, 64))],
)
def test_every_pixel_is_that_of_the_whole_frame(tmp_path: Path, pixel_format, size, scaled, bucket) -> None:
    assert unseen_px(size[0], scaled[0], bucket[0]) or unseen_px(size[1], scaled[1], bucket[1])
    video = write_video(tmp_path / "a.mkv", noise(*size), codec="ffv1", pixel_format=pixel_format, options={})
    assert_as_scaled_whole(video, scaled, *bucket)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_turned_frames_too(tmp_path: Path, degrees: int) -> None:
    video = write_video(tmp_path / "a.mp4", noise(240, 640), rotation=degrees, options={})
    assert_as_scaled_whole(video, (96, 256), 96, 96)


@pytest.mark.parametrize("matrix", [1, 8, 9])
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_survive_the_cut(tmp_path: Path, matrix: int, full_range: bool) -> None:
    luma = noise(240, 640)[0, ..., 0]
    planes = [luma, luma[::2, ::2], 255 - luma[::2, ::2]]
    settings = {"codec": "libx264", "pixel_format": "yuv420p", "options": {"qp": "0"}, "full_range": full_range}
    video = write_planes(tmp_path / "a.mp4", planes, matrix=matrix, **settings)
    if matrix == 8:  # unknown to swscale: shown as if it were unspecified
        video.rename(tmp_path / "reserved.mp4")
        unspecified = write_planes(tmp_path / "a.mp4", planes, matrix=2, **settings)
        shown, expected = (
            decode_clip(str(path), start_s=0, frames=1, fps=8, height=96, width=96, timeout_s=30)
            for path in (tmp_path / "reserved.mp4", unspecified)
        )
        assert np.array_equal(shown, expected)
    assert_as_scaled_whole(video, (96, 256), 96, 96)


def test_a_video_may_change_its_size(tmp_path: Path) -> None:
    parts = [write_video(tmp_path / f"{width}.h264", noise(240, width), rate=25) for width in (640, 480, 640)]
    joined = tmp_path / "joined.h264"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    clip = {"start_s": 0, "fps": 25, "height": 96, "width": 96, "timeout_s": 30}
    expected = [decode_clip(str(part), frames=2, **clip) for part in parts]
    assert np.array_equal(decode_clip(str(joined), frames=6, **clip), np.concatenate(expected))


def test_cuts_fall_where_the_edges_of_pixels_meet() -> None:
    assert unseen_px(1280, 455, 256) == 256 and unseen_px(1920, 455, 256) == 384
    assert unseen_px(1280, 455, 455) == 0  # all is seen
    assert unseen_px(636, 212, 100) == 144 and unseen_px(642, 214, 100) == 0  # half a sample of chroma at the end
    assert unseen_px(1283, 455, 256) == 0  # edges meet nowhere
    for source, scaled, seen in product(range(64, 2000, 36), range(64, 500, 30), range(32, 500, 32)):
        unseen = unseen_px(source, scaled, seen)
        assert unseen * scaled % source == 0 and unseen % 4 == 0
        assert unseen == 0 or unseen * scaled // source + 6 <= (scaled - seen) // 2
