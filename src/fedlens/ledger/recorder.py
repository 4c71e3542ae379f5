"""Records the local models of any training loop, client by client, from any thread.

The loop need not know fedlens: a client's weights are a pytree of arrays, NumPy's or whatever turns into them, such as
the `state_dict` of a PyTorch module. They are copied when they are recorded, into a delivery that goes to the writer
when it is full; a loop that trains on in the same arrays changes nothing that was recorded.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np

from fedlens import trees  # not `from fedlens import`: see format.py
from fedlens.errors import LedgerError, StructureError
from fedlens.ledger.format import ROOT_LEAF, nearest
from fedlens.ledger.keep import Keep
from fedlens.ledger.records import ClientPart, RoundCheck
from fedlens.ledger.tensorfile import AnyArray
from fedlens.ledger.writer import LedgerWriter

_DELIVERY = 64 << 20  # bytes of clients' weights that go to the writer together

_GLOBAL = "global_weights/"  # where in a checkpoint the global model after the round stands


class Recorder:
    """Writes a ledger client by client; made by `Ledger.create`, or by `Ledger.append` for one that exists.

    A round is committed when it is finished: by `finish_round`, or as the next one starts, or when the recorder closes.
    It is for as many threads as there are; all of a round's clients must be recorded before it is finished. After an
    exception inside `with`, the round that was not finished is forgotten.

    Example:
      >>> with Ledger.create("runs/mine", weights=model) as ledger:
      ...     for number in range(rounds):
      ...         for client in clients:
      ...             ledger.record(number, client.name, train(model, client), num_examples=len(client), loss=0.3)
      ...         model = average(...)
      ...         ledger.finish_round(number, global_weights=model)
    """

    def __init__(self, writer: LedgerWriter, global_weights: list[AnyArray]) -> None:
        """Takes over a writer, and the global model before the next round; use `Ledger.create` or `Ledger.append`."""
        self._writer = writer
        self._leaves = writer.run.leaves
        self._global = global_weights
        self._lock = threading.RLock()
        self._round: int | None = None
        self._check = RoundCheck(0, writer.run)
        self._clients = 0
        self._dropped: set[str] = set()
        self._delivery: _Delivery | None = None
        size = sum(leaf.nbytes for leaf in global_weights)
        self._rows = max(1, min(1024, _DELIVERY // max(1, size)))

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        weights: trees.PyTree,
        config: Mapping[str, Any] | None = None,
        rounds: int | None = None,
        encodings: str | Mapping[str, str] | None = None,
        keep: Keep | None = None,
    ) -> Self:
        """Starts a ledger; see `Ledger.create`."""
        example = trees.map(_as_array, weights)
        writer = LedgerWriter.create(
            path, weights=example, config=config or {}, rounds=rounds, encodings=encodings, keep=keep
        )
        return cls(writer, [leaf.copy() for leaf in trees.leaves(example)])

    @classmethod
    def append(cls, path: str | os.PathLike[str]) -> Self:
        """Continues a ledger; see `Ledger.append`."""
        writer = LedgerWriter.open(path)
        try:
            checkpoint = writer.checkpoint()
            found = [checkpoint.get(_GLOBAL + leaf.name) for leaf in writer.run.leaves]
            known = [leaf for leaf in found if leaf is not None]
            if len(known) < len(found):
                raise LedgerError(
                    f"Expected a ledger that record wrote, found one without the global model after its last round, "
                    f"in {path}. If fed.run wrote it, fed.resume continues it."
                )
            return cls(writer, known)
        except BaseException:
            writer.close()
            raise

    @property
    def last_round(self) -> int | None:
        """The last committed round, None before the first."""
        return self._writer.last_round

    def record(
        self,
        round: int,  # noqa: A002
        client_id: str,
        weights: trees.PyTree,
        *,
        num_examples: int = 1,
        dropped: bool = False,
        **metrics: float,
    ) -> None:
        """Records what one client learned in one round. A later round than before finishes the one before.

        Args:
          round: the round: any that is not finished yet.
          client_id: whose weights they are; once a round.
          weights: the client's weights after its training, in the structure of the ledger's.
          num_examples: how many examples it trained on; weights the client in the mean update.
          dropped: whether the client was left out of the aggregate.
          **metrics: what it measured, such as `loss`; numbers, the same names for all clients of a round.

        Raises:
          LedgerError: something does not fit the ledger, and is not taken; or writing failed.
        """
        where = f"client {client_id!r} of round {round}"
        arrays = self._arrays(weights, where)
        try:
            numbers = {name: float(value) for name, value in metrics.items()}
        except (TypeError, ValueError) as error:
            raise LedgerError(f"Expected numbers as metrics, found {metrics}, in {where}.") from error
        with self._lock:
            self._start(round)
            alone = ClientPart(
                (client_id,),
                np.array([self._clients]),
                [leaf[None] for leaf in arrays],
                np.array([num_examples]),
                {name: np.array([value]) for name, value in numbers.items()},
            )
            try:
                self._check.clients([alone])
            except LedgerError as error:
                raise LedgerError(f"{error} In {where}.") from None
            self._clients += 1
            if dropped:
                self._dropped.add(client_id)
            if self._delivery is None:
                self._delivery = _Delivery(self._rows, arrays)
            self._delivery.add(alone)
            if len(self._delivery.clients) == self._rows:
                self._deliver()

    def finish_round(
        self,
        round: int,  # noqa: A002
        *,
        global_weights: trees.PyTree | None = None,
        metrics: Mapping[str, float] | None = None,
        checkpoint: Mapping[str, AnyArray] | None = None,
    ) -> None:
        """Finishes a round; it is committed as soon as it is written.

        Args:
          round: the round that was recorded last; or, if nobody took part in it, a later one.
          global_weights: the global model after the round, which the clients of the next one start from. None takes
            the mean of the clients' weights, weighted by their examples (federated averaging).
          metrics: the server's metrics.
          checkpoint: name -> array; what else resuming needs.

        Raises:
          LedgerError: something does not fit the ledger; or writing failed.
        """
        after = None
        if global_weights is not None:
            # Copies: the loop may go on in the same arrays before these are written.
            after = [leaf.copy() for leaf in self._arrays(global_weights, f"the global model after round {round}")]
        more = {name: np.array(_as_array(array)) for name, array in (checkpoint or {}).items()}
        with self._lock:
            self._start(round)
            self._finish(after, dict(metrics or {}), more)

    def checkpoint(self) -> dict[str, AnyArray]:
        """What was given to `finish_round` as `checkpoint` with the last committed round.

        Raises:
          LedgerError: no round is committed, or the checkpoint is missing or damaged.
        """
        found = self._writer.checkpoint()
        return {name: array for name, array in found.items() if not name.startswith(_GLOBAL)}

    def global_weights(self) -> trees.PyTree:
        """The global model that the clients of the next round start from, as dicts and lists of arrays."""
        with self._lock:
            return trees.from_skeleton(self._writer.run.skeleton, [leaf.copy() for leaf in self._global])

    def close(self) -> None:
        """Finishes the round that was recorded last, waits until all are committed, and gives the ledger free.

        Raises:
          LedgerError: writing failed.
        """
        with self._lock:
            try:
                if self._round is not None:
                    self._finish(None, {}, {})
            finally:
                self._round = self._delivery = None
                self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with self._lock:
            self._round = self._delivery = None
            self._writer.__exit__(kind, error, traceback)

    def _start(self, number: int) -> None:
        if number == self._round:
            return
        if self._round is not None and number > self._round:
            self._finish(None, {}, {})
        if self._round is not None:
            raise LedgerError(f"Expected round {self._round} or a later one, found round {number}.")
        self._writer.begin(number, self._global)
        self._round, self._check = number, RoundCheck(number, self._writer.run)
        self._clients, self._dropped = 0, set()

    def _deliver(self) -> None:
        if self._delivery is not None:
            delivery, self._delivery = self._delivery, None
            self._writer.add([delivery.part()])

    def _finish(
        self, after: list[AnyArray] | None, metrics: Mapping[str, float], checkpoint: Mapping[str, AnyArray]
    ) -> None:
        self._deliver()
        if after is None:
            after = self._averaged()
        kept = {f"{_GLOBAL}{leaf.name}": array for leaf, array in zip(self._leaves, after, strict=True)}
        self._writer.commit(metrics, {**kept, **checkpoint}, self._dropped)
        self._global, self._round = after, None

    def _averaged(self) -> list[AnyArray]:
        """The mean of the recorded weights: the global model plus the mean update."""
        means = self._writer.mean_update()
        result = []
        for before, mean in zip(self._global, means, strict=True):
            wide = np.complex128 if before.dtype.kind == "c" else np.float64
            moved = before.astype(wide) + mean.view(wide).reshape(before.shape)
            result.append((np.rint(moved) if before.dtype.kind in "iub" else moved).astype(before.dtype))
        return result

    def _arrays(self, weights: trees.PyTree, where: str) -> list[AnyArray]:
        """The leaves of `weights` in the ledger's order.

        Raises:
          LedgerError: they are not the ledger's.
        """
        try:
            found = {name or ROOT_LEAF: _as_array(leaf) for name, leaf in trees.items(weights)}
        except (LedgerError, StructureError) as error:
            raise LedgerError(f"{error} In {where}.") from None
        for name in found:
            if name not in {leaf.name for leaf in self._leaves}:
                hint = nearest(name, [leaf.name for leaf in self._leaves])
                raise LedgerError(f"Expected a leaf of the ledger's model, found {name!r}, in {where}. {hint}")
        for leaf in self._leaves:
            array = found.get(leaf.name)
            if array is None or (array.shape, array.dtype.name) != (leaf.shape, leaf.dtype):
                seen = "none" if array is None else f"{array.dtype.name}{list(array.shape)}"
                raise LedgerError(
                    f"Expected {leaf.dtype}{list(leaf.shape)}, found {seen}, in leaf {leaf.name!r} of {where}."
                )
        return [found[leaf.name] for leaf in self._leaves]


class _Delivery:
    """Clients that go to the writer together, their weights copied into arrays of its own."""

    def __init__(self, rows: int, example: list[AnyArray]) -> None:
        self.clients: list[ClientPart] = []  # of one client each, without weights
        self._weights = [np.empty((rows, *leaf.shape), leaf.dtype) for leaf in example]

    def add(self, client: ClientPart) -> None:
        for stacked, leaf in zip(self._weights, client.weights, strict=True):
            stacked[len(self.clients)] = leaf[0]
        self.clients.append(replace(client, weights=[]))

    def part(self) -> ClientPart:
        """All of them, in the order in which they came."""
        return ClientPart(
            tuple(client_id for client in self.clients for client_id in client.ids),
            np.concatenate([client.positions for client in self.clients]),
            [stacked[: len(self.clients)] for stacked in self._weights],
            np.concatenate([client.num_examples for client in self.clients]),
            {
                name: np.concatenate([client.metrics[name] for client in self.clients])
                for name in self.clients[0].metrics
            },
        )


def _as_array(leaf: Any) -> AnyArray:
    """A leaf as a NumPy array, a view where it can be: of a tensor on another device its copy on the host."""
    try:
        host = leaf.detach().cpu() if hasattr(leaf, "detach") else leaf  # PyTorch's, without importing it
        return np.asarray(host)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LedgerError(
            f"Expected arrays as weights, found {type(leaf).__name__} ({error}). Convert it to a NumPy array first."
        ) from None
