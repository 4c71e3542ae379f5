"""One round of a ledger and the local models in it, read as they are asked for and verified as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa

from fedlens import trees  # not `from fedlens import`: see format.py
from fedlens.ledger import format, measure, table
from fedlens.ledger.format import NotInLedgerError, Run
from fedlens.ledger.measure import Clients
from fedlens.ledger.storage import Store
from fedlens.ledger.tensorfile import AnyArray
from fedlens.ledger.weights import RoundWeights


class LedgerRound(Mapping[str, "StoredLocalModel"]):
    """One committed round: a mapping from client id to local model, in cohort order.

    Attributes:
      run: what the ledger's `run.json` says.
      number: the round.
    """

    def __init__(self, store: Store, run: Run, number: int, clients: pa.Table) -> None:
        """Takes over the round's checked table; use `Ledger.round`."""
        self.run = run
        self.number = number
        self._store = store
        self._table = clients
        self._summary = table.read_summary(clients, store.where())
        ids: list[str] = clients.column("client").to_pylist()
        self._place = {client: place for place, client in enumerate(ids)}
        self._weights = RoundWeights(store, run, number, clients, self._summary.global_checksums)

    def __repr__(self) -> str:
        return f"LedgerRound(round {self.number}, {len(self)} clients, in {self._store.where()!r})"

    def __len__(self) -> int:
        return len(self._place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __contains__(self, client_id: object) -> bool:
        return client_id in self._place

    def __getitem__(self, client_id: str) -> StoredLocalModel:
        row = self._table.slice(self._find(client_id), 1).to_pylist()[0]
        return StoredLocalModel(
            client_id,
            self.number,
            row["num_examples"],
            {name: row[name] for name in table.metric_names(self._table) if row[name] is not None},
            row["update_norm"],
            {leaf["leaf"]: leaf["norm"] for leaf in row["leaves"]},
            row["cosine"],
            row["dropped"],
            self,
        )

    @property
    def ids(self) -> tuple[str, ...]:
        """The clients in cohort order."""
        return tuple(self._place)

    @property
    def kept_ids(self) -> tuple[str, ...]:
        """The clients of whom weights are stored, in cohort order: everybody, unless `run.keep` says otherwise."""
        kept = self._weights.stored.any(axis=1)
        return tuple(client for client, here in zip(self._place, kept, strict=True) if here)

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
        leaves = self._weights.global_leaves(range(len(self.run.leaves)))
        return trees.from_skeleton(self.run.skeleton, leaves)

    def table(self) -> pa.Table:
        """One row a client, in cohort order; `docs/ledger-format.md` describes the columns."""
        return self._table.replace_schema_metadata(None)

    def global_leaf(self, name: str) -> AnyArray:
        """One leaf of the global model before the round, [*leaf].

        Raises:
          NotInLedgerError: there is no such leaf.
          LedgerError: the stored bytes are damaged.
        """
        return self._weights.global_leaves([self._column(name)])[0]

    def leaf(self, name: str, clients: Sequence[str] | None = None) -> Clients:
        """One leaf of every local model, or of some clients', stacked: [clients, *leaf]; reads that leaf only.

        Args:
          name: the leaf.
          clients: whose, in the order in which they are wanted, such as `kept_ids`; None is everybody in cohort order.

        Raises:
          NotInLedgerError: there is no such leaf or client, or its weights were not kept.
          LedgerError: the stored bytes are damaged.
        """
        chosen = range(len(self)) if clients is None else [self._find(client) for client in clients]
        return self._weights.local_leaves([self._column(name)], np.array(chosen, np.int64))[0]

    def local_leaf(self, name: str, client_id: str) -> AnyArray:
        """One leaf of one client's local model, [*leaf]; reads those bytes only.

        Raises:
          NotInLedgerError: there is no such leaf or client, or its weights were not kept.
          LedgerError: the stored bytes are damaged.
        """
        return self.leaf(name, [client_id])[0, ...]  # with the dots a leaf without axes stays an array

    def local_leaves(self, client_id: str, names: Sequence[str] | None = None) -> dict[str, AnyArray]:
        """Some of one client's leaves by name, each [*leaf]; reads all of them at once.

        Args:
          client_id: whose.
          names: which; None is those that were kept, in field order.

        Raises:
          NotInLedgerError: there is no such client or leaf, or its weights were not kept.
          LedgerError: the stored bytes are damaged.
        """
        place = self._find(client_id)
        kept = np.flatnonzero(self._weights.stored[place]).tolist() or range(len(self.run.leaves))  # none: an error
        chosen = list(kept) if names is None else [self._column(name) for name in names]
        arrays = self._weights.local_leaves(chosen, np.array([place]))
        return {self.run.leaves[leaf].name: array[0, ...] for leaf, array in zip(chosen, arrays, strict=True)}

    def elements(self, name: str, span: slice, clients: Sequence[str] | None) -> AnyArray:
        """Some elements of a leaf in row-major order, for those who go over leaves that are larger than memory.

        They are not verified, as a checksum is of a whole leaf.

        Args:
          name: the leaf.
          span: which elements, from start to stop.
          clients: whose; None is the global model before the round.

        Returns:
          [elements] of the global model, [clients, elements] of clients.

        Raises:
          NotInLedgerError: there is no such leaf or client, or its weights were not kept.
          LedgerError: a file cannot be read.
        """
        chosen = None if clients is None else np.array([self._find(client) for client in clients], np.int64)
        return self._weights.elements(self._column(name), span, chosen)

    def _column(self, name: str) -> int:
        names = [leaf.name for leaf in self.run.leaves]
        if name not in names:
            hint = format.nearest(str(name), names)
            raise NotInLedgerError(f"Expected a leaf of the model, found {name!r}, in {self._store.where()}. {hint}")
        return names.index(name)

    def _find(self, client_id: str) -> int:
        if client_id not in self._place:
            hint = format.nearest(str(client_id), self._place)
            raise NotInLedgerError(
                f"Expected a client of round {self.number}, found {client_id!r}, in {self._store.where()}. {hint}"
            )
        return self._place[client_id]


@dataclass(frozen=True)
class StoredLocalModel:
    """One client's local model in one round. The weights are read, and verified, when they are first asked for.

    Attributes:
      client_id: whose it is.
      round: of which round.
      num_examples: how many examples it was trained on.
      metrics: the client's metrics, such as `loss`.
      update_norm: L2 norm of its weights minus the global ones, over all leaves.
      leaf_norms: leaf -> L2 norm of that leaf's update.
      cosine: of its update and the round's mean update; None where that is undefined or not recorded.
      dropped: whether it was left out of the aggregate, as its values were not finite; None where not recorded.
    """

    client_id: str
    round: int
    num_examples: int
    metrics: Mapping[str, float]
    update_norm: float
    leaf_norms: Mapping[str, float]
    cosine: float | None
    dropped: bool | None
    _source: LedgerRound = field(repr=False, compare=False)

    @cached_property
    def leaves(self) -> dict[str, AnyArray]:
        """The weights by leaf name, in field order; of a run that keeps some leaves, those.

        Raises:
          NotInLedgerError: the client's weights were not kept.
          LedgerError: the stored bytes are damaged.
        """
        return self._source.local_leaves(self.client_id)

    @property
    def weights(self) -> trees.PyTree:
        """The weights after local training, as dicts and lists of arrays.

        Raises:
          NotInLedgerError: the client's weights, or some leaves of them, were not kept.
          LedgerError: the stored bytes are damaged.
        """
        run = self._source.run
        for name in (leaf.name for leaf in run.leaves if leaf.name not in self.leaves):
            raise NotInLedgerError(
                f"Expected the weights of all leaves, found that they were not kept, in leaf {name!r} of client "
                f"{self.client_id!r}, round {self.round}. `leaves` has those that were."
            )
        return trees.from_skeleton(run.skeleton, list(self.leaves.values()))

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
          NotInLedgerError: the client's weights, or some leaves of them, were not kept.
          LedgerError: the stored bytes are damaged.
        """
        return trees.map(measure.difference, self.weights, self.global_weights)
