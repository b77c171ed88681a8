"""What a file of the videos folder is: its length, rate and size, for rows whose metadata does not tell."""

import os
from collections.abc import Callable, Iterator

from stages.decoding.picture import probe_picture
from stages.decoding.pyav_reader import VideoInfo, probe
from stages.decoding.source_file import source_file
from stages.errors import DecodeError
from stages.planning.metadata import Row

Probe = Callable[[Iterator[Row]], Iterator[VideoInfo | DecodeError]]
"""For each row in order: what its file is, or why it cannot be used."""


def probe_here(videos_folder: str) -> Probe:
    """A probe that looks at one file after the other, in this process."""
    return lambda rows: (probe_row(row, videos_folder) for row in rows)


def probe_row(row: Row, videos_folder: str) -> VideoInfo | DecodeError:
    """What the file of a row is; the error, not raised, where it cannot be used."""
    try:
        with source_file(os.path.join(videos_folder, row.path or "")) as path:
            return probe_picture(path) if row.kind == "image" else probe(path)
    except DecodeError as error:
        return error
