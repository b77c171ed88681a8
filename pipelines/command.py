"""What every command shares: arguments, settings, and the exit status.

Exit status: 0 done, 1 the work failed, 2 the user's mistake (one line, no traceback).
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from models.errors import WeightsError
from pipelines.config import FAMILIAR
from shards.errors import DatasetError, ShardError, StoreError
from stages.errors import ConfigError, WorkError
from stages.launched import rank

USER_MISTAKES = (ConfigError, DatasetError, WeightsError)
FAILURES = (ShardError, StoreError, WorkError)

# A mistake that every rank finds is told by rank 0, which ends the others while they wait; one of theirs alone is
# told after that.
OTHER_RANKS_WAIT_S = 5


class Parser(argparse.ArgumentParser):
    """Options, then ``key.path=value`` settings; mistakes are ConfigErrors."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)
        self.add_argument("--config", metavar="FILE", help="a YAML file of settings")
        self.add_argument("--dry-run", action="store_true", help="print the settings and the plan, then stop")
        self.add_argument("settings", nargs="*", metavar="key.path=value", help="settings that override the file")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        known, unknown = self.parse_known_args(arguments)
        for text in unknown:
            if text.startswith("-"):
                name = text.lstrip("-").partition("=")[0].replace("-", "_")
                hint = f"{FAMILIAR[name]}=VALUE" if name in FAMILIAR else "key.path=value"
                raise ConfigError(f"unknown option {text!r}: settings are written {hint}; see --help")
        known.settings += unknown
        return known


def default_config(folder: str, name: str) -> Path:
    """``configs/FOLDER/NAME.yaml`` of this repository."""
    return Path(__file__).resolve().parent.parent / "configs" / folder / f"{name}.yaml"


def run(main: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None = None) -> int:
    """Run ``main`` and turn its errors into an exit status and one line on stderr."""
    try:
        main(arguments)
    except USER_MISTAKES as mistake:
        if rank():
            time.sleep(OTHER_RANKS_WAIT_S)
        print(f"error on rank {rank()}: {mistake}" if rank() else f"error: {mistake}", file=sys.stderr)
        return 2
    except FAILURES as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 1
    return 0
