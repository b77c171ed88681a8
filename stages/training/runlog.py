"""What a run tells while it goes: a progress line, metrics.jsonl and TensorBoard."""

import io
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter, SummaryWriter

from models.flops import count_flops, peak_flops_per_s
from models.transformer import TransformerConfig
from shards import storage
from shards.loader import Batch
from stages.animation import encode_animation
from stages.errors import WorkError
from stages.output import METRICS


def peak_memory_gb() -> float:
    """The most memory this process has held: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Rates:
    """Rates since it was made, and the share of the time spent waiting for data.

    Clips and tokens are those of all ranks. ``mfu``, model FLOPs utilisation, is of this rank's device: the arithmetic
    that the model needs for its batches, their captions without padding, over what the device could have done in bf16;
    None where that is not known.
    """

    def __init__(self, device: torch.device) -> None:
        self._start = time.perf_counter()
        self._peak_flops_per_s = peak_flops_per_s(device)
        self._waited_s = 0.0
        self._clips = 0
        self._tokens = 0
        self._flops = 0

    def add(self, network: TransformerConfig, batch: Batch, clips: int, waited_s: float) -> None:
        """A step: this rank's batch, and how many clips all ranks took."""
        shape = batch.latent_shape
        self._clips += clips
        self._tokens += clips * network.tokens(*shape)
        self._flops += count_flops(network, len(batch.keys), *shape, int(batch.text_mask.sum())).training
        self._waited_s += waited_s

    def report(self) -> dict[str, float | None]:
        elapsed_s = time.perf_counter() - self._start
        peak = self._peak_flops_per_s
        return {
            "clips_per_s": self._clips / elapsed_s,
            "tokens_per_s": self._tokens / elapsed_s,
            "data_wait_share": self._waited_s / elapsed_s,
            "mfu": None if peak is None else self._flops / elapsed_s / peak,
        }


class RunLog:
    """Rank 0's log of a run. Opening it at a step drops the metrics after that step (a resume replaces them)."""

    def __init__(self, run: Path, start_step: int, total_steps: int):
        self.failure: WorkError | None = None  # for all ranks to hear of before the next step
        self._run = run
        self._path = run / METRICS
        self._total = total_steps
        self._started = time.perf_counter()
        self._start_step = start_step
        kept = [line for line in self._lines() if json.loads(line)["step"] <= start_step]
        self.last_loss: float | None = json.loads(kept[-1])["loss"] if kept else None
        with storage.write_whole(self._path) as file:
            file.write("".join(kept).encode())
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)
        assert self._board.file_writer
        self._events: FileWriter = self._board.file_writer

    def attempt(self, write: Callable[..., object], *arguments: object) -> None:
        """Call what writes into the run's folder; where the file system refuses, that is a ``failure``."""
        try:
            write(*arguments)
        except OSError as error:
            self.failure = WorkError(f"{self._run} cannot be written to: {error}")

    def _lines(self) -> list[str]:
        if not self._path.exists():
            return []
        lines = self._path.read_text().splitlines(keepends=True)
        return [line for line in lines if line.endswith("}\n")]  # a killed run may leave half a line

    def write(self, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl, one point a number in TensorBoard, one progress line."""
        self.last_loss = metrics["loss"]
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, metrics["step"])
        self._progress(metrics)

    def show(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture in TensorBoard at once: uint8 [H, W, 3]."""
        self._board.add_image(name, picture, step, dataformats="HWC")
        self._board.flush()

    def play(self, name: str, frames: np.ndarray, fps: float, step: int) -> None:
        """A video in TensorBoard at once: uint8 [T, H, W, 3].

        As SummaryWriter's ``add_video`` does it, a GIF in the place of a picture, but without moviepy.
        """
        file = io.BytesIO()
        encode_animation(file, frames, fps, "gif")
        _, height, width, channels = frames.shape
        gif = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=file.getvalue())
        self._events.add_summary(Summary(value=[Summary.Value(tag=name, image=gif)]), step)
        self._board.flush()

    def _progress(self, metrics: dict[str, Any]) -> None:
        step = metrics["step"]
        done = max(1, step - self._start_step)
        left_s = (time.perf_counter() - self._started) / done * (self._total - step)
        line = (
            f"step {step}/{self._total}  loss {metrics['loss']:.4f}  {metrics['clips_per_s']:.1f} clips/s  "
            f"data wait {metrics['data_wait_share']:.1%}  left {left_s / 60:.1f} min"
        )
        terminal = sys.stdout.isatty()
        print(f"\r{line}" if terminal else line, end="" if terminal and step < self._total else "\n", flush=True)

    def close(self) -> None:
        self._file.close()
        self._board.close()
