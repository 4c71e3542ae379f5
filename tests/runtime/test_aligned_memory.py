"""Memory for packed cohorts: aligned, used again, and never while somebody can still read it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from fedlens.runtime.columns import aligned

SHAPE = (3, 1 << 20)  # a size that no other test uses


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.complex64])
def test_addresses_are_what_xla_takes_without_a_copy(dtype):
    for rows in (1, 3, 1000):
        array = aligned((rows, 7), np.dtype(dtype))
        assert array.shape == (rows, 7)
        assert array.dtype == dtype
        assert array.ctypes.data % 64 == 0
        assert array.flags.writeable


def test_memory_that_nobody_holds_is_used_again():
    address = aligned(SHAPE, np.dtype(np.int8)).ctypes.data
    assert aligned(SHAPE, np.dtype(np.int8)).ctypes.data == address


@pytest.mark.parametrize("hold", [lambda a: a[1:2], lambda a: a.T.reshape(-1)[::2], lambda a: a.view(np.uint8)[0]])
def test_a_view_keeps_its_memory(hold):
    array = aligned(SHAPE, np.dtype(np.int8))
    array[:] = 7
    view = hold(array)
    del array
    others = [aligned(SHAPE, np.dtype(np.int8)) for _ in range(6)]
    for other in others:
        other[:] = 1
    assert np.all(view == 7)


def test_what_jax_took_keeps_its_memory():
    array = aligned(SHAPE, np.dtype(np.int8))
    array[:] = 7
    held = jax.device_put(array)
    part = jax.device_put(array[1:])
    del array
    for _ in range(6):
        aligned(SHAPE, np.dtype(np.int8))[:] = 1
    assert np.all(np.asarray(held) == 7)
    assert np.all(np.asarray(part) == 7)
