"""Columns for the host: values that no array holds together, some clients of another column, values yet to compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import federated_language as fl
import jax
import numpy as np
from jaxtyping import Int

from fedlens.errors import UnsupportedError
from fedlens.language.types import is_static, num_bytes, tensor_types
from fedlens.runtime.columns import Column, Layout, Share, TensorColumn


@dataclass(frozen=True)
class ValuesColumn:
    """Positional values as they are: arrays of other shapes at each client, or batches of other sizes."""

    type: fl.Type
    values: tuple[Any, ...]

    def costs(self) -> Int[np.ndarray, " clients"]:
        """Each client costs the same: how long the host takes is not known."""
        return np.ones(len(self.values), np.int64)

    def bytes_per_client(self) -> int:
        """The mean bytes of a client's arrays."""
        arrays = [leaf for leaf in jax.tree.leaves(self.values) if isinstance(leaf, np.ndarray)]
        return sum(array.nbytes for array in arrays) // max(len(self.values), 1)

    def value(self, position: int) -> Any:
        """One of the values."""
        return self.values[position]

    def pack(
        self, shares: Sequence[Share], capacity: int, *, in_place: bool = False, grouped: bool = False
    ) -> tuple[list[list[np.ndarray]], Layout]:
        """Refused: one program has one shape for all clients.

        Raises:
          UnsupportedError: always.
        """
        raise UnsupportedError(f"Expected values of one known shape at all clients, found the type {self.type}.")


@dataclass(frozen=True)
class SelectedColumn:
    """Some clients of another column: client i is the one at `positions[i]` there."""

    column: Column
    positions: Int[np.ndarray, " clients"]

    def costs(self) -> Int[np.ndarray, " clients"]:
        """What those clients cost."""
        return self.column.costs()[self.positions]

    def bytes_per_client(self) -> int:
        """The mean of all clients of the other column."""
        return self.column.bytes_per_client()

    def value(self, position: int) -> Any:
        """The value of one of the clients."""
        return self.column.value(int(self.positions[position]))

    def pack(
        self, shares: Sequence[Share], capacity: int, *, in_place: bool = False, grouped: bool = False
    ) -> tuple[list[list[np.ndarray]], Layout]:
        """As the other column packs them."""
        positions = [self.positions[share] for share in shares]
        return self.column.pack(positions, capacity, in_place=in_place, grouped=grouped)


@dataclass(frozen=True)
class ComputedColumn:
    """A value that is computed when a chunk of it is packed.

    Attributes:
      compute: positions of a chunk's clients, ascending -> columns of those clients, by name.
      name: which of them this one is.
      type: the type of a client's value.
      num_clients: how many clients there are.
    """

    compute: Callable[[Int[np.ndarray, " clients"]], Mapping[str, Column]]
    name: str
    type: fl.Type
    num_clients: int

    def costs(self) -> Int[np.ndarray, " clients"]:
        """Each client costs the same."""
        return np.ones(self.num_clients, np.int64)

    def bytes_per_client(self) -> int:
        """The bytes of a value of the type."""
        return num_bytes(self.type)

    def value(self, position: int) -> Any:
        """The value of one client, computed alone."""
        return self.compute(np.array([position]))[self.name].value(0)

    def pack(
        self, shares: Sequence[Share], capacity: int, *, in_place: bool = False, grouped: bool = False
    ) -> tuple[list[list[np.ndarray]], Layout]:
        """Computes the values of all these clients, and packs them."""
        positions = np.sort(np.concatenate(shares))
        column = self.compute(positions)[self.name]
        places = [np.searchsorted(positions, share) for share in shares]
        return column.pack(places, capacity, in_place=in_place, grouped=grouped)


def column_of_positional(values: Sequence[Any], type_: fl.Type) -> Column:
    """A column of clients' positional values of tensors: stacked, if the type has one shape for all of them.

    Args:
      values: one for each client.
      type_: their type.
    """
    if not is_static(type_):
        return ValuesColumn(type_, tuple(values))
    tensors = tensor_types(type_)
    leaves = [np.empty((len(values), *tensor.shape), storage_dtype(tensor)) for tensor in tensors]
    for row, value in enumerate(values):
        for leaf, of_client in zip(leaves, leaves_of(value), strict=True):
            leaf[row] = of_client
    return TensorColumn(type_, tuple(leaves), len(values))


def leaves_of(positional: Any) -> list[Any]:
    """The leaves of a positional value of tensors, in field order; strings too."""
    if isinstance(positional, tuple):
        return [leaf for field in positional for leaf in leaves_of(field)]
    return [positional]


def stored(leaf: Any) -> np.ndarray:
    """A leaf as NumPy holds it; a string as an object."""
    return np.asarray(leaf, np.object_ if isinstance(leaf, str | bytes) else None)


def storage_dtype(tensor: fl.TensorType) -> np.dtype[Any]:
    """The dtype of an array that holds values of a type: objects for strings."""
    return np.dtype(np.object_) if tensor.dtype.kind in "US" else tensor.dtype
