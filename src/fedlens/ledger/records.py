"""What a run hands to its ledger after each round, and the check that it fits the run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped

from fedlens.errors import LedgerError
from fedlens.ledger.format import Leaf, Run, check_text
from fedlens.ledger.measure import Clients
from fedlens.ledger.tensorfile import AnyArray, dtype_of, name_of

PerClient = Shaped[np.ndarray, " clients"]  # a number for each client

# Columns of a round's table that users' metrics cannot take. SQL ignores case, so the comparison does too.
RESERVED = (
    "round",
    "client",
    "position",
    "part",
    "row",
    "num_examples",
    "dropped",
    "update_norm",
    "cosine",
    "leaves",
)


@dataclass(frozen=True)
class ClientPart:
    """Some clients of one round, stacked: what one device or one chunk computed.

    Attributes:
      ids: the clients' ids: any non-empty text. They are data only and never become file names.
      positions: each client's place in the cohort.
      weights: the local models, leaf by leaf in the run's order, each [clients, *leaf].
      num_examples: how many examples each client trained on.
      metrics: name -> one number a client, such as `loss` and `accuracy`.
    """

    ids: tuple[str, ...]
    positions: PerClient
    weights: list[Clients]
    num_examples: PerClient
    metrics: Mapping[str, PerClient]


@dataclass(frozen=True)
class RoundRecord:
    """One round. The ledger reads the arrays until the round is committed: do not change them after handing them over.

    Attributes:
      round: the round's number, from 0.
      global_weights: the global model before the round, leaf by leaf in the run's order.
      parts: the clients; their order is the order in which they are stored.
      metrics: the server's metrics of the round.
      checkpoint: name -> array; what resuming needs, as it is after the round.
      dropped: the clients that were left out of the aggregate because their values were not finite.
    """

    round: int
    global_weights: list[AnyArray]
    parts: Sequence[ClientPart]
    metrics: Mapping[str, float]
    checkpoint: Mapping[str, AnyArray]
    dropped: Collection[str] = ()


class RoundCheck:
    """The check of one round, whose clients may come in several deliveries.

    Each method raises `LedgerError` for what does not fit, naming part, client, leaf or metric, and then takes nothing.
    """

    def __init__(self, number: int, run: Run) -> None:
        self._run = run
        self._where = f"round {number}"
        self._ids: set[str] = set()
        self._positions: set[int] = set()
        self._parts = 0
        self._first: ClientPart | None = None

    def global_weights(self, weights: Sequence[AnyArray]) -> None:
        """Checks the global model before the round."""
        _check_leaves(weights, self._run.leaves, (), f"the global model of {self._where}")

    def clients(self, parts: Sequence[ClientPart]) -> None:
        """Checks some clients against the run and those before them."""
        for number, part in enumerate(parts, self._parts):
            _check_part(part, self._run.leaves, f"part {number} of {self._where}")
        ids = _new_ids(parts, self._ids, self._where)
        positions = _new_positions(parts, self._positions, self._where)
        first = self._first or next(iter(parts), None)
        if first is not None:
            _check_metric_names(first, parts, self._parts, self._where)
        self._first = first
        self._parts += len(parts)
        self._ids |= ids
        self._positions |= positions

    def end(self, metrics: Mapping[str, float], checkpoint: Mapping[str, AnyArray], dropped: Collection[str]) -> None:
        """Checks what is known when all clients are there."""
        for name, array in checkpoint.items():
            if not isinstance(name, str) or name == "__metadata__":
                raise LedgerError(
                    f"Expected a name that safetensors can hold, found {name!r}, in the checkpoint of {self._where}."
                )
            check_text(name, f"the checkpoint of {self._where}")
            try:
                dtype_of(name_of(np.asarray(array).dtype))
            except LedgerError as error:
                raise LedgerError(f"{error} In {name!r} of the checkpoint of {self._where}.") from None
        for name, value in metrics.items():
            check_text(name, f"the metrics of {self._where}")
            if np.ndim(value) != 0 or np.asarray(value).dtype.kind not in "biuf":
                raise LedgerError(f"Expected a number, found {value!r}, in metric {name!r} of {self._where}.")
        for client in dropped:
            if client not in self._ids:
                raise LedgerError(f"Expected a client of {self._where}, found {client!r}, among those left out.")


def _check_leaves(arrays: Sequence[AnyArray], leaves: Sequence[Leaf], axes: tuple[int, ...], where: str) -> None:
    if len(arrays) != len(leaves):
        raise LedgerError(f"Expected {len(leaves)} leaves, found {len(arrays)}, in {where}.")
    for array, leaf in zip(arrays, leaves, strict=True):
        expected = (*axes, *leaf.shape)
        dtype = getattr(array, "dtype", None)
        found = getattr(array, "shape", None), type(array).__name__ if dtype is None else name_of(dtype)
        if found != (expected, leaf.dtype):
            raise LedgerError(
                f"Expected {leaf.dtype}{list(expected)}, found {found[1]}{list(found[0] or ())}, "
                f"in leaf {leaf.name!r} of {where}."
            )


def _check_part(part: ClientPart, leaves: Sequence[Leaf], where: str) -> None:
    clients = len(part.ids)
    _check_leaves(part.weights, leaves, (clients,), where)
    columns = {"positions": part.positions, "num_examples": part.num_examples, **part.metrics}
    for name, column in columns.items():
        if np.shape(column) != (clients,):
            raise LedgerError(f"Expected {clients} numbers, found shape {np.shape(column)}, in {name!r} of {where}.")
    if np.asarray(part.positions).dtype.kind not in "iu" or (clients and np.min(part.positions) < 0):
        raise LedgerError(f"Expected positions from 0, found {part.positions!r}, in {where}.")
    counts = np.asarray(part.num_examples).astype(np.float64)
    wrong = np.flatnonzero(~((counts >= 0) & (counts == np.floor(counts)) & (counts < 2**63)))
    if len(wrong):
        count, client = counts[wrong[0]], part.ids[wrong[0]]
        raise LedgerError(f"Expected a number of examples, found {count}, in client {client!r} of {where}.")
    for name, column in part.metrics.items():
        if metric_dtype(column) is None:
            raise LedgerError(f"Expected numbers, found {np.asarray(column).dtype}, in metric {name!r} of {where}.")


def metric_dtype(column: PerClient) -> np.dtype[np.generic] | None:
    """The dtype of a metric's column in the table: bool, int64, uint64 or float64; None for what is no number."""
    dtype = np.asarray(column).dtype
    if name_of(dtype) in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        return np.dtype(np.float64)
    return {"b": np.dtype(bool), "i": np.dtype(np.int64), "u": np.dtype(np.uint64), "f": np.dtype(np.float64)}.get(
        dtype.kind
    )


def _new_ids(parts: Sequence[ClientPart], known: Collection[str], where: str) -> set[str]:
    found: set[str] = set()
    for client in (client for part in parts for client in part.ids):
        if not isinstance(client, str) or not client:
            raise LedgerError(f"Expected non-empty text as client id, found {client!r}, in {where}.")
        check_text(client, where)
        if client in found or client in known:
            raise LedgerError(f"Expected each client once, found {client!r} twice, in {where}.")
        found.add(client)
    return found


def _new_positions(parts: Sequence[ClientPart], known: Collection[int], where: str) -> set[int]:
    found: set[int] = set()
    for position in (position for part in parts for position in np.asarray(part.positions).tolist()):
        if position in found or position in known:
            raise LedgerError(f"Expected one client at each position, found several at {position}, in {where}.")
        found.add(position)
    return found


def _check_metric_names(first: ClientPart, parts: Sequence[ClientPart], start: int, where: str) -> None:
    """Checks the metrics of `parts`, whose number in the round is `start` and on, against the round's first part."""
    folded: dict[str, str] = {"loss": "loss"}
    for name in first.metrics:
        check_text(name, where)
        if name.casefold() in RESERVED or not name:
            raise LedgerError(
                f"Expected a metric name other than a ledger's own columns, found {name!r}, in {where}. Rename it."
            )
        if folded.setdefault(name.casefold(), name) != name:
            raise LedgerError(f"Expected metrics that differ in more than case, found {name!r}, in {where}. Rename it.")
    for number, part in enumerate(parts, start):
        if set(part.metrics) != set(first.metrics):
            raise LedgerError(
                f"Expected metrics {sorted(first.metrics)}, as in part 0, found {sorted(part.metrics)}, "
                f"in part {number} of {where}."
            )
        for name, column in first.metrics.items():
            if metric_dtype(part.metrics[name]) != metric_dtype(column):
                raise LedgerError(f"Expected one dtype in all parts, found several, in metric {name!r} of {where}.")
