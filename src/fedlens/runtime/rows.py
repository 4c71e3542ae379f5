"""The memory that clients' outputs are written into, row by row, and that is used again.

A program that hands out local models needs room for all of them. Fresh memory costs a page fault every 4 KiB, and is
filled with zeros first: a round of W2 that hands out 42 MB took 1.2 times as long as one that hands out nothing. Now it
takes 1.06 times as long: the rows of a run are an argument of the next, donated, once nobody holds what was handed out.

All leaves of one dtype share one piece of memory on each device. A leaf's rows begin there where a disk can read them
as they lie (`ledger/direct.py`): those of the first device `BEYOND_PAGE`, where XLA has large arrays of its own, those
of the others as far from a sector as in a file in which the devices' rows follow each other. The pages are huge, of
which a disk takes more at once.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, Shaped

from fedlens.compiler import ClientStage
from fedlens.language.types import num_bytes, tensor_types
from fedlens.memory import BEYOND_PAGE, PAGE, in_huge_pages

_WORTH_KEEPING = 1 << 20  # bytes; for less the program makes its own
# Bytes that a stage keeps while nobody uses them. Twice the rows of W2 fit: what a caller drops together is the round
# that it held, and the one before. Chunks of W5 do not, which would raise its peak by a third.
_KEPT = 128 << 20
_SECTOR = 512  # bytes; PAGE is a multiple
_KNOWN = 16  # numbers of clients of the devices for which it is remembered where the rows begin

Memory = dict[str, Shaped[Array, " numbers"]]  # dtype -> its numbers, spread over the devices
Starts = Int[Array, "devices leaves"]  # in the memory of its dtype, the number at which the rows of each leaf begin


class _Leaf(NamedTuple):
    """Room for the rows of a leaf: the number at which it begins, after the first on a page, and a row's shape."""

    dtype: str
    first: int
    shape: tuple[int, ...]


_Places = dict[str, list[_Leaf]]  # output -> its leaves


class Rows(NamedTuple):
    """Memory for the rows of clients; what is in it is undefined before it is written.

    Attributes:
      memory: to be donated to the program that writes it.
      starts: where in it the rows begin.
      known: the same on the host.
      of: the room that it is.
    """

    memory: Memory
    starts: Starts
    known: Int[np.ndarray, "devices leaves"]
    of: _Room


@dataclass(frozen=True)
class _Room:
    """What is known of some memory.

    Attributes:
      capacity: for how many clients of each device it is.
      places: where each leaf is.
      pages: dtype -> the first number that is `BEYOND_PAGE`, on each device.
      starts: how many clients each device has -> where the rows begin, in the memory of the devices and on the host.
    """

    capacity: int
    places: _Places
    pages: Mapping[str, Int[np.ndarray, " devices"]]
    starts: dict[tuple[int, ...], tuple[Starts, Int[np.ndarray, "devices leaves"]]]


def write(
    stage: ClientStage,
    capacity: int,
    starts: Starts,
    memory: Memory,
    outputs: Mapping[str, Sequence[jax.Array]],
    client: jax.Array,
) -> Memory:
    """Writes outputs of a client of this device, or of several from `client` on; for a program to be traced.

    Args:
      stage: whose outputs they are.
      capacity: for how many clients of each device there are rows.
      starts: where those of this device begin.
      memory: this device's.
      outputs: output -> its leaves, each [*leaf] or [clients, *leaf].
      client: the place of the client among those of this device.
    """
    places, _ = _places(stage, capacity)
    written, remaining = dict(memory), iter(starts[0])
    for name, of_output in places.items():
        for (dtype, _, shape), leaf in zip(of_output, outputs[name], strict=True):
            start = next(remaining) + client * math.prod(shape)
            written[dtype] = lax.dynamic_update_slice_in_dim(written[dtype], leaf.ravel(), start, 0)
    return written


class RowMemory:
    """The rows of one client stage, for one capacity at a time."""

    def __init__(self, stage: ClientStage, by_device: NamedSharding, in_place: bool):
        """Takes the stage, how rows are spread over devices, and whether these share the memory of the host."""
        self._stage = stage
        self._bytes = sum(map(num_bytes, stage.output_types))
        self._by_device = by_device
        self._in_place = in_place
        self._capacity = 0
        self._places: _Places = {}
        self._fresh: Callable[[], Memory]
        self._spare: list[tuple[Memory, _Room]] = []

    def take(self, capacity: int, counts: Sequence[int]) -> Rows | None:
        """Rows to be donated; None if the program had better make its own.

        Args:
          capacity: for how many clients of each device.
          counts: how many each has.
        """
        if not self._in_place or not _WORTH_KEEPING <= self._bytes * capacity * self._by_device.num_devices <= _KEPT:
            return None
        if capacity != self._capacity:
            self._places, sizes = _places(self._stage, capacity)
            of_all = {dtype: size * self._by_device.num_devices for dtype, size in sizes.items()}
            self._fresh = jax.jit(partial(_zeros, of_all), out_shardings=self._by_device)
            self._capacity, self._spare = capacity, []
        try:
            memory, room = self._spare.pop()
        except IndexError:
            memory = self._fresh()
            room = self._room(memory)
        return Rows(memory, *self._starts(room, tuple(counts)), room)

    def lend(self, rows: Rows) -> dict[str, list[list[Shaped[np.ndarray, "capacity *leaf"]]]]:
        """What a program wrote: output -> for each leaf the array of each device.

        They are read where they lie. The rows are spare again when none of these arrays, and no view of one, is left.
        """
        lease, room = _Lease(), rows.of
        pieces = {dtype: self._of_devices(spread) for dtype, spread in rows.memory.items()}
        starts = iter(rows.known.T.tolist())
        lent = {
            name: [
                [
                    _lent(piece, start, (room.capacity, *leaf.shape), lease)
                    for piece, start in zip(pieces[leaf.dtype], next(starts), strict=True)
                ]
                for leaf in leaves
            ]
            for name, leaves in room.places.items()
        }
        # Later chunks may have asked for another capacity in the meantime.
        spare = self._spare if room.capacity == self._capacity else []
        weakref.finalize(lease, _give_back, spare, rows.memory, room).atexit = False
        return lent

    def _room(self, memory: Memory) -> _Room:
        """What is known of fresh memory, after it was put into huge pages, where there are some."""
        pages = {}
        for dtype, spread in memory.items():
            pieces = self._of_devices(spread)
            for piece in pieces:
                in_huge_pages(piece)
            pages[dtype] = np.array([(BEYOND_PAGE - piece.ctypes.data) % PAGE // piece.itemsize for piece in pieces])
        return _Room(self._capacity, self._places, pages, {})

    def _starts(self, room: _Room, counts: tuple[int, ...]) -> tuple[Starts, Int[np.ndarray, "devices leaves"]]:
        if counts not in room.starts:
            before = np.cumsum([0, *counts[:-1]])  # clients of the devices before each
            leaves = [leaf for of_output in room.places.values() for leaf in of_output]
            columns = []
            for dtype, first, shape in leaves:
                of_sector = _SECTOR // jnp.dtype(dtype).itemsize
                columns.append(room.pages[dtype] + first + before * math.prod(shape) % of_sector)
            known = np.stack(columns, axis=1).astype(np.int32)
            if len(room.starts) >= _KNOWN:
                room.starts.clear()
            room.starts[counts] = jax.device_put(known, self._by_device), known
        return room.starts[counts]

    def _of_devices(self, spread: jax.Array) -> list[np.ndarray]:
        """The piece of each device, read where it lies."""
        return [np.asarray(spread.addressable_data(number)) for number in range(self._by_device.num_devices)]


class _Lease:
    """Ends with the last of the arrays that hold it."""


class _Lent:
    """What NumPy reads an array from; every view of that array holds it, and with it the lease."""

    def __init__(self, array: np.ndarray, lease: _Lease):
        self.__array_interface__ = array.__array_interface__
        self.held = array, lease


def _lent(piece: np.ndarray, start: int, shape: tuple[int, ...], lease: _Lease) -> np.ndarray:
    array = piece[start : start + math.prod(shape)].reshape(shape)
    return np.asarray(_Lent(array, lease)).view(array.dtype)  # the interface knows NumPy's own dtypes alone


def _give_back(spare: list[tuple[Memory, _Room]], memory: Memory, room: _Room) -> None:
    size = sum(piece.nbytes for piece in memory.values())
    if (len(spare) + 1) * size <= _KEPT:
        spare.append((memory, room))


def _places(stage: ClientStage, capacity: int) -> tuple[_Places, dict[str, int]]:
    """Where on a device there is room for each output's leaves, and how many numbers of each dtype a device has."""
    sizes: dict[str, int] = {}
    places: _Places = {}
    for name, type_ in zip(stage.outputs, stage.output_types, strict=True):
        places[name] = []
        for tensor in tensor_types(type_):
            dtype, of_page = tensor.dtype.name, PAGE // tensor.dtype.itemsize
            first = sizes.get(dtype, 0)
            places[name].append(_Leaf(dtype, first, tuple(tensor.shape)))
            whole_pages = -(-capacity * math.prod(tensor.shape) // of_page)
            sizes[dtype] = first + (whole_pages + 1) * of_page  # one more for what does not begin at a page
    return places, {dtype: size + PAGE // jnp.dtype(dtype).itemsize for dtype, size in sizes.items()}


def _zeros(sizes: dict[str, int]) -> Memory:
    return {dtype: jnp.zeros(size, dtype) for dtype, size in sizes.items()}
