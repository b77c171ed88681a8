"""A finished dataset made of real files by the tiny VAE, without the job: three buckets, three reasons of rejects."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from PIL import Image

from models.identity import vae_identity
from models.vae import FrozenVAE
from shards.dataset import compact, create_dataset, ensure_fingerprint
from shards.schema import LATENTS, MEAN, TEXT, Bucket, Reject, Sample, make_key, text_column
from shards.writer import write_shard
from stages.decoding.decode import decode_clip
from stages.decoding.picture import decode_image
from stages.planning.plan_table import PLAN_SCHEMA, Plan
from stages.shapes.render import ShapesConfig, render_frames, seen
from tests.videos import write_video

FPS = 8
BUCKETS = {"64x64x8": 3, "64x64x4": 2, "64x512x1": 1}  # the last of a picture
HOSTILE = "<script>alert('caption')</script> & a red ball"
TOTALS: dict[str, Any] = {"rows": 10, "clips": 10, "written": 6, "filtered": 0, "duplicates": 1}
TOTALS |= {"rejected": {"missing_file": 1, "too_short": 1, "undecodable": 1}}


@dataclass(frozen=True)
class SmallDataset:
    """``sources``: key -> the frames that its latents were made of, uint8 [T, H, W, 3]."""

    path: Path
    videos: Path
    sources: dict[str, np.ndarray]


def small_dataset(folder: Path, change: Callable[[np.ndarray], np.ndarray] = lambda latents: latents) -> SmallDataset:
    """Written into ``folder``. change: done to every clip's latents, [T, C, h, w], before they are stored."""
    root, videos = create_dataset(folder / "shards", "small"), folder / "videos"
    videos.mkdir()
    vae, identity = FrozenVAE.load("tiny"), vae_identity("tiny")
    rows, sources = _rejected_rows(videos), {}
    for name, count in BUCKETS.items():
        bucket = Bucket.parse(name)
        latents, texts = [], []
        for number in range(count):
            row = _written_row(videos, bucket, number)
            frames = _frames(str(videos / row["path"]), bucket, row["start_s"])
            latents.append(_latents(row, change(vae.encode(frames)), number))
            texts.append(_text(row["key"], number))
            rows.append(row)
            sources[row["key"]] = frames
        _write(root, bucket, LATENTS, latents, _latents_fingerprint(bucket, identity), _rejects(rows, name))
        _write(root, bucket, text_column("t5"), texts, {"schema_version": 1, "text_encoder": {"dim": 6}}, [])
    Plan(root).append(pa.Table.from_pylist(rows, PLAN_SCHEMA))
    compact(root, TOTALS)
    settings = {"input": "internvid", "data": {"videos": str(videos)}, "vae": {"name": "tiny"}}
    (root / "config.yaml").write_text(yaml.safe_dump(settings))
    return SmallDataset(Path(root), videos, sources)


def _frames(path: str, bucket: Bucket, start_s: float) -> np.ndarray:
    size = {"height": bucket.height, "width": bucket.width}
    if bucket.frames == 1:
        return decode_image(path, **size)
    return decode_clip(path, start_s=start_s, frames=bucket.frames, fps=FPS, timeout_s=60, **size)


def _written_row(videos: Path, bucket: Bucket, number: int) -> dict[str, Any]:
    name = f"{bucket}-{number}"
    shown = seen()[7 * (number + bucket.frames) % len(seen())]  # many colours, as a large dataset has
    rendered = render_frames(shown, ShapesConfig(frames=bucket.frames + 2), np.random.default_rng(number))
    if bucket.frames == 1:
        Image.fromarray(rendered[0]).resize((bucket.width, bucket.width)).save(videos / f"{name}.png")
        return _row(name, f"{name}.png", "planned", kind="image", start_s=0.0, bucket=str(bucket))
    write_video(videos / f"{name}.mp4", rendered, rate=FPS)
    caption = HOSTILE if number == 0 else f"caption of {name}"
    return _row(name, f"{name}.mp4", "planned", start_s=0.25, attempt=1, caption=caption, bucket=str(bucket))


def _rejected_rows(videos: Path) -> list[dict[str, Any]]:
    """Two that the plan rejects, one whose file is no video, one that is to be tried again, and one that came late."""
    rendered = render_frames(seen()[9], ShapesConfig(frames=2), np.random.default_rng(9))
    write_video(videos / "short.mp4", rendered, rate=FPS)
    (videos / "broken.mp4").write_bytes(b"no video at all")
    return [
        _row("short", "short.mp4", "rejected", reason="too_short", message="it lasts 250 ms; 4 frames need 500 ms"),
        _row("gone", None, "rejected", reason="missing_file", message="no file of gone was found"),
        _row("broken", "broken.mp4", "planned", start_s=0.0, bucket="64x64x8"),
        _row("again", "broken.mp4", "planned", start_s=0.0, bucket="64x64x8", attempt=1, shard=1),
        _row("64x64x8-0", None, "rejected", reason="missing_file", message="it came later"),
    ]


def _row(source: str, path: str | None, status: str, **values: Any) -> dict[str, Any]:
    key = make_key(source, "small") if status == "planned" else None
    row: dict[str, Any] = dict.fromkeys(PLAN_SCHEMA.names)
    row |= {"clip": zlib.crc32(source.encode()), "occurrence": 0, "attempt": 0, "status": status, "source": source}
    row |= {"shard": 0 if status == "planned" else None, "window": 0 if status == "planned" else None}
    return row | {"kind": "video", "path": path, "key": key, "duration_s": 1.25, "caption": "a caption"} | values


def _latents(row: dict[str, Any], latents: np.ndarray, number: int) -> Sample:
    attributes = {"duration_s": 1.25, "caption": row["caption"], "source": row["source"], "start_s": row["start_s"]}
    attributes |= {"aesthetic": 4.5 + number, "umt": None, "matching_score": None, "desirable_filtering": None}
    return Sample(row["key"], {MEAN: latents.astype(np.float16)}, attributes | {"latent_motion": 0.125})


def _text(key: str, number: int) -> Sample:
    caption = "another caption" if number == 1 else None
    attributes = {"tokens": 3 + number, "caption_hash": "00", "caption": caption}
    return Sample(key, {TEXT: np.zeros((3 + number, 6), np.float16)}, attributes)


def _rejects(rows: list[dict[str, Any]], bucket: str) -> list[Reject]:
    messages = {"broken": "moov atom not found", "again": "a first try"}
    failed = [row for row in rows if row["source"] in messages and row["bucket"] == bucket]
    return [Reject(row["key"], "undecodable", messages[row["source"]]) for row in failed]


def _write(root: Any, bucket: Bucket, column: str, samples: list[Sample], fingerprint: dict, rejects: list) -> None:
    fingerprint_hash = ensure_fingerprint(root, bucket, column, fingerprint)
    ordered = sorted(samples, key=lambda sample: sample.key)
    write_shard(root / str(bucket) / column, 0, ordered, rejects, fingerprint_hash=fingerprint_hash)


def _latents_fingerprint(bucket: Bucket, identity: dict[str, Any]) -> dict[str, Any]:
    sampling = {"fps": FPS, "decoder": "pyav"}
    return {"schema_version": 1, "vae": identity, "batch_frames": 8, "clip": str(bucket), "sampling": sampling}
