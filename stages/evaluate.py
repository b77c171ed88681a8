"""How good are a run's samples? Measured where their prompts allow it, and shown on one page."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
from tqdm import tqdm

from shards.dataset import Dataset
from shards.manifest import Manifest
from stages.decoding.pyav_reader import probe
from stages.errors import ConfigError, DecodeError
from stages.output import output_folder, save_settings, save_summary, write_text
from stages.page import percent
from stages.report import Clip, Page, Training, write_report
from stages.shapes.check import Score, Share, SplitScore, check_file, score
from stages.shapes.render import Combination, parse_caption

REPORT = "report.html"


@dataclass(frozen=True)
class EvaluateConfig:
    """What is looked at.

    samples, run, shards: the output folders of sample, of train and of encode.
    output: where report.html, metrics.json and summary.json go.
    """

    samples: str = ""
    run: str = ""
    shards: str = ""
    output: str = "outputs/report"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Check the samples and write the page, every sample's verdict (metrics.json) and the summary, which is returned.

    Prompts that are captions of the shapes dataset are compared with what their videos show; others are only shown.
    Raises ConfigError or DatasetError where an input is absent or is not what it should be.
    """
    started = time.perf_counter()
    found = read_samples(config.samples)
    training = read_training(config.run)
    manifest = read_manifest(config.shards)
    output = output_folder(config.output)
    save_settings(output, config)

    clips = [look_at(Path(config.samples), row) for row in tqdm(found["samples"], desc="check", disable=None)]
    verdicts = [(clip.prompt, clip.observed) for clip in clips if clip.observed is not None]
    result = score(verdicts) if verdicts else None
    folders = {"encode": config.shards, "train": config.run, "sample": config.samples}
    settings = [(name, text) for name, folder in folders.items() if (text := _settings(folder)) is not None]
    write_report(output / REPORT, Page(clips, result, training, manifest, settings, str(found.get("checkpoint", ""))))

    adherence = None if result is None else adherence_numbers(result)
    metrics = {"adherence": adherence, "samples": [_verdict(clip) for clip in clips]}
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    summary = {
        "samples": len(clips),
        "scored": len(verdicts),
        "adherence": adherence,
        "report": str(output / REPORT),
        "seconds": round(time.perf_counter() - started, 1),
    }
    save_summary(output, summary)
    return summary


def read_samples(folder: str) -> dict[str, Any]:
    """summary.json of sample's output folder. Raises ConfigError unless it lists samples, each with its file."""
    path = _folder("samples", folder, "sample") / "summary.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no summary.json: give samples= the output folder of a finished sample")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        rows = [(str(row["file"]), str(row["prompt"]), int(row["seed"])) for row in summary["samples"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no summary of sample ({error!r}): run sample again") from None
    if not rows:
        raise ConfigError(f"{path} lists no samples: run sample again")
    absent = [file for file, _, _ in rows if not (path.parent / file).is_file()]
    if absent:
        raise ConfigError(f"{path} lists {absent[0]}, which is not there ({len(absent)} absent): run sample again")
    return summary


def read_training(run: str) -> Training:
    """metrics.jsonl of a run's folder. Raises ConfigError where it is absent, empty or damaged."""
    path = _folder("run", run, "train") / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{run} has no metrics.jsonl: give run= the output folder of a training")
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
    )


def read_manifest(shards: str) -> Manifest:
    """The dataset's own account of itself. Raises ConfigError or DatasetError where there is none."""
    return Dataset.open(_folder("shards", shards, "encode"), buckets=()).manifest  # reads no index


def look_at(folder: Path, row: dict[str, Any]) -> Clip:
    """One line of sample's summary with what its video shows."""
    path = folder / row["file"]
    expected = _expected(row["prompt"])
    try:
        info = probe(str(path))
        observed = None if expected is None else check_file(path)
    except (DecodeError, av.error.FFmpegError, ValueError) as error:
        raise ConfigError(f"{path} cannot be checked: {error}; run sample again") from None
    return Clip(path, row["prompt"], int(row["seed"]), info.height, info.width, expected, observed)


def adherence_numbers(result: Score) -> dict[str, Any]:
    """The shares as plain numbers, by kind of combination."""
    return {"seen": _split_numbers(result.seen), "held_out": _split_numbers(result.held_out)}


def result_lines(summary: dict[str, Any]) -> list[str]:
    """What a person wants to know first of ``evaluate``'s summary, the report's path last."""
    lines = []
    for kind, name in (("seen", "seen combinations"), ("held_out", "held-out combinations")):
        if summary["adherence"] is not None:
            numbers = summary["adherence"][kind]
            lines.append(f"{name}: colour and direction right {_in_words(numbers['colour_and_direction'])}")
            lines.append(f"{name}: shape right {_in_words(numbers['shape'])}")
    if not lines:
        lines.append(f"{summary['samples']} samples, none with a prompt of the shapes dataset: shown, not scored")
    return [*lines, f"report: {summary['report']}"]


def describe(config: EvaluateConfig) -> str:
    """What ``evaluate`` would do, in a line."""
    rows = read_samples(config.samples)["samples"]
    read_training(config.run)
    read_manifest(config.shards)
    scored = sum(_expected(row["prompt"]) is not None for row in rows)
    return f"{len(rows)} samples to show, {scored} of them to check against their prompts, in {config.output}/{REPORT}"


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
        numbers = {name: float(values[name]) for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: found {line.strip()[:60]!r}, expected the metrics of a step ({error!r})") from None
    if not all(map(math.isfinite, numbers.values())):
        raise ConfigError(f"{where}: found {line.strip()[:60]!r}, expected finite numbers")
    return numbers


def _expected(prompt: str) -> Combination | None:
    try:
        return parse_caption(prompt)
    except ConfigError:  # a prompt of another dataset
        return None


def _settings(folder: str) -> str | None:
    file = Path(folder) / "config.yaml"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _split_numbers(split: SplitScore) -> dict[str, Any]:
    return {name: _numbers(getattr(split, name)) for name in asdict(split)}


def _numbers(share: Share) -> dict[str, Any]:
    value = share.value if share.total else None
    return {"right": share.right, "samples": share.total, "share": value, "interval": list(share.interval)}


def _in_words(numbers: dict[str, Any]) -> str:
    if not numbers["samples"]:
        return "unknown: no samples"
    low, high = numbers["interval"]
    return (
        f"{percent(numbers['share'])} ({numbers['right']} of {numbers['samples']}, "
        f"95 % interval {100 * low:.1f} to {100 * high:.1f})"
    )


def _verdict(clip: Clip) -> dict[str, Any]:
    return {
        "file": clip.path.name,
        "prompt": clip.prompt,
        "seed": clip.seed,
        "held_out": clip.held_out if clip.expected else None,
        "observed": asdict(clip.observed) if clip.observed else None,
        "right": clip.right,
    }
