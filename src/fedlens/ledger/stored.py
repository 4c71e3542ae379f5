"""One round of a ledger and the local models in it, read as they are asked for and verified as they are."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from fedlens import trees  # not `from fedlens import`: see format.py
from fedlens.errors import LedgerError
from fedlens.ledger import folder, format, measure, table, tensorfile
from fedlens.ledger.format import NotInLedgerError, Run
from fedlens.ledger.measure import Clients
from fedlens.ledger.tensorfile import AnyArray, Slot


class LedgerRound(Mapping[str, "StoredLocalModel"]):
    """One committed round: a mapping from client id to local model, in cohort order.

    Attributes:
      path: the ledger's folder.
      run: what its `run.json` says.
      number: the round.

    Raises:
      LedgerError: the round's files are missing or damaged.
    """

    def __init__(self, path: Path, run: Run, number: int) -> None:
        self.path = path
        self.run = run
        self.number = number
        self._clients_file = folder.clients_file(path, number)
        self._table = table.read_table(self._clients_file, run.leaves)
        self._summary = table.read_summary(self._table, self._clients_file)
        self._place: dict[str, int] = {
            client: place for place, client in enumerate(self._table.column("client").to_pylist())
        }
        self._rows = self._table.column("row").to_numpy()
        self._check_table()

    def __repr__(self) -> str:
        return f"LedgerRound(round {self.number}, {len(self)} clients, in {str(self.path)!r})"

    def __len__(self) -> int:
        return len(self._place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __contains__(self, client_id: object) -> bool:
        return client_id in self._place

    def __getitem__(self, client_id: str) -> StoredLocalModel:
        row = self._table.slice(self._find(client_id), 1).to_pylist()[0]
        metrics = {name: row[name] for name in table.metric_names(self._table) if row[name] is not None}
        norms = {leaf["leaf"]: leaf["norm"] for leaf in row["leaves"]}
        return StoredLocalModel(client_id, self.number, row["num_examples"], metrics, row["update_norm"], norms, self)

    @property
    def ids(self) -> tuple[str, ...]:
        """The clients in cohort order."""
        return tuple(self._place)

    @property
    def metrics(self) -> dict[str, float]:
        """The server's metrics of the round."""
        return dict(self._summary.metrics)

    @cached_property
    def global_weights(self) -> trees.PyTree:
        """The global model before the round, as dicts and lists of arrays.

        Raises:
          LedgerError: the stored bytes are damaged.
        """
        return trees.from_skeleton(self.run.skeleton, [self.global_leaf(leaf.name) for leaf in self.run.leaves])

    def table(self) -> pa.Table:
        """One row a client, in cohort order; `docs/ledger-format.md` describes the columns."""
        return self._table.replace_schema_metadata(None)

    def global_leaf(self, name: str) -> AnyArray:
        """One leaf of the global model before the round, [*leaf].

        Raises:
          NotInLedgerError: there is no such leaf.
          LedgerError: the stored bytes are damaged.
        """
        self._column(name)
        array = self._read(f"global/{name}", None)
        self._verify(array, self._summary.global_checksums.get(name), f"leaf {name!r} of the global model")
        return array

    def leaf(self, name: str) -> Clients:
        """One leaf of every local model, [clients, *leaf] in cohort order; reads that leaf only.

        Raises:
          NotInLedgerError: there is no such leaf.
          LedgerError: the stored bytes are damaged.
        """
        column = self._column(name)
        stored = self._read(f"local/{name}", None)
        array = stored if np.array_equal(self._rows, np.arange(len(self))) else stored[self._rows]
        found, expected = measure.checksums(array), self._checksums[:, column]
        for client, same in zip(self._place, found == expected, strict=True):
            if not same:
                raise self._damaged(f"leaf {name!r} of client {client!r}")
        return array

    def local_leaf(self, name: str, client_id: str) -> AnyArray:
        """One leaf of one client's local model, [*leaf]; reads those bytes only.

        Raises:
          NotInLedgerError: there is no such leaf or client.
          LedgerError: the stored bytes are damaged.
        """
        column = self._column(name)
        place = self._find(client_id)
        row = int(self._rows[place])
        array = self._read(f"local/{name}", slice(row, row + 1)).reshape(self.run.leaves[column].shape)
        self._verify(array, int(self._checksums[place, column]), f"leaf {name!r} of client {client_id!r}")
        return array

    @cached_property
    def _checksums(self) -> AnyArray:
        rows = self._table.column("leaves").combine_chunks().flatten()
        return rows.field("checksum").to_numpy().reshape(len(self), len(self.run.leaves))

    @cached_property
    def _slots(self) -> Mapping[str, Slot]:
        path = folder.weights_file(self.path, self.number)
        slots = tensorfile.read_slots(path)
        found = {name: (slot.dtype, slot.shape) for name, slot in slots.items()}
        expected = {f"global/{leaf.name}": (leaf.dtype, leaf.shape) for leaf in self.run.leaves}
        expected |= {f"local/{leaf.name}": (leaf.dtype, (len(self), *leaf.shape)) for leaf in self.run.leaves}
        for name in sorted({*found, *expected}):
            if found.get(name) != expected.get(name):
                raise LedgerError(
                    f"Expected {expected.get(name)}, found {found.get(name)}, in tensor {name!r} of {path}. "
                    "The file was changed: restore it from a copy."
                )
        return slots

    def _read(self, name: str, rows: slice | None) -> AnyArray:
        try:
            return tensorfile.read_slot(folder.weights_file(self.path, self.number), self._slots[name], rows)
        except LedgerError as error:
            raise LedgerError(f"Round {self.number}: {error}") from error

    def _column(self, name: str) -> int:
        names = [leaf.name for leaf in self.run.leaves]
        if name not in names:
            hint = format.nearest(str(name), names)
            raise NotInLedgerError(f"Expected a leaf of the model, found {name!r}, in {self.path}. {hint}")
        return names.index(name)

    def _find(self, client_id: str) -> int:
        if client_id not in self._place:
            hint = format.nearest(str(client_id), self._place)
            raise NotInLedgerError(
                f"Expected a client of round {self.number}, found {client_id!r}, in {self.path}. {hint}"
            )
        return self._place[client_id]

    def _verify(self, array: AnyArray, checksum: int | None, where: str) -> None:
        if zlib.crc32(tensorfile.as_bytes(array)) != checksum:
            raise self._damaged(where)

    def _damaged(self, where: str) -> LedgerError:
        return LedgerError(
            f"Expected the bytes that were written, found others, in {where}, round {self.number}, in "
            f"{folder.weights_file(self.path, self.number)}. The file was changed: restore it from a copy."
        )

    def _check_table(self) -> None:
        numbers, parts = (self._table.column(name).to_numpy() for name in ("round", "part"))
        here = self._summary.round == self.number and bool(np.all(numbers == self.number))
        if not here or np.any(parts != 0) or not np.array_equal(np.sort(self._rows), np.arange(len(self))):
            raise LedgerError(
                f"Expected the clients of round {self.number}, each with a row of its own, found others, "
                f"in {self._clients_file}. The file was changed: restore it from a copy."
            )


@dataclass(frozen=True)
class StoredLocalModel:
    """What one client learned in one round. Its arrays are read when they are first asked for, and then kept.

    Attributes:
      client_id: the client.
      round: the round.
      num_examples: how many examples it trained on.
      metrics: what it reported, such as `loss`.
      update_norm: L2 norm of its weights minus the global ones, over all leaves.
      leaf_norms: leaf -> L2 norm of that leaf's update.
    """

    client_id: str
    round: int
    num_examples: int
    metrics: Mapping[str, float]
    update_norm: float
    leaf_norms: Mapping[str, float]
    _source: LedgerRound = field(repr=False, compare=False)

    @cached_property
    def leaves(self) -> dict[str, AnyArray]:
        """The weights by leaf name, in field order.

        Raises:
          LedgerError: the stored bytes are damaged.
        """
        return {name: self._source.local_leaf(name, self.client_id) for name in self.leaf_norms}

    @property
    def weights(self) -> trees.PyTree:
        """The weights after local training, as dicts and lists of arrays.

        Raises:
          LedgerError: the stored bytes are damaged.
        """
        return trees.from_skeleton(self._source.run.skeleton, list(self.leaves.values()))

    @property
    def global_weights(self) -> trees.PyTree:
        """The global model that the client started from.

        Raises:
          LedgerError: the stored bytes are damaged.
        """
        return self._source.global_weights

    @property
    def update(self) -> trees.PyTree:
        """The weights minus the global ones; 16-bit floats give float32, unsigned integers wider signed ones.

        Raises:
          LedgerError: the stored bytes are damaged.
        """
        return trees.map(measure.difference, self.weights, self.global_weights)
