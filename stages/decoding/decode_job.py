"""What one decode task does: some clips of a bucket to their frames, whatever their files do to the decoder."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from shards import storage
from shards.errors import DatasetError
from shards.schema import Bucket
from stages.decoding.decode import Decoder, Frames, decode_source
from stages.errors import DecodeError
from stages.planning.plan_table import PlannedClip

MOST_CLIPS = 16  # of one task

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
    """The frames of a clip, whose file may be at a URL. Raises DecodeError and more: see ``or_undecodable``."""
    size = job.bucket.frames, job.bucket.height, job.bucket.width
    with storage.local_copy(storage.place(job.clip.path)) as path:
        return decode_source(replace(job.clip, path=str(path)), *size, timeout_s=timeout_s, decoder=decoder)


def or_undecodable(read: Callable[[], _Found]) -> _Found | DecodeError:
    """What ``read`` gives, or why it does not: whatever a file does to its decoder costs that file alone."""
    try:
        return read()
    except DecodeError as error:
        return error
    except FileNotFoundError:  # at a URL
        return DecodeError("missing_file", "there is no such file")
    except DatasetError as error:  # a store that does not answer
        return DecodeError("io_error", str(error))
    except Exception as error:
        return DecodeError("undecodable", f"{type(error).__name__}: {error}")
