"""Tables that the processes of a node hold in memory once, between them."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

Share = Callable[[Callable[[], pa.Table]], pa.Table]
"""Takes what makes a table, and gives the table."""


def own_table(make: Callable[[], pa.Table]) -> pa.Table:
    """The `Share` of a process that shares with none."""
    return make()


class NodeTables:
    """A `Share` for processes that ask for the same tables in the same order.

    The ``first`` process of a node makes a table and writes it into ``folder``, which it has made and which the others
    see; all of them map that file into memory. ``wait`` returns in a process when all have called it. A file loses its
    name as soon as it is mapped, so that none is left behind.
    """

    def __init__(self, folder: Path, wait: Callable[[], None], *, first: bool):
        self._folder, self._wait, self._first = folder, wait, first
        self._count = 0

    def __call__(self, make: Callable[[], pa.Table]) -> pa.Table:
        path = self._folder / f"{self._count}.arrow"
        self._count += 1
        if self._first:
            table = make().combine_chunks()  # a column in one piece is mapped, in several it would be copied together
            with pa.ipc.new_file(str(path), table.schema) as file:
                file.write_table(table)
            del table
        self._wait()
        mapped = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._wait()
        if self._first:
            path.unlink()
        return mapped
