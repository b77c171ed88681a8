"""Source files at URLs, on a real S3 server: fetched once for all clips of them, kept within a bound."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from shards import object_store
from shards.schema import Bucket
from stages.decoding import source_file as module
from stages.decoding.decode_job import DecodeJob, each, frames_of
from stages.decoding.source_file import source_file
from stages.errors import DecodeError
from stages.planning.plan import PlannedClip
from tests.videos import numbered, write_video


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the copies."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def copies(folder: Path) -> list[str]:
    """The contents of those that there are."""
    return sorted(path.read_text() for path in folder.glob("wisesora-*/*") if not path.name.startswith("."))


def test_a_file_that_is_here_is_itself(tmp_path: Path) -> None:
    with source_file(str(tmp_path / "a.mp4")) as path:
        assert path == str(tmp_path / "a.mp4")


def test_a_video_is_fetched_once_for_all_its_clips(
    bucket: str, folder: Path, downloads: Callable[[UPath], int]
) -> None:
    video = UPath(bucket) / "long.mp4"
    local = write_video(folder / "long.mp4", numbered(48), rate=24)
    video.write_bytes(local.read_bytes())

    def frames(path: object) -> list[np.ndarray]:
        clips = [
            PlannedClip(f"{n}", "long", "video", str(path), n / 4, n / 4, 8.0, 2.0, "", None, None, None, None)
            for n in range(6)
        ]
        jobs = [DecodeJob(clip, Bucket(32, 32, 4)) for clip in clips]
        return [found.pixels for found in each(lambda job: frames_of(job, 60, "pyav"), jobs, 60)]

    np.testing.assert_array_equal(frames(video), frames(local))
    assert downloads(video) == 1
    video.write_bytes(write_video(folder / "other.mp4", numbered(48)[::-1], rate=24).read_bytes())
    np.testing.assert_array_equal(frames(video), frames(folder / "other.mp4"))
    assert downloads(video) == 2  # another file has the name now


def test_the_bound_is_kept_but_for_what_is_being_read(
    bucket: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHE_BYTES", 20)
    videos = [UPath(bucket) / f"{name}.mp4" for name in "abcd"]
    for video in videos:
        video.write_text(video.stem * 10)
    with source_file(str(videos[0])) as first:
        for video in videos[1:]:
            with source_file(str(video)) as path:
                assert Path(path).read_text() == video.stem * 10 and Path(path).suffix == ".mp4"
        assert Path(first).read_text() == "a" * 10
        assert copies(folder) == ["a" * 10, "d" * 10]
        with source_file(str(videos[3])), source_file(str(videos[2])):
            assert copies(folder) == ["a" * 10, "c" * 10, "d" * 10]
    with source_file(str(videos[1])):
        assert copies(folder) == ["b" * 10, "c" * 10]


def test_what_is_not_there_and_what_does_not_come_whole_is_told(
    bucket: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = UPath(bucket) / "a.mp4"
    with pytest.raises(DecodeError) as caught, source_file(str(video)):
        pass
    assert caught.value.reason == "missing_file"
    video.write_text("content")
    with monkeypatch.context() as cut:
        cut.setattr(object_store, "fetch", lambda path, target: target.write_text("cont"))
        with pytest.raises(DecodeError, match="sent 4 of 7 bytes") as caught, source_file(str(video)):
            pass
    assert caught.value.reason == "io_error" and copies(folder) == []
    with source_file(str(video)) as path:
        assert Path(path).read_text() == "content"
