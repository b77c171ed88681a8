"""What one decode task does: some clips of a bucket to their frames, whatever their files do to the decoder."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from shards.schema import Bucket
from stages.decoding.decode import HANGING, Decoder, Frames, decode_source, hard_deadline
from stages.decoding.source_file import source_file
from stages.errors import DecodeError
from stages.planning.plan_table import PlannedClip

MOST_CLIPS = 16  # of one task

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class DecodeJob:
    """One clip to decode, and for what."""

    clip: PlannedClip
    bucket: Bucket

    @property
    def pixel_bytes(self) -> int:
        return 3 * self.bucket.frames * self.bucket.height * self.bucket.width


def group_of(coming: Iterable[DecodeJob], most_bytes: int) -> list[DecodeJob]:
    """The next clips that one task decodes: several small ones, so that it is worth its price; one at least."""
    group: list[DecodeJob] = []
    for job in islice(coming, MOST_CLIPS):
        most_bytes -= job.pixel_bytes
        if group and most_bytes < 0:
            break
        group.append(job)
    return group


def frames_of(job: DecodeJob, timeout_s: float, decoder: Decoder) -> Frames:
    """The frames of a clip, whose file may be at a URL. Raises DecodeError, and what a decoder lets through."""
    size = job.bucket.frames, job.bucket.height, job.bucket.width
    with source_file(job.clip.path) as path:
        return decode_source(replace(job.clip, path=path), *size, timeout_s=timeout_s, decoder=decoder)


def each(read: Callable[[_Item], _Found], items: Iterable[_Item], timeout_s: float) -> list[_Found | DecodeError]:
    """What ``read`` gives for each item, or why it does not: whatever a file does to its decoder costs it alone.

    A file that makes it hang, and does not heed ``timeout_s``, costs the process: see ``hard_deadline``.
    """
    outcomes = []
    for item in items:
        with hard_deadline(HANGING * timeout_s):
            outcomes.append(_or_undecodable(read, item))
    return outcomes


def _or_undecodable(read: Callable[[_Item], _Found], item: _Item) -> _Found | DecodeError:
    try:
        return read(item)
    except DecodeError as error:
        return error
    except Exception as error:
        return DecodeError("undecodable", f"{type(error).__name__}: {error}")
