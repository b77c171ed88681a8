"""What sample, train and encode left, read for an evaluation."""

import json
import math
from pathlib import Path
from typing import Any

from shards.dataset import Dataset
from shards.manifest import Manifest
from stages.errors import ConfigError
from stages.evaluation.report import Training
from stages.output import METRICS, SETTINGS, SUMMARY

VALIDATION = "validation_loss"
VIDEO = ".mp4"


def read_samples(folder: str) -> dict[str, Any]:
    """summary.json of sample's output folder, with the .mp4 of each sample, of whichever formats it has.

    Raises ConfigError unless it lists samples, each with such a file.
    """
    path = _folder("samples", folder, "sample") / SUMMARY
    if not path.is_file():
        raise ConfigError(f"{folder} has no {SUMMARY}: give samples= the output folder of a finished sample")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] = [
            {"file": _video(path.parent, str(row["file"])), "prompt": str(row["prompt"]), "seed": int(row["seed"])}
            for row in summary["samples"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no summary of sample ({error!r}): run sample again") from None
    if not rows:
        raise ConfigError(f"{path} lists no samples: run sample again")
    absent = [row["file"] for row in rows if not (path.parent / row["file"]).is_file()]
    if absent:
        raise ConfigError(f"{path} lists {absent[0]}, which is not there ({len(absent)} absent): run sample again")
    return {**summary, "samples": rows}


def _video(folder: Path, file: str) -> str:
    """The .mp4 that a sample has beside the file which is listed."""
    video = Path(file).with_suffix(VIDEO)
    if Path(file).suffix != VIDEO and not (folder / video).is_file():
        raise ConfigError(f"{folder} lists {file}, expected {VIDEO}: run sample again with mp4 among its formats")
    return str(video)


def read_training(run: str) -> Training:
    """metrics.jsonl of a run's folder. Raises ConfigError where it is absent, empty or damaged."""
    path = _folder("run", run, "train") / METRICS
    if not path.is_file():
        raise ConfigError(f"{run} has no {METRICS}: give run= the output folder of a training")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # of a run that is still writing, or was killed while it did
    logged = [_logged(line, f"{path}, line {place}") for place, line in enumerate(lines, 1)]
    if not logged:
        raise ConfigError(f"{path} is empty: the run has not logged a step yet (see train.log_every)")
    if any(later["step"] <= earlier["step"] for earlier, later in zip(logged, logged[1:], strict=False)):
        raise ConfigError(f"{path}: its steps do not ascend, expected the log of one run: run train again")
    return Training(
        steps=[int(line["step"]) for line in logged],
        losses=[line["loss"] for line in logged],
        clips_per_s=[line["clips_per_s"] for line in logged],
        tokens_per_s=[line["tokens_per_s"] for line in logged],
        data_wait_shares=[line["data_wait_share"] for line in logged],
        peak_memory_gb=max(line["peak_memory_gb"] for line in logged),
        validation=[(int(line["step"]), line[VALIDATION]) for line in logged if VALIDATION in line],
    )


def read_manifest(shards: str) -> Manifest:
    """The dataset's own account of itself. Raises ConfigError or DatasetError where there is none."""
    return Dataset.open(_folder("shards", shards, "encode"), buckets=()).manifest  # reads no index


def read_settings(folder: str) -> str | None:
    """The resolved settings that a command left, as YAML."""
    file = Path(folder) / SETTINGS
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _folder(key: str, path: str, command: str) -> Path:
    if not path:
        raise ConfigError(f"{key} is not set: give {key}= the output folder of {command}")
    if not Path(path).is_dir():
        raise ConfigError(f"no folder at {path}: run {command} first, or give {key}= the output folder of {command}")
    return Path(path)


def _logged(line: str, where: str) -> dict[str, float]:
    try:
        values = json.loads(line)
        names = ("step", "loss", "clips_per_s", "tokens_per_s", "data_wait_share", "peak_memory_gb")
        numbers = {name: float(values[name]) for name in (*names, VALIDATION) if name in names or name in values}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: found {line.strip()[:60]!r}, expected the metrics of a step ({error!r})") from None
    if not all(map(math.isfinite, numbers.values())):
        raise ConfigError(f"{where}: found {line.strip()[:60]!r}, expected finite numbers")
    return numbers
