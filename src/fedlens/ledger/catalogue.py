"""The tables of clients of a ledger's rounds: read side by side, checked, and kept while their files stay the same.

A committed round's table never changes, unless clients are removed from it; then its file is another one. Tables are
small beside the weights, and everything that looks over the rounds (one client's way, a query) needs all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from fedlens.errors import LedgerError
from fedlens.ledger import folder, table
from fedlens.ledger.format import Run
from fedlens.ledger.storage import Store
from fedlens.ledger.table import NOT_KEPT

_KEPT = 256 << 20  # bytes of tables that stay in memory
_AT_ONCE = 8  # tables that are read at the same time: elsewhere than on a disk, each waits for its round trip


class Catalogue:
    """The tables of one ledger, by round; may be used from several threads."""

    def __init__(self, store: Store, run: Run) -> None:
        """Reads nothing yet."""
        self._store, self._run = store, run
        self._lock = threading.Lock()
        self._kept: dict[int, tuple[Hashable, pa.Table]] = {}  # the one used last stands last
        self._size = 0

    def rounds(self) -> list[int]:
        """The committed rounds.

        Raises:
          LedgerError: the folder of rounds cannot be listed.
        """
        return sorted(self._stamps())

    def table(self, number: int) -> pa.Table | None:
        """One round's table, with what it says about the round in its metadata; None when it is not committed.

        Raises:
          LedgerError: the table is damaged.
        """
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 0:
            return None
        stamp = self._store.stamp(table_name(int(number)))
        return None if stamp is None else self._read(int(number), stamp)

    def tables(self) -> list[pa.Table]:
        """The tables of all committed rounds, in order.

        Raises:
          LedgerError: one is damaged.
        """
        stamps = sorted(self._stamps().items())
        if len(stamps) < 2:
            return [self._read(number, stamp) for number, stamp in stamps]
        with ThreadPoolExecutor(_AT_ONCE, "fedlens-catalogue") as threads:
            return list(threads.map(lambda each: self._read(*each), stamps))

    def whole(self) -> pa.Table:
        """The tables of all rounds as one; a metric that a round lacks is null.

        Raises:
          LedgerError: one is damaged, or a metric has types in two rounds that do not go together.
        """
        empty = table.build_table([], self._run.leaves, (), table.RoundSummary(0, {}, {}, {}))
        tables = self.tables() or [empty]
        try:
            return pa.concat_tables(tables, promote_options="permissive").replace_schema_metadata(None)
        except pa.ArrowException as error:
            raise LedgerError(
                f"Expected metrics of one type over all rounds, found others: {error}, in {self._store.where()}. "
                "Read the tables round by round."
            ) from error

    def _stamps(self) -> dict[int, Hashable]:
        found = self._store.stamps(folder.ROUNDS, ".parquet")
        numbers = {name: folder.number_of(name, ".parquet") for name in found}
        return {number: found[name] for name, number in numbers.items() if number is not None}

    def _read(self, number: int, stamp: Hashable) -> pa.Table:
        with self._lock:
            kept = self._kept.pop(number, None)
            if kept is not None and kept[0] == stamp:
                self._kept[number] = kept
                return kept[1]
            self._size -= 0 if kept is None else kept[1].nbytes
        name = table_name(number)
        where = self._store.where(name)
        found = table.parse_table(self._store.read(name), self._run.leaves, where)
        _check(found, number, where)
        with self._lock:
            if number not in self._kept:
                self._kept[number] = stamp, found
                self._size += found.nbytes
            while self._size > _KEPT and len(self._kept) > 1:
                self._size -= self._kept.pop(next(iter(self._kept)))[1].nbytes
        return found


def table_name(number: int) -> str:
    """The name of a round's table in the ledger."""
    return folder.clients_file(Path(), number).as_posix()


def _check(found: pa.Table, number: int, where: str) -> None:
    """Checks what only the reader relies on: whose round it is, where the weights lie, that metrics are numbers."""
    summary = table.read_summary(found, where)
    numbers, parts, rows = (found.column(name).to_numpy() for name in ("round", "part", "row"))
    here = summary.round == number and bool(np.all(numbers == number))
    kept = parts != NOT_KEPT
    places = np.stack([parts[kept], rows[kept]])
    places = places[:, np.lexsort(places)]
    is_shared = bool(np.any(np.all(places[:, 1:] == places[:, :-1], axis=0)))
    in_order = bool(np.all(parts >= NOT_KEPT)) and np.array_equal(kept, rows >= 0)
    if not here or not in_order or is_shared:
        raise LedgerError(
            f"Expected the clients of round {number}, each with a row of its own, found others, "
            f"in {where}. The file was changed: restore it from a copy."
        )
    for name in table.metric_names(found):
        if not _is_number(found.column(name).type):
            raise LedgerError(
                f"Expected numbers as metrics, found {found.column(name).type}, in column {name!r} of {where}. "
                "Remove the column, or restore the file from a copy."
            )


def _is_number(dtype: pa.DataType) -> bool:
    return any(is_it(dtype) for is_it in (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating))
