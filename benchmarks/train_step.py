"""What DeepSpeed, and the way of the data, add to a training step.

python -m benchmarks.train_step        about 5 minutes on 2 cores; 0.4 GB in a temporary folder

One rank, ZeRO-1, fp32, one thread; a model of width 384, two spatial and two temporal blocks, 11 M parameters. A step
is one clip of 256 x 256 pixels with 20 tokens of text, of 16 frames or of a single one: the fewer the tokens, the more
the weights' own work counts. All arms go forward and backward through the same model, clip the gradient's norm and take
a step of AdamW:

  plain        PyTorch alone: clip_grad_norm_, torch.optim.AdamW(fused=True)
  plain + EMA  the same, and the moving average of `torch.optim.swa_utils`, since ours keeps one too
  engine       ours, under DeepSpeed, with the average: `stages.engine.Engine` on inputs that lie in memory
  fed          ours, the whole train command from shards: reading, noise, logging every step

Arms take turns, and the best step counts: in seconds of the CPU where DeepSpeed is looked at, as they are the process's
own whatever else the machine does, and in seconds of the clock where waiting for data would count.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.rendered import Samples
from benchmarks.table import Row, report
from models.presets import preset
from models.transformer import Transformer
from shards.loader import DataConfig
from shards.schema import Bucket
from stages.engine import Engine, start_ranks
from stages.train import train
from stages.training.config import StepConfig, TrainConfig
from stages.training.optimizer import OptimizerConfig

PACKAGES = ("torch", "deepspeed")
TWO_LAYERS_OF_384 = {"preset": "S/2", "num_layers": 2}
TURNS = {16: 4, 1: 12}  # by the clip's frames
STEPS_A_TURN = 2
FED_STEPS = 3  # a turn, the first of which has to wait for its batch


def train_step() -> list[Row]:
    torch.set_num_threads(1)
    start_ranks()
    rows = []
    for frames, turns in TURNS.items():
        rows += _deepspeed_rows(frames, turns)
    return rows + _feed_rows(16, TURNS[16])


def _deepspeed_rows(frames: int, turns: int) -> list[Row]:
    inputs = _inputs(frames)
    arms = {"plain": _plain(inputs, ema=False), "plain + EMA": _plain(inputs, ema=True), "engine": _engine(inputs)}
    seconds = dict.fromkeys(arms, float("inf"))
    for _ in range(turns):
        for name, step in arms.items():
            seconds[name] = min(seconds[name], _least(step, time.process_time))
    name = f"{frames} frames, a step: "
    plain, ema, ours = seconds.values()
    target = "<= 1.1" if frames > 1 else None
    return [
        Row(name + "plain", plain, "CPU s"),
        Row(name + "plain + EMA", ema, "CPU s", "plain", ema / plain),
        Row(name + "engine", ours, "CPU s", "plain + EMA", ours / ema, target, ours / ema <= 1.1 if target else None),
        Row(name + "engine", ours, "CPU s", "plain", ours / plain),
    ]


def _feed_rows(frames: int, turns: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        bucket = Bucket(256, 256, frames)
        Samples(bucket, shards=2, per_shard=turns * FED_STEPS).render(Path(folder) / "dataset")
        alone = _engine(_inputs(frames))
        alone_s = float("inf")
        for turn in range(turns):
            _train(Path(folder), (turn + 1) * FED_STEPS)
            alone_s = min(alone_s, _least(alone, time.perf_counter))
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    fed_s = min(1 / line["clips_per_s"] for line in lines)
    waited = statistics.mean(line["data_wait_share"] for line in lines if line["step"] % FED_STEPS != 1)
    share = alone_s / fed_s
    return [
        Row(f"{frames} frames, a step: engine", alone_s, "s"),
        Row(f"{frames} frames, a step: fed", fed_s, "s"),
        Row("engine's step, of one that is fed", 100 * share, "%", target=">= 98", holds=share >= 0.98),
        Row("data wait, of steps after the first", 100 * waited, "%", target="<= 1", holds=waited <= 0.01),
    ]


def _least(step: Callable[[], None], clock: Callable[[], float]) -> float:
    """The shortest of a turn's steps."""
    seconds = []
    for _ in range(STEPS_A_TURN):
        started = clock()
        step()
        seconds.append(clock() - started)
    return min(seconds)


def _plain(inputs: list[torch.Tensor], *, ema: bool) -> Callable[[], None]:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0, fused=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999)) if ema else None

    def step() -> None:
        model(*inputs).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()
        if average:
            average.update_parameters(model)

    return step


def _engine(inputs: list[torch.Tensor]) -> Callable[[], None]:
    settings = TrainConfig().deepspeed
    engine = Engine(_model(), OptimizerConfig(), precision="fp32", accumulation=1, deepspeed_settings=settings)

    def step() -> None:
        engine.backward(engine.module(*inputs).square().mean())
        engine.step(lr_share=1, clip_norm=1)

    return step


def _train(folder: Path, steps: int) -> None:
    """Goes on with the one run, up to so many steps."""
    config = TrainConfig(
        output=str(folder / "run"),
        data=DataConfig(shards=str(folder / "dataset"), read_threads=1),
        model=TWO_LAYERS_OF_384,
        train=StepConfig(steps=steps, batch_size=1, precision="fp32", log_every=1, keep_last=1),
    )
    train(config)


def _model() -> Transformer:
    torch.manual_seed(0)
    settings = dict(TWO_LAYERS_OF_384)
    return Transformer(preset(str(settings.pop("preset")), settings))


def _inputs(frames: int) -> list[torch.Tensor]:
    """Latents, timestep, text and its mask."""
    mask = torch.ones(1, 20, dtype=torch.bool)
    return [torch.randn(1, 4, frames, 32, 32), torch.tensor([500.0]), torch.randn(1, 20, 4096), mask]


if __name__ == "__main__":
    report("train_step", train_step(), PACKAGES)
