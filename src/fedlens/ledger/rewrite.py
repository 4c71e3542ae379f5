"""Takes clients out of a committed round, so that at any moment the round is whole: with them, or without.

The rows of those who stay go to a new part of the round, which nobody reads yet. Then the table is replaced, in one
step, by one without the clients that points there. What the table does not point to any more is removed last; killed
before, a round holds rows of nobody, which `clear_unused` removes later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from fedlens.errors import LedgerError
from fedlens.ledger import durable, folder, table, tensorfile
from fedlens.ledger.table import NOT_KEPT
from fedlens.ledger.tensorfile import Slot, dtype_of

_LOCAL = "local/"
_BLOCK = 16 << 20  # bytes that are copied at once

Rows = Int[np.ndarray, " clients"]  # rows of a part's tensors, ascending


def files_of_rounds(ledger: Path) -> dict[int, list[Path]]:
    """The weights files of each round, temporary ones too.

    Raises:
      OSError: the folder cannot be listed.
    """
    found: dict[int, list[Path]] = {}
    for path in sorted((ledger / folder.ROUNDS).iterdir()):
        part = folder.part_of(path.name.removesuffix(durable.TEMPORARY))
        if part is not None:
            found.setdefault(part[0], []).append(path)
    return found


def take_out(
    ledger: Path, number: int, files: Iterable[Path], clients: pa.Table, is_gone: Callable[[str], bool]
) -> None:
    """Takes clients out of a round, or finishes what was begun of that.

    Args:
      ledger: its folder.
      number: the round.
      files: its weights files, see `files_of_rounds`.
      clients: its table, checked.
      is_gone: whether the client of an id is to be taken out.

    Raises:
      LedgerError: a file of weights is damaged; the round is as it was then.
      OSError: what the operating system reports; what was begun can be finished later.
    """
    clear_unused(ledger, number, files, clients)
    gone = np.array([is_gone(client) for client in clients.column("client").to_pylist()], bool)
    if gone.any():
        path = folder.clients_file(ledger, number)
        left = _moved(ledger, number, clients, gone)
        durable.replace_file(path, [table.to_parquet(left)])
        clear_unused(ledger, number, files, left)


def clear_unused(ledger: Path, number: int, files: Iterable[Path], clients: pa.Table) -> None:
    """Removes weights that a round's table does not point to: parts, and all local models of part 0.

    Raises:
      LedgerError: part 0 is damaged.
      OSError: what the operating system reports.
    """
    used = set(clients.column("part").to_pylist())
    changed = False
    for path in dict.fromkeys(files):
        part = folder.part_of(path.name)
        if part is None or (part[1] and part[1] not in used):
            path.unlink(missing_ok=True)
            changed = True
    first = folder.weights_file(ledger, number)
    slots = tensorfile.read_slots(first)
    if 0 not in used and has_rows(slots):
        durable.replace_file(first, _copy(first, slots, np.zeros(0, np.int64)))
    elif changed:
        durable.sync_folder(first.parent)


def check_rows(path: Path, rows: Rows) -> Mapping[str, Slot]:
    """What a part holds, checked to have these rows in each tensor of local models.

    Raises:
      LedgerError: it has not, or is damaged.
    """
    slots = tensorfile.read_slots(path)
    needed = int(rows.max(initial=-1)) + 1
    for name, slot in slots.items():
        if name.startswith(_LOCAL) and not (slot.shape and slot.shape[0] >= needed):
            raise LedgerError(
                f"Expected at least {needed} clients, found shape {list(slot.shape)}, in tensor {name!r} of {path}. "
                "The file or the table was changed: restore both from a copy."
            )
    return slots


def has_rows(slots: Mapping[str, Slot]) -> bool:
    """Whether a part holds any local models."""
    return any(name.startswith(_LOCAL) and slot.shape and slot.shape[0] for name, slot in slots.items())


def _moved(ledger: Path, number: int, clients: pa.Table, gone: Any) -> pa.Table:
    """The table without some clients, after those who shared a part with them got one of their own."""
    parts, rows = (clients.column(name).to_numpy().copy() for name in ("part", "row"))
    taken = set(parts.tolist())
    for part in np.unique(parts[gone & (parts != NOT_KEPT)]).tolist():
        source = folder.weights_file(ledger, number, part)
        slots = check_rows(source, rows[parts == part])
        stay = np.flatnonzero((parts == part) & ~gone)
        stay = stay[np.argsort(rows[stay])]
        if len(stay):
            new = next(free for free in range(1, len(taken) + 2) if free not in taken)
            taken.add(new)
            durable.write_file(folder.weights_file(ledger, number, new), _copy(source, slots, rows[stay], local=True))
            parts[stay], rows[stay] = new, np.arange(len(stay))
    durable.sync_folder(ledger / folder.ROUNDS)
    # As it stands in the file, which may be of version 1: what is not touched is not to change.
    content = pa.BufferReader(folder.clients_file(ledger, number).read_bytes())
    found = pq.ParquetFile(content, page_checksum_verification=True).read(use_threads=False)
    for name, column in (("part", parts), ("row", rows)):
        place = found.column_names.index(name)
        found = found.set_column(place, found.schema.field(place), pa.array(column, pa.int64()))
    return found.filter(pa.array(~gone)).combine_chunks()


def _copy(source: Path, slots: Mapping[str, Slot], rows: Rows, *, local: bool = False) -> Iterator[Any]:
    """The pieces of a file with some rows of each tensor of local models, and unless `local` with the others whole."""
    shapes = {
        name: (slot.dtype, (len(rows), *slot.shape[1:]) if name.startswith(_LOCAL) else slot.shape)
        for name, slot in slots.items()
        if name.startswith(_LOCAL) or not local
    }
    start, order = tensorfile.layout(shapes)
    yield start
    for name in order:
        slot = slots[name]
        if not name.startswith(_LOCAL):
            yield tensorfile.as_bytes(tensorfile.read_slot(source, slot))
            continue
        step = max(1, _BLOCK // max(1, math.prod(slot.shape[1:]) * dtype_of(slot.dtype).itemsize))
        for together in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []:
            for first in range(int(together[0]), int(together[-1]) + 1, step):
                block = slice(first, min(first + step, int(together[-1]) + 1))
                yield tensorfile.as_bytes(tensorfile.read_slot(source, slot, block))
