"""Reading metadata: InternVid's own rows and names, and every kind of line that is not one."""

import json
import os
import pickle
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.fuzz_metadata import KINDS, fuzz
from stages.errors import ConfigError
from stages.planning.metadata import Row, read_folder, read_internvid
from tests.videos import numbered, write_video

GOOD = {
    "YoutubeID": "-a_B3cDeF_0",
    "Start_timestamp": "00:01:51.578",
    "End_timestamp": "00:01:53.647",
    "Caption": "a dog runs",
    "Aesthetic_Score": 4.58984375,
    "UMT_Score": 0.39794921875,
}
CLIP = "-a_B3cDeF_0_00:01:51.578_00:01:53.647"

Read = Callable[..., list[Row]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads lines (objects, or raw bytes) as InternVid metadata beside a folder of empty files."""

    def reader(*lines: dict | bytes, files: tuple[str, ...] = ()) -> list[Row]:
        videos = tmp_path / "videos"
        for name in files:
            (videos / name).parent.mkdir(parents=True, exist_ok=True)
            (videos / name).touch()
        videos.mkdir(exist_ok=True)
        metadata = tmp_path / "metadata.jsonl"
        metadata.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
        return list(read_internvid(str(metadata), str(videos)))

    return reader


def test_a_published_row(read: Read) -> None:
    (row,) = read(GOOD, files=(f"{CLIP}.mp4",))
    assert row == Row(
        identity="-a_B3cDeF_0 111578 113647",
        source="-a_B3cDeF_0",
        caption="a dog runs",
        path=f"{CLIP}.mp4",
        duration_ms=2069,
        aesthetic=4.58984375,
        umt=0.39794921875,
        fields=GOOD,
    )


@pytest.mark.parametrize(
    "name",
    [
        f"{CLIP}.mp4",
        f"{CLIP}.webm",
        f"{CLIP}.MKV",
        f"InternVId-FLT_1/{CLIP}.mp4",
        "a/b/-a_B3cDeF_0_00-01-51-578_00-01-53-647.mp4",
        "-a_B3cDeF_0_00_01_51.578_00_01_53.647.mp4",
        "-a_B3cDeF_0_0：01：51.578_0：01：53.647.mp4",
    ],
)
def test_a_clip_is_found_under_every_name(read: Read, name: str) -> None:
    others = ("0a_B3cDeF_0_00:01:51.578_00:01:53.647.mp4", f"{CLIP}.txt", f".{CLIP}.mp4", f"{CLIP}.mp4.part")
    (row,) = read(GOOD, files=(name, *others))
    assert (row.path, row.start_ms, row.reason) == (name, 0, None)


def test_a_whole_video_is_cut_by_its_timestamps(read: Read) -> None:
    (row,) = read(GOOD, files=("whole/-a_B3cDeF_0.mp4",))
    assert (row.path, row.start_ms, row.duration_ms) == ("whole/-a_B3cDeF_0.mp4", 111578, 2069)


def test_a_clip_is_preferred_to_a_whole_video_and_mp4_to_others(read: Read) -> None:
    (row,) = read(GOOD, files=("-a_B3cDeF_0.mp4", f"z/{CLIP}.mp4", f"a/{CLIP}.avi", f"b/{CLIP}.webm"))
    assert row.path == f"z/{CLIP}.mp4"


def test_video_path_names_the_file(read: Read, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.mp4"
    elsewhere.touch()
    given = ["sub/1.mp4", "./sub/../sub/1.mp4", str(elsewhere), "whole/-a_B3cDeF_0.mp4", "gone.mp4"]
    files = ("sub/1.mp4", "whole/-a_B3cDeF_0.mp4", f"{CLIP}.mp4")
    rows = read(*(GOOD | {"video_path": path} for path in given), files=files)
    found = [(row.path, row.start_ms) for row in rows]
    assert found == [
        ("sub/1.mp4", 0),
        ("sub/1.mp4", 0),
        (str(elsewhere), 0),
        ("whole/-a_B3cDeF_0.mp4", 111578),
        (f"{CLIP}.mp4", 0),  # else it is looked for under its usual names
    ]


@pytest.mark.parametrize("path", ["../secret.mp4", "a/../../b.mp4", "s3://bucket/a.mp4", "", 7, "a\0b", "\ud800"])
def test_a_video_path_that_leads_elsewhere_is_a_bad_row(read: Read, path: object) -> None:
    (row,) = read(GOOD | {"video_path": path}, files=(f"{CLIP}.mp4",))
    assert row.reason == "bad_metadata" and "video_path" in str(row.message)


def test_a_file_that_is_not_there_has_no_path(read: Read) -> None:
    (row,) = read(GOOD)
    assert (row.path, row.reason, row.duration_ms) == (None, None, 2069)


def test_a_file_whose_path_cannot_be_stored_is_not_there(read: Read, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/videos/\xff"
    os.makedirs(folder)
    with open(folder + f"/{CLIP}.mp4".encode(), "wb"):
        (row,) = read(GOOD)
    assert (row.path, row.reason) == (None, None)


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "videos/real").mkdir(parents=True)
    (tmp_path / "videos/real" / f"{CLIP}.mp4").touch()
    for name in ("loop", "another"):  # without an end, each level has twice the folders of the one above
        os.symlink(tmp_path / "videos", tmp_path / "videos/real" / name)
    os.symlink(tmp_path / "videos/real", tmp_path / "linked")
    (tmp_path / "m.jsonl").write_text(json.dumps(GOOD))
    for folder in ("videos", "linked"):
        (row,) = read_internvid(str(tmp_path / "m.jsonl"), str(tmp_path / folder))
        assert row.path and row.path.endswith(f"{CLIP}.mp4")


@pytest.mark.parametrize(
    ("scores", "aesthetic", "umt"),
    [
        ({"Aesthetic_Score": 5, "CLIP_Score": 0.3}, 5.0, 0.3),
        ({"Aesthetic_Score": "4.5", "UMT_Score": 0.4, "CLIP_Score": 0.3}, 4.5, 0.4),
        ({}, None, None),
        ({"Aesthetic_Score": None, "UMT_Score": float("nan")}, None, None),
    ],
)
def test_scores_have_two_names_or_none(read: Read, scores: dict, aesthetic: object, umt: object) -> None:
    plain = {key: value for key, value in GOOD.items() if not key.endswith("_Score")}
    (row,) = read(plain | scores)
    assert (row.aesthetic, row.umt, row.reason) == (aesthetic, umt, None)


@pytest.mark.parametrize(
    ("start", "end", "span"),
    [
        ("00:00:00.000", "00:00:00.001", 1),
        ("0:00:01", "0:00:02.5", 1500),
        ("00:00:59.999", "00:01:00.000", 1),
        ("123:00:00.000", "123:00:01.000", 1000),
    ],
)
def test_times_are_whole_milliseconds(read: Read, start: str, end: str, span: int) -> None:
    (row,) = read(GOOD | {"Start_timestamp": start, "End_timestamp": end})
    assert (row.duration_ms, row.reason) == (span, None)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("00:01:53.647", "00:01:51.578"),
        ("00:01:51.578", "00:01:51.578"),
        ("-00:00:01.000", "00:00:02.000"),
        ("00:61:00.000", "02:00:00.000"),
        ("00:00:61.000", "02:00:00.000"),
        ("9999999:00:00.000", "9999999:00:01.000"),
        ("٠٠:٠٠:٠١.٠٠٠", "00:00:02.000"),
        ("", "00:00:02.000"),
        (12.5, 14.5),
        (None, None),
        (["00:00:01.000"], "00:00:02.000"),
    ],
)
def test_spans_that_make_no_sense_are_named(read: Read, start: object, end: object) -> None:
    (row,) = read(GOOD | {"Start_timestamp": start, "End_timestamp": end})
    assert row.reason == "bad_timestamps" and "line 1" in str(row.message) and row.source == "-a_B3cDeF_0"


BAD_LINES = [
    b'{"YoutubeID": "brokenjson_", "Start_timestamp": "00:00',
    b"\x00\x01\xff\xfe",
    b"[" * 100_000,
    b"[1, 2]",
    b"null",
    b'"text"',
    b"{}",
    b'{"n": ' + b"9" * 5000 + b"}",
    *(
        json.dumps({key: value for key, value in GOOD.items() if key != absent}).encode()
        for absent in ("YoutubeID", "Start_timestamp", "End_timestamp", "Caption")
    ),
    *(
        json.dumps(GOOD | change).encode()
        for change in (
            {"YoutubeID": ""},
            {"YoutubeID": 5},
            {"YoutubeID": "\ud800"},
            {"Caption": ["a"]},
            {"Aesthetic_Score": "good"},
            {"Aesthetic_Score": {}},
            {"Aesthetic_Score": float("inf")},
            {"Aesthetic_Score": 10**400},
            {"UMT_Score": "1e999"},
        )
    ),
]


def test_lines_that_are_no_rows_are_rows_all_the_same(read: Read) -> None:
    rows = read(GOOD, *BAD_LINES, b"", b"   ", GOOD)
    assert len(rows) == len(BAD_LINES) + 2
    assert rows[0].reason is None and rows[-1].reason is None
    assert {row.reason for row in rows[1:-1]} == {"bad_metadata"}
    assert all(f"line {number}: " in str(row.message) for number, row in enumerate(rows[1:-1], 2))
    assert len({row.identity for row in rows}) == len(BAD_LINES) + 1  # one each, and the good one twice


@pytest.mark.parametrize("kind", list(KINDS))
def test_mutated_rows_are_all_accounted_for(kind: str, tmp_path: Path) -> None:
    outcome = fuzz(kind, 100, tmp_path, seed=1)
    assert outcome.counted_lines == outcome.lines > 95
    assert outcome.accounted_clips == outcome.clips >= outcome.lines
    assert outcome.planned_again == 0
    assert 10 < outcome.usable < outcome.clips


def test_a_line_without_an_end_does_not_fill_the_memory(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.planning.metadata.MAX_LINE", 1000)
    long = json.dumps(GOOD | {"Caption": "x" * 5000}).encode()
    fits = json.dumps(GOOD | {"Caption": "x" * 700}).encode()
    exact = json.dumps(GOOD).encode().ljust(1000)
    rows = read(long, fits, b"y" * 3000, exact, GOOD)
    assert [row.reason for row in rows] == ["bad_metadata", None, "bad_metadata", None, None]
    assert "1000 bytes" in str(rows[0].message)


def test_sizes_and_rates_of_the_metadata_are_taken_where_they_make_sense(read: Read) -> None:
    rows = read(
        GOOD | {"height": 720, "width": 1280, "fps": 29.97}, GOOD | {"height": "720", "width": -1, "fps": 1e999}
    )
    assert [(row.height, row.width, row.fps) for row in rows] == [(720, 1280, 29.97), (None, None, None)]
    assert rows[1].fields["height"] == "720"


def write_parquet(path: Path, rows: list[dict], **options) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


def test_parquet_is_read_as_the_lines_are(read: Read, tmp_path: Path) -> None:
    lines = [GOOD | {"Caption": f"clip {number}", "extra": number} for number in range(300)]
    lines[7]["Caption"] = None
    lines[8]["Start_timestamp"] = "later"
    lines[9]["YoutubeID"] = None
    from_lines = read(*lines, files=(f"{CLIP}.mp4",))
    path = write_parquet(tmp_path / "rows.parquet", lines, row_group_size=64)
    from_parquet = list(read_internvid(path, str(tmp_path / "videos")))
    bad = [8, 9]
    assert [row for n, row in enumerate(from_parquet) if n not in bad] == [
        row for n, row in enumerate(from_lines) if n not in bad
    ]
    for number in bad:
        assert from_parquet[number].reason == from_lines[number].reason
        assert f"row {number + 1}: " in str(from_parquet[number].message)
    assert len({row.identity for row in from_parquet}) == 3


def test_parquet_of_other_types_is_rows_all_the_same(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet", [{"YoutubeID": 5, "t": datetime(2020, 1, 1), "b": b"\xff"}, {"b": b""}]
    )
    rows = list(read_internvid(path, str(tmp_path)))
    assert [row.reason for row in rows] == ["bad_metadata"] * 2 and rows[0].identity != rows[1].identity


def test_damaged_parquet_is_a_mistake_of_the_users(tmp_path: Path) -> None:
    path = Path(write_parquet(tmp_path / "a.parquet", [GOOD | {"Caption": f"{n}"} for n in range(5000)]))
    data = path.read_bytes()
    for damaged in (b"", b"PAR1", data[:-100], data[: len(data) // 2], data[:200] + bytes(400) + data[600:]):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="a.parquet"):
            list(read_internvid(str(path), str(tmp_path)))
    empty = write_parquet(tmp_path / "empty.parquet", [GOOD])
    pq.write_table(pq.read_table(empty).slice(0, 0), empty)
    for wrong in (empty, str(tmp_path / "absent.parquet")):
        with pytest.raises(ConfigError):
            read_internvid(wrong, str(tmp_path))


def test_captions_are_cleaned_of_what_cannot_be_stored(read: Read) -> None:
    rows = read(*(GOOD | {"Caption": caption} for caption in ("  a dog \n", None, "   ", "a \ud83d dog", "犬")))
    assert [row.caption for row in rows] == ["a dog", "", "", "a ? dog", "犬"]


def test_a_byte_order_mark_and_carriage_returns_do_no_harm(read: Read) -> None:
    line = json.dumps(GOOD).encode()
    assert [row.reason for row in read(b"\xef\xbb\xbf" + line + b"\r", line + b"\r")] == [None, None]


def test_random_damage_never_raises(read: Read) -> None:
    line = json.dumps(GOOD).encode()
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(3000):
        data = bytearray(line)
        for place in rng.integers(0, len(data), rng.integers(1, 6)):
            data[place] = rng.integers(0, 256)
        lines.append(bytes(data).replace(b"\n", b" "))
    rows = read(*lines)
    assert len(rows) == 3000
    assert {row.reason for row in rows} == {None, "bad_metadata", "bad_timestamps"}
    for row in rows:
        f"{row.identity}{row.source}{row.caption}{row.message}".encode()


def test_users_mistakes_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n  \n")
    full = tmp_path / "full.jsonl"
    full.write_text("{}")
    for metadata, videos in (
        (tmp_path / "absent.jsonl", tmp_path / "videos"),
        (tmp_path, tmp_path / "videos"),
        (empty, tmp_path / "videos"),
        (full, tmp_path / "absent"),
    ):
        with pytest.raises(ConfigError):
            read_internvid(str(metadata), str(videos))
    for folder in ("absent", "videos"):
        with pytest.raises(ConfigError):
            read_folder(str(tmp_path / folder))


def test_a_folder_of_videos_and_pictures(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_video(tmp_path / "b/clip.mp4", numbered(30), rate=20)
    (tmp_path / "b/clip.txt").write_text(" a clip \n", encoding="utf-8-sig")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.PNG")
    (tmp_path / "c.webm").write_bytes(b"no video")
    (tmp_path / "notes.txt").write_text("no caption of anything")
    (tmp_path / ".hidden.mp4").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    rows = list(read_folder(str(tmp_path)))
    assert [(row.path, row.kind, row.caption, row.duration_ms, row.reason) for row in rows] == [
        ("a.PNG", "image", "", 0, None),
        ("b/clip.mp4", "video", "a clip", None, None),
        ("c.webm", "video", "", None, None),
    ]
    assert [row.identity for row in rows] == [row.source for row in rows] == ["a.PNG", "b/clip.mp4", "c.webm"]
    assert pickle.loads(pickle.dumps(rows)) == rows  # to be probed elsewhere


def test_a_caption_that_cannot_be_read_costs_its_clip(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    first, second = read_folder(str(tmp_path))
    assert first.reason == "io_error" and "a.txt cannot be read" in str(first.message)
    assert second.reason is None


def test_a_file_name_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    (row,) = read_folder(str(tmp_path))
    assert row.reason == "bad_metadata"
    f"{row.source}{row.message}{row.identity}".encode()
