"""How good is a run? Measured, and shown on one page."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import av

from stages.decoding.pyav_reader import probe
from stages.errors import ConfigError, DecodeError
from stages.evaluation.config import EvaluateConfig
from stages.evaluation.inputs import read_manifest, read_samples, read_settings, read_training
from stages.evaluation.intervals import Proportion
from stages.evaluation.measure import Subject, measure
from stages.evaluation.measured import headlines, plain_numbers
from stages.evaluation.own_samples import make_samples
from stages.evaluation.report import Clip, Page, write_report
from stages.evaluation.training_samples import read_training_samples
from stages.output import output_folder, progress_bar, save_settings, save_summary, write_text
from stages.page import percent
from stages.shapes.check import Score, SplitScore, check_file, score
from stages.shapes.render import Combination, parse_caption

REPORT = "report.html"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, and write the page, all numbers (metrics.json) and the summary, which is returned.

    A checkpoint is measured as `stages.evaluation.measure` does it; samples that are not given are made from it.
    Prompts that are captions of the shapes dataset are compared with what their videos show; others are only shown.
    Raises ConfigError or DatasetError where an input is absent or is not what it should be.
    """
    started = time.perf_counter()
    subject, config = _opened(config)
    training, manifest = read_training(config.run), read_manifest(config.shards)
    output = output_folder(config.output)
    save_settings(output, config)
    if subject and not config.samples:
        config = replace(config, samples=str(make_samples(config, subject.trained, subject.execution, output)))

    found = read_samples(config.samples)
    clips = _look_at_all(Path(config.samples), found["samples"])
    verdicts = [(clip.prompt, clip.observed) for clip in clips if clip.observed is not None]
    result = score(verdicts) if verdicts else None
    measured = measure(config, subject) if subject else None
    while_training = read_training_samples(config.run, config.pretrained_model_path, manifest.latent_rgb)
    checkpoint = str(subject.trained.checkpoint if subject else found.get("checkpoint", ""))
    page = Page(clips, result, training, manifest, _settings(config), checkpoint, measured, while_training)
    write_report(output / REPORT, page)

    adherence = None if result is None else adherence_numbers(result)
    metrics = {"adherence": adherence, "samples": [_verdict(clip) for clip in clips]}
    metrics |= plain_numbers(measured) if measured else {}
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    summary = {
        "samples": len(clips),
        "scored": len(verdicts),
        "adherence": adherence,
        "measured": headlines(measured) if measured else [],
        "report": str(output / REPORT),
        "seconds": round(time.perf_counter() - started, 1),
    }
    save_summary(output, summary)
    return summary


def _opened(config: EvaluateConfig) -> tuple[Subject | None, EvaluateConfig]:
    """What is measured, if a checkpoint is, and the config with what follows from it. Checks the samples if given."""
    subject = Subject.open(config) if config.checkpoint else None
    config = subject.completed(config) if subject else config
    if config.samples or not subject:
        read_samples(config.samples)
    return subject, config


def _look_at_all(folder: Path, rows: Sequence[dict[str, Any]]) -> list[Clip]:
    clips = []
    with progress_bar(len(rows), "check", "sample") as bar:
        for row in rows:
            clips.append(look_at(folder, row))
            bar.update()
    return clips


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
    return [*lines, *summary["measured"], f"report: {summary['report']}"]


def describe(config: EvaluateConfig) -> str:
    """What ``evaluate`` would do, in a line or two."""
    subject, config = _opened(config)
    read_training(config.run)
    read_manifest(config.shards)
    rows = read_samples(config.samples)["samples"] if config.samples else []
    scored = sum(_expected(row["prompt"]) is not None for row in rows)
    shown = f"{len(rows)} samples to show, {scored} of them to check against their prompts, in {config.output}/{REPORT}"
    if not subject:
        return shown
    made = f"{config.clips.samples} samples to make and show in {config.output}/{REPORT}"
    against = f" and of {subject.against.checkpoint}" if subject.against else ""
    loss = f"at {config.loss.levels} levels on up to {config.loss.samples} {subject.trained.clips} clips"
    return f"{shown if rows else made}\nthe loss of {subject.trained.checkpoint}{against} {loss}"


def _settings(config: EvaluateConfig) -> list[tuple[str, str]]:
    """The resolved config of this command and of each before it, where its folder has one."""
    folders = {"encode": config.shards, "train": config.run, "sample": config.samples, "evaluate": config.output}
    return [(name, text) for name, folder in folders.items() if (text := read_settings(folder)) is not None]


def _expected(prompt: str) -> Combination | None:
    try:
        return parse_caption(prompt)
    except ConfigError:  # a prompt of another dataset
        return None


def _split_numbers(split: SplitScore) -> dict[str, Any]:
    return {name: _numbers(getattr(split, name)) for name in asdict(split)}


def _numbers(share: Proportion) -> dict[str, Any]:
    value = share.value if share.total else None
    return {"right": share.count, "samples": share.total, "share": value, "interval": list(share.interval)}


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
