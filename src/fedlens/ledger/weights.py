"""The weights of one round: found by part and row, read by ranges of bytes, verified, decoded.

A round may have several files. The table says in which of them a client's weights lie (`part`), and in which row of
that file's tensors (`row`). Neighbouring rows are read as one range, whatever was asked for is read in one go, and
nothing else of a file is touched but its header.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from fedlens.errors import LedgerError
from fedlens.ledger import checksums, encodings, folder, tensorfile
from fedlens.ledger.format import Leaf, NotInLedgerError, Run
from fedlens.ledger.measure import Clients
from fedlens.ledger.storage import Piece, Store
from fedlens.ledger.table import NOT_KEPT
from fedlens.ledger.tensorfile import AnyArray, Slot, dtype_of, memory_of

Places = Int[np.ndarray, " clients"]  # clients of a round, by their place in its table

_BLOCK = 16 << 20  # bytes of clients' leaves that are decoded at once: decoding takes several times as much


class RoundWeights:
    """Reads the weights of one round, of which the table was checked.

    Attributes:
      stored: which leaves of which clients the ledger holds.
    """

    def __init__(
        self, store: Store, run: Run, number: int, clients: pa.Table, global_checksums: Mapping[str, int]
    ) -> None:
        """Reads nothing yet."""
        self._store, self._run, self._number = store, run, number
        self._ids = clients.column("client")
        self._parts, self._rows = (clients.column(name).to_numpy() for name in ("part", "row"))
        self._global_checksums = global_checksums
        shape = (len(clients), len(run.leaves))
        facts = clients.column("leaves").combine_chunks().flatten()
        recorded, scales = facts.field("checksum"), facts.field("scale")
        self._checksums = recorded.fill_null(0).to_numpy(zero_copy_only=False).reshape(shape)
        self._scales = scales.fill_null(math.nan).to_numpy(zero_copy_only=False).reshape(shape)
        self._scaled = scales.is_valid().to_numpy(zero_copy_only=False).reshape(shape)
        known = recorded.is_valid().to_numpy(zero_copy_only=False).reshape(shape)
        self.stored: Bool[np.ndarray, "clients leaves"] = known & (self._parts != NOT_KEPT)[:, None]
        self._slots: dict[int, Mapping[str, Slot]] = {}
        self._references: dict[int, AnyArray] = {}

    def global_leaves(self, leaves: Sequence[int]) -> list[AnyArray]:
        """Some leaves of the global model before the round, each [*leaf].

        Args:
          leaves: their places in the run's order.

        Raises:
          LedgerError: the stored bytes are damaged.
        """
        chosen = [self._run.leaves[place] for place in leaves]
        arrays = [np.empty(leaf.shape, dtype_of(leaf.dtype)) for leaf in chosen]
        name = self._file(0)
        slots = self._slots_of(0) if chosen else {}
        self._fill(
            [
                (name, slots[f"global/{leaf.name}"].start, memory_of(array))
                for leaf, array in zip(chosen, arrays, strict=True)
            ]
        )
        for leaf, array in zip(chosen, arrays, strict=True):
            if checksums.of_array(array) != self._global_checksums.get(leaf.name):
                raise self._damaged(f"leaf {leaf.name!r} of the global model", 0)
        return arrays

    def local_leaves(self, leaves: Sequence[int], clients: Places) -> list[Clients]:
        """Some leaves of some clients, each [clients, *leaf] in the order of `clients`.

        Args:
          leaves: their places in the run's order.
          clients: their places in the table.

        Raises:
          NotInLedgerError: one of them was not kept.
          LedgerError: the stored bytes are damaged.
        """
        for place in leaves:
            if not self.stored[clients, place].all():
                raise self._not_kept(place, clients)
        pieces: list[Piece] = []
        scattered: list[tuple[AnyArray, Places, AnyArray]] = []
        arrays = [self._planned(place, clients, pieces, scattered) for place in leaves]
        self._fill(pieces)
        for array, targets, rows in scattered:
            array[targets] = rows
        for place, array in zip(leaves, arrays, strict=True):
            wrong = np.flatnonzero(checksums.of_rows(array) != self._checksums[clients, place])
            if len(wrong):
                client = int(clients[wrong[0]])
                raise self._damaged(
                    f"leaf {self._run.leaves[place].name!r} of client {self._ids[client].as_py()!r}",
                    int(self._parts[client]),
                )
        self._read_references([place for place in leaves if self._run.leaves[place].encoding != encodings.RAW])
        return [self._decoded(place, clients, array) for place, array in zip(leaves, arrays, strict=True)]

    def elements(self, place: int, span: slice, clients: Places | None) -> AnyArray:
        """Some elements of one leaf in row-major order, of the global model or of clients; nothing else is read.

        They are not verified, as a checksum is of a whole leaf.

        Args:
          place: the leaf's, in the run's order.
          span: which elements, from start to stop.
          clients: their places in the table; None is the global model.

        Returns:
          [elements] of the global model, [clients, elements] of clients.

        Raises:
          NotInLedgerError: a client's leaf was not kept.
          LedgerError: a file cannot be read.
        """
        leaf, count = self._run.leaves[place], span.stop - span.start
        if clients is None:
            array = np.empty(count, dtype_of(leaf.dtype))
            start = self._slots_of(0)[f"global/{leaf.name}"].start + span.start * array.itemsize
            self._fill([(self._file(0), start, memory_of(array))])
            return array
        if not self.stored[clients, place].all():
            raise self._not_kept(place, clients)
        array = np.empty((len(clients), count), dtype_of(encodings.stored_dtype(leaf.encoding, leaf.dtype)))
        pieces: list[Piece] = []
        for target, client in zip(array, clients.tolist(), strict=True):
            part, row = int(self._parts[client]), int(self._rows[client])
            first = row * math.prod(leaf.shape) + span.start
            start = self._slots_of(part)[f"local/{leaf.name}"].start + first * array.itemsize
            pieces.append((self._file(part), start, memory_of(target)))
        self._fill(pieces)
        if leaf.encoding == encodings.RAW:
            return array
        reference = self.elements(place, span, None)
        return encodings.decode(array, reference, leaf.encoding, self._scales[clients, place])

    def _planned(
        self, place: int, clients: Places, pieces: list[Piece], scattered: list[tuple[AnyArray, Places, AnyArray]]
    ) -> AnyArray:
        """Memory for one leaf of some clients, the pieces that fill it added to `pieces`.

        Rows that do not stand in the file as they do in the result are read into memory of their own, which is added to
        `scattered` with where it belongs.
        """
        leaf = self._run.leaves[place]
        dtype = dtype_of(encodings.stored_dtype(leaf.encoding, leaf.dtype))
        array = np.empty((len(clients), *leaf.shape), dtype)
        width = math.prod(leaf.shape) * dtype.itemsize
        parts, rows = self._parts[clients], self._rows[clients]
        for part in np.unique(parts).tolist():
            slot = self._slots_of(part)[f"local/{leaf.name}"]
            here = np.flatnonzero(parts == part)
            here = here[np.argsort(rows[here], kind="stable")]
            for targets in np.split(here, np.flatnonzero(np.diff(rows[here]) != 1) + 1):
                memory = array[targets[0] : targets[0] + len(targets)]
                if np.any(np.diff(targets) != 1):
                    memory = np.empty((len(targets), *leaf.shape), dtype)
                    scattered.append((array, targets, memory))
                pieces.append((self._file(part), slot.start + int(rows[targets[0]]) * width, memory_of(memory)))
        return array

    def _decoded(self, place: int, clients: Places, stored: Clients) -> Clients:
        leaf = self._run.leaves[place]
        if leaf.encoding == encodings.RAW:
            return stored
        if leaf.encoding == encodings.INT8_DELTA and not self._scaled[clients, place].all():
            raise self._damaged(f"the scales of leaf {leaf.name!r}", 0)
        reference = self._references[place]
        array = np.empty(stored.shape, reference.dtype)
        step = max(1, _BLOCK // max(1, reference.nbytes))
        for first in range(0, len(stored), step):
            rows = slice(first, first + step)
            array[rows] = encodings.decode(stored[rows], reference, leaf.encoding, self._scales[clients[rows], place])
        return array

    def _read_references(self, leaves: Sequence[int]) -> None:
        missing = [place for place in leaves if place not in self._references]
        self._references |= dict(zip(missing, self.global_leaves(missing), strict=True))

    @cached_property
    def _rows_of_parts(self) -> dict[int, int]:
        """Part -> how many rows its tensors have to have at least."""
        return {part: int(self._rows[self._parts == part].max()) + 1 for part in np.unique(self._parts).tolist()}

    def _slots_of(self, part: int) -> Mapping[str, Slot]:
        """Where the tensors of a part's file lie; they are those that this round has to have."""
        if part not in self._slots:
            try:
                slots = tensorfile.slots_in(self._store, self._file(part))
            except LedgerError as error:
                raise LedgerError(f"Round {self._number}: {error}") from error
            for leaf in self._run.leaves if part == 0 else ():
                self._check_slot(part, f"global/{leaf.name}", slots, leaf.dtype, leaf.shape, None)
            for place, leaf in enumerate(self._run.leaves):
                if self.stored[self._parts == part, place].any():
                    dtype = encodings.stored_dtype(leaf.encoding, leaf.dtype)
                    self._check_slot(part, f"local/{leaf.name}", slots, dtype, leaf.shape, self._rows_of_parts[part])
            self._slots[part] = slots
        return self._slots[part]

    def _check_slot(
        self, part: int, name: str, slots: Mapping[str, Slot], dtype: str, shape: tuple[int, ...], rows: int | None
    ) -> None:
        slot = slots.get(name)
        if slot is not None and slot.dtype == dtype:
            if rows is None and slot.shape == shape:
                return
            if rows is not None and slot.shape[1:] == shape and slot.shape and slot.shape[0] >= rows:
                return
        found = "none" if slot is None else f"{slot.dtype}{list(slot.shape)}"
        expected = list(shape) if rows is None else [f"at least {rows}", *shape]
        raise LedgerError(
            f"Round {self._number}: Expected {dtype}{expected}, found {found}, in tensor {name!r} of "
            f"{self._store.where(self._file(part))}. The file or the table was changed: restore both from a copy."
        )

    def _fill(self, pieces: Sequence[Piece]) -> None:
        try:
            self._store.fill(pieces)
        except LedgerError as error:
            raise LedgerError(f"Round {self._number}: {error}") from error

    def _file(self, part: int) -> str:
        return folder.weights_file(Path(), self._number, part).as_posix()

    def _not_kept(self, place: int, clients: Places) -> NotInLedgerError:
        leaf: Leaf = self._run.leaves[place]
        client: Any = self._ids[int(clients[np.flatnonzero(~self.stored[clients, place])[0]])].as_py()
        return NotInLedgerError(
            f"Expected stored weights, found that the weights were not kept, in leaf {leaf.name!r} of client "
            f"{client!r}, round {self._number}, in {self._store.where()}. The run keeps {self._run.keep}; "
            "`kept_ids` and `kept_leaves` say what there is."
        )

    def _damaged(self, where: str, part: int) -> LedgerError:
        return LedgerError(
            f"Expected the bytes that were written, found others, in {where}, round {self._number}, in "
            f"{self._store.where(self._file(part))}. The file was changed: restore it from a copy."
        )
