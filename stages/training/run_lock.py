"""One run a folder at a time: two that write the same checkpoints would each lose theirs."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from stages.engine import Ranks, from_main
from stages.errors import ConfigError

LOCK = ".lock"


@contextmanager
def run_lock(run: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the folder; every rank must call. Raises ConfigError, on every rank, naming who holds it.

    The system drops the lock of a process that ends, however it ends, so that none is ever left behind. It holds
    across machines where the file system's locks do: on NFS, and on Lustre mounted with ``flock``.
    """
    file = (run / LOCK).open("a+") if ranks.main else None
    try:
        holder = from_main(_lock(file) if file else None)
        if holder:
            raise ConfigError(
                f"{run} is in use by {holder}: wait for it, stop it with `touch {run}/STOP`, or give another output="
            )
        yield
    finally:
        if file:
            file.close()


def _lock(file: TextIO) -> str | None:
    """None, or who holds the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "another run"
    except OSError as error:  # a file system without locks
        print(f"{file.name} cannot be locked ({error.strerror}): see to it that no second run writes there", flush=True)
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return None
