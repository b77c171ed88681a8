"""The folders that encode, train and sample leave, made without them: rendered clips stand in for samples."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shards.dataset import compact, create_dataset, ensure_fingerprint
from shards.schema import LATENTS, MEAN, TEXT, Bucket, Reject, Sample, make_key, text_column
from shards.writer import write_shard
from stages.evaluation.config import EvaluateConfig
from stages.shapes.render import Combination, ShapesConfig, caption, render_frames
from stages.video import write_mp4

TOTALS = {
    "rows": 9,
    "clips": 8,
    "written": 5,
    "filtered": 0,
    "duplicates": 1,
    "rejected": {"too_short": 1, "undecodable": 1},
}


def write_samples(folder: Path, shown: Sequence[Combination], prompts: Sequence[str] | None = None) -> None:
    """A samples folder: clips that show combinations, said to be made from prompts (their captions by default)."""
    folder.mkdir(parents=True)
    rows = []
    for number, combination in enumerate(shown):
        frames = render_frames(combination, ShapesConfig(), np.random.default_rng(number))
        write_mp4(folder / f"{number:04d}.mp4", frames, fps=8)
        prompt = prompts[number] if prompts else caption(combination)
        rows.append({"file": f"{number:04d}.mp4", "prompt": prompt, "seed": number})
    (folder / "summary.json").write_text(json.dumps({"samples": rows, "checkpoint": "run/checkpoints/step-000100"}))
    (folder / "config.yaml").write_text("guidance_scale: 2.0\n")


def metrics_line(step: int, loss: float) -> str:
    rates = {"clips_per_s": 40.0, "tokens_per_s": 5120.0, "data_wait_share": 0.01}
    return json.dumps({"step": step, "loss": loss, **rates, "peak_memory_gb": 0.7, "mfu": None}) + "\n"


def write_run(folder: Path, steps: int = 2400, every: int = 20) -> None:
    """A run's folder, with a loss that falls from 1.5 to 0.15 and is noisy."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    lines = [
        metrics_line(step, float((0.15 + 1.35 * np.exp(-step / 150)) * draw.lognormal(0, 0.15)))
        for step in range(every, steps + 1, every)
    ]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "config.yaml").write_text("train:\n  steps: 2400\n")


def write_shards(folder: Path, name: str = "shapes") -> None:
    """A finished dataset of two buckets with 3 and 2 samples and one reject in each."""
    create_dataset(folder, name)
    for bucket, count in (("64x64x8", 3), ("64x64x16", 2)):
        for column in (LATENTS, text_column("t5")):
            fingerprint = ensure_fingerprint(folder, Bucket.parse(bucket), column, {"schema_version": 1})
            samples = sorted((_sample(bucket, number, column) for number in range(count)), key=lambda one: one.key)
            rejects = [Reject(make_key("bad", bucket), "too_short", "2 of 8 frames")] if column == LATENTS else []
            write_shard(folder / bucket / column, 0, samples, rejects, fingerprint_hash=fingerprint)
    compact(folder, TOTALS)
    (folder / "config.yaml").write_text("input: shapes\n")


def _sample(bucket: str, number: int, column: str) -> Sample:
    key = make_key("clip", bucket, number)
    if column != LATENTS:
        return Sample(key, {TEXT: np.zeros((3, 6), np.float16)}, {"tokens": 3, "caption_hash": "00", "caption": None})
    attributes = {"duration_s": 1.0, "caption": "a clip", "source": "clip.mp4", "start_s": 0.0}
    attributes |= {"aesthetic": None, "umt": None, "matching_score": None, "desirable_filtering": None}
    attributes |= {"latent_motion": 0.1}
    return Sample(key, {MEAN: np.zeros((2, 4, 8, 8), np.float16)}, attributes)


def finished_run(folder: Path, shown: Sequence[Combination], prompts: Sequence[str] | None = None) -> EvaluateConfig:
    """All three folders, and the config that evaluates them."""
    write_samples(folder / "samples", shown, prompts)
    write_run(folder / "run")
    write_shards(folder / "shards")
    folders = {name: str(folder / name) for name in ("samples", "run", "shards")}
    return EvaluateConfig(**folders, output=str(folder / "report"))
