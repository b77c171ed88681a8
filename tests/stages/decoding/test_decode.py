"""Decoding, against independent answers: which frame is on screen when, and which colour it has."""

import os
import socket
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from stages.decoding.decode import Decoder, decode_clip, decode_source, hard_deadline
from stages.decoding.decord_reader import read_shown_by_decord
from stages.decoding.pyav_frames import Deadline
from stages.decoding.pyav_reader import probe
from stages.errors import DecodeError
from stages.planning.plan import PlannedClip
from tests.videos import (
    cut_without_encoding,
    flip_bits,
    numbered,
    numbers_of,
    write_audio,
    write_planes,
    write_video,
)

DECODERS: tuple[Decoder, ...] = ("pyav", "decord")
X265 = {"x265-params": "log-level=none"}


def decode(path: Path, frames: int = 8, *, start_s: float = 0.0, fps: float = 8, **options) -> np.ndarray:
    settings = {"height": 32, "width": 32, "timeout_s": 30.0} | options
    return decode_clip(str(path), start_s=start_s, frames=frames, fps=fps, **settings)


def reason(path: Path, frames: int = 8, **options) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(path, frames, **options)
    assert str(caught.value)
    return caught.value.reason


def on_screen(times_ms: list[int], count: int, start_ms: int = 0, fps: int = 8) -> list[int]:
    """The last frame that began at or before each wanted time, by whole numbers."""
    wanted = (start_ms * fps + 1000 * index for index in range(count))
    return [max(n for n, time in enumerate(times_ms) if (time - times_ms[0]) * fps <= at) for at in wanted]


def steady(rate: Fraction | int, count: int, wanted: int) -> list[int]:
    frames = [Fraction(number) / rate for number in range(count)]
    return [max(n for n, at in enumerate(frames) if at <= Fraction(index, 8)) for index in range(wanted)]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("rate", [8, 12, 24, 25, Fraction(30000, 1001), 30, 60])
def test_frames_are_those_on_screen_at_the_wanted_times(tmp_path: Path, rate, decoder: Decoder) -> None:
    count = int(2 * rate) + 2
    video = write_video(tmp_path / "steady.mp4", numbered(count), rate=rate)
    assert numbers_of(decode(video, 16, decoder=decoder)) == steady(rate, count, 16)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.avi", "a.ts", "a.flv"])
def test_the_container_does_not_matter(tmp_path: Path, name: str, decoder: Decoder) -> None:
    video = write_video(tmp_path / name, numbered(64), rate=24)
    assert numbers_of(decode(video, 16, decoder=decoder)) == steady(24, 64, 16)


@pytest.mark.parametrize(
    ("codec", "name", "pixel_format", "options"),
    [
        ("libx264", "a.mp4", "yuv444p10le", None),
        ("libx265", "a.mp4", "yuv420p10le", X265),
        ("libvpx-vp9", "a.webm", "yuv420p", {"deadline": "realtime"}),
        ("libsvtav1", "a.mp4", "yuv420p", {"preset": "8", "crf": "10"}),
        ("mpeg4", "a.avi", "yuv420p", {"qscale": "2"}),
        ("mjpeg", "a.mov", "yuvj420p", {"qscale": "2"}),
        ("ffv1", "a.mkv", "gray", {}),
    ],
)
@pytest.mark.parametrize("decoder", DECODERS)
def test_the_codec_does_not_matter(tmp_path, codec, name, pixel_format, options, decoder) -> None:
    frames = numbered(26, 96, 128)
    video = write_video(tmp_path / name, frames, rate=24, codec=codec, pixel_format=pixel_format, options=options)
    assert numbers_of(decode(video, decoder=decoder)) == steady(24, 26, 8)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("first_ms", [0, 500])
def test_a_variable_frame_rate_gives_the_right_frames(tmp_path: Path, decoder: Decoder, first_ms: int) -> None:
    gaps = np.random.default_rng(7).integers(15, 110, 100)
    times = [int(first_ms + gaps[:n].sum()) for n in range(100)]
    video = write_video(tmp_path / "vfr.mkv", numbered(100), times_ms=times)
    assert numbers_of(decode(video, 32, decoder=decoder)) == on_screen(times, 32)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("start_ms", [30, 1001, 1999, 2501])
def test_a_clip_inside_a_long_video_starts_at_its_time(tmp_path: Path, start_ms: int, decoder: Decoder) -> None:
    video = write_video(tmp_path / "long.mp4", numbered(140), rate=40)
    wanted = on_screen([25 * n for n in range(140)], 8, start_ms)
    assert numbers_of(decode(video, start_s=start_ms / 1000, decoder=decoder)) == wanted


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", ["cut.mp4", "cut.mov"])
def test_a_clip_cut_without_encoding_starts_where_it_was_cut(tmp_path: Path, name: str, decoder: Decoder) -> None:
    whole = write_video(tmp_path / "whole.mp4", numbered(120), options={"g": "48", "bf": "3", "crf": "12"})
    cut = cut_without_encoding(whole, tmp_path / name, 1.0)
    assert numbers_of(decode(cut, decoder=decoder)) == [30 + n for n in steady(30, 60, 8)]


def test_decord_is_asked_where_it_can_be_relied_on(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", numbered(120), options={"g": "48", "bf": "3", "crf": "12"})
    cut = cut_without_encoding(whole, tmp_path / "cut.mp4", 1.0)
    stream = write_video(tmp_path / "stream.ts", numbered(60))
    for path, relied_on in ((whole, True), (cut, False), (stream, False)):
        shown = read_shown_by_decord(str(path), [0.0, 0.125], 32, 32, Deadline(30))
        assert (shown is not None) == relied_on


def test_one_frame_is_enough_for_one(tmp_path: Path) -> None:
    video = write_video(tmp_path / "one.mp4", numbered(1), rate=30)
    assert numbers_of(decode(video, 1)) == [0]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_video_comes_upright(tmp_path: Path, degrees: int, decoder: Decoder) -> None:
    corners = np.zeros((64, 64, 3), np.uint8)
    corners[:32, :32], corners[:32, 32:], corners[32:, :32] = (200, 40, 40), (40, 200, 40), (40, 40, 200)
    frames = np.stack([corners] * 10)
    video = write_video(tmp_path / "turned.mp4", frames, rate=8, rotation=degrees)
    shown = decode(video, decoder=decoder)[0].astype(int)
    upright = np.rot90(corners, degrees // 90)[::2, ::2].astype(int)  # the tag says: turn counterclockwise
    inner = np.r_[2:13, 19:30]  # away from edges, which are filtered
    assert np.abs(shown - upright)[np.ix_(inner, inner)].max() < 25


@pytest.mark.parametrize("decoder", DECODERS)
def test_pixels_that_are_not_square_are_stretched(tmp_path: Path, decoder: Decoder) -> None:
    """Stored 64 x 64, shown 128 x 64: a square crop holds the middle half of the width."""
    quarters = np.repeat(np.array([30, 90, 150, 210], np.uint8), 16)
    frames = np.broadcast_to(quarters[None, None, :, None], (10, 64, 64, 3))
    video = write_video(tmp_path / "wide.mp4", frames, rate=8, pixel_aspect=Fraction(2))
    assert (probe(str(video)).height, probe(str(video)).width) == (64, 128)
    row = decode(video, decoder=decoder)[0, 16, :, 0]
    assert np.abs(row[2:13] - 90.0).max() < 8 and np.abs(row[19:30] - 150.0).max() < 8


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 24), (16, 64), (96, 128), (33, 57)])
def test_a_picture_covers_the_bucket_and_keeps_its_shape(tmp_path: Path, height: int, width: int) -> None:
    """Columns 0..63 as grey levels: the middle of the picture is in the middle of every bucket."""
    ramp = np.broadcast_to(np.arange(16, 16 + 3 * 64, 3, np.uint8)[None, None, :, None], (9, 48, 64, 3))
    video = write_video(tmp_path / "ramp.mp4", ramp, rate=8)
    shown = decode(video, height=height, width=width)
    assert shown.shape == (8, height, width, 3)
    scale = max(height / 48, width / 64)
    columns = (np.arange(width) + 0.5 - width / 2) / scale + 32 - 0.5
    inside = slice(2, -2)
    assert np.abs(shown[0, height // 2, inside, 0] - (16 + 3 * columns)[inside]).max() < 3


PATCHES = np.array([[40, 60, 200], [190, 30, 50], [30, 170, 60], [220, 220, 40], [128, 128, 128], [20, 20, 20]])


def to_planes(rgb: np.ndarray, matrix: int, full_range: bool, bits: int) -> list[np.ndarray]:
    """Y, Cb, Cr of ITU-T H.273, equations 38 to 46, rounded to whole steps."""
    red, blue = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}[matrix]
    y = rgb @ np.array([red, 1 - red - blue, blue]) / 255
    cb, cr = (rgb[..., 2] / 255 - y) / (2 * (1 - blue)), (rgb[..., 0] / 255 - y) / (2 * (1 - red))
    top = 2**bits - 1
    if full_range:
        planes = [y * top, cb * top + 2 ** (bits - 1), cr * top + 2 ** (bits - 1)]
    else:
        unit = 2 ** (bits - 8)
        planes = [(219 * y + 16) * unit, (224 * cb + 128) * unit, (224 * cr + 128) * unit]
    return [np.rint(plane).astype(np.uint16 if bits > 8 else np.uint8) for plane in planes]


@pytest.mark.parametrize(
    ("codec", "pixel_format", "matrix", "full_range", "options"),
    [
        ("libx264", "yuv444p", 6, False, {"qp": "0"}),
        ("libx264", "yuv420p", 6, False, {"qp": "0"}),
        ("libx264", "yuv420p", 1, False, {"qp": "0"}),
        ("libx264", "yuvj420p", 1, True, {"qp": "0"}),
        ("libx264", "yuv420p10le", 9, False, {"qp": "0"}),
        ("libx265", "yuv420p10le", 1, False, {"x265-params": "lossless=1:log-level=none"}),
        ("libx265", "yuv420p", 6, True, {"x265-params": "lossless=1:range=full:log-level=none"}),
    ],
)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("patch_px", [32, 24])  # at the size of the source, and scaled
def test_colours_are_right(tmp_path, codec, pixel_format, matrix, full_range, options, patch_px, decoder) -> None:
    picture = np.repeat(np.repeat(PATCHES.reshape(2, 3, 3), 32, 0), 32, 1)
    bits = 10 if "10" in pixel_format else 8
    planes = to_planes(picture.astype(float), matrix, full_range, bits)
    if "420" in pixel_format:
        planes[1:] = [plane[::2, ::2] for plane in planes[1:]]
    settings = {"codec": codec, "pixel_format": pixel_format, "options": options}
    video = write_planes(tmp_path / "a.mp4", planes, matrix=matrix, full_range=full_range, **settings)
    shown = decode(video, height=2 * patch_px, width=3 * patch_px, decoder=decoder)[0].astype(float)
    inner = slice(patch_px // 4, 3 * patch_px // 4)
    patches = shown.reshape(2, patch_px, 3, patch_px, 3)[:, inner, :, inner].mean((1, 3)).reshape(6, 3)
    # Where nothing is scaled, decord's swscale takes short cuts on some processors, which round downwards.
    most, bias = (3.2, 2.0) if decoder == "decord" and patch_px == 32 else (2.2, 0.5)
    assert np.abs(patches - PATCHES).max() < most
    assert abs((patches - PATCHES).mean()) < bias  # roundings do not add up


@pytest.mark.parametrize("full_range", [False, True])
def test_gray_is_gray(tmp_path: Path, full_range: bool) -> None:
    luma = np.repeat(np.linspace(16, 235, 8).astype(np.uint8), 8)[None].repeat(48, 0)
    settings = {"codec": "libx264", "pixel_format": "gray", "options": {"qp": "0"}}
    video = write_planes(tmp_path / "gray.mp4", [luma], full_range=full_range, **settings)
    shown = decode(video, height=48, width=64)[0]
    assert (shown[..., 0] == shown[..., 1]).all() and (shown[..., 0] == shown[..., 2]).all()
    levels = luma.astype(float) if full_range else (luma - 16.0) * 255 / 219
    inside = np.arange(64) % 8 // 2 % 3 != 0  # away from the steps
    assert np.abs(shown[..., 0] - levels)[:, inside].max() <= 1


def test_a_reserved_matrix_is_no_reason_to_reject(tmp_path: Path) -> None:
    planes = [np.full((48, 64), 100, np.uint8)] + 2 * [np.full((24, 32), 128, np.uint8)]
    settings = {"codec": "libx264", "pixel_format": "yuv420p", "options": {"qp": "0"}}
    video = write_planes(tmp_path / "a.mp4", planes, matrix=8, **settings)  # YCgCo, which swscale refuses
    assert abs(decode(video).mean() - (100 - 16) * 255 / 219) < 2


BROKEN = {
    "empty.mp4": b"",
    "page.mp4": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "noise.mp4": np.random.default_rng(0).bytes(4096),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_video_is_named_undecodable(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BROKEN[name])
    assert reason(tmp_path / name) == "undecodable"


def test_a_playlist_does_not_reach_the_network(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n")
        assert reason(tmp_path / "list.m3u8") == "undecodable"
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_colon_in_a_name_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", numbered(24), rate=24)
    (tmp_path / "a.mp4").rename(tmp_path / "data:1.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(decode(Path("data:1.mp4"))) == 8


def test_other_files_are_named(tmp_path: Path) -> None:
    assert reason(tmp_path / "absent.mp4") == "missing_file"
    assert reason(tmp_path) == "undecodable"
    audio = write_audio(tmp_path / "audio.mp4")
    with pytest.raises(DecodeError, match="found: audio") as caught:
        decode(audio)
    assert caught.value.reason == "undecodable"


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", numbered(60))
    start = write_video(tmp_path / "start.mkv", numbered(60))
    for source in (whole, start):
        source.write_bytes(source.read_bytes()[: source.stat().st_size * 6 // 10])
    assert reason(whole, 12) == "undecodable"  # its index was at the end
    assert reason(start, 12) in ("undecodable", "too_short")


def noise(count: int) -> np.ndarray:
    """Blocks of noise: every part of the coded file matters to every frame."""
    return np.random.default_rng(0).integers(0, 255, (count, 24, 32, 3), np.uint8).repeat(8, 1).repeat(8, 2)


def test_damage_that_the_decoder_conceals_is_found(tmp_path: Path) -> None:
    """H.264 may decode a wrong bit into a wrong picture without noticing, but seldom to the end of a frame."""
    video = write_video(tmp_path / "good.mp4", noise(20), rate=16, options={"g": "20", "crf": "20"})
    decode(video)
    found = 0
    for seed in range(10):
        bad = flip_bits(video, tmp_path / "bad.mp4", np.random.default_rng(seed).uniform(0.1, 0.5, 8))
        try:
            decode(bad)
        except DecodeError as error:
            assert error.reason == "undecodable"
            found += 1
    assert found >= 9


def test_damage_after_the_clip_does_not_matter(tmp_path: Path) -> None:
    video = write_video(tmp_path / "good.mp4", noise(60), rate=16, options={"g": "20", "crf": "20"})
    bad = flip_bits(video, tmp_path / "bad.mp4", np.linspace(0.8, 0.9, 99))
    assert (decode(bad) == decode(video)).all()
    assert reason(bad, 28) == "undecodable"


def test_a_late_clip_is_read_from_the_key_frame_before_it(tmp_path: Path) -> None:
    """What is broken in front of it is not even looked at."""
    video = write_video(tmp_path / "good.mp4", noise(60), rate=16, options={"g": "20", "crf": "20"})
    data = video.read_bytes()
    cut = len(data) // 10
    (tmp_path / "bad.mp4").write_bytes(data[:cut] + bytes(cut) + data[2 * cut :])
    assert reason(tmp_path / "bad.mp4") == "undecodable"
    assert (decode(tmp_path / "bad.mp4", start_s=2.6) == decode(video, start_s=2.6)).all()


def test_the_last_wanted_frame_decides_what_is_too_short(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", numbered(24), rate=24)  # 1.000 s
    assert len(decode(video, 8)) == 8
    assert reason(video, 9) == "too_short"
    assert reason(video, 8, start_s=0.2) == "too_short"
    assert reason(video, 1, start_s=100.0) == "too_short"


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_slow_source_is_refused_and_an_unsteady_one_is_not(tmp_path: Path, decoder: Decoder) -> None:
    for rate in (1, 4, Fraction(15, 2)):
        slow = write_video(tmp_path / "slow.mp4", numbered(int(3 * rate) + 1), rate=rate)
        assert reason(slow, 16, decoder=decoder) == "low_frame_rate"
    pauses = [1000 * second + 25 * number for second in range(4) for number in range(12)]
    video = write_video(tmp_path / "pauses.mkv", numbered(48), times_ms=pauses)  # 12 fps on average
    assert reason(video, 24, decoder=decoder) == "low_frame_rate"
    burst = [*range(0, 500, 50), 700, 850]  # 12 fps on average, with a gap of 250 ms
    jitter = [1000 * second + time for second in range(4) for time in burst]
    video = write_video(tmp_path / "jitter.mkv", numbered(48), times_ms=jitter)
    shown = numbers_of(decode(video, 24, decoder=decoder))
    assert shown == on_screen(jitter, 24) and len(set(shown)) == 21


def test_a_deadline_is_kept(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", numbered(24), rate=24)
    assert reason(video, timeout_s=0.0) == "timeout"
    assert reason(video, timeout_s=0.0, decoder="decord") == "timeout"


def test_a_hard_deadline_ends_the_process() -> None:
    def run(seconds: float) -> subprocess.CompletedProcess:
        code = (
            "import time; from stages.decoding.decode import hard_deadline\n"
            f"with hard_deadline({seconds}): time.sleep(1)\n"
            "time.sleep(0.5); print('alive')"
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    hung, fine = run(0.3), run(1.2)
    assert hung.returncode == 1 and "Timeout" in hung.stderr and not hung.stdout
    assert fine.returncode == 0 and fine.stdout == "alive\n"
    with pytest.raises(ZeroDivisionError), hard_deadline(60):
        raise ZeroDivisionError


def test_no_file_stays_open_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = write_video(tmp_path / "a.mp4", numbered(24), rate=24)
    write_audio(tmp_path / "audio.mp4")
    for name, content in BROKEN.items():
        (tmp_path / name).write_bytes(content)
    bad = [flip_bits(good, tmp_path / "bits.mp4", [0.3]), tmp_path / "audio.mp4", tmp_path / "absent.mp4"]
    capfd.readouterr()
    before = len(os.listdir("/proc/self/fd"))
    for decoder in DECODERS:
        for _ in range(3):
            decode(good, decoder=decoder)
            for path in bad + [tmp_path / name for name in BROKEN]:
                try:
                    decode(path, 3, decoder=decoder)
                except DecodeError:
                    continue
    assert len(os.listdir("/proc/self/fd")) == before
    captured = capfd.readouterr()
    assert not captured.out and not captured.err


def test_decoding_loads_neither_torch_nor_decord() -> None:
    code = "import sys, stages.decoding.decode; print(sorted({'torch', 'decord', 'ray'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_probe_tells_what_players_show(tmp_path: Path, name: str) -> None:
    codec = {"codec": "libvpx-vp9", "options": {}} if name.endswith("webm") else {}
    rotation = {} if name.endswith("webm") else {"rotation": 90}
    info = probe(str(write_video(tmp_path / name, numbered(30), rate=20, **codec, **rotation)))
    assert info.duration_s == pytest.approx(1.5, abs=0.002) and info.fps == pytest.approx(20)
    assert (info.height, info.width) == ((48, 64) if name.endswith("webm") else (64, 48))


def test_every_valid_odd_video_decodes_and_every_broken_one_is_named(assets: Path) -> None:
    broken = {path.name: "undecodable" for path in (assets / "videos/odd").glob("bad_*")} | {
        "audio_only.mp4": "undecodable"
    }
    videos = sorted((assets / "videos/odd").iterdir())
    assert len(videos) == 26 and len(broken) == 7
    for path in videos:
        if path.name in broken:
            assert reason(path) == broken[path.name], path.name
        else:
            count = max(1, int(probe(str(path)).duration_s * 8 + 1e-6))
            assert len(decode(path, count)) == count, path.name
            assert reason(path, count + 2) == "too_short", path.name


def test_a_window_beyond_the_end_of_a_file_falls_back_to_the_clips_beginning(tmp_path: Path) -> None:
    path = str(write_video(tmp_path / "short.mp4", numbered(48), rate=24))  # 2 s, whatever its metadata says

    def planned(start_s: float, clip_start_s: float) -> PlannedClip:
        return PlannedClip("k", "s", "video", path, start_s, clip_start_s, 8.0, 9.0, "", None, None, None, None)

    def start(clip: PlannedClip) -> float:
        return decode_source(clip, 8, 32, 32, timeout_s=60, decoder="pyav").start_s

    assert start(planned(0.5, 0.25)) == 0.5
    assert start(planned(5.0, 0.25)) == 0.25
    with pytest.raises(DecodeError) as error:
        start(planned(5.0, 1.5))
    assert error.value.reason == "too_short"
