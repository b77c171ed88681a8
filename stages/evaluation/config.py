"""What is evaluated."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluateConfig:
    """What is looked at.

    samples, run, shards: the output folders of sample, of train and of encode.
    output: where report.html, metrics.json and summary.json go.
    pretrained_model_path: the VAE that the shards were made with.
    """

    samples: str = ""
    run: str = ""
    shards: str = ""
    output: str = "outputs/report"
    pretrained_model_path: str = "tiny"
