"""What is left out of a clip: never a picture of it, against passes of PyAV's own over every frame."""

from pathlib import Path

import av
import numpy as np
import pytest

from stages.decoding.decode import decode_clip
from stages.errors import DecodeError
from tests.videos import cut_without_encoding, write_video

PYRAMID = {"x264-params": "bframes=5:b-adapt=0:keyint=40:log-level=-1"}
OPEN_GOPS = {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=24:log-level=-1"}
LONG_GOP = {"x264-params": "bframes=5:b-adapt=0:keyint=200:crf=14:log-level=-1"}
SHORT_GOPS = {"x264-params": "bframes=3:b-adapt=0:keyint=15:log-level=-1"}
FIELDS = {"x264-params": "tff=1:bframes=3:log-level=-1"}


def drifting(count: int) -> np.ndarray:
    """Blocks that move, under noise: no two frames are the same, and each is made of those around it."""
    random = np.random.default_rng(0)
    blocks = random.integers(30, 220, (20, 30, 3)).repeat(8, 0).repeat(8, 1)
    frames = [blocks[i % 40 : i % 40 + 64, i : i + 96] + random.normal(0, 5, (64, 96, 1)) for i in range(count)]
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def every_frame(path: Path) -> tuple[np.ndarray, list[float]]:
    """All frames [T, 64, 96, 3] by PyAV's own defaults, and when they are on screen, in seconds from the first."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        frames = list(container.decode(video=0))
    scaled = [f.reformat(format="rgb24", interpolation=0x4 | 0x2000 | 0x40000 | 0x80000) for f in frames]
    return np.stack([f.to_ndarray() for f in scaled]), [f.time - frames[0].time for f in frames]


def decode(path: Path, start_s: float, count: int, fps: float) -> np.ndarray:
    return decode_clip(str(path), start_s=start_s, frames=count, fps=fps, height=64, width=96, timeout_s=30)


def assert_same(path: Path) -> None:
    pictures, times = every_frame(path)
    for start_s, fps, count in ((0, 8, 10), (0.03, 12, 9), (0.7, 10, 12), (1.21, 8, 6), (1.6, 25, 10)):
        wanted = [start_s + index / fps for index in range(count)]
        numbers = [max(n for n, time in enumerate(times) if time <= at + 6e-4) for at in wanted]
        assert np.array_equal(decode(path, start_s, count, fps), pictures[numbers]), (path.name, start_s, fps)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("options", [{}, {"bf": "0"}, PYRAMID, OPEN_GOPS, FIELDS], ids=str)
def test_the_pictures_are_those_of_a_whole_pass(tmp_path: Path, name: str, options: dict[str, str]) -> None:
    assert_same(write_video(tmp_path / name, drifting(75), rate=30, options=options))


@pytest.mark.parametrize("first_ms", [0, 700])
def test_so_are_those_at_unsteady_times(tmp_path: Path, first_ms: int) -> None:
    times = [first_ms + int(at) for at in np.random.default_rng(1).integers(15, 50, 75).cumsum()]
    assert_same(write_video(tmp_path / "a.mkv", drifting(75), times_ms=times, options=PYRAMID))


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mov"])
def test_so_are_those_after_a_hidden_beginning(tmp_path: Path, name: str) -> None:
    whole = write_video(tmp_path / "whole.mp4", drifting(110), rate=30, options=PYRAMID)
    assert_same(cut_without_encoding(whole, tmp_path / name, 1.0))


@pytest.mark.parametrize("missing", [1, 3])
@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv"])
def test_so_are_those_of_a_stream_without_its_first_frames(tmp_path: Path, name: str, missing: int) -> None:
    whole = write_video(tmp_path / "whole.mp4", drifting(110), rate=30, options=SHORT_GOPS)
    with av.open(str(whole)) as source, av.open(str(tmp_path / name), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in list(source.demux(source.streams.video[0]))[missing:-1]:
            packet.stream = stream
            target.mux(packet)
    assert_same(tmp_path / name)


def packets(path: Path) -> list[tuple[float, int, int, bool]]:
    """When each frame of H.264 in MP4 is shown, its place and size in the file, and whether others refer to it."""
    with av.open(str(path)) as container:
        found = [p for p in container.demux(video=0) if p.size]
        slices = [next(unit for unit in units(bytes(p)) if unit[0] & 31 in (1, 5)) for p in found]
        return [
            (float(p.pts * p.time_base), p.pos, p.size, bool(s[0] >> 5 & 3)) for p, s in zip(found, slices, strict=True)
        ]


def units(packet: bytes) -> list[bytes]:
    """The NAL units of a packet, each of which follows its length."""
    found = []
    while packet:
        end = 4 + int.from_bytes(packet[:4], "big")
        found.append(packet[4:end])
        packet = packet[end:]
    return found


@pytest.mark.parametrize("hidden_s", [0.0, 1.0])
def test_damage_is_found_unless_it_is_in_what_is_left_out(tmp_path: Path, hidden_s: float) -> None:
    video = write_video(tmp_path / "whole.mp4", drifting(110), rate=30, options=LONG_GOP)
    if hidden_s:
        video = cut_without_encoding(video, tmp_path / "cut.mp4", hidden_s)
    data = video.read_bytes()
    clip = {"start_s": 0.034, "count": 6, "fps": 10}  # frames 1, 4, 7, ... 16: to none of them others refer
    good = decode(video, **clip)
    seen = unseen = 0
    for time_s, position, size, refers in packets(video):
        number = round(30 * time_s)
        if not 0 < number < 17:
            continue
        half = slice(position + size // 2, position + size)
        (tmp_path / "bad.mp4").write_bytes(data[: half.start] + bytes(size - size // 2) + data[half.stop :])
        if refers or number % 3 == 1:
            with pytest.raises(DecodeError, match="damaged|Invalid") as caught:
                decode(tmp_path / "bad.mp4", **clip)
            assert caught.value.reason == "undecodable"
            seen += 1
        else:
            assert np.array_equal(decode(tmp_path / "bad.mp4", **clip), good)
            unseen += 1
    assert seen >= 8 and unseen >= 4


def test_real_clips_lose_nothing_either(assets: Path) -> None:
    for name in ("faststart_flower.mp4", "vfr_flower.mp4", "three_scenes_cuts_at_2s_4s.mp4"):
        pictures, times = every_frame(assets / "videos/odd" / name)
        height, width = pictures.shape[1:3]
        clip = {"frames": 6, "fps": 12, "height": height, "width": width, "timeout_s": 30}
        shown = decode_clip(str(assets / "videos/odd" / name), start_s=0.1, **clip)
        numbers = [max(n for n, time in enumerate(times) if time <= 0.1 + i / 12 + 1e-5) for i in range(6)]
        assert np.array_equal(shown, pictures[numbers]), name
