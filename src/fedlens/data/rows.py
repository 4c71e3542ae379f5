"""Whose rows are whose: client ids, and the offsets at which each client's run of rows starts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Shaped
from numpy.typing import ArrayLike

from fedlens.errors import DataError


def offsets_of(lengths: ArrayLike) -> Int[np.ndarray, " clients+1"]:
    """Where each client's rows start when clients of these lengths follow one another, and where the last one ends.

    Example:
      >>> offsets_of([2, 0, 3])
      array([0, 2, 2, 5])
    """
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def owners(clients: ArrayLike, rows: int) -> tuple[tuple[str, ...], Int[np.ndarray, " rows"]]:
    """Reads a column of client ids.

    Args:
      clients: the client id of each row, strings or integers; integers become their decimal digits.
      rows: how many rows there are.

    Returns:
      The ids in the order of their first row, and for each row the position of its client among them.

    Raises:
      DataError: an id is neither, strings and integers are mixed, or there are not as many of them as rows.

    Example:
      >>> owners(["bob", "alice", "bob"], 3)
      (('bob', 'alice'), array([0, 1, 0]))
    """
    names = _sortable(clients)
    if len(names) != rows:
        raise DataError(f"Expected a client id for each of {rows} rows, found {len(names)}.")
    unique, first_row, group = np.unique(names, return_index=True, return_inverse=True)
    by_appearance = np.argsort(first_row)
    position = np.empty_like(by_appearance)
    position[by_appearance] = np.arange(len(unique))
    return tuple(str(unique[index]) for index in by_appearance), position[group]


def _sortable(clients: ArrayLike) -> Shaped[np.ndarray, " rows"]:
    """The ids as an array of integers, or of strings."""
    ids = np.asarray(clients)
    if ids.ndim != 1:
        raise DataError(f"Expected one client id a row, found an array of shape {ids.shape}.")
    if ids.dtype.kind in "iu" or (ids.dtype.kind == "U" and isinstance(clients, np.ndarray)):
        return ids
    # NumPy reads the list [1, "1"] as two equal strings: look at what was given, or two clients would become one.
    given = ids.astype(object) if isinstance(clients, np.ndarray) else np.asarray(clients, dtype=object)
    kinds = (int, np.integer) if len(given) and isinstance(given[0], int | np.integer) else (str,)
    for row, client_id in enumerate(given):
        if isinstance(client_id, bool) or not isinstance(client_id, kinds):
            raise DataError(
                "Expected client ids to be all strings or all integers, "
                f"found {client_id!r} of type {type(client_id).__name__} in row {row}."
            )
    return given


def check_ids(ids: Sequence[str]) -> tuple[str, ...]:
    """Returns `ids` as a tuple.

    Raises:
      DataError: there is none; one is no string, is empty, or occurs twice.
    """
    if isinstance(ids, str) or len(ids) == 0:
        raise DataError(f"Expected the ids of at least one client, found {ids!r}.")
    seen: set[str] = set()
    for client_id in ids:
        if not isinstance(client_id, str) or not client_id:
            raise DataError(f"Expected client ids to be non-empty strings, found {client_id!r}.")
        if client_id in seen:
            raise DataError(f"Expected each client id once, found {client_id!r} twice.")
        seen.add(client_id)
    return tuple(ids)


def check_offsets(offsets: ArrayLike, ids: tuple[str, ...], rows: int) -> Int[np.ndarray, " clients+1"]:
    """Returns `offsets` as int64.

    Raises:
      DataError: they are not one more than the clients, do not run from 0 to `rows`, or decrease; the message names the
        client whose number of rows is negative.
    """
    found = np.asarray(offsets)
    if found.dtype.kind not in "iu" or found.shape != (len(ids) + 1,):
        raise DataError(
            f"Expected {len(ids) + 1} integer offsets for {len(ids)} clients, found {found.dtype}{list(found.shape)}."
        )
    found = found.astype(np.int64, copy=False)
    if found[0] != 0 or found[-1] != rows:
        raise DataError(f"Expected offsets from 0 to {rows}, the number of rows, found {found[0]} to {found[-1]}.")
    backwards = np.flatnonzero(np.diff(found) < 0)
    if len(backwards):
        raise DataError(f"Expected offsets that never decrease, found a decrease in client {ids[backwards[0]]!r}.")
    return found
