"""`ClientValues`: what the clients of a call returned, by client id."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import federated_language as fl
import numpy as np
from jaxtyping import Int, Shaped

from fedlens.errors import CohortError
from fedlens.language.types import from_positional, leaf_paths
from fedlens.runtime.columns import nest


@dataclass(frozen=True)
class Part:
    """The values of some clients, as one device computed them.

    Attributes:
      positions: where each row's client stands in the cohort.
      leaves: the leaves of the values, each [len(positions), *leaf].
    """

    positions: Int[np.ndarray, " rows"]
    leaves: tuple[Shaped[np.ndarray, "rows *leaf"], ...]


class ClientValues:
    """One value for each client of a cohort, in cohort order.

    Example:
      >>> values = result["client_weights"]
      >>> values["alice"]["w"].shape, len(values), values.ids
      >>> for client_id, weights in values.items(): ...
      >>> values.stacked["w"].shape  # (clients, *shape of w)

    Attributes:
      ids: the client ids in cohort order.
      type: the type of one client's value, with its containers.
      parts: the values as they were computed, without a copy: for writing them out.
    """

    def __init__(self, ids: Sequence[str], type_: fl.Type, parts: Sequence[Part]):
        """Holds the values of `parts`, which together have each position of `ids` once."""
        self.ids = tuple(ids)
        self.type = type_
        self.parts = tuple(parts)
        self._part = np.empty(len(self.ids), np.int64)
        self._row = np.empty(len(self.ids), np.int64)
        for number, part in enumerate(self.parts):
            self._part[part.positions] = number
            self._row[part.positions] = np.arange(len(part.positions))
        self._position: dict[str, int] | None = None

    def __getitem__(self, client_id: str) -> Any:
        return self._at(self._find(client_id))

    def __iter__(self) -> Iterator[Any]:
        return (self._at(position) for position in range(len(self.ids)))

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, client_id: object) -> bool:
        return client_id in self._positions()

    def items(self) -> Iterator[tuple[str, Any]]:
        """The client ids with their values, in cohort order."""
        return zip(self.ids, self, strict=True)

    @property
    def stacked(self) -> Any:
        """All values as one pytree whose leaves have a leading axis of clients, in cohort order."""
        return from_positional(nest(self.type, self.stacked_leaves()), self.type)

    def stacked_leaves(self) -> list[Shaped[np.ndarray, "clients *leaf"]]:
        """The leaves of `stacked` in field order."""
        if len(self.parts) == 1 and np.array_equal(self.parts[0].positions, np.arange(len(self.ids))):
            return list(self.parts[0].leaves)
        stacked = []
        for number in range(len(leaf_paths(self.type))):
            first = self.parts[0].leaves[number]
            leaf = np.empty((len(self.ids), *first.shape[1:]), first.dtype)
            for part in self.parts:
                leaf[part.positions] = part.leaves[number]
            stacked.append(leaf)
        return stacked

    def __repr__(self) -> str:
        leaves = ", ".join(
            f"{path or 'value'} {leaf.dtype}[{','.join(map(str, leaf.shape[1:]))}]"
            for path, leaf in zip(leaf_paths(self.type)[:3], self.parts[0].leaves, strict=False)
        )
        more = ", ..." if len(leaf_paths(self.type)) > 3 else ""
        return f"ClientValues({len(self.ids)} clients: {leaves}{more})"

    def _at(self, position: int) -> Any:
        leaves = self.parts[self._part[position]].leaves
        return from_positional(nest(self.type, [leaf[self._row[position]] for leaf in leaves]), self.type)

    def _positions(self) -> dict[str, int]:
        if self._position is None:
            self._position = {client_id: position for position, client_id in enumerate(self.ids)}
        return self._position

    def _find(self, client_id: str) -> int:
        position = self._positions().get(client_id)
        if position is None:
            raise unknown_client(client_id, self.ids)
        return position


class UnknownClientError(CohortError, KeyError):
    """A client id that is not in the cohort."""

    __str__ = Exception.__str__  # KeyError's would quote the message


def unknown_client(client_id: object, ids: Sequence[str]) -> UnknownClientError:
    """The error for a client id that is not among `ids`, naming the nearest ones."""
    import difflib

    near = difflib.get_close_matches(str(client_id), ids, n=3) or list(ids[:3])
    return UnknownClientError(
        f"Expected the id of a client of this cohort, such as {', '.join(map(repr, near))}, found {client_id!r}."
    )


def of_array(ids: Sequence[str], array: Shaped[np.ndarray, "clients *leaf"]) -> ClientValues:
    """Client values from one array with a leading axis of clients."""
    type_ = fl.TensorType(array.dtype, array.shape[1:])
    return ClientValues(ids, type_, [Part(np.arange(len(ids)), (array,))])
