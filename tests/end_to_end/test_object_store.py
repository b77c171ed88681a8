"""Metadata, videos and shards on a real S3 server: the same dataset as on a disk, and training from there."""

import json
from pathlib import Path

import pytest
from upath import UPath

from tests.end_to_end.conftest import command, deepspeed, hashes, run, train_settings
from tests.object_store import new_bucket, s3_server

TINY = [
    "vae=tiny",
    "text_encoder={name: tiny, precision: fp32}",
    "clip={height: 64, width: 64, frames: 8, fps: 8}",
    "shard_clips=16",
]


def test_encode_and_train_on_an_object_store(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as endpoint:
        bucket = new_bucket(endpoint, monkeypatch)
        store = UPath(bucket)
        store.fs.put(f"{shards.parent / 'data'}/", f"{store.path}data/", recursive=True)
        data = [f"data.metadata={bucket}/data/InternVid-shapes.jsonl", f"data.videos={bucket}/data/videos"]
        output = f"{bucket}/shards"
        run(*command("encode"), "--input", "internvid", "data.name=shapes", *data, *TINY, f"output={output}")
        tars = {path.partition("shards/")[2] for path in store.fs.glob(f"{store.path}shards/*/*/*.tar")}
        assert tars == {path for path in hashes(shards) if path.endswith(".tar")}
        assert json.loads((UPath(output) / "summary.json").read_text())["written"] == 48

        mine = f"{bucket}/mine"  # a folder of videos, whose sizes are looked up
        sizes = ["clip={sizes: [[64, 64], [32, 64]], frames: 8, fps: 8}", "vae=tiny", TINY[1], f"output={mine}"]
        run(*command("encode"), "--input", "folder", data[1], *sizes)
        summary = json.loads((UPath(mine) / "summary.json").read_text())
        assert (summary["written"], summary["rejected"]) == (48, {})

        cache = tmp_path / "cache"
        run(*deepspeed(2), *train_settings(output, tmp_path / "run"), "train.steps=2", f"data.cache={cache}")
        assert (tmp_path / "run" / "summary.json").exists() and any(cache.rglob("*.tar"))
