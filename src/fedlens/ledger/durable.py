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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlens.ledger import direct

TEMPORARY = ".tmp"  # suffix of a file that is being written and will be renamed

_PATIENCE = 0.25  # seconds that a writer waits for the lock: a reader holds it for microseconds to see if it is free
_START_EVERY = 32 << 20  # bytes after which the disk is set to work, while the next ones are measured
_SYNC_EVERY = 256 << 20  # bytes; letting more dirty pages pile up slowed the disk to a fifth
_LONGEST_WRITE = 1 << 30  # bytes; Linux writes at most 2 GiB - 4 KiB in one call


def write_file(path: Path, pieces: Iterable[Any], *, keep_cached: bool = False) -> None:
    """Writes `pieces` (bytes or byte arrays) one after the other to `path` and through to the disk.

    What is large goes past the cache (`direct.py`), unless `keep_cached`: then it can be read again without the disk,
    and `drop_cached` lets go of it later. When writing fails, the incomplete file is removed, which gives a full disk
    its room back.

    Raises:
      OSError: what the operating system reports.
    """
    finish_file(begin_file(path, pieces, keep_cached=keep_cached))


@dataclass(frozen=True)
class Begun:
    """A file whose bytes are on their way to the disk; `finish_file` waits until they are there."""

    path: Path
    descriptor: int
    keep_cached: bool


def begin_file(path: Path, pieces: Iterable[Any], *, keep_cached: bool = False) -> Begun:
    """Writes `pieces` as `write_file` does, but for the end, where it leaves the disk at work.

    Raises:
      OSError: what the operating system reports.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    file = Begun(path, os.open(path, flags, 0o666), keep_cached)
    try:
        written = started = synced = 0
        for piece in pieces if keep_cached else direct.written(file.descriptor, pieces):
            _write(file.descriptor, memoryview(piece))
            written = os.lseek(file.descriptor, 0, os.SEEK_CUR)  # with what went past the cache
            if written - synced >= _SYNC_EVERY:
                os.fsync(file.descriptor)
                synced = written
            if written - started >= _START_EVERY:
                _drop(file.descriptor, started, written)
                started = written
        _drop(file.descriptor, started, written)
    except BaseException:
        forget_file(file)
        raise
    return file


def finish_file(file: Begun) -> None:
    """Waits until a file is on the disk, and closes it; see `write_file`.

    Raises:
      OSError: what the operating system reports.
    """
    try:
        os.fsync(file.descriptor)
        if not file.keep_cached:
            _drop(file.descriptor, 0, 0)  # to the end
        os.close(file.descriptor)
    except BaseException:
        forget_file(file)
        raise


def forget_file(file: Begun) -> None:
    """Closes and removes a file that was begun."""
    with contextlib.suppress(OSError):
        os.close(file.descriptor)
    with contextlib.suppress(OSError):
        file.path.unlink()


def drop_cached(path: Path) -> None:
    """Lets go of the cached pages of a file that is on the disk.

    Raises:
      OSError: what the operating system reports.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _drop(descriptor, 0, 0)  # to the end
    finally:
        os.close(descriptor)


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


def holder_of(descriptor: int) -> str:
    """Who holds the lock on an open file, in words: the process's number where the system tells it."""
    found = os.fstat(descriptor)
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    try:
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:  # Linux alone has the list
        locks = []
    # A line reads `1: FLOCK ADVISORY WRITE <process> <device>:<inode> 0 EOF`; one that waits has `->` after its number.
    for line in locks:
        if line[1:2] == ["FLOCK"] and len(line) > 5 and line[5] == f"{device}:{found.st_ino}" and int(line[4]) > 0:
            return "this process" if int(line[4]) == os.getpid() else f"process {line[4]}"
    return "this process or another"


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


def _write(descriptor: int, memory: memoryview) -> None:
    remaining = memory
    while remaining:
        remaining = remaining[os.write(descriptor, remaining[:_LONGEST_WRITE]) :]


def _drop(descriptor: int, start: int, end: int) -> None:
    """Lets go of the cached pages in a range; those not written yet, Linux begins to write without waiting for them."""
    if hasattr(os, "posix_fadvise"):  # macOS has no such call
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
