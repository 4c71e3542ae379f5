"""Files past the page cache have the bytes of ordinary ones, whatever the file system takes."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fedlens.ledger import direct, durable

SIZES = (0, 1, direct.SIZE - 1, direct.SIZE, direct.SIZE + 1, 2 * direct.SIZE + 4096, 3 * direct.SIZE - 4097)


def pieces_of(size: int) -> list[bytes | np.ndarray]:
    """A file's bytes in pieces of odd lengths, short and long."""
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    ends = [0, min(7, size), min(1000, size), min(direct.SIZE + 333, size), size]
    pieces = [content[a:b] for a, b in pairwise(ends)]
    return [piece.tobytes() if len(piece) < 1000 else piece for piece in pieces]


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def watch(monkeypatch: pytest.MonkeyPatch, answer: Callable[[int, memoryview], memoryview]) -> list[bool]:
    """Lets `answer` choose what of each direct write is written; returns which writes were direct."""
    seen, write = [], os.write

    def watched(descriptor: int, memory: memoryview) -> int:
        seen.append(is_direct(descriptor))
        return write(descriptor, answer(len(seen), memory) if seen[-1] else memory)

    monkeypatch.setattr(os, "write", watched)
    return seen


def check(path: Path, size: int) -> None:
    pieces = pieces_of(size)
    durable.write_file(path, iter(pieces))
    assert path.read_bytes() == b"".join(bytes(piece) for piece in pieces)


@pytest.mark.parametrize("size", SIZES)
def test_the_bytes_arrive(tmp_path, size):
    check(tmp_path / "file", size)


@pytest.mark.parametrize("size", SIZES)
def test_the_bytes_arrive_where_there_are_no_direct_files(tmp_path, monkeypatch, size):
    monkeypatch.setattr(direct, "_FLAG", 0)
    check(tmp_path / "file", size)


@pytest.mark.parametrize("size", SIZES)
def test_the_bytes_arrive_where_the_file_system_refuses(tmp_path, monkeypatch, size):
    def refuse(descriptor: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return control(descriptor, command, flags)

    control = fcntl.fcntl
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    check(tmp_path / "file", size)


def test_a_large_file_goes_past_the_cache_but_for_its_end(tmp_path, monkeypatch):
    seen = watch(monkeypatch, lambda number, memory: memory)
    check(tmp_path / "file", 2 * direct.SIZE + 4097)
    if not any(seen):
        pytest.skip("this file system has no direct files")
    assert seen == [True, True, True, False]
    seen.clear()
    durable.write_file(tmp_path / "kept", iter(pieces_of(2 * direct.SIZE)), keep_cached=True)
    assert seen
    assert not any(seen)
    seen.clear()
    check(tmp_path / "short", direct.SIZE - 1)
    assert seen == [False]


@pytest.mark.parametrize("size", SIZES[3:])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_refused_in_the_middle(tmp_path, monkeypatch, size, at):
    def answer(number: int, memory: memoryview) -> memoryview:
        if number == at:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return memory

    watch(monkeypatch, answer)
    check(tmp_path / "file", size)


@pytest.mark.parametrize("size", SIZES[3:])
def test_written_in_part(tmp_path, monkeypatch, size):
    watch(monkeypatch, lambda number, memory: memory[: max(4096, len(memory) // 2 // 4096 * 4096)])
    check(tmp_path / "file", size)


def test_an_error_of_the_disk_is_raised_and_nothing_stays(tmp_path, monkeypatch):
    def answer(number: int, memory: memoryview) -> memoryview:
        if number == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return memory

    seen = watch(monkeypatch, answer)
    check(tmp_path / "before", direct.SIZE)
    (tmp_path / "before").unlink()
    if not any(seen):
        pytest.skip("this file system has no direct files")
    with pytest.raises(OSError, match="Input/output error"):
        durable.write_file(tmp_path / "file", iter(pieces_of(3 * direct.SIZE)))
    assert list(tmp_path.iterdir()) == []
    check(tmp_path / "after", direct.SIZE)  # the buffer is as good as before
