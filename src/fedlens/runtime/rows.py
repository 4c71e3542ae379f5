"""The memory that clients' outputs are written into, row by row, and that is used again.

A program that hands out local models needs room for all of them. Fresh memory costs a page fault every 4 KiB, and is
filled with zeros first: a round of W2 that hands out 42 MB took 1.2 times as long as one that hands out nothing. Now it
takes 1.06 times as long: the rows of a run are an argument of the next, donated, once nobody holds what was handed out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Shaped

from fedlens.compiler import ClientStage
from fedlens.language.types import num_bytes, tensor_types

Rows = dict[str, list[jax.Array]]  # output -> its leaves, each [devices * capacity, *leaf], spread over the devices

_WORTH_KEEPING = 1 << 20  # bytes; for less the program makes its own
# Bytes that a stage keeps while nobody uses them. Twice the rows of W2 fit: what a caller drops together is the round
# that it held, and the one before. Chunks of W5 do not, which would raise its peak by a third.
_KEPT = 128 << 20


class RowMemory:
    """The rows of one client stage, for one capacity at a time."""

    def __init__(self, stage: ClientStage, by_device: NamedSharding, in_place: bool):
        """Takes the stage, how rows are spread over devices, and whether these share the memory of the host."""
        self._types = {name: tensor_types(type_) for name, type_ in zip(stage.outputs, stage.output_types, strict=True)}
        self._bytes = sum(map(num_bytes, stage.output_types))
        self._by_device = by_device
        self._in_place = in_place
        self._capacity = 0
        self._fresh: Callable[[], Rows]
        self._spare: list[Rows] = []

    def take(self, capacity: int) -> Rows | None:
        """Rows for `capacity` clients of each device, to be donated; None if the program had better make its own.

        What is in them is undefined.
        """
        count = capacity * self._by_device.num_devices
        if not self._in_place or not _WORTH_KEEPING <= self._bytes * count <= _KEPT:
            return None
        if capacity != self._capacity:
            shapes = {name: [((count, *each.shape), each.dtype) for each in of] for name, of in self._types.items()}
            self._fresh = jax.jit(partial(_zeros, shapes), out_shardings=self._by_device)
            self._capacity, self._spare = capacity, []
        try:
            return self._spare.pop()
        except IndexError:
            return self._fresh()

    def lend(self, rows: Rows) -> dict[str, list[list[Shaped[np.ndarray, "capacity *leaf"]]]]:
        """What a program wrote: output -> for each leaf the array of each device, read where it lies.

        The rows are spare again when none of these arrays, and no view of one, is left.
        """
        capacity = next(leaf.shape[0] for leaves in rows.values() for leaf in leaves) // self._by_device.num_devices
        lease = _Lease()
        # Later chunks may have asked for another capacity in the meantime.
        spare = self._spare if capacity == self._capacity else []
        weakref.finalize(lease, _give_back, spare, rows).atexit = False
        return {
            name: [
                [_lent(leaf.addressable_data(device), lease) for device in range(len(leaf.sharding.device_set))]
                for leaf in leaves
            ]
            for name, leaves in rows.items()
        }


class _Lease:
    """Ends with the last of the arrays that hold it."""


class _Lent:
    """What NumPy reads an array from; every view of that array holds it, and with it the lease."""

    def __init__(self, array: np.ndarray, lease: _Lease):
        self.__array_interface__ = array.__array_interface__
        self.held = array, lease


def _lent(piece: jax.Array, lease: _Lease) -> np.ndarray:
    array = np.asarray(piece)
    return np.asarray(_Lent(array, lease)).view(array.dtype)  # the interface knows NumPy's own dtypes alone


def _give_back(spare: list[Rows], rows: Rows) -> None:
    size = sum(leaf.nbytes for leaves in rows.values() for leaf in leaves)
    if (len(spare) + 1) * size <= _KEPT:
        spare.append(rows)


def _zeros(shapes: dict[str, list[tuple[tuple[int, ...], np.dtype]]]) -> Rows:
    return {name: [jnp.zeros(shape, dtype) for shape, dtype in leaves] for name, leaves in shapes.items()}
