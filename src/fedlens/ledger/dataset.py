"""A whole run as an xarray data set, whose weights stay in the ledger until they are looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

from fedlens.errors import LedgerError
from fedlens.ledger.format import Leaf, Run
from fedlens.ledger.stored import LedgerRound
from fedlens.ledger.tensorfile import AnyArray, dtype_of

PerRoundAndClient = Shaped[np.ndarray, "rounds clients"]

_HIDDEN = ("round", "client", "part", "row", "leaves")  # columns that say where things lie, or are dimensions
_OWN = ("leaf", "leaf_norm", "kept")  # names that a client's metric may have too; it is then `metric/<name>`


def to_xarray(
    run: Run, table: pa.Table, metrics: Sequence[dict[str, Any]], round_of: Callable[[int], LedgerRound]
) -> Any:
    """The run as an `xarray.Dataset`; see `Ledger.to_xarray`.

    Args:
      run: what it is.
      table: the tables of clients of all its rounds.
      metrics: the server's metrics by round, each with `round`.
      round_of: a round by its number.

    Raises:
      LedgerError: xarray is not installed.
    """
    try:
        import xarray  # optional, and 0.5 s to import
        from xarray.backends import BackendArray
        from xarray.core import indexing
    except ImportError:
        raise LedgerError(
            "Expected the package xarray, which makes data sets, found none. Run `pip install 'fedlens[xarray]'`."
        ) from None

    class StoredArray(BackendArray):
        """Reads what is asked for, see `_WeightsOfRun`."""

        def __init__(self, weights: _WeightsOfRun) -> None:
            self.weights, self.shape, self.dtype = weights, weights.shape, weights.dtype

        def __getitem__(self, key: Any) -> Any:
            return indexing.explicit_indexing_adapter(
                key, self.shape, indexing.IndexingSupport.OUTER, self.weights.read
            )

    rounds = [each["round"] for each in metrics]
    ids = list(dict.fromkeys(table.column("client").to_pylist()))
    cells = _Cells(table, rounds, ids)
    variables: dict[str, Any] = {}
    for name in (name for name in table.column_names if name not in _HIDDEN):
        key = f"metric/{name}" if name in _OWN else name
        variables[key] = (("round", "client"), cells.column(table.column(name)))
    facts = table.column("leaves").combine_chunks().flatten()
    of_cell = (len(table), len(run.leaves))
    norms = facts.field("norm").to_numpy(zero_copy_only=False).reshape(of_cell)
    kept = facts.field("checksum").is_valid().to_numpy(zero_copy_only=False).reshape(of_cell)
    variables["leaf_norm"] = (("round", "client", "leaf"), cells.spread(norms, np.nan))
    variables["kept"] = (("round", "client", "leaf"), cells.spread(kept, False))
    for name in dict.fromkeys(name for each in metrics for name in each if name != "round"):
        variables[f"server/{name}"] = (("round",), np.array([each.get(name, np.nan) for each in metrics]))
    for place, leaf in enumerate(run.leaves):
        axes = tuple(f"{leaf.name}.{axis}" for axis in range(len(leaf.shape)))
        local = _WeightsOfRun(leaf, tuple(rounds), tuple(ids), variables["kept"][1][:, :, place], round_of)
        start = _WeightsOfRun(leaf, tuple(rounds), None, None, round_of)
        variables[f"local/{leaf.name}"] = (("round", "client", *axes), indexing.LazilyIndexedArray(StoredArray(local)))
        variables[f"global/{leaf.name}"] = (("round", *axes), indexing.LazilyIndexedArray(StoredArray(start)))
    # Text of any length is Python's: NumPy's would give each id the width of the longest.
    names = {"client": np.array(ids, object), "leaf": np.array([leaf.name for leaf in run.leaves], object)}
    return xarray.Dataset(variables, coords={"round": np.array(rounds, np.int64), **names})


class _Cells:
    """Where the rows of the table belong in arrays over rounds and clients."""

    def __init__(self, table: pa.Table, rounds: Sequence[int], ids: Sequence[str]) -> None:
        places = {client: place for place, client in enumerate(ids)}
        self._clients = np.array([places[client] for client in table.column("client").to_pylist()], np.int64)
        self._rounds = np.searchsorted(np.array(rounds, np.int64), table.column("round").to_numpy())
        self._shape = (len(rounds), len(ids))

    def spread(self, rows: AnyArray, missing: Any) -> AnyArray:
        """[rows, ...] as [rounds, clients, ...], with `missing` where there is no row."""
        array = np.full((*self._shape, *rows.shape[1:]), missing, rows.dtype)
        array[self._rounds, self._clients] = rows
        return array

    def column(self, column: pa.ChunkedArray) -> PerRoundAndClient:
        """A column, as float64 with NaN if there is not a value for every round and client."""
        if column.null_count == 0 and len(column) == self._shape[0] * self._shape[1]:
            return self.spread(column.to_numpy(), 0)
        values = [np.nan if value is None else value for value in column.to_pylist()]
        return self.spread(np.array(values, np.float64), np.nan)


class _WeightsOfRun:
    """One leaf over rounds and clients, or without clients that of the global model: what it is before it is read."""

    def __init__(
        self,
        leaf: Leaf,
        rounds: tuple[int, ...],
        ids: tuple[str, ...] | None,
        kept: PerRoundAndClient | None,
        round_of: Callable[[int], LedgerRound],
    ) -> None:
        self._leaf, self._rounds, self._ids, self._kept, self._round_of = leaf, rounds, ids, kept, round_of
        dtype = dtype_of(leaf.dtype)
        self.dtype = np.dtype(np.float32) if dtype.kind == "V" or dtype.name.startswith(("bfloat", "float8")) else dtype
        self.shape = (len(rounds), *(() if ids is None else (len(ids),)), *leaf.shape)

    def read(self, key: tuple[Any, ...]) -> AnyArray:
        """What stands at `key`, an index of its own for each axis: whole numbers, slices, arrays of whole numbers."""
        rounds = np.atleast_1d(np.arange(len(self._rounds))[key[0]])
        found = [self._read_round(int(place), key[1:]) for place in rounds]
        if isinstance(key[0], int | np.integer):
            return found[0]
        return np.stack(found) if found else _outer(np.empty((0, *self.shape[1:]), self.dtype), (slice(None), *key[1:]))

    def _read_round(self, place: int, key: tuple[Any, ...]) -> AnyArray:
        stored = self._round_of(self._rounds[place])
        if self._ids is None or self._kept is None:
            return _outer(stored.global_leaf(self._leaf.name).astype(self.dtype), key)
        clients = np.atleast_1d(np.arange(len(self._ids))[key[0]])
        there = self._kept[place, clients]
        array = np.full((len(clients), *self._leaf.shape), np.nan if self.dtype.kind in "fc" else 0, self.dtype)
        array[there] = stored.leaf(self._leaf.name, [self._ids[client] for client in clients[there]])
        if isinstance(key[0], int | np.integer):
            return _outer(array[0], key[1:])
        return _outer(array, (slice(None), *key[1:]))


def _outer(array: AnyArray, key: tuple[Any, ...]) -> AnyArray:
    """Indexes each axis by itself, the last first, as an index that is a number takes its axis away."""
    for axis in reversed(range(len(key))):
        array = array[(slice(None),) * axis + (key[axis],)]
    return array
