"""What is evaluated."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluateConfig:
    """What is looked at.

    samples, run, shards: the output folders of sample, of train and of encode.
    output: where report.html, metrics.json and summary.json go.
    """

    samples: str = ""
    run: str = ""
    shards: str = ""
    output: str = "outputs/report"
