"""Samples to a report: ``python -m pipelines.evaluate --config configs/evaluate/shapes.yaml [key=value ...]``."""

import sys
from collections.abc import Sequence

from pipelines.command import Parser, run
from pipelines.config import load_config
from stages.evaluation.config import EvaluateConfig
from stages.evaluation.evaluate import describe, evaluate, result_lines
from stages.output import settings_text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("Check what samples show against their prompts, and write a page about the run.")
    options = parser.read(arguments)
    config = load_config(EvaluateConfig, options.config, options.settings)
    if options.dry_run:
        print(settings_text(config), end="")
        print(describe(config))
        return
    print("\n".join(result_lines(evaluate(config))))


if __name__ == "__main__":
    sys.exit(run(main))
