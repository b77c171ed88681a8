"""Published metadata -> one typed row a clip, streamed: InternVid's lines and folders of videos.

A row that cannot be used is a row all the same, with the reason: every line of the metadata is accounted for.
Times are whole milliseconds, as InternVid writes them, so that no clip is too short by a rounding.
"""

import json
import os
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from shards import storage
from stages.errors import ConfigError
from stages.planning.fields import (
    BAD_METADATA,
    BadRow,
    brief,
    caption_text,
    check_span,
    field,
    milliseconds,
    positive,
    score,
)
from stages.planning.video_files import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    VideoFiles,
    encodable,
    open_input,
    stem,
    suffix,
    walk,
)

CAPTION_SUFFIX = ".txt"

MAX_LINE = 1 << 24
"""Bytes. A longer line is no row: a file without line ends must not fill the memory."""

_JSON = json.JSONDecoder()  # what json.loads uses, without its search for the encoding
_NOTHING: Mapping[str, Any] = {}


class Row(NamedTuple):
    """One clip of the metadata, or one line that names none. (A tuple: millions are made.)

    ``identity`` is what makes it this clip and no other within its dataset. ``path`` is relative to the
    videos folder unless the metadata gives an absolute one; None if there is no such file. The clip begins
    ``start_ms`` after the start of that file. ``duration_ms``, and the ``height``, ``width`` (pixels) and
    ``fps`` of the file, are None where nobody has said. ``reason`` is set for a row that cannot be used.
    ``first_of_line``: false for the second and further clips of a line. ``fields``: all that the line says.
    """

    identity: str
    source: str
    caption: str = ""
    kind: Literal["video", "image"] = "video"
    path: str | None = None
    start_ms: int = 0
    duration_ms: int | None = None
    height: float | None = None
    width: float | None = None
    fps: float | None = None
    aesthetic: float | None = None
    umt: float | None = None
    matching_score: float | None = None
    desirable_filtering: str | None = None
    reason: str | None = None
    message: str | None = None
    first_of_line: bool = True
    fields: Mapping[str, Any] = _NOTHING


def read_internvid(metadata_path: str, videos_folder: str) -> Iterator[Row]:
    """The rows of InternVid's published JSON lines, or of a parquet file (``.parquet``) with the same columns.

    A clip is found as a ``video_path`` (absolute, or relative to the videos folder), as a file named
    ``ID_START_END`` with InternVid's colons or any other separators, or as a whole video named ``ID``, to be
    cut by the timestamps; anywhere below the videos folder, with any of VIDEO_SUFFIXES.

    Raises ConfigError, at once, if the metadata is absent or empty, or the folder absent.
    """
    if suffix(metadata_path) == ".parquet":
        with _parquet_file(metadata_path) as table:
            if not table.metadata.num_rows:
                raise ConfigError(f"{metadata_path} is empty: expected InternVid's columns and a row for each clip")
        return _parquet_rows(metadata_path, VideoFiles(videos_folder))
    with open_metadata(metadata_path) as file:
        if not any(line.strip() for line in lines(file)):
            raise ConfigError(f"{metadata_path} is empty: expected one JSON object a line, as InternVid has")
    return _json_rows(metadata_path, VideoFiles(videos_folder))


def read_folder(videos_folder: str) -> Iterator[Row]:
    """A row for each video, and for each picture as a clip of one frame, below a folder, sorted by path.

    The caption is the content of the file of the same name that ends in ``.txt``; empty if there is none.
    How long a video lasts is not known yet. Raises ConfigError, at once, for a folder that is absent or holds
    neither.
    """
    wanted = {*VIDEO_SUFFIXES, *IMAGE_SUFFIXES}
    found = list(walk(videos_folder))
    names = [name for name in found if suffix(name) in wanted and not _is_pipe(videos_folder, name)]
    captions = {name for name in found if name.endswith(CAPTION_SUFFIX)}
    if not names:
        raise ConfigError(
            f"found no video or picture in {videos_folder!r}: set data.videos to a folder that holds some "
            f"({', '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)})"
        )
    return (_folder_row(videos_folder, name, captions) for name in sorted(names))


def open_metadata(path: str) -> BinaryIO:
    try:
        return open_input(path)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ConfigError(f"{path!r} cannot be read ({why}): set data.metadata to a file of metadata") from None


def lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, those beyond MAX_LINE cut there."""
    for line in iter(partial(file.readline, MAX_LINE), b""):
        rest = line
        while len(rest) == MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE)
        yield line


def bad_row(error: BadRow, content: bytes, place: str, source: object) -> Row:
    """The row of a line that is none, known by its content."""
    name = source if isinstance(source, str) and encodable(source) else ""
    identity = f"line {xxhash.xxh3_128_hexdigest(content)}"
    return Row(identity, name, reason=error.reason, message=f"{place}: {error}")


def parse_object(text: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises BadRow."""
    if len(text) >= MAX_LINE:
        raise BadRow(BAD_METADATA, f"longer than {MAX_LINE} bytes")
    try:
        fields = _JSON.decode(text.decode(errors="surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise BadRow(BAD_METADATA, f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadRow(BAD_METADATA, f"expected a JSON object, found a {type(fields).__name__}")
    return fields


def _json_rows(path: str, files: VideoFiles) -> Iterator[Row]:
    with open_metadata(path) as file:
        for number, line in enumerate(lines(file), 1):
            text = line.removeprefix(b"\xef\xbb\xbf").strip()
            if text:
                try:
                    fields = parse_object(text)
                except BadRow as error:
                    yield bad_row(error, text, f"line {number}", None)
                    continue
                try:
                    yield _internvid_row(fields, files)
                except BadRow as error:
                    yield bad_row(error, text, f"line {number}", fields.get("YoutubeID"))


@contextmanager
def _parquet_file(path: str) -> Iterator[pq.ParquetFile]:
    """ConfigError for one that cannot be read, or not to its end."""
    with open_metadata(path) as file:
        try:
            yield pq.ParquetFile(file)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no parquet file, or damaged: {error}") from None


def _parquet_rows(path: str, files: VideoFiles) -> Iterator[Row]:
    for number, fields in enumerate(_parquet_objects(path), 1):
        try:
            yield _internvid_row(fields, files)
        except BadRow as error:
            content = json.dumps(fields, default=repr).encode()
            yield bad_row(error, content, f"row {number}", fields.get("YoutubeID"))


def _parquet_objects(path: str) -> Iterator[dict[str, Any]]:
    with _parquet_file(path) as table:
        for batch in table.iter_batches(batch_size=4096):
            yield from batch.to_pylist()


def _internvid_row(fields: dict[str, Any], files: VideoFiles) -> Row:
    source = field(fields, "YoutubeID")
    if not isinstance(source, str) or not source or not encodable(source):
        raise BadRow(BAD_METADATA, f"YoutubeID is {brief(source)}, expected a text")
    start_ms = milliseconds(field(fields, "Start_timestamp"), "Start_timestamp")
    end_ms = milliseconds(field(fields, "End_timestamp"), "End_timestamp")
    check_span(start_ms, end_ms)
    path, whole = _find(files, source, start_ms, end_ms, fields.get("video_path"))
    umt = "UMT_Score" if fields.get("UMT_Score") is not None else "CLIP_Score"  # as the first release of AES had it
    return Row(
        identity=f"{source} {start_ms} {end_ms}",
        source=source,
        caption=caption_text(field(fields, "Caption")),
        path=path,
        start_ms=start_ms if whole else 0,
        duration_ms=end_ms - start_ms,
        height=positive(fields["height"]) if "height" in fields else None,
        width=positive(fields["width"]) if "width" in fields else None,
        fps=positive(fields["fps"]) if "fps" in fields else None,
        aesthetic=score(fields.get("Aesthetic_Score"), "Aesthetic_Score"),
        umt=score(fields.get(umt), umt),
        fields=fields,
    )


def _find(files: VideoFiles, source: str, start_ms: int, end_ms: int, video_path: Any) -> tuple[str | None, bool]:
    """The path of a clip's file, None if it is not there, and whether that is the whole video."""
    if video_path is not None:
        if not isinstance(video_path, str) or not video_path or "\0" in video_path or "://" in video_path:
            raise BadRow(BAD_METADATA, f"video_path is {brief(video_path)}, expected the path of a file")
        if not encodable(video_path):
            raise BadRow(BAD_METADATA, f"video_path is {brief(video_path)}, which is not UTF-8")
        try:
            path = files.given(video_path)
        except ValueError as error:
            raise BadRow(BAD_METADATA, f"video_path {brief(video_path)} {error}") from None
        if path is not None:
            return path, stem(path) == source
    return files.find(source, start_ms, end_ms)


def _folder_row(folder: str, name: str, captions: Container[str]) -> Row:
    if not encodable(name):
        safe = name.encode(errors="surrogateescape").decode(errors="replace")
        identity = f"file {xxhash.xxh3_128_hexdigest(name.encode(errors='surrogateescape'))}"
        return Row(identity, safe, reason=BAD_METADATA, message=f"{safe!r}: its name is not UTF-8; rename it")
    beside = os.path.splitext(name)[0] + CAPTION_SUFFIX
    try:
        caption = _read_caption(os.path.join(folder, beside)) if beside in captions else ""
    except OSError as error:
        return Row(name, name, path=name, reason="io_error", message=f"{beside} cannot be read: {error.strerror}")
    kind: Literal["video", "image"] = "image" if suffix(name) in IMAGE_SUFFIXES else "video"
    return Row(name, name, caption, kind, name, duration_ms=0 if kind == "image" else None)


def _is_pipe(folder: str, name: str) -> bool:
    """Whether reading it would wait for ever."""
    path = storage.place(folder) / name
    return isinstance(path, Path) and path.is_fifo()


def _read_caption(path: str) -> str:
    with open_input(path) as file:
        return file.read(MAX_LINE).decode("utf-8-sig", errors="replace").strip()
