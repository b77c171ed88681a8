"""The runs of a comparison, made by the train command itself; what is finished is not made again."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from shards.manifest import differences
from stages.errors import ConfigError, WorkError
from stages.output import SUMMARY, output_folder, save_settings, settings_text
from stages.training.config import TrainConfig


def command(config: TrainConfig, launcher: str, script: Path) -> list[str]:
    """What makes a run: a command that a person could type as well."""
    return [*shlex.split(launcher), str(script), "--config", str(_settings_file(config))]


def finished(config: TrainConfig) -> bool:
    """Whether the run has taken all its steps."""
    summary = Path(config.output) / SUMMARY
    return summary.is_file() and json.loads(summary.read_text())["steps"] == config.train.steps


def check_settings(config: TrainConfig) -> None:
    """Raises ConfigError where the run's folder was begun with other settings."""
    file = _settings_file(config)
    if not file.is_file():
        return
    before, now = yaml.safe_load(file.read_text()), yaml.safe_load(settings_text(config))
    differing = [f"{name} was {was}, is {is_now}" for name, was, is_now in differences(before, now)]
    if differing:
        raise ConfigError(
            f"{config.output} was begun with other settings ({'; '.join(differing)}): give another output=, or remove "
            f"{file} and {config.output}"
        )


def make(config: TrainConfig, launcher: str, script: Path) -> None:
    """Train, or go on where a kill left the run. Raises WorkError where it ends before its last step."""
    save_settings(output_folder(str(_settings_file(config).parent)), config, _settings_file(config).name)
    status = _run(command(config, launcher, script))
    if status or not finished(config):
        ended = f"exit status {status}" if status else "all well, but before its last step"
        raise WorkError(f"{config.output} ended with {ended} (see above): the same command goes on from there")


def _run(words: Sequence[str]) -> int:
    beside = str(Path(sys.executable).parent)  # deepspeed, of a virtual environment that is not activated
    environment = {**os.environ, "PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"}
    try:
        return subprocess.run(words, env=environment).returncode
    except OSError as error:
        raise ConfigError(f"launcher: cannot run {words[0]!r} ({error.strerror}): give launcher=deepspeed") from None


def _settings_file(config: TrainConfig) -> Path:
    """ARM/seed-S.yaml, beside ARM/seed-S."""
    return Path(f"{config.output}.yaml")
