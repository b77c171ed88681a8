"""What the encode job costs beside its two real costs, the VAE and the decoder.

    python -m benchmarks.encode      prints a table, writes outputs/benchmarks/encode.json; about 12 minutes

One worker with one thread and one decode process, as in the arms they are compared with. The VAE arm encodes frames
that lie in memory; the decode arm decodes the same clips one after the other. The job's clock runs from its first
finished shard to its last: starting Ray and loading the model, which happen once, do not count. Of each arm the
fastest of several rounds counts, since whatever else the machine does only slows it.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch

from benchmarks.table import Row, report
from models.identity import vae_identity
from models.vae import FrozenVAE
from shards.schema import LATENTS, Bucket
from stages import execute
from stages.columns import Decoded, ShardReport, Target, VaeConfig
from stages.decoding.decode import Frames, decode_source
from stages.execute import RuntimeConfig, Worker
from stages.latent_worker import LatentWorker
from stages.planning.plan import PlannedClip, ShardPlan

ROUNDS = 4


@dataclass(frozen=True)
class Clips:
    """What is encoded: clips of so many frames, from H.264 of 30 frames a second of a size (width, height)."""

    frames: int
    source: tuple[int, int]
    shard_clips: int
    vae_shards: int
    decoder_shards: int

    @property
    def bucket(self) -> Bucket:
        return Bucket(256, 256, self.frames)

    @property
    def name(self) -> str:
        return f"{self.frames} frames of {self.source[1]}p"


LONG = Clips(56, (1280, 720), shard_clips=6, vae_shards=5, decoder_shards=9)
SHORT = Clips(16, (640, 360), shard_clips=24, vae_shards=0, decoder_shards=25)
FPS, SOURCE_FPS = 8.0, 30


class NullWorker:
    """Takes the frames and makes nothing of them: what is left is the job's own cost."""

    def make_shard(self, plan: ShardPlan, decoded: Decoded) -> ShardReport:
        frames = sum(len(found.pixels) for found in decoded if isinstance(found, Frames))
        return ShardReport(plan.bucket.name, plan.number, Counter(written=len(plan.clips)), frames)


def main() -> None:
    torch.set_num_threads(1)
    runtime = RuntimeConfig(actors=1, threads=1, decoders=1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [*_against_vae(LONG, folder, runtime)]
        for clips in (LONG, SHORT):
            rows += _against_decoder(clips, folder, runtime)
    report("encode", rows, ("ray", "av", "torch", "diffusers"))


def _against_vae(clips: Clips, folder: str, runtime: RuntimeConfig) -> list[Row]:
    plans = _plans(clips, clips.vae_shards, folder)
    rounds = [
        (_job(partial(_latent_worker, f"{folder}/dataset-{number}", clips), plans, runtime), _bare_vae(clips))
        for number in range(ROUNDS)
    ]
    return _rows(rounds, f"with the tiny VAE, {clips.name}", "bare VAE", 0.90)


def _against_decoder(clips: Clips, folder: str, runtime: RuntimeConfig) -> list[Row]:
    plans = _plans(clips, clips.decoder_shards, folder)
    rounds = [(_job(NullWorker, plans, runtime), _bare_decoder(clips, plans)) for _ in range(ROUNDS)]
    return _rows(rounds, f"with a null encoder, {clips.name}", "bare decoder", 0.85)


def _rows(rounds: list[tuple[float, float]], what: str, against: str, target: float) -> list[Row]:
    job, bare = (max(speeds) for speeds in zip(*rounds, strict=True))
    return [
        Row(f"{against}, for the next row", bare, "frames/s"),
        Row(f"job {what}", job, "frames/s", against, job / bare, f">= {target}", job / bare >= target),
    ]


def _job(make_worker: Callable[[], Worker], plans: list[ShardPlan], runtime: RuntimeConfig) -> float:
    """Frames a second between the end of the first shard and the end of the last."""
    with execute.running(runtime):
        ends, frames = [], 0
        for done in execute.run_shards(make_worker, plans, runtime, "pyav"):
            ends.append(time.perf_counter())
            frames += done.frames if len(ends) > 1 else 0
    return frames / (ends[-1] - ends[0])


def _latent_worker(folder: str, clips: Clips) -> LatentWorker:
    target = Target(Path(folder), LATENTS, {clips.bucket: ""})
    return LatentWorker(VaeConfig("tiny"), vae_identity("tiny"), target, threads=1)


def _bare_vae(clips: Clips) -> float:
    vae = FrozenVAE.load("tiny")
    frames = np.random.default_rng(0).integers(0, 256, (12 * clips.frames, 256, 256, 3), np.uint8)
    vae.encode_posterior(frames[:8])
    started = time.perf_counter()
    vae.encode_posterior(frames)
    return len(frames) / (time.perf_counter() - started)


def _bare_decoder(clips: Clips, plans: list[ShardPlan]) -> float:
    some = [clip for plan in plans[::2] for clip in plan.clips]
    size = clips.bucket.frames, clips.bucket.height, clips.bucket.width
    started = time.perf_counter()
    for clip in some:
        decode_source(clip, *size, timeout_s=60, decoder="pyav")
    return len(some) * clips.frames / (time.perf_counter() - started)


def _plans(clips: Clips, shards: int, folder: str) -> list[ShardPlan]:
    path = _render(Path(folder) / f"{clips.source[1]}.mp4", clips)

    def clip(name: str) -> PlannedClip:
        return PlannedClip(name, name, "video", str(path), 0.0, 0.0, FPS, 7.0, "", None, None, None, None)

    names = [[f"{shard:04d}_{index:04d}" for index in range(clips.shard_clips)] for shard in range(shards)]
    return [ShardPlan(clips.bucket, number, tuple(map(clip, keys))) for number, keys in enumerate(names)]


def _render(path: Path, clips: Clips) -> Path:
    """A drifting texture, as long as the clips are."""
    width, height = clips.source
    texture = np.random.default_rng(0).integers(0, 256, (height // 4 + 64, width // 4 + 64), np.uint8)
    texture = texture.repeat(4, 0).repeat(4, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=SOURCE_FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(round(clips.frames / FPS * SOURCE_FPS) + 1):
            part = np.ascontiguousarray(texture[index : index + height, index : index + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(part, format="gray")))
        container.mux(stream.encode())
    return path


if __name__ == "__main__":
    main()
