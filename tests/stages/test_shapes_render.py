"""The rendered dataset: what it holds, that it is the same each time, and that its colours survive H.264."""

import itertools
import json
import re
from pathlib import Path

import av
import decord
import numpy as np
import pytest

from stages.errors import ConfigError
from stages.shapes import render
from stages.shapes.render import (
    BACKGROUND,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Combination,
    ShapesConfig,
    caption,
    combinations,
    held_out,
    parse_caption,
    render_dataset,
    seen,
)

CONFIG = ShapesConfig(clips=57)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    render_dataset(folder, CONFIG)
    return folder


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "InternVid-shapes.jsonl").read_text().splitlines()]


def video_of(folder: Path, row: dict) -> Path:
    name = f"{row['YoutubeID']}_{row['Start_timestamp']}_{row['End_timestamp']}.mp4"
    return folder / "videos" / name


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_held_out_combinations_leave_every_pair_of_attributes_in_training():
    assert len(combinations()) == 72 and len(held_out()) == 15
    assert sorted(seen() + held_out()) == sorted(combinations())
    for one, other in itertools.combinations(("colour", "shape", "direction"), 2):
        pairs = {(getattr(c, one), getattr(c, other)) for c in combinations()}
        assert {(getattr(c, one), getattr(c, other)) for c in seen()} == pairs


def test_caption_and_parse_are_inverse():
    assert caption(Combination("red", "ball", "left")) == "a red ball moves left"
    assert [parse_caption(caption(c)) for c in combinations()] == combinations()
    assert parse_caption("  A Red  ball moves LEFT ") == Combination("red", "ball", "left")


@pytest.mark.parametrize(
    "text", ["", "a red ball", "a red ball moves away", "the red ball moves left", "a red ball is left"]
)
def test_other_texts_are_no_captions(text: str):
    with pytest.raises(ConfigError, match="not a caption"):
        parse_caption(text)


def test_metadata_is_of_internvids_format_and_names_every_file(dataset: Path):
    lines = rows(dataset)
    assert len(lines) == CONFIG.clips
    for row in lines:
        assert re.fullmatch(r"[A-Za-z0-9_-]{11}", row["YoutubeID"])
        assert (row["Start_timestamp"], row["End_timestamp"]) == ("00:00:00.000", "00:00:01.000")
        assert isinstance(row["Aesthetic_Score"], float) and isinstance(row["UMT_Score"], float)
    assert {video_of(dataset, row) for row in lines} == set((dataset / "videos").iterdir())
    assert {parse_caption(row["Caption"]) for row in lines} == set(seen())


def test_prompts_name_seen_combinations_once_and_held_out_ones_eight_times(dataset: Path):
    prompts = (dataset / "prompts.txt").read_text().splitlines()
    assert {c: prompts.count(caption(c)) for c in combinations()} == {
        **dict.fromkeys(seen(), 1),
        **dict.fromkeys(held_out(), 8),
    }


def test_videos_are_h264_of_the_configured_size_rate_and_length(dataset: Path):
    with av.open(str(video_of(dataset, rows(dataset)[0]))) as container:
        (stream,) = container.streams
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.height, stream.width, stream.average_rate, stream.frames) == (64, 64, 8, 8)
        assert float(stream.duration * stream.time_base) == pytest.approx(1.0)
        assert [float(frame.time) for frame in container.decode(stream)] == pytest.approx(np.arange(8) / 8)


def test_both_decoders_see_the_named_colour_and_the_background(dataset: Path):
    for row in rows(dataset):
        path, combination = video_of(dataset, row), parse_caption(row["Caption"])
        frames = decoded(path)
        both = decord.VideoReader(str(path)).get_batch(range(8)).asnumpy()
        assert np.abs(frames.astype(int) - both).max() <= 3
        first = frames[0].reshape(-1, 3).astype(int)
        wanted = np.array(COLOURS[combination.colour])
        assert np.abs(np.median(first, axis=0) - BACKGROUND).max() <= 3
        nearest = np.abs(first - wanted).max(axis=1)
        assert (nearest < 16).sum() > 60  # the inside of even the smallest shape


def test_shapes_stay_in_the_picture_and_go_the_named_way():
    for number, combination in enumerate(combinations()):
        frames = render.render_frames(combination, ShapesConfig(), np.random.default_rng(number))
        shown = np.abs(frames.astype(int) - BACKGROUND).max(axis=3) > 0
        assert not shown[:, [0, -1]].any() and not shown[:, :, [0, -1]].any()
        first, last = (np.argwhere(shown[t]).mean(axis=0)[::-1] for t in (0, -1))
        step = np.array(DIRECTIONS[combination.direction])
        assert (last - first) @ step > 16
        assert np.abs((last - first) * (1 - np.abs(step))).max() < 1


@pytest.mark.parametrize(("shape", "share"), [("ball", np.pi / 4), ("square", 1.0), ("triangle", 0.5)])
def test_shapes_fill_their_bounding_boxes_as_in_geometry(shape: str, share: float):
    assert set(SHAPES) == {"ball", "square", "triangle"}
    cover = render.shape_coverage(shape, (50.0, 55.0), 20.0, 100)
    inside = np.argwhere(cover > 0.5)
    height, width = inside.max(axis=0) - inside.min(axis=0) + 1
    assert cover.sum() / (height * width) == pytest.approx(share, rel=0.04)
    if shape != "triangle":  # the sampled centroid of the antialiased triangle is the true one too
        assert inside.mean(axis=0) + 0.5 == pytest.approx([55.0, 50.0], abs=0.5)
    weighted = (np.argwhere(cover > 0) + 0.5) * cover[cover > 0][:, None]
    assert weighted.sum(axis=0) / cover.sum() == pytest.approx([55.0, 50.0], abs=0.2)


def test_rendering_again_gives_the_same_clips_and_a_complete_folder_is_left_alone(dataset: Path, tmp_path: Path):
    again = tmp_path / "again"
    render_dataset(again, CONFIG)
    files = sorted(path.relative_to(dataset) for path in dataset.rglob("*") if path.is_file())
    assert len(files) == CONFIG.clips + 3
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    texts = [name for name in files if name.suffix != ".mp4"]  # x264 itself now and then gives other bytes
    assert len(texts) == 3 and all((dataset / name).read_bytes() == (again / name).read_bytes() for name in texts)
    marked = sorted((again / "videos").iterdir())[0]
    marked.write_bytes(b"untouched")
    assert render_dataset(again, CONFIG) == (again / "InternVid-shapes.jsonl", again / "videos")
    assert marked.read_bytes() == b"untouched"


def test_sizes_places_and_speeds_follow_the_seed(tmp_path: Path):
    for seed in (1, 2):
        render_dataset(tmp_path / str(seed), ShapesConfig(clips=2, seed=seed))
    one, other = (sorted(p.read_bytes() for p in (tmp_path / s / "videos").iterdir()) for s in ("1", "2"))
    assert one != other


def test_a_folder_of_another_config_or_of_other_things_is_refused(dataset: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="clips is 57 there, 58 wanted"):
        render_dataset(dataset, ShapesConfig(clips=58))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a shapes dataset"):
        render_dataset(tmp_path, CONFIG)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_interrupted_rendering_leaves_no_dataset_and_the_next_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Path
):
    folder = tmp_path / "shapes"
    written, real = [], render.write_mp4

    def failing(path: Path, frames: np.ndarray, fps: float, *, crf: int) -> None:
        if len(written) == 5:
            raise OSError("disk full")
        written.append(path)
        real(path, frames, fps, crf=crf)

    monkeypatch.setattr(render, "write_mp4", failing)
    with pytest.raises(OSError, match="disk full"):
        render_dataset(folder, CONFIG)
    assert not folder.exists()
    monkeypatch.undo()
    render_dataset(folder, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["shapes"]
    assert len(list((folder / "videos").iterdir())) == CONFIG.clips


@pytest.mark.parametrize(("setting", "value"), [("clips", 0), ("size_px", 63), ("size_px", 16), ("frames", 1)])
def test_impossible_settings_are_refused(setting: str, value: int):
    with pytest.raises(ConfigError, match=setting):
        ShapesConfig(**{setting: value})
