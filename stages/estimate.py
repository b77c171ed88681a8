"""What an encode would do, take and leave on the disk, before anything is spent on it."""

import resource
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.compute import default_device
from shards import storage
from shards.manifest import read_header
from shards.schema import Bucket, text_column
from stages import execute
from stages.encode import (
    SHARD_FIELDS,
    Sizes,
    check_captions,
    output_of,
    plan_rows,
    read_outcomes,
    rejects_of,
    shard_sizes,
    text_left,
)
from stages.encode_config import EncodeConfig, Identities, read_rows
from stages.latent_worker import exact, load_vae
from stages.planning.plan import Plan, ShardPlan, counts, shard_plans
from stages.text_worker import load_text_encoder
from stages.timing import timed

SECONDS = 1.0  # for each thing that is timed, at least
CLIPS = 16  # of the first shard, that are decoded and whose captions are encoded


def describe(config: EncodeConfig, retry: Sequence[str] = ()) -> str:
    """What ``encode`` would do, in a few lines; writes nothing but rendered shapes.

    Times and memory are those of one worker with a few of the clips, and hold for machines like its own.
    """
    config = config.located()
    identities = Identities.of(config)
    rows, videos = read_rows(config)
    root = storage.place(output_of(config))
    with tempfile.TemporaryDirectory() as folder, execute.running(config.runtime):
        planned = Plan(folder, before=Plan(root))
        sizes = shard_sizes(planned.parts(SHARD_FIELDS))
        outcomes = read_outcomes(root, sizes)
        for part in plan_rows(rows, videos, config, planned, outcomes, retry):
            planned.append(part)
            sizes |= shard_sizes([part])
        check_captions(config, planned)
        totals = counts(planned, outcomes)
        lines = [
            f"{totals.rows} rows: {totals.pending} clips to encode, {totals.written} written, {totals.filtered} "
            f"filtered, {totals.duplicates} duplicates; {rejects_of(totals)}"
        ]
        if totals.pending:
            first = next(shard_plans(planned.parts(), videos, outcomes))
            left = {shard: clips for shard, clips in sizes.items() if shard not in outcomes}
            lines += _estimate(config, identities, left, _measure(config, first))
    return "\n".join(lines)


def describe_text(config: EncodeConfig) -> str:
    """What ``encode_text`` would do, in a line."""
    root, column = storage.place(output_of(config)), text_column(config.text_encoder.column)
    read_header(root)
    planned = Plan(root)
    check_captions(config, planned)
    sizes = shard_sizes(planned.parts(SHARD_FIELDS))
    left = text_left(root, column, sizes, read_outcomes(root, sizes))
    return f"{sum(left.values())} captions of {len(left)} shards to encode into {column}"


@dataclass(frozen=True)
class _VaeSpeed:
    """Of one worker. pixels_per_s: of frames. peak_gb: of the memory of its ``device``."""

    device: str
    pixels_per_s: float
    peak_gb: float


@dataclass(frozen=True)
class _TextSpeed:
    """Of one worker. tokens: of a caption, on average."""

    captions_per_s: float
    tokens: float
    peak_gb: float


@dataclass(frozen=True)
class _Speeds:
    """decode_s: of one clip, in one process."""

    decode_s: float
    vae: _VaeSpeed
    text: _TextSpeed


def _measure(config: EncodeConfig, shard: ShardPlan) -> _Speeds:
    """With the first clips of a shard."""
    clips = shard.clips[:CLIPS]
    some = ShardPlan(shard.bucket, shard.number, clips)
    decoding_s, _ = timed(lambda: list(execute.DecodeAhead(config.runtime, config.decoder).frames_of(some)), SECONDS)
    return _Speeds(
        decode_s=decoding_s * min(len(clips), execute.decoders()) / len(clips),
        vae=execute.in_worker(partial(_measure_vae, config, shard.bucket)),
        text=execute.in_worker(partial(_measure_text, config, [clip.caption for clip in clips])),
    )


def _measure_vae(config: EncodeConfig, bucket: Bucket) -> _VaeSpeed:
    """In a process that does what a worker does."""
    torch.set_num_threads(config.runtime.threads)
    settings = config.vae
    vae = load_vae(settings)
    batch = np.zeros((settings.batch_frames, bucket.height, bucket.width, 3), np.uint8)
    if settings != exact(settings):  # with which a worker compares its first frames
        load_vae(exact(settings)).encode(batch)
    seconds, _ = timed(lambda: vae.encode(batch), SECONDS)
    return _VaeSpeed(default_device().type, batch.size / 3 / seconds, _peak_gb())


def _measure_text(config: EncodeConfig, captions: list[str]) -> _TextSpeed:
    """In a process that does what a worker does."""
    torch.set_num_threads(config.runtime.threads)
    encoder = load_text_encoder(config.text_encoder)
    seconds, embeddings = timed(lambda: encoder.encode(captions), SECONDS)
    tokens = float(np.mean([len(embedding) for embedding in embeddings]))
    return _TextSpeed(len(captions) / seconds, tokens, _peak_gb())


def _peak_gb() -> float:
    """Of the GPU's memory that this process took, or of its own where there is none."""
    if default_device().type == "cuda":
        return torch.cuda.max_memory_reserved() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in KiB


def _free_bytes(output: str) -> int | None:
    """Of the disk that a local output is, or will be, on."""
    folder = storage.place(output)
    if not isinstance(folder, Path):
        return None
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def _estimate(config: EncodeConfig, identities: Identities, left: Sizes, speeds: _Speeds) -> list[str]:
    """Bytes of each bucket, and hours: decoding and the VAE run side by side, then comes the text."""
    clips_of: Counter[str] = Counter()
    for (name, _), clips in left.items():
        clips_of[name] += clips
    buckets = {Bucket.parse(name): clips for name, clips in clips_of.items()}
    total = sum(buckets.values())
    lines, whole = [], 0.0
    for bucket, clips in sorted(buckets.items()):
        latents = clips * sample_bytes(bucket, identities.vae) * (2 if config.vae.store_std else 1)
        text = clips * speeds.text.tokens * identities.text["dim"] * 2
        shards = sum(name == bucket.name for name, _ in left)
        lines.append(
            f"  {bucket}: {clips} clips ({clips / total:.0%}) in {shards} shards, {latents / 1e6:.1f} MB of latents, "
            f"{text / 1e6:.1f} MB of text"
        )
        whole += latents + text
    places, decoders = execute.places(config.runtime), execute.decoders()
    pixels = sum(clips * bucket.frames * bucket.height * bucket.width for bucket, clips in buckets.items())
    vae_s, decoding_s = pixels / speeds.vae.pixels_per_s / places, total * speeds.decode_s / decoders
    text_s = total / speeds.text.captions_per_s / places
    std = "" if config.vae.store_std else "; vae.store_std=true would double the latents"
    memory = "GPU memory" if speeds.vae.device == "cuda" else "memory"
    window_gb = config.runtime.decode_window_mb / 1e3
    free = _free_bytes(config.output)
    full = f": DOES NOT FIT, {free / 1e9:.2f} GB are free" if free is not None and free < whole else ""
    return [
        *lines,
        f"  {whole / 1e9:.2f} GB in all, with {speeds.text.tokens:.1f} tokens a caption{std}{full}",
        f"  a worker, at its peak: {speeds.vae.peak_gb:.2f} GB of {memory} for latents, {speeds.text.peak_gb:.2f} GB "
        f"for text; and {window_gb:.2f} GB for its frames in Ray's object store",
        f"  about {_duration(max(vae_s, decoding_s) + text_s)}: VAE {_duration(vae_s)} and text {_duration(text_s)} "
        f"with {places} workers as measured here (on {speeds.vae.device}), decoding {_duration(decoding_s)} beside "
        f"the VAE with {decoders} processes",
    ]


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def sample_bytes(bucket: Bucket, vae: dict[str, Any]) -> int:
    """Of one clip's stored mean: float16 [T, C, h, w]."""
    frames = (bucket.frames - 1) // vae["temporal_factor"] + 1
    area = (bucket.height // vae["spatial_factor"]) * (bucket.width // vae["spatial_factor"])
    return 2 * frames * vae["latent_channels"] * area
