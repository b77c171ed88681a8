"""What every command leaves in its output folder: its resolved settings and a summary."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from shards import storage
from stages.errors import ConfigError
from stages.launched import rank

SETTINGS, SUMMARY = "config.yaml", "summary.json"
METRICS, SAMPLES = "metrics.jsonl", "samples"  # of a training


def output_folder(path: str) -> Path:
    """The folder, made when absent. Raises ConfigError when it cannot be written."""
    if not path:
        raise ConfigError("output is not set: give output=FOLDER")
    folder = storage.local_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the output folder {folder}: {error.strerror}") from None
    return folder


def write_text(path: storage.Place, text: str) -> None:
    """Write a small file whole or not at all."""
    with storage.write_whole(path) as file:
        file.write(text.encode())


def save_settings(folder: storage.Place, config: Any, name: str = SETTINGS) -> None:
    """The resolved config, as a file that ``--config`` reads back."""
    write_text(folder / name, settings_text(config))


def settings_text(config: Any) -> str:
    """A config dataclass as YAML."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def save_summary(folder: storage.Place, summary: dict[str, Any]) -> None:
    write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def progress_bar(total: int, what: str, unit: str) -> tqdm:
    """A bar on a terminal, a line every ten seconds otherwise, on stderr; of several ranks the first has one."""
    silent = rank() > 0
    if sys.stderr.isatty():
        return tqdm(total=total, desc=what, unit=unit, disable=silent)
    line = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}\n"
    return tqdm(total=total, desc=what, unit=unit, bar_format=line, mininterval=10, miniters=1, disable=silent)
