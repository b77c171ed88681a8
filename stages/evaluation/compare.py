"""Which data, captions or settings are better? Short runs of equal tokens, judged on clips that none has seen."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from models.compute import default_device
from stages.evaluation import arm_runs
from stages.evaluation.arms import Arm, Comparison
from stages.evaluation.compare_page import write_page
from stages.evaluation.held_out_loss import clip_losses, sources_of
from stages.evaluation.judge import Judged, judge
from stages.evaluation.trained import Execution, Trained
from stages.output import output_folder, save_settings, save_summary, write_text
from stages.training.held_out import noise_levels

REPORT = "report.html"


def compare(comparison: Comparison, script: Path) -> dict[str, Any]:
    """Make the runs that are not finished, judge all, write report.html and metrics.json; returns the summary.

    script: of the train command. Raises ConfigError for a folder of other runs, WorkError where a run fails.
    """
    started = time.perf_counter()
    config = comparison.config
    runs = [(arm, seed, comparison.run_config(arm, seed)) for seed in config.seeds for arm in comparison.arms]
    for _, _, run in runs:
        arm_runs.check_settings(run)
    output = output_folder(config.output)
    save_settings(output, config)
    for number, (arm, seed, run) in enumerate(runs, 1):
        if not arm_runs.finished(run):
            print(f"run {number} of {len(runs)}: {arm.name}, seed {seed}", flush=True)
            arm_runs.make(run, config.launcher, script)

    losses, sources = _losses(comparison)
    judged = judge(comparison.arms, losses, sources)
    _write(output, comparison, judged)
    summary = {
        "runs": len(runs),
        "held_out_clips": len(sources),
        "loss": {one.arm.name: one.loss for one in judged},
        "differences": {
            one.arm.name: {**asdict(one.difference), "verdict": one.verdict} for one in judged if one.difference
        },
        "report": str(output / REPORT),
        "seconds": round(time.perf_counter() - started, 1),
    }
    save_summary(output, summary)
    return summary


def describe(comparison: Comparison, script: Path) -> str:
    """What ``compare`` would do, and what the arms share."""
    config, arms = comparison.config, comparison.arms
    lines = [
        f"{len(arms)} arms x {len(config.seeds)} seeds, {arms[0].tokens:,} tokens a run; judged on {comparison.clips} "
        f"clips of {comparison.ground.shards} that are in no arm (split < {comparison.holdout:g}), captions "
        f"{comparison.ground.text}, at {config.loss.levels} noise levels",
        *(f"{arm.name}: {about(arm)}" for arm in arms),
        "runs of one seed share the noise, the noise level and the dropped captions of every place in the training, "
        "and their initial weights where the model is the same",
    ]
    for seed in config.seeds:
        for arm in arms:
            run = comparison.run_config(arm, seed)
            arm_runs.check_settings(run)
            state = "finished" if arm_runs.finished(run) else " ".join(arm_runs.command(run, config.launcher, script))
            lines.append(f"{run.output}: {state}")
    return "\n".join(lines)


def about(arm: Arm) -> str:
    """What an arm trains on."""
    order = "in the order of the first" if arm.same_order else f"{arm.shared:,} of them the first arm has too"
    told = f"{arm.clips:,} clips, {arm.passes:.1f} passes"
    return f"{told}, {order}; {'; '.join(arm.changed)}" if arm.changed else told


def result_lines(summary: dict[str, Any]) -> list[str]:
    """What a person wants to know first of ``compare``'s summary, the report's path last."""
    (first, loss), *_ = summary["loss"].items()
    lines = [f"{first}: held-out loss {loss:.4f}"]
    for name, found in summary["differences"].items():
        low, high = found["interval"]
        lines.append(
            f"{name}: held-out loss {summary['loss'][name]:.4f}, {found['value']:+.4f} beside {first} "
            f"(95 % interval {low:+.4f} to {high:+.4f}): {found['verdict']}"
        )
    return [*lines, f"report: {summary['report']}"]


def _losses(comparison: Comparison) -> tuple[dict[str, np.ndarray], list[str]]:
    """By arm, [seeds, clips, levels] on the common ground, and the sources of the clips."""
    config = comparison.config
    execution = Execution(default_device(), config.precision, config.batch_size, config.weights)
    found: dict[str, np.ndarray] = {}
    keys: list[str] = []
    for arm in comparison.arms:
        tables = []
        for seed in config.seeds:
            run = Trained.open(comparison.run_config(arm, seed).output)
            on = replace(run, data=comparison.ground, holdout=comparison.holdout)
            by_key = clip_losses(comparison.held_out, run, on, config.loss, execution)
            keys = keys or list(by_key)
            tables.append([by_key[key] for key in keys])
        found[arm.name] = np.array(tables)
    return found, sources_of(comparison.held_out, keys)


def _write(output: Path, comparison: Comparison, judged: list[Judged]) -> None:
    levels = noise_levels(comparison.config.loss.levels)
    metrics = {
        "held_out": {
            **{name: getattr(comparison.ground, name) for name in ("shards", "text", "filter")},
            "holdout": comparison.holdout,
            "clips": comparison.clips,
        },
        "levels": levels,
        "arms": {one.arm.name: _numbers(one) for one in judged},
    }
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_page(output / REPORT, comparison, judged, levels)


def _numbers(one: Judged) -> dict[str, Any]:
    arm = {name: value for name, value in asdict(one.arm).items() if name not in ("name", "config")}
    return arm | {name: value for name, value in asdict(one).items() if name != "arm"}
