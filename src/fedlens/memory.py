"""Host memory at addresses that XLA reads in place; NumPy's own may be copied first, at 1 GB/s.

What is aligned costs a CPU device nothing to take: the columns of a data set are read where they lie, and the memory of
packed cohorts and of what is written is used again.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import weakref
from collections import defaultdict
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

PAGE = 4096  # bytes
# Bytes beyond a page at which XLA's allocator has large arrays: its alignment, after the allocator's own header.
BEYOND_PAGE = 64
HUGE_PAGE = 2 << 20  # bytes; NumPy asks for such pages where it makes large arrays

_ALIGNMENT = 64  # bytes
_COLLAPSE = 25  # Linux's MADV_COLLAPSE, since 6.1
_WORTH_KEEPING = 1 << 20  # bytes
_KEPT = 4  # pieces of memory of one size
_spare: defaultdict[tuple[int, int], list[np.ndarray]] = defaultdict(list)


def is_aligned(array: np.ndarray) -> bool:
    """Whether a CPU device can read an array where it lies."""
    return bool(array.flags.c_contiguous and array.dtype.isnative and array.ctypes.data % _ALIGNMENT == 0)


def in_place(array: np.ndarray) -> np.ndarray:
    """The array itself, if it is aligned or a file that is mapped into memory; otherwise an aligned copy."""
    if is_aligned(array) or _is_mapped(array):
        return array
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


def taken(
    array: Shaped[np.ndarray, "rows *leaf"], rows: Int[np.ndarray, " taken"]
) -> Shaped[np.ndarray, "taken *leaf"]:
    """`array[rows]` in aligned memory."""
    chosen = aligned((len(rows), *array.shape[1:]), array.dtype)
    np.take(array, rows, axis=0, out=chosen, mode="clip")  # "raise" would take through a buffer
    return chosen


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An uninitialised, aligned array."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    return _from_aligned(memory, size, _ALIGNMENT).view(dtype).reshape(shape)


def reused(shape: tuple[int, ...], dtype: np.dtype[Any], alignment: int = _ALIGNMENT) -> np.ndarray:
    """An uninitialised array for a while, whose address is a multiple of `alignment` bytes.

    A large one takes the memory of an earlier one that nobody holds any more: fresh memory costs a page fault every
    4 KiB, which took as long as filling it.
    """
    size = math.prod(shape) * dtype.itemsize
    spare = _spare[size, alignment]
    memory = spare.pop() if spare else np.empty(size + alignment, np.uint8)
    # Every view, and what JAX takes without a copy, holds `owner`: NumPy looks for the owner of memory up to the first
    # object that is no array, here a memoryview. Its end is therefore the moment when nobody can read the memory.
    owner = np.frombuffer(memoryview(memory), np.uint8)
    if size >= _WORTH_KEEPING:
        weakref.finalize(owner, _give_back, spare, memory).atexit = False
    return _from_aligned(owner, size, alignment).view(dtype).reshape(shape)


def in_huge_pages(array: np.ndarray) -> None:
    """Puts the memory of an array into huge pages, as far as it fills some and the system has them.

    It is copied once: worth it for memory that is used again and again.
    """
    start = -(-array.ctypes.data // HUGE_PAGE) * HUGE_PAGE
    size = (array.ctypes.data + array.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    if size > 0 and sys.platform == "linux":
        # What it answers makes no difference: where it is refused, pages stay as they are.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _COLLAPSE)


def _from_aligned(memory: np.ndarray, size: int, alignment: int) -> np.ndarray:
    start = -memory.ctypes.data % alignment
    return memory[start : start + size]


def _give_back(spare: list[np.ndarray], memory: np.ndarray) -> None:
    if len(spare) < _KEPT:
        spare.append(memory)


def _is_mapped(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap) or (isinstance(array, memoryview) and isinstance(array.obj, mmap.mmap))
