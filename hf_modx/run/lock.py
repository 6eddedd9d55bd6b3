"""One process at a time changes the folder of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"
LOCK_WAIT = 10.0
"""Seconds: what was just interrupted may still be writing."""


@contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Nobody else who asks trains in the folder, rolls it back or makes it forget meanwhile. A process that is killed
    lets go.

    Raises:
        BlockingIOError: somebody does; the message names the folder and the remedy.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=LOCK_WAIT)
    except Timeout:
        raise BlockingIOError(
            f"Another process is training in {run}, or changing it. Wait until it has ended, or choose another folder "
            f"(if none is running, remove {run / LOCK})."
        ) from None
    try:
        yield
    finally:
        lock.release()
