"""Files that survive: written through to the disk, put in place whole, and locked against a second writer.

A file is safe once its bytes are synced, and visible for good once its folder is synced too. What must never be seen
half-written goes to a temporary name first; `os.replace` then puts it in place in one step.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"  # suffix of a file that is being written and will be renamed

_PATIENCE = 0.25  # seconds that a writer waits for the lock: a reader holds it for microseconds to see if it is free
_START_EVERY = 32 << 20  # bytes after which the disk is set to work, while the next ones are measured
_SYNC_EVERY = 256 << 20  # bytes; letting more dirty pages pile up slowed the disk to a fifth
_LONGEST_WRITE = 1 << 30  # bytes; Linux writes at most 2 GiB - 4 KiB in one call


def write_file(path: Path, pieces: Iterable[Any]) -> None:
    """Writes `pieces` (bytes or byte arrays) one after the other to `path` and through to the disk.

    The pages leave the cache as they are synced: nobody reads a round back while the next ones are written. When
    writing fails, the incomplete file is removed, which on a full disk gives its room back.

    Raises:
      OSError: what the operating system reports.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        try:
            written = started = synced = 0
            for piece in pieces:
                written += _write(descriptor, memoryview(piece))
                if written - synced >= _SYNC_EVERY:
                    os.fsync(descriptor)
                    synced = written
                if written - started >= _START_EVERY:
                    _drop(descriptor, started, written)
                    started = written
            os.fsync(descriptor)
            _drop(descriptor, 0, written)
        finally:
            os.close(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def replace_file(path: Path, pieces: Iterable[Any]) -> None:
    """Writes a file that exists whole or not at all: to a temporary name, then renamed, then its folder synced.

    Raises:
      OSError: what the operating system reports; the old file, if there is one, is as it was.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    write_file(temporary, pieces)
    try:
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable.

    Raises:
      OSError: what the operating system reports.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Takes the writer's lock on an open file; False when somebody else has it. Closing the descriptor gives it up.

    The lock (`flock`) belongs to the open file and not to its name: it follows the file through a rename, and the
    kernel releases it when the process dies, however it dies.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        else:
            return True


def is_locked(path: Path) -> bool:
    """Whether a writer, in this process or another, holds the lock on the file at `path`.

    Raises:
      OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def size_below(folder: Path) -> int:
    """The bytes in all files below `folder`; files that vanish meanwhile count nothing."""
    return sum(_sizes(folder))


def _sizes(folder: Path) -> Iterator[int]:
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield os.stat(os.path.join(parent, name)).st_size


def _write(descriptor: int, memory: memoryview) -> int:
    remaining = memory
    while remaining:
        remaining = remaining[os.write(descriptor, remaining[:_LONGEST_WRITE]) :]
    return memory.nbytes


def _drop(descriptor: int, start: int, end: int) -> None:
    """Lets go of the cached pages in a range; those not written yet, Linux begins to write without waiting for them."""
    if hasattr(os, "posix_fadvise"):  # macOS has no such call
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
