"""Memory for packed cohorts: aligned, used again, and never while somebody can still read it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from fedlens.memory import HUGE_PAGE, aligned, in_huge_pages, in_place, is_aligned, reused, taken

SHAPE = (3, 1 << 20)  # a size that no other test uses


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.complex64])
def test_addresses_are_what_xla_takes_without_a_copy(dtype):
    for rows in (1, 3, 1000):
        array = reused((rows, 7), np.dtype(dtype))
        assert array.shape == (rows, 7)
        assert array.dtype == dtype
        assert array.ctypes.data % 64 == 0
        assert array.flags.writeable


def test_memory_that_nobody_holds_is_used_again():
    address = reused(SHAPE, np.dtype(np.int8)).ctypes.data
    assert reused(SHAPE, np.dtype(np.int8)).ctypes.data == address


@pytest.mark.parametrize("hold", [lambda a: a[1:2], lambda a: a.T.reshape(-1)[::2], lambda a: a.view(np.uint8)[0]])
def test_a_view_keeps_its_memory(hold):
    array = reused(SHAPE, np.dtype(np.int8))
    array[:] = 7
    view = hold(array)
    del array
    others = [reused(SHAPE, np.dtype(np.int8)) for _ in range(6)]
    for other in others:
        other[:] = 1
    assert np.all(view == 7)


def test_what_jax_took_keeps_its_memory():
    array = reused(SHAPE, np.dtype(np.int8))
    array[:] = 7
    held = jax.device_put(array)
    part = jax.device_put(array[1:])
    del array
    for _ in range(6):
        reused(SHAPE, np.dtype(np.int8))[:] = 1
    assert np.all(np.asarray(held) == 7)
    assert np.all(np.asarray(part) == 7)


def test_in_place_copies_only_what_must_be():
    lies_well = aligned((5, 3), np.dtype(np.float32))
    assert in_place(lies_well) is lies_well
    for lies_badly in (lies_well[1:], lies_well.T, np.broadcast_to(np.float32(2), (4, 3))):
        lies_badly_values = np.array(lies_badly)
        copy = in_place(lies_badly)
        assert is_aligned(copy)
        assert np.array_equal(copy, lies_badly_values, equal_nan=True)


def test_reused_memory_lies_as_asked():
    for alignment in (64, HUGE_PAGE):
        found = reused((3, 1 << 18), np.dtype(np.float32), alignment)
        assert found.ctypes.data % alignment == 0
        assert (found.shape, found.dtype) == ((3, 1 << 18), np.float32)


def test_a_mapped_file_is_not_copied(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(12).reshape(4, 3))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert is_aligned(mapped)  # NumPy's header is padded to 64 bytes
    rest = np.asarray(mapped)[1:]
    assert in_place(rest) is rest


@pytest.mark.parametrize("dtype", ["bool", "int8", "float32", "complex64"])
def test_taken_is_fancy_indexing(dtype):
    array = np.random.default_rng(0).integers(0, 2, (50, 3)).astype(dtype)
    rows = np.random.default_rng(1).integers(0, 50, 80)
    found = taken(array, rows)
    assert is_aligned(found)
    assert np.array_equal(found, array[rows])
    assert taken(array, rows[:0]).shape == (0, 3)


@pytest.mark.parametrize("numbers", [0, 1, 1000, (5 << 20) + 3])
def test_in_huge_pages_memory_is_as_it_was(numbers):
    array = np.random.default_rng(0).integers(0, 256, numbers, np.uint8)
    before, address = array.copy(), array.ctypes.data
    in_huge_pages(array)
    assert array.ctypes.data == address
    np.testing.assert_array_equal(array, before)
