"""Writes a ledger: rounds go to the disk on the writer's own thread while the next ones are computed.

A round is written in this order, each step durable before the next: weights, checkpoint, then the table of clients
under a temporary name, renamed into place. That rename commits the round. Killed at any moment, a ledger therefore
holds whole rounds and at most one torn one, which `LedgerWriter.open` clears away.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedlens import trees  # not `from fedlens import`: see format.py
from fedlens.errors import LedgerError
from fedlens.ledger import commit, durable, format, records
from fedlens.ledger import folder as folders
from fedlens.ledger.format import Run
from fedlens.ledger.records import RoundRecord
from fedlens.ledger.tensorfile import AnyArray

_IN_FLIGHT = 2  # rounds handed over and not yet committed; their arrays stay in memory


class LedgerWriter:
    """The one writer of a ledger; `create` starts a ledger, `open` continues one.

    Used as a context manager it is closed at the end; after an exception too, with the rounds handed over before
    committed.

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
        self._room = threading.BoundedSemaphore(_IN_FLIGHT)
        self._thread = ThreadPoolExecutor(1, "fedlens-ledger")
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
        rounds: int,
        versions: Mapping[str, str] | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> Self:
        """Starts a ledger in a folder that does not exist or is empty.

        Args:
          path: the folder.
          weights: an example of the model's weights: a pytree of arrays.
          config: the run's configuration, as JSON has it.
          rounds: how many rounds are planned.
          versions: library -> version, beside those of Python, fedlens, JAX, NumPy and pyarrow.
          policy: what the stored models disclose, as JSON has it.

        Raises:
          LedgerError: there is a ledger already, the folder is not empty or cannot be written, or `weights` or
            `config` cannot be stored.
        """
        folder = Path(path)
        run = format.describe(weights, config, rounds, versions or {}, policy)
        try:
            lock = folders.start(folder, format.to_json(run))
        except LedgerError:
            raise
        except OSError as error:
            raise LedgerError(f"Expected to create a ledger, found: {error.strerror}, in {folder}.") from error
        return cls._with_lock(folder, run, lock)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Continues a ledger: removes what an interrupted round left behind.

        Raises:
          LedgerError: there is no ledger, it is damaged, or another writer has it.
        """
        folder = Path(path)
        run = format.read_run(folder)
        try:
            lock = os.open(folder / folders.RUN, os.O_RDWR | os.O_CLOEXEC)
            try:
                if not durable.lock(lock):
                    raise LedgerError(
                        f"Expected a ledger that nobody writes, found a running writer, in {folder}. Wait for it."
                    )
                folders.clear_torn(folder)
            except BaseException:
                os.close(lock)
                raise
        except LedgerError:
            raise
        except OSError as error:
            raise LedgerError(
                f"Expected to open a ledger for writing, found: {error.strerror}, in {folder}."
            ) from error
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
        return commit.read_checkpoint(self.path, self.run, self._committed)

    def record(self, record: RoundRecord) -> None:
        """Hands a round over to be written; waits while two earlier rounds are not committed yet.

        Raises:
          LedgerError: the round does not fit the run (it is then not taken, and the writer goes on), or writing an
            earlier round failed (nothing is written any more).
        """
        if self._closed:
            raise LedgerError(f"Expected an open writer, found a closed one, in {self.path}. Open the ledger again.")
        self._raise_failure()
        if record.round != self._next or record.round >= self.run.planned_rounds:
            raise LedgerError(
                f"Expected round {self._next} of the {self.run.planned_rounds} planned, found round {record.round}, "
                f"in {self.path}."
            )
        try:
            records.check(record, self.run)
        except LedgerError as error:
            raise LedgerError(f"{error} Ledger: {self.path}.") from None
        self._room.acquire()
        self._next += 1
        self._thread.submit(self._commit, record)

    def close(self) -> None:
        """Waits until every round handed over is committed, and gives the ledger free.

        Raises:
          LedgerError: writing a round failed, and `record` has not said so yet.
        """
        if not self._closed:
            self._closed = True
            self._thread.shutdown()
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

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._reported = True
            raise self._failure

    def _commit(self, record: RoundRecord) -> None:
        """Writes one round, on the writer's thread; once a round failed, those after it are dropped."""
        try:
            if self._failure is None:
                commit.write_round(self.path, self.run, record)
                self._committed = record.round
        except BaseException as error:
            found = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
            self._failure = LedgerError(
                f"Expected to write round {record.round}, found: {found}, in {self.path}. "
                "The rounds before it are safe; make room or restore access, then resume."
            )
            self._failure.__cause__ = error
            with contextlib.suppress(OSError, LedgerError):
                folders.clear_torn(self.path)
        finally:
            self._room.release()
