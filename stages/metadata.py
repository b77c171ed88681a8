"""Published metadata -> one typed row a clip, streamed.

A row that cannot be used is a row all the same, with the reason: every line of the metadata is accounted for.
Times are whole milliseconds, as InternVid writes them, so that no clip is too short by a rounding.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import xxhash

from stages.errors import ConfigError, DecodeError
from stages.pyav_reader import probe

# Of several files of one name, the one with the first of these is taken.
VIDEO_SUFFIXES = ".mp4 .webm .mkv .mov .m4v .avi .mpg .mpeg .ts .m2ts .flv .wmv .3gp .ogv .gif".split()
IMAGE_SUFFIXES = ".jpg .jpeg .png .webp .bmp .tif .tiff".split()

BAD_METADATA = "bad_metadata"
BAD_TIMESTAMPS = "bad_timestamps"

_SPACER = "[^0-9]"
_TIME = f"([0-9]{{1,3}}){_SPACER}([0-9]{{2}}){_SPACER}([0-9]{{2}})(?:{_SPACER}([0-9]{{1,3}}))?"
_CLIP_NAME = re.compile(f"(.+)_{_TIME}_{_TIME}", re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
_TIMESTAMP = re.compile(r"([0-9]{1,3}):([0-5]?[0-9]):([0-5]?[0-9])(?:[.,]([0-9]{1,9}))?")


@dataclass(frozen=True)
class Row:
    """One clip of the metadata, or one line that names none.

    ``identity`` is what makes it this clip and no other within its dataset. ``path`` is relative to the
    videos folder unless the metadata gives an absolute one; None if there is no such file. The clip begins
    ``start_ms`` after the start of that file. ``reason`` is set for a row that cannot be used.
    """

    identity: str
    source: str
    caption: str = ""
    kind: Literal["video", "image"] = "video"
    path: str | None = None
    start_ms: int = 0
    duration_ms: int = 0
    aesthetic: float | None = None
    umt: float | None = None
    matching_score: float | None = None
    desirable_filtering: str | None = None
    reason: str | None = None
    message: str | None = None


class _BadRow(ValueError):
    """What is wrong with a line: a reason and a message."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def read_internvid(metadata_path: str, videos_folder: str) -> Iterator[Row]:
    """The rows of InternVid's published JSON lines, in the order of the file.

    A clip is found as a ``video_path`` (absolute, or relative to the videos folder), as a file named
    ``ID_START_END`` with InternVid's colons or any other separators, or as a whole video named ``ID``, to be
    cut by the timestamps; anywhere below the videos folder, with any of VIDEO_SUFFIXES.

    Raises ConfigError, at once, if the metadata is absent or empty, or the folder absent.
    """
    if not os.path.isfile(metadata_path):
        raise ConfigError(f"no metadata file at {metadata_path!r}: set data.metadata to a JSON-lines file")
    with open(metadata_path, "rb") as file:
        if not any(line.strip() for line in file):
            raise ConfigError(f"{metadata_path} is empty: expected one JSON object a line, as InternVid has")
    return _internvid_rows(metadata_path, _VideoFiles(videos_folder))


def read_folder(videos_folder: str) -> Iterator[Row]:
    """A row for each video, and for each picture as a clip of one frame, below a folder, sorted by path.

    The caption is the content of the file of the same name that ends in ``.txt``; empty if there is none.
    Raises ConfigError, at once, for a folder that is absent or holds neither.
    """
    wanted = {*VIDEO_SUFFIXES, *IMAGE_SUFFIXES}
    found = (name for name in _walk(videos_folder) if _suffix(name) in wanted)
    names = [name for name in found if os.path.isfile(os.path.join(videos_folder, name))]  # no pipes
    if not names:
        raise ConfigError(
            f"found no video or picture in {videos_folder!r}: set data.videos to a folder that holds some "
            f"({', '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)})"
        )
    return (_folder_row(videos_folder, name) for name in sorted(names))


def _internvid_rows(metadata_path: str, files: "_VideoFiles") -> Iterator[Row]:
    with open(metadata_path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            text = line.removeprefix(b"\xef\xbb\xbf").strip()
            if text:
                yield _internvid_row(text, f"line {number}", files)


def _internvid_row(line: bytes, place: str, files: "_VideoFiles") -> Row:
    fields: dict[str, Any] = {}
    try:
        fields = _parse_object(line)
        source = _text(fields, "YoutubeID")
        if not source:
            raise _BadRow(BAD_METADATA, "YoutubeID is empty")
        start_ms, end_ms = _milliseconds(fields, "Start_timestamp"), _milliseconds(fields, "End_timestamp")
        if end_ms <= start_ms:
            raise _BadRow(BAD_TIMESTAMPS, f"it ends at {end_ms} ms and starts at {start_ms} ms")
        path, whole = files.find(source, start_ms, end_ms, fields.get("video_path"))
        return Row(
            identity=f"{source} {start_ms} {end_ms}",
            source=source,
            caption=_caption(fields),
            path=path,
            start_ms=start_ms if whole else 0,
            duration_ms=end_ms - start_ms,
            aesthetic=_score(fields, "Aesthetic_Score"),
            umt=_score(fields, "UMT_Score", "CLIP_Score"),  # the first release of AES had the other name
        )
    except _BadRow as error:
        source = _encodable(fields.get("YoutubeID")) or ""
        identity = f"line {xxhash.xxh3_128_hexdigest(line)}"
        return Row(identity, source, reason=error.reason, message=f"{place}: {error}")


def _parse_object(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _BadRow(BAD_METADATA, f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _BadRow(BAD_METADATA, f"expected a JSON object, found a {type(fields).__name__}")
    return fields


def _field(fields: dict[str, Any], key: str) -> Any:
    if key not in fields:
        raise _BadRow(BAD_METADATA, f"no {key}; it has {', '.join(map(repr, list(fields)[:8])) or 'nothing'}")
    return fields[key]


def _text(fields: dict[str, Any], key: str) -> str:
    value = _encodable(_field(fields, key))
    if value is None:
        raise _BadRow(BAD_METADATA, f"{key} is {_brief(fields[key])}, expected a text")
    return value


def _encodable(value: Any) -> str | None:
    """A text that can be stored and shown: JSON allows halves of surrogate pairs, UTF-8 does not."""
    return value if isinstance(value, str) and not _SURROGATE.search(value) else None


def _caption(fields: dict[str, Any]) -> str:
    value = _field(fields, "Caption")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _BadRow(BAD_METADATA, f"Caption is {_brief(value)}, expected a text")
    return value.encode(errors="replace").decode().strip()


def _milliseconds(fields: dict[str, Any], key: str) -> int:
    value = _field(fields, key)
    match = _TIMESTAMP.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise _BadRow(BAD_TIMESTAMPS, f"{key} is {_brief(value)}, expected HH:MM:SS.mmm")
    return _clock_ms(*match.groups())


def _clock_ms(hours: str, minutes: str, seconds: str, fraction: str | None) -> int:
    whole = (int(hours) * 60 + int(minutes)) * 60 + int(seconds)
    return whole * 1000 + int(((fraction or "") + "000")[:3])


def _score(fields: dict[str, Any], *keys: str) -> float | None:
    """The first of the keys that is there, as a number; None for null and NaN, which stand for no score."""
    key = next((key for key in keys if fields.get(key) is not None), None)
    if key is None:
        return None
    try:
        score = float(fields[key])
    except (TypeError, ValueError, OverflowError):
        raise _BadRow(BAD_METADATA, f"{key} is {_brief(fields[key])}, expected a number") from None
    if math.isinf(score):
        raise _BadRow(BAD_METADATA, f"{key} is infinite")
    return None if math.isnan(score) else score


def _brief(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _VideoFiles:
    """The videos below a folder, by what their names say; the folder is walked once."""

    def __init__(self, folder: str):
        self._folder = folder
        self._by_name: dict[str, str] = {}
        for path in _walk(folder):
            if _suffix(path) in VIDEO_SUFFIXES:
                name = _clip_name(os.path.splitext(os.path.basename(path))[0])
                self._by_name[name] = min(path, self._by_name.get(name, path), key=_preference)

    def find(self, source: str, start_ms: int, end_ms: int, video_path: Any) -> tuple[str | None, bool]:
        """The path of a clip's file, None if it is not there, and whether that is the whole video."""
        if video_path is not None:
            path = self._named(video_path)
            if path is not None:
                return path, os.path.splitext(os.path.basename(path))[0] == source
        clip = self._by_name.get(_span_name(source, start_ms, end_ms))
        if clip is not None:
            return clip, False
        whole = self._by_name.get(source)
        return whole, whole is not None

    def _named(self, video_path: Any) -> str | None:
        path = _encodable(video_path)
        if not path or "\0" in path or "://" in path:
            raise _BadRow(BAD_METADATA, f"video_path is {_brief(video_path)}, expected the path of a file")
        if not os.path.isabs(path):
            path = os.path.normpath(path)
            if path.split(os.sep)[0] == os.pardir:
                raise _BadRow(BAD_METADATA, f"video_path {_brief(video_path)} leads out of the videos folder")
        walked = self._by_name.get(_clip_name(os.path.splitext(os.path.basename(path))[0]))
        return path if path == walked or os.path.isfile(os.path.join(self._folder, path)) else None


def _clip_name(stem: str) -> str:
    """One name for a clip whatever its file name has between the digits; other names stay as they are."""
    match = _CLIP_NAME.fullmatch(stem)
    if not match:
        return stem
    source, *times = match.groups()
    return _span_name(source, _clock_ms(*times[:4]), _clock_ms(*times[4:]))


def _span_name(source: str, start_ms: int, end_ms: int) -> str:
    return f"{source}/{start_ms}/{end_ms}"  # no file name has a slash


def _preference(path: str) -> tuple[int, str]:
    return VIDEO_SUFFIXES.index(_suffix(path)), path


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _walk(folder: str) -> Iterator[str]:
    """The paths, relative to the folder, of all visible files below it. Links are followed, loops are not."""
    if not os.path.isdir(folder):
        raise ConfigError(f"no folder at {folder!r}: set data.videos to the folder of the videos")
    entered = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(parent, folder)
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.normpath(os.path.join(inside, name))


def _folder_row(folder: str, name: str) -> Row:
    if _encodable(name) is None:
        safe = name.encode(errors="surrogateescape").decode(errors="replace")
        identity = f"file {xxhash.xxh3_128_hexdigest(name.encode(errors='surrogateescape'))}"
        return Row(identity, safe, reason=BAD_METADATA, message=f"{safe!r}: its name is not UTF-8; rename it")
    path = os.path.join(folder, name)
    caption = _caption_beside(path)
    if _suffix(name) in IMAGE_SUFFIXES:
        return Row(name, name, caption, kind="image", path=name)
    try:
        duration_ms = round(probe(path).duration_s * 1000)
    except DecodeError as error:
        return Row(name, name, caption, path=name, reason=error.reason, message=f"{name}: {error}")
    return Row(name, name, caption, path=name, duration_ms=duration_ms)


def _caption_beside(path: str) -> str:
    try:
        with open(os.path.splitext(path)[0] + ".txt", encoding="utf-8-sig", errors="replace") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""
