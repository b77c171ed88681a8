"""A run's weights, and what follows from its settings: the data they were trained on, and the clips held out of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from models.compute import PRECISIONS
from models.loading import load_transformer
from models.transformer import Transformer
from models.weights import CheckpointInfo, find_checkpoint, read_info
from shards import storage
from shards.dataset import Dataset
from shards.loader import DataConfig
from shards.manifest import read_header
from stages.errors import ConfigError
from stages.output import SETTINGS
from stages.training.held_out import ValidationConfig, open_clips


@dataclass(frozen=True)
class Trained:
    """A checkpoint; the run that wrote it; the data and the share of its sources held out, as its settings say."""

    checkpoint: Path
    run: Path
    info: CheckpointInfo
    data: DataConfig
    holdout: float

    @classmethod
    def open(cls, path: str, shards: str = "") -> "Trained":
        """From a run or checkpoint folder. shards: where the dataset is now, where its settings know it elsewhere.

        Raises ConfigError where its settings are absent, WeightsError where it is no checkpoint.
        """
        checkpoint = find_checkpoint(path)
        run = checkpoint.parent.parent
        found = [folder / SETTINGS for folder in (checkpoint, run) if (folder / SETTINGS).is_file()]
        if not found:
            raise ConfigError(f"neither {checkpoint} nor {run} has a {SETTINGS}: give checkpoint= the folder of a run")
        settings = yaml.safe_load(found[0].read_text(encoding="utf-8"))
        try:
            data: dict[str, Any] = settings["data"]
            config = DataConfig(shards or data["shards"], data["text"], data["filter"])
            holdout = float(settings["validation"]["holdout"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{found[0]} does not hold the settings of a run ({error!r}): train again") from None
        return cls(checkpoint, run, read_info(checkpoint), config, holdout)

    @property
    def clips(self) -> str:
        """Which of the dataset's clips are looked at."""
        return "held-out" if self.holdout else "training"

    def open_clips(self, buckets: list[str]) -> Dataset:
        """The held-out clips of some buckets, or of a run that held out none, those that it was trained on."""
        return open_clips(ValidationConfig(holdout=self.holdout), self.data, buckets)

    @property
    def dataset_name(self) -> str:
        """The name that the dataset's keys depend on."""
        return str(read_header(storage.place(self.data.shards))["name"])


@dataclass(frozen=True)
class Execution:
    """How models are run: on which device, at which precision, how many samples at once, and which weights."""

    device: torch.device
    precision: Literal["fp32", "bf16"]
    batch_size: int
    weights: Literal["ema", "model"]

    def load(self, trained: Trained) -> Transformer:
        """The weights, ready to be called on the device."""
        model = load_transformer(trained.checkpoint, weights=self.weights)
        return model.to(self.device, PRECISIONS[self.precision])
