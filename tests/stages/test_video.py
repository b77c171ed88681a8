"""Files of videos: their colours as other programs read them, what they say of themselves, whole or absent."""

import json
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from stages.animation import write_animation
from stages.video import read_tags, write_mp4

RNG = np.random.default_rng(0)
CLIP = RNG.integers(0, 256, (7, 32, 48, 3), dtype=np.uint8)
COLOURS = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (120, 30, 200)]


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_bt709_in_limited_range_and_the_file_says_so(colour: tuple[int, int, int], tmp_path: Path) -> None:
    """Held against ITU-R BT.709's equations, and against the codes of ITU-T H.273, where 1 is BT.709."""
    path = tmp_path / "a.mp4"
    write_mp4(path, np.full((3, 64, 48, 3), colour, np.uint8), 8, crf=0)
    red, green, blue = (level / 255 for level in colour)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = (16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
        frame = next(container.decode(video=0))
        assert (frame.color_primaries, frame.color_trc, frame.colorspace, frame.color_range) == (1, 1, 1, 1)
        assert frame.format.name == "yuv420p"
        planes = [np.frombuffer(plane, np.uint8)[: plane.width] for plane in frame.planes]
    assert np.abs(np.array([plane.mean() for plane in planes]) - expected).max() <= 1
    box = path.read_bytes().partition(b"colr")[2]  # what players that open no stream look at
    assert (box[:4], struct.unpack(">HHHB", box[4:11])) == (b"nclx", (1, 1, 1, 0))


def test_a_video_says_of_itself_what_it_is_given(tmp_path: Path) -> None:
    told = {"title": 'Eine Stadt bei "Nacht" 夜\n2', "comment": json.dumps({"long": "é" * 5000})}
    write_mp4(tmp_path / "a.mp4", CLIP, 8, tags=told)
    assert {key: read_tags(tmp_path / "a.mp4")[key] for key in told} == told
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # still playable while it loads


@pytest.mark.parametrize("suffix", ["mp4", "gif", "png"])
def test_a_file_that_fails_half_way_is_not_there_and_the_old_one_stays(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text("old")

    def write(frames: np.ndarray) -> None:
        if suffix == "mp4":
            write_mp4(path, frames, 8)
        else:
            write_animation(path, frames, 8, suffix)  # type: ignore[arg-type]

    broken = np.empty(2, object)
    broken[:] = [CLIP[0], "no picture"]
    with pytest.raises((ValueError, TypeError, AttributeError, IndexError)):
        write(broken)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_text() == "old"
    write(CLIP)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.stat().st_size > 1000


@pytest.mark.parametrize(("kind", "levels"), [("png", 0), ("gif", 80)])
def test_an_animation_has_all_frames_at_the_rate_asked_for(kind: str, levels: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_animation(path, CLIP, 8, kind)  # type: ignore[arg-type]
    with Image.open(path) as image:
        assert (image.format, image.n_frames, image.info["loop"]) == (kind.upper(), 7, 0)  # type: ignore[attr-defined]
        starts_ms = [0.0]
        for number, expected in enumerate(CLIP.astype(int)):
            image.seek(number)
            assert np.abs(np.asarray(image.convert("RGB")) - expected).max() <= levels
            starts_ms.append(starts_ms[-1] + image.info["duration"])
    assert np.abs(np.array(starts_ms) - 125 * np.arange(8)).max() <= 5  # never drifts, though GIF counts by 10 ms
