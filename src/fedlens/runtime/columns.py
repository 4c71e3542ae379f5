"""Columns: one clients-placed value of a cohort, laid out so that a program can walk over the clients.

A column knows its values by position in the cohort. `value` gives one of them eagerly, for the debug engine; `pack`
lays out the values of some clients for each device, in compressed sparse rows where clients hold sequences, so that
ragged clients cost what they hold. Capacities are rounded up to a geometric ladder (12.5 % apart): cohorts of different
sizes then share compiled programs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import federated_language as fl
import jax
import numpy as np
from jax import lax
from jaxtyping import Int, Shaped

from fedlens.errors import UnsupportedError
from fedlens.language import Sequence as ClientSequence
from fedlens.language.sequence import SequenceLayout
from fedlens.memory import reused

_MAX_ROWS = np.iinfo(np.int32).max  # row numbers are int32 in a program

Share = Int[np.ndarray, " clients"]  # positions in the cohort of the clients that one device computes


@dataclass(frozen=True)
class Layout:
    """How a traced program reads a packed column; hashable, because a program is compiled for it.

    Attributes:
      num_leaves: how many arrays the column packed.
      client: `client(arrays, i)` is the positional value of the i-th client of a device's share.
    """

    num_leaves: int
    client: Callable[[Sequence[jax.Array], jax.Array], Any]


class Column(Protocol):
    """One clients-placed value of every client of a cohort."""

    def costs(self) -> Int[np.ndarray, " clients"]:
        """How much work each client's value brings: its number of batches, or 1."""

    def bytes_per_client(self) -> int:
        """The mean size of a client's value."""

    def value(self, position: int) -> Any:
        """The positional value of one client, in host memory."""

    def pack(
        self, shares: Sequence[Share], capacity: int, *, in_place: bool = False, grouped: bool = False
    ) -> tuple[list[list[np.ndarray]], Layout]:
        """For each device the arrays that hold its clients, of the same shapes on all devices; and how to read them.

        Args:
          shares: the clients of each device.
          capacity: how many clients a device's arrays have room for.
          in_place: whether the devices read host memory: rows that may stay where they are are then not copied.
          grouped: whether a device computes several clients side by side. A program for clients who hold equally much
            is then worth compiling.
        """


@dataclass(frozen=True)
class TensorColumn:
    """Values of tensors and structs of tensors, stacked: each leaf is [clients, *leaf]."""

    type: fl.Type
    leaves: tuple[Shaped[np.ndarray, "clients *leaf"], ...]
    num_clients: int

    def costs(self) -> Int[np.ndarray, " clients"]:
        """Each client costs the same."""
        return np.ones(self.num_clients, np.int64)

    def bytes_per_client(self) -> int:
        """The bytes of one client's leaves."""
        return sum(leaf.nbytes for leaf in self.leaves) // max(self.num_clients, 1)

    def value(self, position: int) -> Any:
        """The leaves of one client in the structure of the type."""
        return nest(self.type, [leaf[position] for leaf in self.leaves])

    def pack(
        self, shares: Sequence[Share], capacity: int, *, in_place: bool = False, grouped: bool = False
    ) -> tuple[list[list[np.ndarray]], Layout]:
        """Each device's leaves are [capacity, *leaf]."""
        arrays = [[_rows(leaf, share, capacity) for leaf in self.leaves] for share in shares]
        return arrays, Layout(len(self.leaves), _TensorReader(self.type))


@dataclass(frozen=True)
class _TensorReader:
    type: fl.Type

    def __call__(self, arrays: Sequence[jax.Array], position: jax.Array) -> Any:
        return nest(self.type, [lax.dynamic_index_in_dim(array, position, keepdims=False) for array in arrays])


@dataclass(frozen=True)
class SequenceColumn:
    """Sequences in compressed sparse rows: client i holds rows `starts[i] : starts[i] + lengths[i]`.

    Attributes:
      element_type: the type of a batch.
      leaves: the rows, one array [rows, *leaf] for each leaf of a batch but the mask.
      starts: first row of each client.
      lengths: number of rows of each client.
      rows_per_batch: how many rows make a batch; None when a row is a batch.
      masked: whether a batch ends in a mask field that is not among `leaves`.
      in_place: whether a CPU device may read `leaves` where they lie.
    """

    element_type: fl.Type
    leaves: tuple[Shaped[np.ndarray, "rows *leaf"], ...]
    starts: Int[np.ndarray, " clients"]
    lengths: Int[np.ndarray, " clients"]
    rows_per_batch: int | None
    masked: bool
    in_place: bool = False

    def costs(self) -> Int[np.ndarray, " clients"]:
        """The number of batches of each client, at least 1."""
        return np.maximum(-(-self.lengths // (self.rows_per_batch or 1)), 1)

    def bytes_per_client(self) -> int:
        """The mean bytes of a client's rows."""
        row = sum(leaf[:1].nbytes for leaf in self.leaves)
        return int(row * self.lengths.sum()) // max(len(self.lengths), 1)

    def value(self, position: int) -> ClientSequence:
        """The sequence of one client over its own rows."""
        start, length = int(self.starts[position]), int(self.lengths[position])
        # A client without rows has one of zeros, which no batch reads: arrays without rows cannot be indexed.
        rows = tuple(_rows(leaf, slice(start, start + length), max(length, 1)) for leaf in self.leaves)
        return ClientSequence(rows, 0, length, None, self._layout(length))

    def pack(
        self, shares: Sequence[Share], capacity: int, *, in_place: bool = False, grouped: bool = False
    ) -> tuple[list[list[np.ndarray]], Layout]:
        """Each device's arrays are its rows [row capacity, *leaf], then starts and lengths [capacity].

        In place, the rows are those of all clients, and nothing but starts and lengths is written.
        """
        lengths = [self.lengths[share] for share in shares]
        longest = bucket(max(int(of_share.max(initial=1)) for of_share in lengths))
        if in_place and self.in_place and all(0 < len(leaf) <= _MAX_ROWS for leaf in self.leaves):
            starts = [self.starts[share] for share in shares]
            rows = [list(self.leaves)] * len(shares)
        else:
            starts = [np.cumsum(of_share) - of_share for of_share in lengths]
            row_capacity = bucket(max(int(of_share.sum()) for of_share in lengths))
            numbers = [
                _row_numbers(self.starts[share], of_share) for share, of_share in zip(shares, lengths, strict=True)
            ]
            rows = [[_rows(leaf, chosen, row_capacity) for leaf in self.leaves] for chosen in numbers]
        arrays = [
            [*of_share, _filled(start.astype(np.int32), capacity), _filled(length.astype(np.int32), capacity)]
            for of_share, start, length in zip(rows, starts, lengths, strict=True)
        ]
        # Only then does a loop over several clients side by side need no mask: 10 % of logistic regression's time.
        of_all = np.concatenate(lengths)
        alike = bool(np.ptp(of_all) == 0)
        batches, rest = divmod(int(of_all[0]), self.rows_per_batch or 1)
        layout = self._layout(longest, batches if grouped and alike and not rest else None)
        return arrays, Layout(len(self.leaves) + 2, _SequenceReader(layout, alike))

    def _layout(self, max_rows: int, num_batches: int | None = None) -> SequenceLayout:
        return SequenceLayout(self.element_type, self.rows_per_batch, self.masked, max(max_rows, 1), num_batches)


@dataclass(frozen=True)
class _SequenceReader:
    layout: SequenceLayout
    alike: bool  # whether all clients have equally many rows

    def __call__(self, arrays: Sequence[jax.Array], position: jax.Array) -> ClientSequence:
        *leaves, starts, lengths = arrays
        length = lengths[0] if self.alike else lengths[position]
        return ClientSequence(tuple(leaves), starts[position], length, None, self.layout)


@dataclass(frozen=True)
class StructColumn:
    """A struct with sequences in it: a column for each field."""

    fields: tuple[Column, ...]

    def costs(self) -> Int[np.ndarray, " clients"]:
        """The product of what the fields cost is unknown; their maximum is the work of walking the longest."""
        return np.max([field.costs() for field in self.fields], axis=0)

    def bytes_per_client(self) -> int:
        """The sum over the fields."""
        return sum(field.bytes_per_client() for field in self.fields)

    def value(self, position: int) -> Any:
        """One client's value of each field."""
        return tuple(field.value(position) for field in self.fields)

    def pack(
        self, shares: Sequence[Share], capacity: int, *, in_place: bool = False, grouped: bool = False
    ) -> tuple[list[list[np.ndarray]], Layout]:
        """The fields' arrays one after the other."""
        packed = [field.pack(shares, capacity, in_place=in_place, grouped=grouped) for field in self.fields]
        arrays = [[array for of_field, _ in packed for array in of_field[device]] for device in range(len(shares))]
        layouts = tuple(layout for _, layout in packed)
        return arrays, Layout(sum(layout.num_leaves for layout in layouts), _StructReader(layouts))


@dataclass(frozen=True)
class _StructReader:
    layouts: tuple[Layout, ...]

    def __call__(self, arrays: Sequence[jax.Array], position: jax.Array) -> Any:
        values, start = [], 0
        for layout in self.layouts:
            values.append(layout.client(arrays[start : start + layout.num_leaves], position))
            start += layout.num_leaves
        return tuple(values)


def bucket(count: int) -> int:
    """The capacity for `count` things, at most 12.5 % more: 1 to 8, then 9, 10, ... 16, 18, 20, ... 32, 36, ..."""
    if count <= 8:
        return max(count, 1)
    step = 1 << ((count - 1).bit_length() - 4)
    return -(-count // step) * step


def nest(type_: fl.Type, leaves: Sequence[Any]) -> Any:
    """The positional value of `type_` with these leaves, in field order."""
    remaining = iter(leaves)

    def take(part: fl.Type) -> Any:
        if isinstance(part, fl.StructType):
            return tuple(take(field) for _, field in part.items())
        if isinstance(part, fl.SequenceType):
            raise UnsupportedError("Expected tensors, found a sequence: fold it with sequence.reduce first.")
        return next(remaining)

    return take(type_)


def _row_numbers(
    starts: Int[np.ndarray, " clients"], lengths: Int[np.ndarray, " clients"]
) -> Int[np.ndarray, " rows"] | slice:
    """The rows of several clients one after the other; a slice, which copies nothing twice, if they already lie so."""
    if len(starts) and np.array_equal(starts[1:], starts[:-1] + lengths[:-1]):
        return slice(int(starts[0]), int(starts[-1] + lengths[-1]))
    ends = np.cumsum(lengths)
    return np.arange(int(lengths.sum())) + np.repeat(starts - (ends - lengths), lengths)


def _rows(leaf: np.ndarray, rows: Int[np.ndarray, " rows"] | slice, capacity: int) -> np.ndarray:
    """Some rows of an array, filled up with zeros to `capacity`, in memory that a CPU device takes without a copy."""
    if leaf.dtype.hasobject:  # strings: no device takes them, and Python's objects may not lie in memory used again
        return np.concatenate([leaf[rows], np.zeros((capacity, *leaf.shape[1:]), leaf.dtype)])[:capacity]
    chosen = reused((capacity, *leaf.shape[1:]), leaf.dtype)
    if isinstance(rows, slice):
        count = rows.stop - rows.start
        chosen[:count] = leaf[rows]
    else:
        count = len(rows)
        np.take(leaf, rows, axis=0, out=chosen[:count], mode="clip")  # "raise" would take through a buffer
    chosen[count:] = 0
    return chosen


def _filled(array: np.ndarray, capacity: int) -> np.ndarray:
    return _rows(array, slice(0, len(array)), capacity)
