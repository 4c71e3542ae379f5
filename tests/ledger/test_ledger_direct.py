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


def lying(size: int, beyond: int) -> np.ndarray:
    """Random bytes whose address is so far beyond a multiple of 4096."""
    memory = np.empty(size + 2 * direct.BLOCK, np.uint8)
    start = -memory.ctypes.data % direct.BLOCK + beyond
    content = memory[start : start + size]
    content[:] = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    return content


def pieces_of(size: int) -> list[bytes | np.ndarray]:
    """A file's bytes in pieces of odd lengths, short and long; none lies so that the disk could read it."""
    content = lying(size, 1)
    ends = [0, min(7, size), min(1000, size), min(direct.SIZE + 333, size), size]
    pieces = [content[a:b] for a, b in pairwise(ends)]
    return [piece.tobytes() if len(piece) < 1000 else piece for piece in pieces]


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def placed(lengths: list[int]) -> tuple[list[np.ndarray], list[bool]]:
    """Pieces of a file, every other one of which lies in memory as it does in the file; and which are long and do."""
    pieces, start = [], 0
    for number, length in enumerate(lengths):
        pieces.append(lying(length, (start + 512 * number) % direct.BLOCK if number % 2 == 0 else (start + 8) % 4096))
        start += length
    return pieces, [number % 2 == 0 and length > direct.IN_PLACE + 4096 for number, length in enumerate(lengths)]


PLACED = [
    [3 << 20],
    [4096, 5 << 20],
    [100, 100, 3 << 20, 5 << 20, (2 << 20) + 77],
    [4095, 1, (1 << 20) + 8191, 3, (9 << 20) + 5, 200_000, 1 << 20],
    [direct.SIZE - 1, 1, direct.SIZE, direct.SIZE, direct.SIZE + 1],
]


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


@pytest.mark.parametrize("lengths", PLACED, ids=str)
def test_what_lies_as_in_the_file_is_written_from_there(tmp_path, monkeypatch, lengths):
    written: list[tuple[bool, int, int]] = []
    write = os.write

    def watched(descriptor: int, memory: memoryview) -> int:
        written.append((is_direct(descriptor), np.frombuffer(memory, np.uint8).ctypes.data, len(memory)))
        return write(descriptor, memory)

    monkeypatch.setattr(os, "write", watched)
    pieces, in_place = placed(lengths)
    durable.write_file(tmp_path / "file", iter(pieces))
    assert (tmp_path / "file").read_bytes() == b"".join(map(bytes, pieces))
    if not any(direct_ for direct_, _, _ in written):
        pytest.skip("this file system has no direct files")
    for piece, expected in zip(pieces, in_place, strict=True):
        begin, end = piece.ctypes.data, piece.ctypes.data + len(piece)
        of_piece = [size for direct_, start, size in written if direct_ and begin <= start < end]
        assert sum(of_piece) > len(piece) - 2 * direct.BLOCK if expected else not of_piece


@pytest.mark.parametrize("lengths", PLACED, ids=str)
@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 4096])  # bytes that are written before the refusal
def test_a_refusal_of_memory_as_it_lies(tmp_path, monkeypatch, lengths, at, first):
    refusing = False

    def answer(number: int, memory: memoryview) -> memoryview:
        nonlocal refusing
        if refusing or (number == at and first == 0):
            refusing = False
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        refusing = number == at
        return memory[:first] if refusing else memory

    watch(monkeypatch, answer)
    pieces, _ = placed(lengths)
    durable.write_file(tmp_path / "file", iter(pieces))
    assert (tmp_path / "file").read_bytes() == b"".join(map(bytes, pieces))
