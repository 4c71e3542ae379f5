"""Large files past the page cache: the disk reads from the process's own memory, where it lies if it can.

A buffered write copies every byte into pages of the kernel's, which have to be found, marked, sent to the disk and let
go of: more processor time than all else that capturing a model takes. With `O_DIRECT` the disk reads from the process's
memory, which has to be aligned, and so has its place in the file. A long piece that is, which the weights of clients
are (`tensorfile.layout`, `runtime.rows`), is written from where it lies; all else passes through a buffer that is
aligned. Short files, the last bytes of long ones, and file systems that refuse go the ordinary way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fedlens.memory import HUGE_PAGE, reused

SIZE = 4 << 20  # bytes written in one go; with 1 MiB the disk took a tenth longer, 8 MiB gained nothing
IN_PLACE = 1 << 20  # bytes of a piece that is worth a write of its own
BLOCK = 4096  # bytes: the place in the file is a multiple of it; a page, and the largest block of today's disks

_SECTOR = 512  # bytes: where the disk reads from is a multiple of it; most disks ask for less
_FLAG: int = getattr(os, "O_DIRECT", 0)  # macOS has no such flag


def written(descriptor: int, pieces: Iterable[Any]) -> Iterator[memoryview]:
    """Writes what it can of `pieces` directly, and gives what has to be written the ordinary way, each in its turn.

    Args:
      descriptor: an empty file, opened for writing.
      pieces: bytes or byte arrays that follow each other in the file.

    Yields:
      What is to be written at the file's position before the next is asked for.

    Raises:
      OSError: what the operating system reports.

    Example:
      >>> for rest in written(descriptor, [b"a short", b" file"]):
      ...     os.write(descriptor, rest)
      12
    """
    contents = (memoryview(piece) for piece in pieces)
    if not _FLAG:
        yield from contents
        return
    buffer = reused((SIZE,), np.dtype(np.uint8), HUGE_PAGE)  # the disk takes small pages one by one: half its time
    memory, filled, is_direct, in_place = memoryview(buffer), 0, False, True
    for content in contents:
        remaining = content
        while remaining:
            lead, whole = _in_place(remaining, filled) if in_place else (0, 0)
            count = lead if whole else min(len(remaining), SIZE - filled)
            buffer[filled : filled + count] = np.frombuffer(remaining[:count], np.uint8)
            filled, remaining = filled + count, remaining[count:]
            if filled < SIZE and not whole:
                continue
            is_direct = is_direct or _set_direct(descriptor, on=True)
            refused = _write(descriptor, memory[:filled]) if is_direct else memory[:filled]
            if not refused and whole:
                filled = 0
                refused = _write(descriptor, remaining[:whole])
                if len(refused) == whole:  # it does not take memory as it lies
                    in_place, is_direct = False, _set_direct(descriptor, on=True)
                    continue
                remaining = remaining[whole:]
            if refused:  # once refused, there is no gain in passing through the buffer
                yield from (refused, remaining)
                yield from contents
                return
            filled = 0
    whole = filled // BLOCK * BLOCK if is_direct else 0
    refused = _write(descriptor, memory[:whole])
    if is_direct:
        _set_direct(descriptor, on=False)
    yield from (refused, memory[whole:filled])


def _in_place(content: memoryview, filled: int) -> tuple[int, int]:
    """How many of its first bytes a piece lacks to the next block, after `filled`, and how many to write from there.

    Of the latter there are none if the piece is short, or lies in memory so that the disk cannot read it.
    """
    lead = -filled % BLOCK
    if len(content) < IN_PLACE + lead or (np.frombuffer(content, np.uint8).ctypes.data + lead) % _SECTOR:
        return 0, 0
    return lead, (len(content) - lead) // BLOCK * BLOCK


def _write(descriptor: int, memory: memoryview) -> memoryview:
    """Writes aligned memory directly; returns what the file system refused; the file is an ordinary one then.

    It refuses in the middle after it took an odd number of bytes: all that there was room for, or that a file may have.
    """
    remaining = memory
    try:
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _set_direct(descriptor, on=False)
    return remaining


def _set_direct(descriptor: int, *, on: bool) -> bool:
    """Makes an open file direct or ordinary; returns whether it is what was asked for."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    with contextlib.suppress(OSError):  # not every file system has direct files
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _FLAG if on else flags & ~_FLAG)
        return True
    return False
