"""What is told of the columns of a dataset: how each is made, where it goes, and what became of a shard of it.

Loads no torch, of which the processes that decode have no use.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from models.text_lengths import LENGTHS
from shards import storage
from shards.schema import STATUS, Bucket
from shards.writer import Commit
from stages.decoding.decode import Frames
from stages.errors import DecodeError, at_least

Decoded = Iterator[Frames | DecodeError]
"""For each clip of a shard in order: its frames, or why it has none."""


@dataclass(frozen=True)
class VaeConfig:
    """The VAE by name, folder or hub id. batch_frames is the fixed batch that every frame is encoded in.

    channels_last and compile: layouts and kernels that may be faster on a GPU; ``--tune`` tells.
    """

    name: str = "tiny"
    batch_frames: int = 8
    store_std: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_frames")

    @property
    def compute(self) -> str:
        """What decides the bytes beside the weights and the batch: other kernels round in another order."""
        layout = " channels-last" if self.channels_last else ""
        return f"{self.precision}{layout}{' compiled' if self.compile else ''}"


@dataclass(frozen=True)
class TextConfig:
    """The text encoder by name, folder or hub id, and the column that its embeddings go to.

    captions: a JSON-lines file of ``{"key": …, "caption": …}`` that replaces the metadata's captions of these clips.
    batch_tokens: of a batch, padding included: 8 captions of 128 tokens, 64 of 16.
    """

    name: str = "tiny"
    column: str = "t5"
    captions: str = ""
    max_tokens: int = 120
    batch_tokens: int = 1024
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        at_least(self, 1, "max_tokens")
        at_least(self, LENGTHS[-1], "batch_tokens")
        if self.max_tokens > LENGTHS[-1]:
            raise ValueError(f"max_tokens: found {self.max_tokens}, expected at most {LENGTHS[-1]}")


@dataclass(frozen=True)
class Target:
    """Where a worker writes: the dataset, and the fingerprint of the column in each bucket."""

    dataset: storage.Place
    column: str
    fingerprints: dict[Bucket, str]

    def folder(self, bucket: Bucket) -> storage.Place:
        return self.dataset / bucket.name / self.column


@dataclass(frozen=True)
class ShardReport:
    """What became of the clips of one shard of one column, and where the time went.

    statuses: "written" or a reason -> clips. frames: encoded. replaced: captions that are not the metadata's. reused:
    captions that another column, or a shard just before, had encoded. busy_s: in the model. wait_s: for frames.
    """

    bucket: str
    number: int
    statuses: Counter[str]
    frames: int = 0
    replaced: int = 0
    reused: int = 0
    busy_s: float = 0.0
    wait_s: float = 0.0


def statuses_of(commit: Commit) -> Counter[str]:
    return Counter(commit.table[STATUS].to_pylist())
