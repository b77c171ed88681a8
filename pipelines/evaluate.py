"""A checkpoint to numbers and a report: ``python -m pipelines.evaluate --checkpoint RUN [key.path=value ...]``.

``--compare FILE`` trains the arms of a comparison instead, and says which is better.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.command import Parser, run
from pipelines.config import load_config
from stages.errors import ConfigError
from stages.evaluation import compare
from stages.evaluation.arms import Comparison, open_comparison
from stages.evaluation.compare_config import CompareConfig
from stages.evaluation.config import EvaluateConfig
from stages.evaluation.evaluate import describe, evaluate, result_lines
from stages.output import settings_text
from stages.training.config import TrainConfig

TRAIN = Path(__file__).with_name("train.py")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("Measure a checkpoint and its samples, and write a page about the run; or compare short runs.")
    parser.add_argument("--checkpoint", metavar="RUN", help="a run or checkpoint folder; the same as checkpoint=")
    parser.add_argument("--compare", metavar="FILE", help="a YAML file of arms: train each with some seeds, compare")
    options = parser.read(arguments)
    if options.compare:
        _compare(options)
        return
    checkpoint = {} if options.checkpoint is None else {"checkpoint": options.checkpoint}
    config = load_config(EvaluateConfig, options.config, options.settings, checkpoint)
    if options.dry_run:
        print(settings_text(config), end="")
        print(describe(config))
        return
    print("\n".join(result_lines(evaluate(config))))


def _compare(options: argparse.Namespace) -> None:
    comparison = _open(options)
    if options.dry_run:
        print(settings_text(comparison.config), end="")
        print(compare.describe(comparison, TRAIN))
        return
    print("\n".join(compare.result_lines(compare.compare(comparison, TRAIN))))


def _open(options: argparse.Namespace) -> Comparison:
    if options.config or options.checkpoint:
        raise ConfigError("found --compare beside --config or --checkpoint: --compare takes the one file of settings")
    config = load_config(CompareConfig, options.compare, options.settings)
    arms = {}
    for name, changes in config.arms.items():
        try:
            arms[name] = load_config(TrainConfig, config.train or None, [*config.settings, *changes])
        except ConfigError as mistake:
            raise ConfigError(f"arm {name}: {mistake}") from None
    return open_comparison(config, arms)


if __name__ == "__main__":
    sys.exit(run(main))
