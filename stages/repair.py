"""Checking a dataset, and making its damaged shards again.

A repair moves what is damaged out of the way, into ``DATASET/set_aside/NUMBER``, and runs the dataset's own encode,
which makes what is missing: the same bytes, from the same videos. Nothing is deleted.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.errors import WeightsError
from shards import storage
from shards.errors import DatasetError, ShardError, StoreError
from shards.schema import LATENTS, TEXT_PREFIX, text_column
from shards.verification.fault import Fault, Tally
from shards.verification.verify import describe, verify
from stages.encode import encode
from stages.encode_config import EncodeConfig
from stages.errors import ConfigError, WorkError
from stages.output import progress_bar

SET_ASIDE = "set_aside"


@dataclass(frozen=True)
class Checked:
    """The faults of a dataset, and what was read to find them."""

    faults: list[Fault]
    tally: Tally
    seconds: float

    def __str__(self) -> str:
        count = len(self.faults)
        told = "nothing is wrong" if not count else f"{count} fault{'s' if count > 1 else ''}"
        return (
            f"{told}: {self.tally.files} files, {self.tally.tar_bytes / 1e6:.1f} MB of tars and "
            f"{self.tally.records} records read in {self.seconds:.1f} s"
        )


def check(dataset: storage.Location, tell: Callable[[str], object] = print) -> Checked:
    """Read everything of a dataset and tell each finding, on one line, when it is found."""
    started = time.perf_counter()
    _, shards = describe(dataset)
    faults = []
    with progress_bar(shards, "verify", "shard") as bar:
        tally = Tally(after_tar=bar.update)
        for finding in verify(dataset, tally):
            tell(" ".join(str(finding).split()))
            if isinstance(finding, Fault):
                faults.append(finding)
    return Checked(faults, tally, time.perf_counter() - started)


def local_folder(dataset: storage.Location) -> Path:
    """Where a dataset to be repaired is. Raises ConfigError for one on an object store."""
    root = storage.place(dataset)
    if not isinstance(root, Path):
        raise ConfigError(f"{root}: a repair works on a local folder: copy the dataset to one, repair it, copy it back")
    return root


def repair(root: Path, faults: Sequence[Fault], config: EncodeConfig) -> list[str]:
    """Set aside the damaged files that ``config``'s encode makes again, and run it; what was done, in lines.

    ``config`` is the one that made the dataset. Where the encode fails before it has made anything, everything is
    put back and its error raised.
    """
    made = {None, LATENTS, text_column(config.text_encoder.column)}
    damaged = list(dict.fromkeys(path for fault in faults for path in fault.redo if isinstance(path, Path)))
    aside = _SetAside(root)
    try:
        for path in damaged:
            if _column(path) in made:
                aside.take(path)
        encode(config)
    except (ConfigError, DatasetError, WeightsError, ShardError, StoreError, WorkError) as error:
        if not aside.made_again():
            aside.put_back()
            raise
        return [*aside.lines(), f"the encode did not finish: {error}"]
    others = sorted({f"{_column(path)}" for path in damaged} - {f"{column}" for column in made})
    return [
        *aside.lines(),
        *(f"{column} is left as it is: give --config FILE of the encode that made it" for column in others),
    ]


def _column(path: Path) -> str | None:
    """The column that a file belongs to; None for what belongs to the whole dataset."""
    names = (path.parent.name, path.name.removeprefix("null.").removesuffix(".safetensors"))
    return next((name for name in names if name == LATENTS or name.startswith(TEXT_PREFIX)), None)


class _SetAside:
    """A new folder ``DATASET/set_aside/NUMBER`` for damaged files, at their places relative to the dataset."""

    def __init__(self, root: Path):
        self._root = root
        numbers = [int(name) for name in storage.list_folder(root / SET_ASIDE) if name.isdecimal()]
        self._folder = root / SET_ASIDE / f"{max(numbers, default=-1) + 1:03d}"
        self._taken: list[Path] = []

    def take(self, path: Path) -> None:
        """Moves a file here, unless it is not there at all."""
        if path.exists():
            self._move(path, self._folder / path.relative_to(self._root))
            self._taken.append(path)

    def made_again(self) -> bool:
        """Whether any of the files has come anew."""
        return any(path.exists() for path in self._taken)

    def put_back(self) -> None:
        for path in self._taken:
            self._move(self._folder / path.relative_to(self._root), path)

    def lines(self) -> Iterator[str]:
        """What was set aside, and of what was not made again under its name, which holds the hash of its bytes."""
        yield f"{len(self._taken)} files set aside in {self._folder}"
        for path in self._taken:
            if not path.exists():
                yield f"{path} was not made again byte for byte: its videos or this machine differ, or it was another's"

    @staticmethod
    def _move(source: Path, target: Path) -> None:
        storage.make_folder(target.parent)
        if target.exists():
            raise WorkError(f"{target} is there already and is not replaced: let another repair end, then repair again")
        source.rename(target)
        storage.flush(source.parent)
        storage.flush(target.parent)
