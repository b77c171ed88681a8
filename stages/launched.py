"""Which process of those that ``deepspeed`` or ``torchrun`` started this is: the only one, where none was."""

import os


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def tell(text: str) -> None:
    """A line of the first one for the user."""
    if rank() == 0:
        print(text, flush=True)
