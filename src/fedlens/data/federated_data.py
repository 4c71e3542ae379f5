"""Federated data sets: columnar arrays whose rows are sorted by client, and the offsets where each client's rows start.

This layout (compressed sparse rows) costs what the clients hold, however unequal they are, and a cohort drawn from it
copies nothing: it is a list of runs of rows. Columns may be memory-mapped; others are copied once, when the data set is
made, to addresses at which a CPU computes on them in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, Shaped
from numpy.typing import ArrayLike

from fedlens.data import tables
from fedlens.data.columns import Columns, check_columns, check_same_type, rows_of
from fedlens.data.rows import check_ids, check_offsets, offsets_of, owners
from fedlens.data.sampling import draw, generator, integer
from fedlens.errors import DataError
from fedlens.memory import in_place, is_aligned, taken

if TYPE_CHECKING:  # the runtime loads JAX, which reading data does not need
    import federated_language as fl

    from fedlens.runtime.cohort import Cohort


@dataclass(frozen=True, eq=False, repr=False)
class FederatedData:
    """The examples of many clients. Client i owns rows `offsets[i] : offsets[i + 1]` of every column.

    Iterating gives the client ids, `in` asks for one, `len` counts them.

    Attributes:
      columns: name -> array with one row an example, sorted by client.
      offsets: int64, where each client's rows start, and at the end the number of rows.
      ids: the client ids, unique and not empty, in order.

    Raises:
      DataError: columns, offsets and ids do not fit together.

    Example:
      >>> data = FederatedData.from_arrays({"y": [0, 1, 2]}, clients=["bob", "alice", "bob"])
      >>> data
      FederatedData(2 clients, 3 examples, y: int64[])
      >>> data.client("bob")
      {'y': array([0, 2])}
    """

    columns: Mapping[str, Shaped[np.ndarray, " examples *feature"]]
    offsets: Int[np.ndarray, " clients+1"]
    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        columns = {name: in_place(column) for name, column in check_columns(self.columns).items()}
        ids = check_ids(self.ids)
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "offsets", check_offsets(self.offsets, ids, rows_of(columns)))

    @classmethod
    def from_arrays(cls, columns: Mapping[str, ArrayLike], clients: ArrayLike) -> FederatedData:
        """Groups the rows of `columns` by client.

        Clients come in the order of their first row, and a client's rows in the order given.

        Args:
          columns: name -> array with one row an example.
          clients: the client id of each row, strings or integers; integers become their decimal digits.

        Raises:
          DataError: a column is not usable, or the ids are not, or there are not as many of them as rows.
        """
        arrays = check_columns(columns)
        ids, owner = owners(clients, rows_of(arrays))
        if np.any(owner[1:] < owner[:-1]):
            order = np.argsort(owner, kind="stable")
            arrays = {name: taken(column, order) for name, column in arrays.items()}
        return cls(arrays, offsets_of(np.bincount(owner, minlength=len(ids))), ids)

    @classmethod
    def from_clients(cls, clients: Mapping[str, Mapping[str, ArrayLike]]) -> FederatedData:
        """Joins the arrays of single clients, which all have the same columns.

        Args:
          clients: client id -> column name -> array with one row an example; zero rows are allowed.

        Raises:
          DataError: there is no client, or one has other columns, shapes or dtypes than the first.
        """
        parts: list[Columns] = []
        for client_id, columns in clients.items():
            try:
                parts.append(check_columns(columns))
            except DataError as error:
                raise DataError(f"{error} In client {client_id!r}.") from error
            check_same_type(parts[0], parts[-1], str(client_id))
        ids = check_ids(tuple(clients))
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return cls(joined, offsets_of([rows_of(part) for part in parts]), ids)

    @classmethod
    def from_table(cls, table: Any, client: str = "client", columns: Sequence[str] | None = None) -> FederatedData:
        """Groups the rows of a table by the column that names the client.

        Cells that hold lists of one shape become arrays with further axes: `list<list<float>>` of 8 by 8 gives
        float64[8, 8].

        Args:
          table: a `pandas.DataFrame` or a `pyarrow.Table`.
          client: the column of client ids, strings or integers.
          columns: the columns to keep; None keeps all but `client`.

        Raises:
          DataError: a column is missing or occurs twice, or holds nulls, ragged lists or anything but numbers; the
            message names column and row.
        """
        arrays, clients = tables.read(table, client, columns)
        return cls.from_arrays(arrays, clients)

    @property
    def num_clients(self) -> int:
        """How many clients there are, those without examples included."""
        return len(self.ids)

    @property
    def num_examples(self) -> int:
        """How many examples all clients hold together."""
        return int(self.offsets[-1])

    @property
    def element_type(self) -> fl.StructType:
        """The language's type of one example, `<x=float32[8,8,1],y=int32>`: what a model is told about its inputs.

        Raises:
          DataError: a column has a dtype that the language does not know.
        """
        import federated_language as fl  # takes 0.4 s, which reading data does not need

        try:
            fields = [(name, fl.TensorType(column.dtype, column.shape[1:])) for name, column in self.columns.items()]
        except NotImplementedError as error:
            raise DataError(f"Expected dtypes that the federated language knows, found {self!r}.") from error
        return fl.StructWithPythonType(fields, dict)

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {client_id: position for position, client_id in enumerate(self.ids)}

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __contains__(self, client_id: object) -> bool:
        return client_id in self._positions

    def __repr__(self) -> str:
        example = ", ".join(
            f"{name}: {column.dtype}[{','.join(map(str, column.shape[1:]))}]" for name, column in self.columns.items()
        )
        return f"FederatedData({self.num_clients} clients, {self.num_examples} examples, {example})"

    def client(self, client_id: str) -> Columns:
        """The rows of one client, as views: writing to them writes to the data set.

        Raises:
          DataError: there is no such client.
        """
        position = self._position(client_id)
        start, stop = self.offsets[position], self.offsets[position + 1]
        return {name: column[start:stop] for name, column in self.columns.items()}

    def cohort(self, round: int, *, clients_per_round: int | None = None, seed: int = 0) -> Cohort:  # noqa: A002
        """The participants of one round, and their examples; nothing is copied.

        Args:
          round: the number of the round.
          clients_per_round: how many clients to draw, uniformly and without replacement, in the order drawn; None
            takes all clients in the order of the data set.
          seed: the draw depends on `(seed, round)` alone, not on what was drawn before.

        Raises:
          DataError: `clients_per_round` is not from 1 to `num_clients`, or an argument is no integer.
        """
        if clients_per_round is None:
            return self._cohort(self.ids, self.offsets[:-1], np.diff(self.offsets))
        source = generator("cohort", seed, integer("round", round))
        drawn = draw(source, clients_per_round, self.num_clients, "clients_per_round")
        return self._cohort_at(drawn)

    def cohort_of(self, ids: Iterable[str]) -> Cohort:
        """The clients `ids`, in that order, as the participants of a round; nothing is copied.

        Example:
          >>> data = FederatedData.from_arrays({"y": [0, 1, 2]}, clients=["bob", "alice", "bob"])
          >>> data.cohort_of(["alice"])
          Cohort(1 clients: alice)

        Raises:
          DataError: there is no such client, one is named twice, or none is.
        """
        chosen = check_ids((ids,) if isinstance(ids, str) else tuple(ids))
        return self._cohort_at(np.array([self._position(client_id) for client_id in chosen]))

    def _cohort_at(self, positions: Int[np.ndarray, " clients"]) -> Cohort:
        starts = self.offsets[positions]
        ids = tuple([self.ids[position] for position in positions.tolist()])
        return self._cohort(ids, starts, self.offsets[positions + 1] - starts)

    def _cohort(
        self, ids: tuple[str, ...], starts: Int[np.ndarray, " clients"], lengths: Int[np.ndarray, " clients"]
    ) -> Cohort:
        from fedlens.runtime.cohort import Cohort
        from fedlens.runtime.examples import Examples

        aligned = all(map(is_aligned, self.columns.values()))
        return Cohort.from_examples(ids, Examples(self.columns, starts, lengths, aligned), checked=True)

    def sample(self, clients: int, seed: int = 0) -> FederatedData:
        """A smaller data set of `clients` clients drawn uniformly, in the order they have here.

        Raises:
          DataError: `clients` is not from 1 to `num_clients`.
        """
        drawn = draw(generator("sample", seed), clients, self.num_clients, "clients")
        return self.select([self.ids[position] for position in np.sort(drawn)])

    def select(self, ids: Iterable[str]) -> FederatedData:
        """The data set of the clients `ids`, in that order.

        Raises:
          DataError: there is no such client, one is named twice, or none is.
        """
        chosen = (ids,) if isinstance(ids, str) else tuple(ids)
        positions = [self._position(client_id) for client_id in chosen]
        lengths = np.diff(self.offsets)[positions]
        offsets = offsets_of(lengths)
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[positions] - offsets[:-1], lengths)
        return FederatedData({name: taken(column, rows) for name, column in self.columns.items()}, offsets, chosen)

    def split(self, test_fraction: float = 0.2, seed: int = 0) -> tuple[FederatedData, FederatedData]:
        """Holds out a part of every client's examples.

        Both parts have all clients. A client with n >= 2 examples keeps at least one on each side and holds out
        `test_fraction * n` of them, rounded; a client with one keeps it for training and has no row in the test part.
        Which rows are held out depends on the seed, the client's id and n alone, so that adding or removing other
        clients changes nothing. Rows keep their order.

        Args:
          test_fraction: between 0 and 1, both excluded.
          seed: any integer.

        Returns:
          `(train, test)`.

        Raises:
          DataError: `test_fraction` is out of range.
        """
        if not 0 < test_fraction < 1:
            raise DataError(f"Expected test_fraction between 0 and 1, both excluded, found {test_fraction}.")
        held_out = np.zeros(self.num_examples, dtype=bool)
        for client_id, start, stop in zip(self.ids, self.offsets[:-1], self.offsets[1:], strict=True):
            size = int(stop - start)
            if size >= 2:
                count = min(max(math.floor(test_fraction * size + 0.5), 1), size - 1)
                held_out[start + generator("split", seed, client_id).permutation(size)[:count]] = True
        return self._filter(~held_out), self._filter(held_out)

    def _filter(self, keep: np.ndarray[Any, np.dtype[np.bool_]]) -> FederatedData:
        """The data set of the rows where `keep` is true; all clients stay."""
        kept_before = np.concatenate([[0], np.cumsum(keep)])
        rows = np.flatnonzero(keep)
        columns = {name: taken(column, rows) for name, column in self.columns.items()}
        return FederatedData(columns, kept_before[self.offsets], self.ids)

    def _position(self, client_id: str) -> int:
        try:
            return self._positions[client_id]
        except KeyError:
            known = ", ".join(self.ids[:3]) + (", ..." if self.num_clients > 3 else "")
            raise DataError(f"Expected one of the {self.num_clients} clients ({known}), found {client_id!r}.") from None
