"""What is compared."""

import re
from dataclasses import dataclass, field
from typing import Literal

from stages.errors import at_least
from stages.evaluation.config import LossConfig

_ARM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class CommonGroundConfig:
    """The clips that every arm is judged on: held out of all of them, whatever they train on.

    shards, text: a dataset and one of its text columns; by default the first arm's, and its first. filter: which of
    the held-out clips; by default all, whatever the arms' own filters.
    """

    shards: str = ""
    text: str = ""
    filter: str = ""


@dataclass(frozen=True)
class CompareConfig:
    """Short runs that differ in one thing, and what they are judged on.

    train: the file of train settings that all runs start from. settings: what all runs change of it, as on the command
    line of train. arms: name -> what it changes beyond that; the first is what the others are compared with.
    launcher: the start of train's command, up to the script.
    """

    train: str = ""
    settings: list[str] = field(default_factory=list)
    arms: dict[str, list[str]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    common_ground: CommonGroundConfig = field(default_factory=CommonGroundConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    launcher: str = "deepspeed"
    weights: Literal["ema", "model"] = "ema"
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = 8
    output: str = "outputs/comparison"

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")
        if len(self.arms) < 2:
            raise ValueError(f"arms: found {len(self.arms)}, expected two or more, such as all: [] and some: [...]")
        for name in self.arms:
            if not _ARM.fullmatch(name):
                raise ValueError(f"arms: found {name!r}, expected a name of letters, digits, '_', '-' and '.'")
        if len(set(self.seeds)) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: found {list(self.seeds)}, expected two or more that differ: one tells no luck")
