"""Writes a ledger: what is handed over goes to the disk on the writer's own thread while the next is computed.

A round is written in this order, each step durable before the next: weights, checkpoint, then the table of clients
under a temporary name, renamed into place. That rename commits the round. Killed at any moment, a ledger therefore
holds whole rounds and at most one torn one, which `LedgerWriter.open` clears away.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from fedlens import trees  # not `from fedlens import`: see format.py
from fedlens.errors import LedgerError
from fedlens.ledger import folder as folders
from fedlens.ledger import format
from fedlens.ledger.claim import claim
from fedlens.ledger.commit import RoundWriter, read_checkpoint
from fedlens.ledger.format import Run
from fedlens.ledger.handover import Handover
from fedlens.ledger.keep import Keep
from fedlens.ledger.records import ClientPart, RoundCheck, RoundRecord
from fedlens.ledger.tensorfile import AnyArray


class LedgerWriter:
    """The one writer of a ledger; `create` starts a ledger, `open` continues one.

    A round is handed over whole (`record`) or in pieces (`begin`, `add`, `commit`), from one thread. Used as a context
    manager the writer is closed at the end; after an exception too, with the rounds handed over before committed.

    Example:
      >>> weights = {"bias": np.zeros(2, np.float32)}
      >>> with LedgerWriter.create("runs/x", weights=weights, config={"lr": 0.1}, rounds=1) as writer:
      ...     part = ClientPart(("ann",), np.array([0]), [np.ones((1, 2), np.float32)], np.array([5]), {})
      ...     writer.record(RoundRecord(0, [weights["bias"]], [part], {"loss": 0.5}, {"key": np.zeros(2, np.uint32)}))
    """

    def __init__(self, path: Path, run: Run, lock: int) -> None:
        """Takes over `lock`, the locked descriptor of `run.json`. Use `create` or `open`."""
        self.path = path
        self.run = run
        self._lock = lock
        committed = folders.committed_rounds(path)
        self._committed = committed[-1] if committed else None
        self._next = 0 if self._committed is None else self._committed + 1
        self._work = Handover("fedlens-ledger")
        self._measuring = ThreadPoolExecutor(1, "fedlens-ledger-measure")
        self._round: RoundWriter | None = None
        self._check: RoundCheck | None = None
        self._begun = self._next
        self._failure: LedgerError | None = None
        self._reported = False
        self._closed = False

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        weights: trees.PyTree,
        config: Mapping[str, Any],
        rounds: int | None,
        versions: Mapping[str, str] | None = None,
        encodings: str | Mapping[str, str] | None = None,
        keep: Keep | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> Self:
        """Starts a ledger in a folder that does not exist or is empty.

        Args:
          path: the folder.
          weights: an example of the model's weights: a pytree of arrays.
          config: the run's configuration, as JSON has it.
          rounds: how many rounds are planned; None leaves it open.
          versions: library -> version, beside those of Python, fedlens, JAX, NumPy and pyarrow.
          encodings: how clients' leaves are stored, see `encodings.rules_of`; None stores them as they are.
          keep: whose weights are stored; None is everybody's.
          policy: what the stored models disclose, as JSON has it.

        Raises:
          LedgerError: there is a ledger already, the folder is not empty or cannot be written, or `weights`,
            `config`, `encodings` or `keep` cannot be.
        """
        folder = Path(path)
        run = format.describe(weights, config, rounds, versions or {}, encodings, keep, policy)
        try:
            lock = folders.start(folder, format.to_json(run))
        except LedgerError:
            raise
        except OSError as error:
            raise LedgerError(f"Expected to create a ledger, found: {error.strerror}, in {folder}.") from error
        return cls._with_lock(folder, run, lock)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Continues a ledger: removes what an interrupted round left behind. One of format version 1 becomes version 2.

        Raises:
          LedgerError: there is no ledger, it is damaged, or another writer has it.
        """
        folder = Path(path)
        run, lock = claim(folder)
        return cls._with_lock(folder, run, lock)

    @classmethod
    def _with_lock(cls, folder: Path, run: Run, lock: int) -> Self:
        try:
            return cls(folder, run, lock)
        except BaseException:
            os.close(lock)
            raise

    @property
    def last_round(self) -> int | None:
        """The last committed round, None before the first."""
        return self._committed

    def checkpoint(self) -> dict[str, AnyArray]:
        """What was handed over as `checkpoint` with the last committed round.

        Raises:
          LedgerError: no round is committed, or the checkpoint is missing or damaged.
        """
        if self._committed is None:
            raise LedgerError(f"Expected a committed round, found none, in {self.path}. Start from the initial state.")
        return read_checkpoint(self.path, self.run, self._committed)

    def record(self, record: RoundRecord) -> None:
        """Hands a whole round over to be written; waits while too many bytes are on their way already.

        Raises:
          LedgerError: the round does not fit the run (it is then not taken, and the writer goes on), or writing
            something before failed (nothing is written any more).
        """
        self.begin(record.round, record.global_weights)
        try:
            if record.parts:
                self.add(record.parts)
            self.commit(record.metrics, record.checkpoint, record.dropped)
        except BaseException:
            self.discard()
            raise

    def begin(self, number: int, global_weights: Sequence[AnyArray]) -> None:
        """Begins a round.

        Args:
          number: the round: the one after the last, or in a run without a plan any later one.
          global_weights: the global model before the round, leaf by leaf in the run's order.

        Raises:
          LedgerError: see `record`.
        """
        self._raise_failure()
        if self._closed:
            raise LedgerError(f"Expected an open writer, found a closed one, in {self.path}. Open the ledger again.")
        if self._round is not None:
            raise LedgerError(f"Expected round {self._begun} to end first, found round {number}, in {self.path}.")
        planned = self.run.planned_rounds
        if planned is None:
            if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < self._next:
                raise LedgerError(f"Expected round {self._next} or a later one, found {number!r}, in {self.path}.")
        elif number != self._next or number >= planned:
            raise LedgerError(
                f"Expected round {self._next} of the {planned} planned, found round {number}, in {self.path}."
            )
        check = RoundCheck(number, self.run)
        with self._named():
            check.global_weights(global_weights)
        self._check, self._begun = check, int(number)
        self._round = RoundWriter(self.path, self.run, self._begun, global_weights, self._measuring)

    def add(self, parts: Sequence[ClientPart]) -> None:
        """Hands over some clients of the round; they share one file. Waits as `record` does.

        The ledger reads the arrays until the round is committed: do not change them.

        Raises:
          LedgerError: see `record`.
        """
        round_, check = self._open_round()
        self._raise_failure()
        with self._named():
            check.clients(parts)
        size = sum(leaf.nbytes for part in parts for leaf in part.weights)
        number, delivery = self._begun, list(parts)
        self._work.submit(lambda: self._attempt(number, lambda: round_.add(delivery)), size)

    def commit(
        self, metrics: Mapping[str, float], checkpoint: Mapping[str, AnyArray], dropped: Collection[str] = ()
    ) -> None:
        """Ends the round; it is committed when what was handed over is written.

        Args:
          metrics: the server's metrics of the round.
          checkpoint: name -> array; what resuming needs, as it is after the round.
          dropped: the clients that were left out of the aggregate because their values were not finite.

        Raises:
          LedgerError: something of it does not fit; it is not ended then. What fails in writing, the next call says.
        """
        round_, check = self._open_round()
        with self._named():
            check.end(metrics, checkpoint, dropped)
        number, self._round, self._check = self._begun, None, None
        self._next = number + 1
        self._work.submit(
            lambda: self._attempt(number, lambda: self._commit(round_, number, metrics, checkpoint, dropped)), 0
        )

    def discard(self) -> None:
        """Forgets the round that was begun and did not end, if there is one."""
        if self._round is not None:
            round_, self._round, self._check = self._round, None, None
            self._work.submit(round_.discard, 0)

    def mean_update(self) -> list[AnyArray]:
        """The mean update of the round's clients so far, see `RoundWriter`; waits until they are written.

        Raises:
          LedgerError: no round was begun, or writing failed.
        """
        round_, _ = self._open_round()
        self._work.wait()
        self._raise_failure()
        return round_.mean_update()

    def close(self) -> None:
        """Waits until every round handed over is committed, forgets one that did not end, and gives the ledger free.

        Raises:
          LedgerError: writing failed, and no other method has said so yet.
        """
        if not self._closed:
            self.discard()
            self._closed = True
            self._work.close()
            self._measuring.shutdown()
            os.close(self._lock)
        if not self._reported:
            self._raise_failure()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except LedgerError as failure:
            if error is None:
                raise
            error.add_note(f"Besides: {failure}")

    def _open_round(self) -> tuple[RoundWriter, RoundCheck]:
        if self._round is None or self._check is None:
            raise LedgerError(f"Expected a round that was begun, found none, in {self.path}. Call begin first.")
        return self._round, self._check

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Adds the ledger to an error of a check."""
        try:
            yield
        except LedgerError as error:
            raise LedgerError(f"{error} Ledger: {self.path}.") from None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._reported = True
            raise self._failure

    def _attempt(self, number: int, work: Callable[[], object]) -> None:
        """Does something for a round, on the writer's thread; once something failed, all that follows is dropped."""
        if self._failure is not None:
            return
        try:
            work()
        except BaseException as error:
            self._failure = LedgerError(
                f"Expected to write round {number}, found: {_found(error)}, in {self.path}. "
                "The rounds before it are safe; make room or restore access, then resume."
            )
            self._failure.__cause__ = error
            with contextlib.suppress(OSError, LedgerError):
                folders.clear_torn(self.path)

    def _commit(
        self,
        round_: RoundWriter,
        number: int,
        metrics: Mapping[str, float],
        checkpoint: Mapping[str, AnyArray],
        dropped: Collection[str],
    ) -> None:
        round_.commit(metrics, checkpoint, dropped)
        self._committed = number


def _found(error: BaseException) -> str:
    if isinstance(error, LedgerError):
        return str(error)
    return error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
