"""A checkpoint to numbers and a report: ``python -m pipelines.evaluate --checkpoint RUN [key.path=value ...]``."""

import sys
from collections.abc import Sequence

from pipelines.command import Parser, run
from pipelines.config import load_config
from stages.evaluation.config import EvaluateConfig
from stages.evaluation.evaluate import describe, evaluate, result_lines
from stages.output import settings_text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("Measure a checkpoint and its samples, and write a page about the run.")
    parser.add_argument("--checkpoint", metavar="RUN", help="a run or checkpoint folder; the same as checkpoint=")
    options = parser.read(arguments)
    checkpoint = {} if options.checkpoint is None else {"checkpoint": options.checkpoint}
    config = load_config(EvaluateConfig, options.config, options.settings, checkpoint)
    if options.dry_run:
        print(settings_text(config), end="")
        print(describe(config))
        return
    print("\n".join(result_lines(evaluate(config))))


if __name__ == "__main__":
    sys.exit(run(main))
