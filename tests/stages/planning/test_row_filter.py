"""Which rows are taken: filters on every column, and files that are looked at for what their metadata lacks."""

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from stages.errors import ConfigError, DecodeError
from stages.planning.metadata import read_folder
from stages.planning.plan import ClipConfig, Plan, PlanConfig, probe_here
from tests.stages.planning.plans import CONFIG, FakeFiles, clip, no_probe, planned, sized, statuses, stored
from tests.videos import numbered, write_video


def test_only_what_is_needed_is_probed(tmp_path: Path) -> None:
    config = PlanConfig(ClipConfig(frames=8, sizes=((256, 256), (128, 128))), filter="aesthetic > 4 and height >= 300")
    rows = [
        clip("good", aesthetic=5.0),
        clip("ugly", aesthetic=3.0),
        clip("short", 10, aesthetic=5.0),
        clip("gone", aesthetic=5.0, path=None),
        clip("low", aesthetic=5.0),
        clip("broken", aesthetic=5.0),
        clip("known", aesthetic=5.0, height=400, width=400),
        clip("same file", aesthetic=5.0, path="good.mp4", start_ms=900),
    ]
    probe = FakeFiles(good=sized(500, 500), low=sized(299, 500), broken=DecodeError("undecodable", "no video"))
    dataset = Plan(tmp_path)
    dataset.append(planned(rows, config, probe=probe))
    assert probe.asked == ["good", "low", "broken"]
    table = stored(dataset)
    found = dict(zip(table["source"].to_pylist(), statuses(table), strict=True))
    assert found == {
        "good": ("planned", None),
        "known": ("planned", None),
        "same file": ("planned", None),
        "ugly": ("filtered", None),
        "low": ("filtered", None),
        "short": ("rejected", "too_short"),
        "gone": ("rejected", "missing_file"),
        "broken": ("rejected", "undecodable"),
    }
    assert planned(rows, config, previous=dataset, probe=no_probe).num_rows == 0
    again = planned(rows, config, previous=dataset, retry={"undecodable"}, probe=FakeFiles(broken=sized(900, 900)))
    assert (again["source"].to_pylist(), again["bucket"].to_pylist()) == (["broken"], ["256x256x8"])


def test_lengths_that_nobody_told_are_probed() -> None:
    rows = [clip("a", duration_ms=None), clip("b", duration_ms=None), clip("c", duration_ms=None)]
    probe = FakeFiles(a=sized(9, 9, duration_s=2.0), b=sized(9, 9, duration_s=0.5), c=sized(9, 9, duration_s=30.0))
    table = planned(rows, dataclasses.replace(CONFIG, filter="duration_s < 20"), probe=probe)
    assert dict(zip(table["source"].to_pylist(), statuses(table), strict=True)) == {
        "a": ("planned", None),
        "b": ("rejected", "too_short"),
        "c": ("filtered", None),
    }
    assert sorted(table["duration_s"].to_pylist()) == [0.5, 2.0, 30.0]


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("aesthetic >= 4.75", {"a", "b"}),
        ("aesthetic >= 4.75 and duration_s >= 2", {"b"}),
        ("desirable_filtering in ('desirable',)", {"a", "c"}),
        ("not (desirable_filtering == 'desirable')", {"b"}),
        ("matching_score > 0.5 or umt > 0.4", {"c"}),
        ("language == 'en'", {"a"}),
        ("likes >= 10", {"b"}),
        ("seen == False", {"a"}),
        ("caption == 'a dog' and source != 'c'", {"a"}),
        ("likes is None and aesthetic is not None", {"a"}),
        ("24 <= fps < 30 and width > 10", {"b"}),
    ],
)
def test_a_filter_works_on_any_column(text: str, taken: set[str]) -> None:
    rows = [
        clip(
            "a", aesthetic=5.0, caption="a dog", desirable_filtering="desirable", height=9, width=9, fps=30.0
        )._replace(fields={"language": "en", "likes": None, "seen": False}),
        clip("b", 3000, aesthetic=4.75, desirable_filtering="4_x", height=9, width=16, fps=24.0)._replace(
            fields={"language": 7, "likes": 10, "seen": "no"}
        ),
        clip(
            "c", umt=0.5, matching_score=0.2, caption="a dog", desirable_filtering="desirable", height=9, width=16
        )._replace(fps=23.9, fields={"likes": 10**400, "language": "\ud800"}),
    ]
    table = planned(rows, dataclasses.replace(CONFIG, filter=text))
    found = dict(zip(table["source"].to_pylist(), table["status"].to_pylist(), strict=True))
    assert {source for source, status in found.items() if status == "planned"} == taken
    assert set(found.values()) <= {"planned", "filtered"} and len(found) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("aestetic > 4", r"no number in column aestetic .* did you mean aesthetic\? there are: .*language"),
        ("umt > 0.4", r"no number in column umt of the first 1 clips"),
        ("language > 4", r"no number in column language"),
        ("aesthetic >", "filter: .* is no condition"),
    ],
)
def test_a_filter_on_nothing_is_refused(text: str, message: str) -> None:
    rows = [clip("bad", reason="bad_metadata"), clip("a", aesthetic=5.0)._replace(fields={"language": "en"})]
    with pytest.raises(ConfigError, match=message):
        planned(rows, dataclasses.replace(CONFIG, filter=text))


def test_files_of_a_folder_are_probed_here(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", numbered(30), rate=20)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    Image.new("RGB", (80, 64)).save(tmp_path / "picture.png")
    turned = Image.new("RGB", (40, 64))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG no picture")
    config = PlanConfig(ClipConfig(sizes=((32, 64), (64, 32), (8, 8)), frames=(1, 8), max_upscale=4))
    table = planned(list(read_folder(str(tmp_path))), config, probe=probe_here(str(tmp_path)))
    found = dict(
        zip(
            table["source"].to_pylist(),
            zip(table["bucket"].to_pylist(), table["reason"].to_pylist(), strict=True),
            strict=True,
        )
    )
    assert found["broken.mp4"] == found["bad.png"] == (None, "undecodable")
    assert found["turned.jpg"] == ("32x64x1", None)
    assert found["clip.mp4"][0].endswith("x8") and found["picture.png"][0].endswith("x1")
    durations = dict(zip(table["source"].to_pylist(), table["duration_s"].to_pylist(), strict=True))
    assert durations["clip.mp4"] == 1.5
