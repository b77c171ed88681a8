"""How exact the model and the training are: against diffusers, after kills, on other ranks, against plain PyTorch.

python -m benchmarks.exactness [KILLS]      prints a table, writes outputs/benchmarks/exactness.json

Trains the tiny preset on rendered shapes in fp32 for 50 steps, again and again, with the real commands on CPU ranks;
KILLS (5) of these runs are killed with SIGKILL at a random moment, all processes at once. 7 minutes on 2 cores.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from diffusers import LatteTransformer3DModel

from benchmarks.table import Row, report
from models.loading import load_transformer
from models.weights import read_info
from pipelines.config import load_config
from stages.export import ExportConfig, export
from stages.training.config import TrainConfig
from stages.training.network import build_loss, build_model
from stages.training.optimizer import lr_share
from stages.training.source import open_source
from tests.end_to_end.test_overfit import psnr_of_a_clip_learnt_by_heart
from tests.models.networks import SHAPES, SMALL, image_model, inputs, latte, random_transformer
from tests.running import ROOT, command, deepspeed, environment, run

CONFIG = "configs/train/shapes.yaml"
STEPS, SAVE_EVERY, RESUMED_AT = 50, 5, 25
STATE = ("model", "ema", "exp_avg", "exp_avg_sq")
ENCODERS = (
    "decord", "av.", "sentencepiece", "diffusers.models.autoencoders", "transformers.models.t5",
    "models.vae", "models.text", "stages.decoding",
)  # fmt: skip

ALONE = [
    sys.executable,
    "-c",
    "import sys; from pipelines.train import main; main(sys.argv[1:]); print('LOADED', *sys.modules)",
    "--config",
    CONFIG,
]
TWO_RANKS = [*deepspeed(2), "--config", CONFIG]


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    rows = list(parity())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shards = root / "shards"
        run(*command("encode"), "--input", "shapes", f"output={shards}", "shapes.clips=48", "shard_clips=16")
        rows += training(root, shards, kills)
        psnr = psnr_of_a_clip_learnt_by_heart(shards, root / "one clip")
    rows.append(Row("one clip learnt by heart by the tiny preset", psnr, "dB", target=">= 25", holds=psnr >= 25))
    report("exactness", rows, ("torch", "deepspeed", "diffusers", "transformers"))


def training(root: Path, shards: Path, kills: int) -> Iterator[Row]:
    """What the runs over one dataset show."""
    two, one = root / "two ranks", root / "one rank"
    run(*TWO_RANKS, *settings(shards, two))
    loaded = run(*ALONE, *settings(shards, one)).stdout.rpartition("LOADED ")[2].split()
    assert "stages.train" in loaded
    yield from resumes(root, shards, two, kills)
    yield from elastic(shards, {"2 ranks to 1": (two, ALONE), "1 rank to 2": (one, TWO_RANKS)})

    reference = plain_losses(load_config(TrainConfig, CONFIG, settings(shards, root)))
    for stage in (1, 2, 3):
        folder = two if stage == 1 else root / f"zero {stage}"
        if stage > 1:
            run(*TWO_RANKS, *settings(shards, folder), f"deepspeed.zero_optimization.stage={stage}")
        found = losses(folder)
        for step, target in ((10, 1e-5), (STEPS, 1e-4)):
            pairs = zip(found[:step], reference[:step], strict=True)
            largest = max(abs(ours - plain) / plain for ours, plain in pairs)
            yield within(f"ZeRO-{stage} on 2 ranks against plain PyTorch: losses to step {step}", largest, target)

    yield within("trained weights in diffusers' Latte", exported(two, root / "exported"), 1e-4)
    encoders = [name for name in loaded if name.startswith(ENCODERS) or name == "av"]
    yield Row("modules of encoders in the trainer's process", len(encoders), "", target="0", holds=not encoders)


def within(name: str, value: float, target: float) -> Row:
    """A relative difference."""
    return Row(name, value, "relative", target=f"<= {target:g}", holds=value <= target)


@torch.no_grad()
def parity() -> Iterator[Row]:
    """The largest difference to the references over their output's scale, with every parameter drawn at random."""
    videos, images = [], []
    for shape in SHAPES:
        model, video = random_transformer(), latte(SMALL, shape[0])
        video.load_state_dict(model.state_dict())
        latents, timestep, text, mask = inputs(shape=shape)
        videos.append(difference(model(latents, timestep, text, mask), video(latents, timestep, text).sample))

        model, image = image_model(replace(SMALL, temporal_init="zero"))
        latents, timestep, text, mask = inputs(shape=(1, *shape[1:]), lengths=(7, 1, 4))
        expected = image(latents[:, :, 0], text, timestep, encoder_attention_mask=mask).sample
        images.append(difference(model(latents, timestep, text, mask)[:, :, 0], expected))
    yield within(f"output against diffusers' Latte, {len(SHAPES)} shapes", max(videos), 1e-4)
    yield within(f"output of a frame against PixArt, {len(SHAPES)} shapes", max(images), 1e-4)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, over the scale of what is expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def settings(shards: Path, folder: Path) -> list[str]:
    """A run that Latte's layout can express, and so diffusers open."""
    return [
        f"data.shards={shards}", f"output={folder}", f"train.steps={STEPS}",
        "train.batch_size=8", f"train.save_every={SAVE_EVERY}", f"train.keep_last={STEPS}", "train.log_every=1",
        "train.log_sample_ids=true", "optimizer.warmup_steps=10", "model.pooled_text=false",
    ]  # fmt: skip


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def has_stepped(folder: Path) -> bool:
    path = folder / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


def samples(folder: Path) -> list[list[str]]:
    return [line["sample_ids"] for line in metrics(folder)]


def resumes(root: Path, shards: Path, whole: Path, kills: int) -> Iterator[Row]:
    """Runs that are killed while they train and go on by the same command, held against the one that was not."""
    length_s = json.loads((whole / "summary.json").read_text())["seconds"]
    chance, equal, equal_losses, killed = random.Random(0), 0, 0, 0
    while killed < kills:
        folder = root / f"killed {killed}"
        if not killed_at(chance.uniform(0, length_s), [*TWO_RANKS, *settings(shards, folder)], folder):
            length_s *= 0.9  # it was faster than the first, and there was nobody left to kill
            shutil.rmtree(folder)
            continue
        killed += 1
        came_to = len((folder / "metrics.jsonl").read_text().splitlines())
        run(*TWO_RANKS, *settings(shards, folder))
        equal += all(state(folder, name) == state(whole, name) for name in STATE)
        equal_losses += (losses(folder), samples(folder)) == (losses(whole), samples(whole))
        print(f"killed after step {came_to}: {equal} of {killed} bit-equal", flush=True)
    for what, count in (("losses", equal_losses), ("weights, average, moments", equal)):
        name = f"{what} bit-equal after a kill"
        yield Row(name, count, f"of {kills}", target=f"{kills}", holds=count == kills)


def state(folder: Path, name: str) -> bytes:
    return (folder / f"checkpoints/step-{STEPS:07d}/{name}.safetensors").read_bytes()


def killed_at(moment_s: float, arguments: Sequence[str], folder: Path) -> bool:
    """Start a run and kill all its processes so long after its first step; whether there was one to kill."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not has_stepped(folder):
        time.sleep(0.01)
    end = time.monotonic() + moment_s
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    if process.poll() is not None:
        return False
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    return True


def elastic(shards: Path, cases: dict[str, tuple[Path, list[str]]]) -> Iterator[Row]:
    """Runs that go on from their middle on another number of ranks. cases: name -> (the run, how it goes on)."""
    for name, (whole, command_line) in cases.items():
        folder = whole.with_name(f"{whole.name}, resumed")
        shutil.copytree(whole, folder)
        for checkpoint in (folder / "checkpoints").iterdir():
            if read_info(checkpoint).step > RESUMED_AT:
                shutil.rmtree(checkpoint)
        assert f"continues at step {RESUMED_AT}" in run(*command_line, *settings(shards, folder)).stdout
        same = samples(folder) == samples(whole)
        yield Row(f"{name}: steps with the same samples in order", STEPS * same, "steps", target=f"{STEPS}", holds=same)
        pairs = zip(losses(folder), losses(whole), strict=True)
        largest = max(abs(found - expected) / expected for found, expected in pairs)
        yield within(f"{name}: losses, {STEPS - RESUMED_AT} steps after", largest, 1e-4)


def plain_losses(config: TrainConfig) -> list[float]:
    """The same training in this process, without DeepSpeed: the losses of its steps."""
    source = open_source(config)
    model = build_model(config, source)
    loss_of = build_loss(config, source, torch.device("cpu"))
    adam = torch.optim.AdamW(model.parameters(), betas=config.optimizer.betas, weight_decay=0)
    found = []
    for step, batch in enumerate(source.loader.batches(0, STEPS)):
        for group in adam.param_groups:
            group["lr"] = config.optimizer.lr * lr_share(step, STEPS, config.optimizer)
        loss = loss_of.training(model, batch, source.sample_tokens[batch.bucket.name])
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        adam.step()
        found.append(loss.item())
    return found


@torch.no_grad()
def exported(source: Path, folder: Path) -> float:
    """The difference of what diffusers computes with a run's exported weights."""
    frames = export(ExportConfig(str(source), str(folder)))["video_length"]
    model, opened = load_transformer(source), LatteTransformer3DModel.from_pretrained(folder).eval()
    latents, timestep, text, mask = inputs(model.config, shape=(frames, 8, 8))
    return difference(opened(latents, timestep, text).sample, model(latents, timestep, text, mask))


if __name__ == "__main__":
    main()
