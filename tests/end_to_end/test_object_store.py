"""Metadata, videos and shards on a real S3 server: the same dataset as on a disk, and training from there."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from upath import UPath

from tests.end_to_end.conftest import hashes, train_settings
from tests.running import ROOT, command, deepspeed, environment, run, wait_for

TINY = [
    "vae=tiny",
    "text_encoder={name: tiny, precision: fp32}",
    "clip={height: 64, width: 64, frames: 8, fps: 8}",
    "shard_clips=16",
]


STOPS_IN_AN_UPLOAD = """
import pathlib, time
import s3fs.core

call = s3fs.S3FileSystem._call_s3


async def stopping(self, method, *args, **more):
    done = await call(self, method, *args, **more)
    if method == "upload_part" and more["Key"].endswith(".tar"):
        pathlib.Path(MARK).touch()
        time.sleep(600)
    return done


s3fs.core.calculate_chunksize = lambda size, chunksize=None: 2**15
s3fs.S3FileSystem._call_s3 = stopping
"""


def killed_in_an_upload(settings: list[str], folder: Path) -> None:
    """Encode until a worker has sent the first part of a tar, then kill -9."""
    mark = folder / "mark"
    (folder / "sitecustomize.py").write_text(STOPS_IN_AN_UPLOAD.replace("MARK", repr(str(mark))))
    paths = {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command("encode"), *settings], cwd=ROOT, env=environment() | paths, **quiet)
    wait_for(process, mark.exists)
    process.kill()
    process.wait()


def test_encode_and_train_on_an_object_store(
    shards: Path, tmp_path: Path, bucket: str, downloads: Callable[[UPath], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # the names of its sockets must be short
    store = UPath(bucket, use_listings_cache=False)
    store.fs.put(f"{shards.parent / 'data'}/", f"{store.path}data/", recursive=True)
    data = [f"data.metadata={bucket}/data/InternVid-shapes.jsonl", f"data.videos={bucket}/data/videos"]
    output = f"{bucket}/shards"
    settings = ["--input", "internvid", "data.name=shapes", *data, *TINY, f"output={output}"]
    killed_in_an_upload(settings, tmp_path)
    assert boto3.client("s3").list_multipart_uploads(Bucket=store.drive)["Uploads"]
    assert not store.fs.glob(f"{store.path}shards/*/*/*.tar")
    run(*command("encode"), *settings)
    tars = {path.partition("shards/")[2] for path in store.fs.glob(f"{store.path}shards/*/*/*.tar")}
    assert tars == {path for path in hashes(shards) if path.endswith(".tar")}
    assert json.loads((UPath(output) / "summary.json").read_text())["written"] == 48

    mine = f"{bucket}/mine"  # a folder of videos, whose sizes are looked up
    sizes = ["clip={sizes: [[64, 64], [32, 64]], frames: 8, fps: 8}", "vae=tiny", TINY[1], f"output={mine}"]
    run(*command("encode"), "--input", "folder", data[1], *sizes)
    summary = json.loads((UPath(mine) / "summary.json").read_text())
    assert (summary["written"], summary["rejected"]) == (48, {})
    videos = list((UPath(bucket) / "data" / "videos").iterdir())
    assert len(videos) == 48 and max(map(downloads, videos)) <= 2  # in three runs: the second, where the kill cut it

    cache = tmp_path / "cache"
    run(*deepspeed(2), *train_settings(output, tmp_path / "run"), "train.steps=2", f"data.cache={cache}")
    assert (tmp_path / "run" / "summary.json").exists() and any(cache.rglob("*.tar"))
