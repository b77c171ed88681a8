"""The files that metadata speaks of: reading them, and finding a clip's video by what file names say."""

import os
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from shards import storage
from shards.errors import DatasetError
from stages.errors import ConfigError

# Of several files of one name, the one with the first of these is taken.
VIDEO_SUFFIXES = ".mp4 .webm .mkv .mov .m4v .avi .mpg .mpeg .ts .m2ts .flv .wmv .3gp .ogv .gif".split()
IMAGE_SUFFIXES = ".jpg .jpeg .png .webp .bmp .tif .tiff".split()

_SPACER = "[^0-9]"
_TIME = f"([0-9]{{1,3}}){_SPACER}([0-9]{{2}}){_SPACER}([0-9]{{2}})(?:{_SPACER}([0-9]{{1,3}}))?"
_CLIP_NAME = re.compile(f"(.+)_{_TIME}_{_TIME}", re.DOTALL)
_INDEX_ZERO = re.compile(r".{11}_0", re.DOTALL)  # after YouTube's eleven characters, which may end in _0 too
_SURROGATE = re.compile("[\ud800-\udfff]")


def open_input(path: str) -> BinaryIO:
    """A file of the user's to read, at a path or URL; FileNotFoundError if it is not there."""
    return storage.open_read(path)


def walk(folder: str) -> Iterator[str]:
    """The paths, relative to a folder, of all visible files below it, sorted within each folder.

    Raises ConfigError, at once, if there is no such folder.
    """
    try:
        return storage.walk(storage.place(folder))
    except DatasetError as error:
        raise ConfigError(f"{error}: set data.videos to the folder of the videos") from None


def suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def encodable(text: str) -> bool:
    """Whether a text can be stored and shown: JSON and file names allow surrogates, UTF-8 does not."""
    return text.isascii() or not _SURROGATE.search(text)


def clock_ms(hours: str, minutes: str, seconds: str, fraction: str | None) -> int:
    whole = (int(hours) * 60 + int(minutes)) * 60 + int(seconds)
    return whole * 1000 + int(((fraction or "") + "000")[:3])


class VideoFiles:
    """The videos below a folder, by what their names say; the folder is walked once.

    Kept small, since there may be ten million: the 64-bit hash of each name, ascending, and where its path
    stands in one long row of paths.
    """

    def __init__(self, folder: str):
        self._folder = folder
        names, starts, paths = array("Q"), array("Q"), bytearray()
        self._first_index = 1  # of clips named ID_1, ID_2, ...
        for path in walk(folder):
            if suffix(path) in VIDEO_SUFFIXES and encodable(path):
                name = stem(path)
                if _INDEX_ZERO.fullmatch(name):
                    self._first_index = 0
                names.append(_hash(_clip_name(name)))
                starts.append(len(paths))
                paths += path.encode() + b"\0"
        self._paths = paths
        order = np.argsort(np.array(names, np.uint64), kind="stable")
        in_order = np.array(starts, np.uint64)[order]
        hashes, first, times = np.unique(np.array(names, np.uint64)[order], return_index=True, return_counts=True)
        best = in_order[first]
        for place in np.flatnonzero(times > 1):
            several = in_order[first[place] : first[place] + times[place]].tolist()
            best[place] = min(several, key=lambda start: _preference(self._path(start)))
        self._hashes, self._starts = memoryview(hashes.data), memoryview(best.data)

    def find(self, source: str, start_ms: int, end_ms: int, index: int | None = None) -> tuple[str | None, bool]:
        """The path of a clip's file, None if it is not there, and whether that is the whole video.

        By its span, ``ID_START_END`` with any separators; by its ``index`` (from 0) within the video, ``ID.INDEX``
        or ``ID_INDEX``, which counts from 1 unless there is a file with a 0; or the whole video, ``ID``.
        """
        path = self._named(_span_name(source, start_ms, end_ms))
        if path is None and index is not None:
            path = self._named(f"{source}.{index}") or self._named(f"{source}_{index + self._first_index}")
        if path is not None:
            return path, False
        path = self._named(source)
        return path, path is not None

    def given(self, path: str) -> str | None:
        """The normal form of a path that the metadata gives, absolute or relative to the folder; None if absent.

        Raises ValueError for one that leads out of the folder.
        """
        if not os.path.isabs(path):
            path = os.path.normpath(path)
            if path.split(os.sep)[0] == os.pardir:
                raise ValueError("leads out of the videos folder")
        return path if path == self._named(_clip_name(stem(path))) or self._is_file(path) else None

    def _is_file(self, path: str) -> bool:
        folder = storage.place(self._folder)
        if isinstance(folder, Path) or os.path.isabs(path):
            return os.path.isfile(os.path.join(self._folder, path))
        return storage.exists(folder / path)

    def _named(self, name: str) -> str | None:
        wanted = _hash(name)
        place = bisect_left(self._hashes, wanted)
        found = place < len(self._hashes) and self._hashes[place] == wanted
        return self._path(self._starts[place]) if found else None

    def _path(self, start: int) -> str:
        return self._paths[start : self._paths.index(0, start)].decode()


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode(errors="surrogatepass"))


def _clip_name(name: str) -> str:
    """One name for a clip whatever its file name has between the digits; other names stay as they are."""
    match = _CLIP_NAME.fullmatch(name)
    if not match:
        return name
    source, *times = match.groups()
    return _span_name(source, clock_ms(*times[:4]), clock_ms(*times[4:]))


def _span_name(source: str, start_ms: int, end_ms: int) -> str:
    return f"{source}/{start_ms}/{end_ms}"  # no file name has a slash


def _preference(path: str) -> tuple[int, str]:
    return VIDEO_SUFFIXES.index(suffix(path)), path
