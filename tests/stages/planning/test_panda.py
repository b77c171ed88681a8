"""Reading Panda-70M: both releases of its CSV, every way to name a clip, and its downloader's folders."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.errors import ConfigError
from stages.planning.metadata import Row
from stages.planning.panda import read_panda
from stages.planning.plan import ClipConfig, Plan, PlanConfig, counts, plan, probe_here

# As published: the first release, then that of October 2024.
HEADER_1 = "videoID,url,timestamp,caption,matching_score"
HEADER_2 = HEADER_1 + ",desirable_filtering,shot_boundary_detection"
LINE_1 = (
    "-1hTK0wGrTg,https://www.youtube.com/watch?v=-1hTK0wGrTg,"
    "\"[['0:00:19.227', '0:00:28.278'], ['0:01:11.905', '0:01:23.958'], ['0:02:35.280', '0:02:45.331']]\","
    "\"['The speaker is standing in front of a purple background, wearing a blue shirt and glasses.', 'A person is "
    "standing in front of a purple background, wearing a blue shirt and glasses.', 'A man in glasses standing in front "
    'of a purple background.\']","[0.50927734375, 0.47900390625, 0.472900390625]"'
)
LINE_2 = (
    "-2yHu5qgTzM,https://www.youtube.com/watch?v=-2yHu5qgTzM,"
    "\"[['0:01:20.880', '0:01:23.983'], ['0:02:31.151', '0:02:34.320'], ['0:03:28.841', '0:03:33.680']]\","
    "\"['A neuron in a black background.', 'A woman is standing on a black background and talking to the camera.', "
    "'There is a whiteboard with equations on it, and a man and a woman are standing in front of it.']\","
    '"[0.451416015625, 0.4990234375, 0.434814453125]",'
    "\"['1_still_foreground_image', 'desirable', 'desirable']\","
    "\"[[['0:00:00.000', '0:00:03.069']], [['0:00:00.000', '0:00:03.169']], [['0:00:00.000', '0:00:02.702'], "
    "['0:00:02.736', '0:00:04.838']]]\""
)
ID = "-1hTK0wGrTg"

DOWNLOADED = {
    "url": f"https://www.youtube.com/watch?v={ID}",
    "caption": "[A man] speaks, isn't he?",
    "matching_score": "0.50927734375",
    "desirable_filtering": "desirable",
    "shot_boundary_detection": "[['0:00:00.000', '0:00:09.051']]",
    "clips": "[('00:00:19.227', '00:00:28.278')]",
    "key": "0000000_00000",
    "status": "success",
    "error_message": None,
    "yt_meta_dict": None,
    "clip_subtitles": None,
}

Read = Callable[..., list[Row]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads lines as a CSV beside a folder of empty files."""

    def reader(header: str, *lines: str | bytes, files: tuple[str, ...] = ()) -> list[Row]:
        videos = tmp_path / "videos"
        videos.mkdir(exist_ok=True)
        for name in files:
            (videos / name).parent.mkdir(parents=True, exist_ok=True)
            (videos / name).touch()
        content = [line if isinstance(line, bytes) else line.encode() for line in (header, *lines)]
        (tmp_path / "panda.csv").write_bytes(b"\n".join(content) + b"\n")
        return list(read_panda(str(tmp_path / "panda.csv"), str(videos)))

    return reader


def line(**changes: object) -> str:
    """A line of the second release with other cells."""
    row = next(csv.DictReader([HEADER_2, LINE_2]))
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([str(value) for value in (row | changes).values()])
    return text.getvalue()


def test_a_line_of_each_release(read: Read) -> None:
    rows = read(HEADER_1, LINE_1)
    assert [(row.source, row.duration_ms, row.matching_score, row.first_of_line) for row in rows] == [
        (ID, 9051, 0.50927734375, True),
        (ID, 12053, 0.47900390625, False),
        (ID, 10051, 0.472900390625, False),
    ]
    assert rows[2].caption == "A man in glasses standing in front of a purple background."
    assert [row.identity for row in rows] == [f"{ID} 19227 28278", f"{ID} 71905 83958", f"{ID} 155280 165331"]
    assert {(row.reason, row.desirable_filtering, row.path) for row in rows} == {(None, None, None)}
    rows = read(HEADER_2, LINE_2)
    assert [row.desirable_filtering for row in rows] == ["1_still_foreground_image", "desirable", "desirable"]
    assert [row.duration_ms for row in rows] == [3103, 3169, 4839]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ((f"{ID}_0:00:19.227_0:00:28.278.mp4", f"x/{ID}_00-01-11-905_00-01-23-958.webm"), [0, 1, None]),
        ((f"{ID}.0.mp4", f"{ID}.2.mp4"), [0, None, 1]),
        ((f"{ID}_1.mp4", f"{ID}_2.mp4", f"{ID}_3.mp4"), [0, 1, 2]),
        ((f"{ID}_0.mp4", f"{ID}_1.mp4", f"{ID}_3.mp4"), [0, 1, None]),
        ((f"{ID}_1.mp4", f"{ID}_2.mp4", "othervideo1_0.mp4"), [None, 0, 1]),
        ((f"{ID}_1.mp4", "0therVide_0.mp4"), [0, None, None]),  # the id of a whole video ends in _0
        (("elsewhere.mp4", f"{ID}x.mp4", f"{ID}.0.json"), [None, None, None]),
    ],
)
def test_clips_are_found_under_their_names(read: Read, files: tuple[str, ...], found: list[int | None]) -> None:
    rows = read(HEADER_1, LINE_1, files=files)
    assert [row.path for row in rows] == [None if index is None else files[index] for index in found]
    assert {row.start_ms for row in rows if row.path} <= {0}


def test_a_whole_video_is_cut_by_the_timestamps(read: Read) -> None:
    rows = read(HEADER_1, LINE_1, files=(f"{ID}.mp4", f"{ID}.1.mp4"))
    assert [(row.path, row.start_ms) for row in rows] == [
        (f"{ID}.mp4", 19227),
        (f"{ID}.1.mp4", 0),
        (f"{ID}.mp4", 155280),
    ]


def test_a_cell_may_be_longer_than_csv_reads_by_default(read: Read) -> None:
    spans = [[f"{n // 3600}:{n // 60 % 60:02}:{n % 60:02}.000", "9:59:59.000"] for n in range(6000)]
    long = line(timestamp=spans, caption=['it\'s a "dog"'] * 6000, matching_score="", desirable_filtering="")
    rows = read(HEADER_2, LINE_2, long)
    assert len(rows) == 3 + 6000 and rows[-1].caption == 'it\'s a "dog"' and rows[-1].reason is None


BAD_LINES = [
    line(timestamp="[['0:01:20.880', '0:01:23.983']]"),  # lists of unequal length
    line(caption=["one", "two"]),
    line(matching_score=[0.5]),
    line(desirable_filtering=["desirable"] * 4),
    line(timestamp=[], caption=[], matching_score=[], desirable_filtering=[]),
    line(timestamp=""),
    line(timestamp="__import__('os').system('true')"),
    line(timestamp="[" * 5000 + "]" * 5000),
    line(timestamp="[" + "-" * 100_000 + "1]"),
    line(timestamp="[" + "1+" * 100_000 + "1j]"),
    line(timestamp="[" + "'a'" * 2_000_000 + "]"),
    line(timestamp="[9" + "9" * 6000 + "]"),
    line(timestamp=[[1, 2]] * 3),
    line(timestamp=[["0:00:01.000"]] * 3),
    line(timestamp=["0:00:01.000"] * 3),
    line(timestamp="{'a': 1}"),
    line(timestamp="[['0:00:01.000', '0:00:02.000'"),
    line(timestamp=[["0:00:02.000", "0:00:01.000"]] * 3),
    line(timestamp=[["0:99:02.000", "1:00:01.000"]] * 3),
    line(caption=[1, 2, 3]),
    line(caption=""),
    line(caption="A plain text."),
    line(matching_score=["good"] * 3),
    line(matching_score="[1e999, 1, 1]"),
    line(desirable_filtering=[["a"]] * 3),
    line(url="", videoID=""),
    LINE_2 + ",one cell more",
    LINE_2.rsplit(",", 3)[0],
    LINE_2 + '"',
    LINE_2.replace('"', "", 1),
    b"\xff\xfe" + LINE_2.encode(),
    "x",
]


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_one_reject_and_spoils_no_other(read: Read, bad: str | bytes) -> None:
    rows = read(HEADER_2, LINE_2, bad, "", LINE_2)
    assert [row.reason is None for row in rows] == [True] * 3 + [False] + [True] * 3
    assert rows[3].reason in ("bad_metadata", "bad_timestamps") and "line 3: " in str(rows[3].message)
    assert rows[3].first_of_line and len(str(rows[3].message)) < 400
    f"{rows[3].identity}{rows[3].source}{rows[3].message}".encode()


def test_the_video_is_that_of_the_url(read: Read) -> None:
    sources = [
        read(HEADER_2, line(url=url))[0].source
        for url in (
            "https://www.youtube.com/watch?v=abcdefghij_&t=5",
            "https://youtu.be/-bcdefghij_",
            "somewhere else",
            "",
        )
    ]
    assert sources == ["abcdefghij_", "-bcdefghij_", "-2yHu5qgTzM", "-2yHu5qgTzM"]


def test_other_columns_can_be_filtered_by(read: Read) -> None:
    (row, *_) = read(HEADER_2 + ",views,language", LINE_2 + ",1200,en")
    assert (row.fields["views"], row.fields["language"]) == (1200.0, "en")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the downloader leaves: two clips, one failed clip, one failed video, one broken file."""
    failed = DOWNLOADED | {"status": "failed_to_subsample", "error_message": "ffmpeg: no such stream"}
    video = failed | {
        "status": "failed_to_download",
        "clips": "[('00:00:01.000', '00:00:02.000'), ('00:00:03.000', '00:00:04.000')]",
        "caption": "['one', 'two']",
        "matching_score": [0.5, 0.25],
        "desirable_filtering": None,
        "error_message": "Video unavailable",
    }
    samples = {
        "00000/0000000_00000": DOWNLOADED,
        "00000/0000000_00001": DOWNLOADED | {"clips": [["00:01:11.905", "00:01:23.958"]], "matching_score": 0.25},
        "00000/0000001_00000": failed | {"clips": "[('00:02:35.280', '00:02:45.331')]"},
        "00001/0000100": video,
        "00001/0000101_00000": None,
    }
    for name, fields in samples.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").write_text(json.dumps(fields) if fields else "{")
    for name in ("00000/0000000_00000.mp4", "00000/0000000_00001.mp4"):
        (tmp_path / name).touch()
    for name in ("00000/0000000_00000.txt", "00000_stats.json", "00000.parquet"):
        (tmp_path / name).touch()
    return tmp_path


def test_the_downloaders_folders(folder: Path) -> None:
    rows = list(read_panda("", str(folder)))
    assert [(row.path, row.start_ms, row.duration_ms, row.matching_score, row.first_of_line) for row in rows[:5]] == [
        ("00000/0000000_00000.mp4", 0, 9051, 0.50927734375, True),
        ("00000/0000000_00001.mp4", 0, 12053, 0.25, True),
        (None, 0, 10051, 0.50927734375, True),
        (None, 0, 1000, 0.5, True),
        (None, 0, 1000, 0.25, False),
    ]
    assert rows[0].caption == "[A man] speaks, isn't he?" and rows[4].caption == "two"
    assert rows[0].desirable_filtering == "desirable" and rows[3].desirable_filtering is None
    assert "no such stream" in str(rows[2].message) and "Video unavailable" in str(rows[3].message)
    assert [row.reason for row in rows] == [None] * 5 + ["bad_metadata"]


def test_a_record_that_cannot_be_read_is_a_reject(folder: Path) -> None:
    (folder / "00000/0000009_00000.json").symlink_to(folder / "gone")
    rows = [row for row in read_panda("", str(folder)) if "0000009" in str(row.message)]
    assert [row.reason for row in rows] == ["bad_metadata"] and "cannot be read" in str(rows[0].message)


def test_a_clip_is_the_same_from_the_csv_and_from_the_downloader(read: Read, folder: Path) -> None:
    from_csv = [row.identity for row in read(HEADER_1, LINE_1)]
    assert [row.identity for row in read_panda("", str(folder))][:3] == from_csv


def test_all_of_it_is_planned_and_counted(folder: Path, tmp_path: Path) -> None:
    config = PlanConfig(ClipConfig(64, 64, 8), filter="desirable_filtering == 'desirable' or matching_score < 0.3")
    dataset = Plan(tmp_path / "dataset")
    videos = str(folder)
    for part in plan(read_panda("", videos), config, "panda70m", dataset, probe=probe_here(videos)):
        dataset.append(part)
    totals = counts(dataset, {})
    assert (totals.rows, totals.clips, totals.pending, totals.filtered) == (5, 6, 2, 1)
    assert totals.rejected == {"bad_metadata": 1, "missing_file": 2}
    messages = [message for part in dataset.parts() for message in part["message"].to_pylist() if message]
    assert any("Video unavailable" in message for message in messages)


@pytest.mark.parametrize("content", ["", "a,b,c\n1,2,3\n", 'videoID,"caption\n', "\n\n", "videoID,caption\n"])
def test_what_is_not_panda_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "panda.csv").write_text(content)
    with pytest.raises(ConfigError, match="panda.csv"):
        read_panda(str(tmp_path / "panda.csv"), str(tmp_path))


def test_absent_inputs_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "panda.csv").write_text(HEADER_1)
    for metadata, videos in (("absent.csv", "."), ("panda.csv", "absent"), ("", "absent"), ("", ".")):
        with pytest.raises(ConfigError):
            read_panda(metadata and str(tmp_path / metadata), str(tmp_path / videos))
