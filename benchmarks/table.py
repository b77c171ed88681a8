"""What every benchmark prints and writes: rows of measured values, each with its target where it has one."""

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

FOLDER = Path("outputs/benchmarks")


@dataclass(frozen=True)
class Row:
    """One measured value. ``ratio`` is over ``against``; ``holds`` says whether the target is met."""

    name: str
    value: float
    unit: str
    against: str | None = None
    ratio: float | None = None
    target: str | None = None
    holds: bool | None = None


def report(name: str, rows: Sequence[Row], packages: Sequence[str]) -> None:
    """Print the table and write ``outputs/benchmarks/NAME.json``."""
    for row in rows:
        show(row)
    save(name, rows, packages)


def show(row: Row) -> None:
    ratio = "" if row.ratio is None else f"  {row.ratio:.3g} of {row.against}"
    target = "" if row.holds is None else f"  target {row.target}: {'yes' if row.holds else 'NO'}"
    print(f"{row.name:56} {row.value:10.4g} {row.unit:9}{ratio}{target}", flush=True)


def save(name: str, rows: Sequence[Row], packages: Sequence[str]) -> None:
    """packages: whose versions are written beside the rows, of those that are installed."""
    content = {
        "rows": [asdict(row) for row in rows],
        "machine": _machine(),
        "versions": {package: version(package) for package in packages if find_spec(package)},
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def _machine() -> dict[str, object]:
    processors = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = {"processor": (processors or [platform.machine()])[0], "cores": os.cpu_count()}
    machine |= {"python": platform.python_version()}
    if torch.cuda.is_available():
        machine |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        machine |= {"cudnn": torch.backends.cudnn.version()}
    return machine
