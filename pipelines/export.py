"""Trained weights for others: ``python -m pipelines.export --checkpoint RUN --format diffusers --output DIR``."""

import sys
from collections.abc import Sequence

from pipelines.command import Parser, run
from pipelines.config import load_config
from stages.export import ExportConfig, describe, export
from stages.output import settings_text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("Write trained weights in diffusers' layout.")
    parser.add_argument("--checkpoint", metavar="RUN", help="a run or checkpoint folder; the same as checkpoint=")
    parser.add_argument("--format", choices=("diffusers",), help="the layout; the same as format=")
    parser.add_argument("--output", metavar="DIR", help="the folder to write; the same as output=")
    options = parser.read(arguments)
    given = {name: getattr(options, name) for name in ("checkpoint", "format", "output")}
    config = load_config(
        ExportConfig, options.config, options.settings, {name: value for name, value in given.items() if value}
    )
    if options.dry_run:
        print(settings_text(config), end="")
        print(describe(config))
        return
    summary = export(config)
    print(f"{summary['exported']} of {summary['checkpoint']}, {summary['bytes'] / 1e9:.2f} GB in {config.output}")


if __name__ == "__main__":
    sys.exit(run(main))
