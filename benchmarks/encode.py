"""What the encode job costs beside its two real costs, the VAE and the decoder.

    python -m benchmarks.encode      prints a table, writes outputs/benchmarks/encode.json; about 5 minutes

One worker with one thread and one decode process, as in the arms they are compared with. The VAE arm encodes frames
that lie in memory; the decode arm decodes the same clips one after the other. The job's clock runs from its first
finished shard to its last, so that starting Ray and loading the model, which happen once, do not count.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch

from benchmarks.table import Row, report
from models.vae import FrozenVAE, vae_identity
from shards.schema import LATENTS, Bucket
from stages import execute
from stages.columns import Decoded, LatentWorker, ShardReport, Target, VaeConfig
from stages.decode import Frames, decode_source
from stages.execute import RuntimeConfig, Worker
from stages.plan import PlannedClip, ShardPlan

BUCKET = Bucket(256, 256, 16)
FPS, SOURCE_FPS, SOURCE_SIZE = 8.0, 30, (640, 360)  # pixels: width, height
SHARDS, SHARD_CLIPS = 7, 24
ROUNDS = 3


class NullWorker:
    """Takes the frames and makes nothing of them: what is left is the job's own cost."""

    def make_shard(self, plan: ShardPlan, decoded: Decoded) -> ShardReport:
        frames = sum(len(found.pixels) for found in decoded if isinstance(found, Frames))
        return ShardReport(plan.bucket.name, plan.number, Counter(written=len(plan.clips)), frames)


def main() -> None:
    torch.set_num_threads(1)
    runtime = RuntimeConfig(actors=1, threads=1, decoders=1)
    with tempfile.TemporaryDirectory() as folder:
        plans = _plans(_render(Path(folder) / "clip.mp4"))
        vae = partial(_latent_worker, folder)
        ratios: dict[str, list[tuple[float, float]]] = {"VAE": [], "decoder": []}
        for number in range(ROUNDS):  # in turn, so that what else the machine does falls on both
            ratios["VAE"].append((_job(partial(vae, number), plans, runtime), _bare_vae()))
            ratios["decoder"].append((_job(NullWorker, plans, runtime), _bare_decoder(plans)))
    rows = []
    for arm, reach in (("VAE", 0.90), ("decoder", 0.85)):
        job, bare = sorted(ratios[arm], key=lambda pair: pair[0] / pair[1])[ROUNDS // 2]  # the median round
        name = "with the tiny VAE" if arm == "VAE" else "with a null encoder"
        rows.append(Row(f"bare {arm}", bare, "frames/s"))
        rows.append(Row(f"job {name}", job, "frames/s", f"bare {arm}", job / bare, f">= {reach}", job / bare >= reach))
    report("encode", rows, ("ray", "av", "torch", "diffusers"))


def _job(make_worker: Callable[[], Worker], plans: list[ShardPlan], runtime: RuntimeConfig) -> float:
    """Frames a second between the end of the first shard and the end of the last."""
    with execute.running(runtime):
        ends, frames = [], 0
        for done in execute.run_shards(make_worker, plans, runtime, "pyav"):
            ends.append(time.perf_counter())
            frames += done.frames if len(ends) > 1 else 0
    return frames / (ends[-1] - ends[0])


def _latent_worker(folder: str, number: int) -> LatentWorker:
    target = Target(Path(folder) / f"dataset-{number}", LATENTS, {BUCKET: ""})
    return LatentWorker(VaeConfig("tiny"), vae_identity("tiny"), target, threads=1)


def _bare_vae() -> float:
    vae = FrozenVAE.load("tiny")
    frames = np.random.default_rng(0).integers(0, 256, (SHARD_CLIPS * BUCKET.frames, 256, 256, 3), np.uint8)
    vae.encode_posterior(frames[:8])
    started = time.perf_counter()
    for _ in range(2):
        vae.encode_posterior(frames)
    return 2 * len(frames) / (time.perf_counter() - started)


def _bare_decoder(plans: list[ShardPlan]) -> float:
    clips = [clip for plan in plans[:3] for clip in plan.clips]
    started = time.perf_counter()
    for clip in clips:
        decode_source(clip, BUCKET.frames, BUCKET.height, BUCKET.width, timeout_s=60, decoder="pyav")
    return len(clips) * BUCKET.frames / (time.perf_counter() - started)


def _plans(path: Path) -> list[ShardPlan]:
    def clip(name: str) -> PlannedClip:
        return PlannedClip(name, name, "video", str(path), 0.0, 0.0, FPS, 2.0, "", None, None, None, None)

    names = [[f"{shard:04d}_{index:04d}" for index in range(SHARD_CLIPS)] for shard in range(SHARDS)]
    return [ShardPlan(BUCKET, number, tuple(map(clip, keys))) for number, keys in enumerate(names)]


def _render(path: Path) -> Path:
    """Two seconds of a drifting texture."""
    width, height = SOURCE_SIZE
    texture = np.random.default_rng(0).integers(0, 256, (height // 4 + 64, width // 4 + 64), np.uint8).repeat(4, 0)
    texture = texture.repeat(4, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=SOURCE_FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(2 * SOURCE_FPS):
            part = np.ascontiguousarray(texture[index : index + height, index : index + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(part, format="gray")))
        container.mux(stream.encode())
    return path


if __name__ == "__main__":
    main()
