"""Panda-70M -> one typed row a clip, streamed: its CSV, or the folders that its downloader writes.

A line of the CSV is a source video; its cells are Python literals, lists with an item for each clip. A clip is the
same (video, start, end) whether a CSV or the downloader's JSON file tells of it.
"""

import ast
import csv
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any

from stages.errors import ConfigError
from stages.planning.fields import BAD_METADATA, BadRow, brief, caption_text, check_span, field, milliseconds, score
from stages.planning.metadata import MAX_LINE, Row, bad_row, lines, open_metadata, parse_object
from stages.planning.video_files import VideoFiles, encodable, open_input, walk

MAX_CELL = 1 << 22
"""Characters. A video of many hours has less; parsing takes a hundred times its cell's memory."""

_URL_ID = re.compile(r"(?:v=|youtu\.be/)([A-Za-z0-9_-]{11})(?![A-Za-z0-9_-])")
_DOWNLOADED = re.compile(r"[0-9]{7,}(?:_[0-9]+)?\.json")
_PER_CLIP = ("caption", "matching_score", "desirable_filtering")
_LISTS = ("timestamp", "clips", "shot_boundary_detection", *_PER_CLIP)
_TEXTS = ("videoID", "url", *_LISTS)


def read_panda(metadata_path: str, videos_folder: str) -> Iterator[Row]:
    """The clips of Panda-70M's CSV, either release, in the order of the file.

    A clip is found as a file named ``ID_START_END`` with any separators, ``ID.INDEX``, ``ID_INDEX`` (counted from
    0 if any such file is there, else from 1), or as a whole video named ``ID``, to be cut by the timestamps.
    Without ``metadata_path``, the clips are those of the downloader's output in the videos folder, such as
    ``00000/0000000_00000.json`` with its ``.mp4``; a download that failed has none.

    Raises ConfigError, at once, if the metadata is absent, empty or has other columns, or the folder is absent.
    """
    if not metadata_path:
        return _downloaded(videos_folder)
    csv.field_size_limit(MAX_LINE)
    with open_metadata(metadata_path) as file:
        header = _cells(next(lines(file), b""), metadata_path)
    if not {"timestamp", "caption"} <= set(header) or not {"url", "videoID"} & set(header):
        raise ConfigError(
            f"{metadata_path} begins with {brief(','.join(header))}, expected Panda-70M's columns: "
            "videoID,url,timestamp,caption,matching_score"
        )
    return _csv_rows(metadata_path, header, VideoFiles(videos_folder))


def _cells(line: bytes, path: str) -> list[str]:
    try:
        return _parse_line(line.removeprefix(b"\xef\xbb\xbf"))
    except BadRow as error:
        raise ConfigError(f"{path} does not begin with the names of Panda-70M's columns: {error}") from None


def _parse_line(line: bytes) -> list[str]:
    """The cells of a line. No cell of Panda-70M has a line end in it, so that a stray quote spoils one line only."""
    if len(line) >= MAX_LINE:
        raise BadRow(BAD_METADATA, f"longer than {MAX_LINE} bytes")
    try:
        return next(csv.reader([line.decode()], strict=True), [])
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadRow(BAD_METADATA, f"not CSV: {error}") from None


def _csv_rows(path: str, header: Sequence[str], files: VideoFiles) -> Iterator[Row]:
    with open_metadata(path) as file:
        for number, line in enumerate(islice(lines(file), 1, None), 2):
            content = line.strip()
            if not content:
                continue
            cells: dict[str, Any] = {}
            try:
                values = _parse_line(content)
                if len(values) != len(header):
                    raise BadRow(BAD_METADATA, f"{len(values)} cells, expected {len(header)}")
                cells = {key: _cell(key, value) for key, value in zip(header, values, strict=True)}
                rows = _rows(cells, "timestamp")
            except BadRow as error:
                yield bad_row(error, content, f"line {number}", cells.get("videoID"))
                continue
            yield from (_found(row, index, files) for index, row in enumerate(rows))


def _found(row: Row, index: int, files: VideoFiles) -> Row:
    path, whole = files.find(row.source, row.start_ms, row.start_ms + (row.duration_ms or 0), index)
    return row._replace(path=path, start_ms=row.start_ms if whole else 0)


def _downloaded(folder: str) -> Iterator[Row]:
    names = (name for name in walk(folder) if name.endswith((".json", ".mp4")))
    first = next((name for name in names if _DOWNLOADED.fullmatch(os.path.basename(name))), None)
    if first is None:
        raise ConfigError(
            f"no file such as 00000/0000000_00000.json in {folder!r}: set data.metadata to Panda-70M's CSV, or "
            "data.videos to what its downloader wrote"
        )
    return _downloaded_rows(folder)


def _downloaded_rows(folder: str) -> Iterator[Row]:
    for _, group in groupby(walk(folder), key=os.path.dirname):
        names = set(group)
        for name in sorted(name for name in names if _DOWNLOADED.fullmatch(os.path.basename(name))):
            try:
                with open_input(os.path.join(folder, name)) as file:
                    content = file.read(MAX_LINE)
            except OSError as error:
                unread = BadRow(BAD_METADATA, f"it cannot be read: {error.strerror or type(error).__name__}")
                yield bad_row(unread, name.encode(errors="surrogateescape"), ascii(name), None)
                continue
            video = os.path.splitext(name)[0] + ".mp4"
            yield from _downloaded_file(content, name, video if video in names and encodable(video) else None)


def _downloaded_file(content: bytes, name: str, video: str | None) -> Iterator[Row]:
    place = name if encodable(name) else ascii(name)
    fields: dict[str, Any] = {}
    try:
        fields = parse_object(content)
        rows = _rows(fields, "clips")
        if video and len(rows) > 1:
            raise BadRow(BAD_METADATA, f"{len(rows)} clips, expected one beside {video}")
    except BadRow as error:
        yield bad_row(error, content + place.encode(), place, fields.get("url"))
        return
    message = None if video else f"{place}: {_printable(fields.get('error_message')) or 'no .mp4 beside it'}"
    for row in rows:
        yield row._replace(path=video, start_ms=0, message=message)


def _rows(fields: Mapping[str, Any], spans_key: str) -> list[Row]:
    """The clips of a line, each with its start within the whole video. Raises BadRow."""
    source = _video_id(fields)
    spans = _list(field(fields, spans_key), spans_key)
    if not spans:
        raise BadRow(BAD_METADATA, f"{spans_key} is empty")
    field(fields, "caption")
    plain = spans_key == "clips"
    captions, scores, filtering = (_each(fields, key, len(spans), plain) for key in _PER_CLIP)
    others = {key: value for key, value in fields.items() if key not in _LISTS}
    rows: list[Row] = []
    for span, caption, matching, desirable in zip(spans, captions, scores, filtering, strict=True):
        if not isinstance(span, list | tuple) or len(span) != 2:
            raise BadRow(BAD_METADATA, f"a clip is {brief(span)}, expected its start and end")
        start_ms, end_ms = milliseconds(span[0], spans_key), milliseconds(span[1], spans_key)
        check_span(start_ms, end_ms)
        rows.append(
            Row(
                identity=f"{source} {start_ms} {end_ms}",
                source=source,
                caption=caption_text(caption),
                start_ms=start_ms,
                duration_ms=end_ms - start_ms,
                matching_score=score(matching, "matching_score"),
                desirable_filtering=_label(desirable),
                first_of_line=not rows,
                fields=others,
            )
        )
    return rows


def _video_id(fields: Mapping[str, Any]) -> str:
    url = fields.get("url")
    match = _URL_ID.search(url) if isinstance(url, str) else None
    source = match[1] if match else fields.get("videoID")
    if not isinstance(source, str) or not source or not encodable(source):
        raise BadRow(BAD_METADATA, f"no video in url {brief(url)}")
    return source


def _each(fields: Mapping[str, Any], key: str, clips: int, plain: bool) -> Sequence[Any]:
    """A value for each clip, None where the line has no such key. plain: the text of a single clip may stand alone."""
    value = fields.get(key)
    if value is None or (value == "" and key != "caption"):
        return [None] * clips
    if plain and clips == 1 and isinstance(value, str | float) and (key == "caption" or "[" not in str(value)):
        return [value]
    values = _list(value, key)
    if len(values) != clips:
        raise BadRow(BAD_METADATA, f"{len(values)} values of {key}, expected {clips}, one a clip")
    return values


def _list(value: Any, key: str) -> Sequence[Any]:
    """A list, or the Python literal of one."""
    if isinstance(value, str):
        if len(value) > MAX_CELL:
            raise BadRow(BAD_METADATA, f"{key} has {len(value)} characters, expected at most {MAX_CELL}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that are none
                value = ast.literal_eval(value.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise BadRow(BAD_METADATA, f"{key} is {brief(value)}, no Python literal: {brief(str(error))}") from None
    if not isinstance(value, list | tuple):
        raise BadRow(BAD_METADATA, f"{key} is {brief(value)}, expected a list")
    return value


def _label(value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and encodable(value)):
        raise BadRow(BAD_METADATA, f"desirable_filtering is {brief(value)}, expected a text")
    return value


def _cell(key: str, value: str) -> str | float:
    """A cell of the CSV, which has no numbers: in columns that Panda-70M does not have, what reads like one is one."""
    try:
        return value if key in _TEXTS else float(value)
    except ValueError:
        return value


def _printable(value: Any) -> str:
    return value[:500].encode(errors="replace").decode() if isinstance(value, str) else ""
