"""Checks a whole ledger: the structure of every file, and every checksum of every client's leaf.

Checksums are of the bytes as they are stored, so nothing is decoded. Files are read from start to end in blocks, and an
error is noted, not raised: one flipped byte should not hide the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fedlens.errors import LedgerError
from fedlens.ledger import checksums, encodings, folder, removals, rewrite, table, tensorfile
from fedlens.ledger.catalogue import Catalogue, table_name
from fedlens.ledger.format import Leaf, Run
from fedlens.ledger.removals import CLIENTS, ROUNDS, Removal
from fedlens.ledger.storage import Store
from fedlens.ledger.tensorfile import AnyArray, Slot, dtype_of, memory_of
from fedlens.ledger.weights import Places

Progress = Callable[[int, int], object]  # is told how many bytes of weights are read, and of how many

_BLOCK = 16 << 20  # bytes that are read at once
_OTHER_BYTES = "other bytes than were written"


@dataclass(frozen=True)
class Damage:
    """Something in a ledger that is not as it was written.

    Attributes:
      round: the round; None for what belongs to none.
      client: whose; None for the global model, and for what is of the whole round.
      leaf: which leaf; None for all of them.
      file: the file, by its name in the ledger.
      found: what was found.
    """

    round: int | None
    client: str | None
    leaf: str | None
    file: str
    found: str

    def __str__(self) -> str:
        where = [] if self.round is None else [f"round {self.round}"]
        where += [] if self.client is None else [f"client {self.client!r}"]
        where += [] if self.leaf is None else [f"leaf {self.leaf!r}"]
        return f"{', '.join([*where, self.file])}: {self.found}"


def verify(store: Store, run: Run, on_progress: Progress | None = None) -> list[Damage]:
    """Checks all that `run` and the other files of a ledger say; see `Ledger.verify`.

    Raises:
      LedgerError: the folder of rounds cannot be listed.
    """
    files = _weights_files(store)
    catalogue = Catalogue(store, run)
    committed = catalogue.rounds()
    reading = _Reading(store, sum(_size(store, name) for each in files.values() for name in each), on_progress)
    damage: list[Damage] = []
    try:
        last = removals.read_removals(store)[-1:]
    except LedgerError as error:
        last = []
        damage.append(Damage(None, None, None, removals.FILE, str(error)))
    damage += _missing_rounds(store, run, committed)
    for number in committed:
        while True:
            stamp = store.stamp(table_name(number))
            found = _verify_round(_Round(reading, run, number), catalogue, files.get(number, ()), last)
            if number == committed[-1] and catalogue.rounds()[-1:] == [number]:
                found += _verify_checkpoint(reading, run, catalogue, number)
            # A round from which clients were removed meanwhile is looked at once more.
            now = store.stamp(table_name(number))
            if now == stamp or not found:
                break
            files = _weights_files(store)
        damage += found if now is not None else []
    return damage


class _Reading:
    """Reads from a ledger, and says how far it is."""

    def __init__(self, store: Store, total: int, on_progress: Progress | None) -> None:
        self.store = store
        self._done, self._total = 0, total
        self._on_progress = on_progress or (lambda done, total: None)

    def read(self, file: str, start: int, array: AnyArray) -> str | None:
        """Fills an array from a file; what went wrong, or None."""
        try:
            self.store.fill([(file, start, memory_of(array))])
        except LedgerError as error:
            return str(error)
        finally:
            self._done += array.nbytes
            self._on_progress(min(self._done, self._total), self._total)
        return None


@dataclass(frozen=True)
class _Round:
    """A round that is looked at."""

    reading: _Reading
    run: Run
    number: int

    def damage(self, file: str, found: str, client: str | None = None, leaf: str | None = None) -> Damage:
        return Damage(self.number, client, leaf, file, found)

    def file(self, part: int) -> str:
        return folder.weights_file(Path(), self.number, part).as_posix()


def _verify_round(this: _Round, catalogue: Catalogue, files: Sequence[str], last: Sequence[Removal]) -> list[Damage]:
    name = table_name(this.number)
    try:
        clients = catalogue.table(this.number)
    except LedgerError as error:
        return [this.damage(name, str(error))]
    if clients is None:  # removed meanwhile
        return []
    damage = list(_unfinished(this, clients, last))
    ids, parts = (clients.column(column).to_pylist() for column in ("client", "part"))
    places = {part: [place for place, of in enumerate(parts) if of == part] for part in sorted({0, *parts})}
    for part, here in places.items():
        if part == table.NOT_KEPT:
            continue
        file = this.file(part)
        try:
            slots = tensorfile.slots_in(this.reading.store, file)
        except LedgerError as error:
            damage += [this.damage(file, str(error))] * (part == 0)  # the global model
            damage += [this.damage(file, str(error), ids[place]) for place in here]
            continue
        if len({slot.shape[:1] for tensor, slot in slots.items() if tensor.startswith("local/")}) > 1:
            damage.append(this.damage(file, "tensors of unequal numbers of clients"))
        if part == 0:
            damage += _verify_global(this, clients, slots)
        for leaf in range(len(this.run.leaves)):
            damage += _verify_local(this, clients, part, slots, leaf, np.array(here, np.int64))
    for file in files:
        part = folder.part_of(Path(file).name)
        if part is not None and part[1] not in parts:
            try:
                unused = rewrite.has_rows(tensorfile.slots_in(this.reading.store, file))
            except LedgerError:
                unused = part[1] > 0  # of part 0 it was said above
            if unused:
                damage.append(this.damage(file, "weights of nobody: a removal was interrupted. Run `fedlens prune`."))
    return damage


def _verify_global(this: _Round, clients: pa.Table, slots: Mapping[str, Slot]) -> Iterator[Damage]:
    expected = table.read_summary(clients, table_name(this.number)).global_checksums
    for leaf in this.run.leaves:
        slot = slots.get(f"global/{leaf.name}")
        if slot is None or (slot.dtype, slot.shape) != (leaf.dtype, leaf.shape):
            yield this.damage(this.file(0), _other_tensor(leaf.dtype, list(leaf.shape), slot), None, leaf.name)
            continue
        array = np.empty(slot.size, np.uint8)
        wrong = this.reading.read(this.file(0), slot.start, array)
        if wrong or checksums.of_array(array) != expected.get(leaf.name):
            yield this.damage(this.file(0), wrong or _OTHER_BYTES, None, leaf.name)


def _verify_local(
    this: _Round, clients: pa.Table, part: int, slots: Mapping[str, Slot], place: int, here: Places
) -> Iterator[Damage]:
    """The leaf at a place of the run's, of those clients of a part of whom it is stored."""
    leaf = this.run.leaves[place]
    file, ids, rows = this.file(part), clients.column("client"), clients.column("row").to_numpy()
    facts = clients.column("leaves").combine_chunks().flatten()[place :: len(this.run.leaves)]
    known = facts.field("checksum").is_valid().to_numpy(zero_copy_only=False)
    recorded = facts.field("checksum").fill_null(0).to_numpy(zero_copy_only=False)
    here = here[known[here]]
    here = here[np.argsort(rows[here])]
    if not len(here):
        return
    slot = slots.get(f"local/{leaf.name}")
    wrong_tensor = _check_tensor(leaf, slot, int(rows[here[-1]]) + 1)
    if wrong_tensor or slot is None:
        for client in here:
            yield this.damage(file, wrong_tensor, ids[int(client)].as_py(), leaf.name)
        return
    width = math.prod(leaf.shape) * dtype_of(slot.dtype).itemsize
    step = max(1, _BLOCK // max(1, width))
    for first in range(int(rows[here[0]]), int(rows[here[-1]]) + 1, step):
        inside = here[(rows[here] >= first) & (rows[here] < first + step)]
        if not len(inside):
            continue
        array = np.empty((int(rows[inside[-1]]) + 1 - first, width), np.uint8)
        wrong = this.reading.read(file, slot.start + first * width, array)
        found = checksums.of_rows(array)[rows[inside] - first]
        for client in inside[(found != recorded[inside]) | bool(wrong)]:
            yield this.damage(file, wrong or _OTHER_BYTES, ids[int(client)].as_py(), leaf.name)
    if leaf.encoding == encodings.INT8_DELTA:
        scaled = facts.field("scale").is_valid().to_numpy(zero_copy_only=False)
        for client in here[~scaled[here]]:
            yield this.damage(table_name(this.number), "no scale", ids[int(client)].as_py(), leaf.name)


def _verify_checkpoint(reading: _Reading, run: Run, catalogue: Catalogue, number: int) -> Iterator[Damage]:
    file = folder.checkpoint_file(Path(), number).as_posix()
    this = _Round(reading, run, number)
    try:
        clients = catalogue.table(number)
        slots = tensorfile.slots_in(reading.store, file)
    except LedgerError as error:
        yield this.damage(file, f"{error} The run cannot be resumed.")
        return
    expected = {} if clients is None else table.read_summary(clients, table_name(number)).checkpoint_checksums
    if set(slots) != set(expected):
        yield this.damage(file, f"arrays {sorted(slots)}, expected {sorted(expected)}")
        return
    for name, slot in slots.items():
        array = np.empty(slot.size, np.uint8)
        wrong = reading.read(file, slot.start, array)
        if wrong or checksums.of_array(array) != expected[name]:
            yield this.damage(file, wrong or f"{_OTHER_BYTES}, in array {name!r}")


def _missing_rounds(store: Store, run: Run, committed: Sequence[int]) -> list[Damage]:
    """Rounds that a run with a plan has to have, and that no removal says are gone."""
    if run.planned_rounds is None or not committed:
        return []
    try:
        removed = {number for each in removals.read_removals(store) if each.kind == ROUNDS for number in each.rounds}
    except LedgerError:
        return []
    missing = sorted(set(range(committed[-1])) - set(committed) - removed)
    return [Damage(number, None, None, table_name(number), "no table, so the round is lost") for number in missing]


def _unfinished(this: _Round, clients: pa.Table, last: Sequence[Removal]) -> Iterator[Damage]:
    for removal in last:
        if this.number in removal.rounds:
            gone = removal.kind == ROUNDS
            if removal.kind == CLIENTS:
                gone = any(
                    removals.digest(client) in removal.clients for client in clients.column("client").to_pylist()
                )
            if gone:
                found = f"{removal.kind} that were removed: that was interrupted. Run `fedlens prune`."
                yield this.damage(table_name(this.number), found)


def _check_tensor(leaf: Leaf, slot: Slot | None, rows: int) -> str:
    dtype = encodings.stored_dtype(leaf.encoding, leaf.dtype)
    if (
        slot is not None
        and slot.dtype == dtype
        and slot.shape[1:] == leaf.shape
        and slot.shape
        and slot.shape[0] >= rows
    ):
        return ""
    return _other_tensor(dtype, [f"at least {rows}", *leaf.shape], slot)


def _other_tensor(dtype: str, shape: list[Any], slot: Slot | None) -> str:
    found = "none" if slot is None else f"{slot.dtype}{list(slot.shape)}"
    return f"{found} in place of a tensor {dtype}{shape}"


def _weights_files(store: Store) -> dict[int, list[str]]:
    """Round -> the names of its weights files."""
    found: dict[int, list[str]] = {}
    for name in sorted(store.stamps(folder.ROUNDS, ".safetensors")):
        part = folder.part_of(name)
        if part is not None:
            found.setdefault(part[0], []).append(f"{folder.ROUNDS}/{name}")
    return found


def _size(store: Store, name: str) -> int:
    try:
        return store.size(name)
    except LedgerError:
        return 0
