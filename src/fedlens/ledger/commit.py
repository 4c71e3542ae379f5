"""One round on its way to the disk: files of weights, the checkpoint, and last its table of clients, which commits it.

Clients come in deliveries; each becomes one weights file as it comes, so a round of any size passes through little
memory. How far a client went along with the others (the cosine of its update and the mean update) is known only when
all were there. A single delivery of finite clients is measured in one pass (`measure.py`); other rounds are gone over
once more when they end, small ones from memory, others from the files.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from fedlens.errors import LedgerError
from fedlens.ledger import checksums, durable, encodings, folder, measure, table, tensorfile
from fedlens.ledger.delivery import Delivery, MeasuredPart
from fedlens.ledger.format import Run
from fedlens.ledger.measure import PerRow
from fedlens.ledger.records import ClientPart
from fedlens.ledger.table import NOT_KEPT, ClientRows
from fedlens.ledger.tensorfile import AnyArray

HELD = 256 << 20  # bytes of a round's deliveries that stay in memory until the round ends

_BLOCK = 1 << 20  # bytes of clients' rows that are encoded, checksummed and written in one go

# One leaf of a delivery's clients once more, block by block: the leaf's place -> the first client's place, the rows.
_Again = Callable[[int], Iterator[tuple[int, AnyArray]]]


class RoundWriter:
    """Writes one round: `add` for each delivery of clients, then `commit`, or `discard`. What it takes was checked."""

    def __init__(
        self, path: Path, run: Run, number: int, global_weights: Sequence[AnyArray], measuring: Executor
    ) -> None:
        """Starts round `number`; nothing is written yet. Clients are measured by a thread of `measuring`."""
        self._path, self._run, self._number = path, run, int(number)
        self._global = [np.asarray(leaf) for leaf in global_weights]
        self._measuring = measuring
        leaves, kept_leaves = run.leaves, set(run.kept_leaves)
        self._leaf_kept = np.array([leaf in kept_leaves for leaf in leaves], bool)
        self._leaf_scaled = np.array([leaf.encoding == encodings.INT8_DELTA for leaf in leaves], bool)
        self._stored_raw = self._leaf_kept & np.array([leaf.encoding == encodings.RAW for leaf in leaves], bool)
        self._rows: list[ClientRows] = []
        self._again: list[_Again] = []
        self._files = 0
        self._held = 0
        self._scratch: list[Path] = []
        self._cached: list[Path] = []
        self._begun: durable.Begun | None = None  # the last file of weights
        # The weighted sum of the updates divided by the scale, leaf by leaf; nothing before the first file.
        self._totals: list[measure.Total] = []
        self._scale = 1.0
        self._weight = 0.0
        self._products: PerRow | None = None  # of each client's update and the sum of all; None if not known

    def add(self, parts: Sequence[ClientPart]) -> bool:
        """Writes a delivery of clients; returns whether it reads the arrays again when the round ends.

        Raises:
          LedgerError: a client's leaf cannot be encoded.
          OSError: what the operating system reports.
        """
        kept = [self._kept(part) for part in parts]
        everybody = all(bool(each.all()) for each in kept)
        # What is stored as it is, and of all, is checksummed as it is measured; all else as it is written.
        whole = self._stored_raw if everybody else np.zeros_like(self._stored_raw)
        delivery = Delivery(parts, self._global, np.flatnonzero(whole))
        rows = [self._new_rows(*of_part) for of_part in zip(delivery.by_part(), kept, strict=True)]
        size = sum(leaf.nbytes for part in parts for leaf in part.weights)
        held = self._held + size <= HELD
        in_full = bool(whole.all())
        target = folder.weights_file(self._path, self._number, self._files)
        self._finish_file()
        with delivery.measured(self._measuring):
            self._begun = durable.begin_file(target, self._pieces(rows, whole), keep_cached=in_full and not held)
        self._products = delivery.products if self._files == 0 else None
        if self._files == 0:
            self._totals, self._scale = delivery.totals, delivery.scale
        else:
            before, self._scale = self._scale, 1.0
            for total, of_delivery in zip(self._totals, delivery.totals, strict=True):
                total.sum = before * total.sum.astype(np.float64) + delivery.scale * of_delivery.sum
        self._weight += float(delivery.weights.sum())
        if held:
            self._held += size
            self._again += [_from_memory(part) for part in parts]
        elif in_full:
            self._cached.append(target)
            self._again += _from_file(target, rows, "local/", self._run, self._global)
        else:
            scratch = folder.scratch_file(self._path, self._number, self._files)
            self._scratch.append(scratch)
            durable.write_file(scratch, self._whole(parts), keep_cached=True)
            self._again += _from_file(scratch, rows, "", self._run, self._global)
        self._files += 1
        # What is read from files again is not held.
        self._rows += rows if held else [replace(each, of=replace(each.of, weights=[])) for each in rows]
        return held

    def mean_update(self) -> list[AnyArray]:
        """The mean of the updates of the clients so far, leaf by leaf: float64, flat, complex numbers as pairs.

        Weighted by examples, without the clients whose update is not finite; zero if nobody is left.
        """
        if not self._weight:
            return [np.zeros(measure.width(leaf)) for leaf in self._global]
        with np.errstate(all="ignore"):
            return [total.sum.astype(np.float64) * (self._scale / self._weight) for total in self._totals]

    def commit(
        self, metrics: Mapping[str, float], checkpoint: Mapping[str, AnyArray], dropped: Collection[str]
    ) -> None:
        """Writes what ends the round, and removes the checkpoints before it.

        Raises:
          OSError: what the operating system reports; the round may then be torn.
        """
        if not self._files:
            durable.write_file(folder.weights_file(self._path, self._number), self._pieces([], self._stored_raw))
        rows = self._with_cosines()
        self._finish_file()  # now: while cosines were computed, the disk was at work
        for path in self._scratch:
            path.unlink()
        for path in self._cached:
            durable.drop_cached(path)
        durable.write_file(folder.checkpoint_file(self._path, self._number), tensorfile.whole_file(checkpoint))
        durable.sync_folder(self._path / folder.ROUNDS)
        durable.sync_folder(self._path / folder.CHECKPOINTS)
        summary = table.RoundSummary(
            self._number,
            metrics,
            {leaf.name: checksums.of_array(array) for leaf, array in zip(self._run.leaves, self._global, strict=True)},
            {name: checksums.of_array(array) for name, array in checkpoint.items()},
        )
        clients = table.build_table(rows, self._run.leaves, frozenset(dropped), summary)
        durable.replace_file(folder.clients_file(self._path, self._number), [table.to_parquet(clients)])
        folder.clear_checkpoints(self._path, self._number)

    def discard(self) -> None:
        """Removes what was written of a round that will not be committed; what cannot be removed stays torn."""
        if self._begun is not None:
            durable.forget_file(self._begun)
        files = [folder.weights_file(self._path, self._number, part) for part in range(self._files + 1)]
        for path in (*files, *self._scratch):
            with contextlib.suppress(OSError):
                path.unlink()

    def _finish_file(self) -> None:
        """Waits until the last file of weights is on the disk."""
        if self._begun is not None:
            file, self._begun = self._begun, None
            durable.finish_file(file)

    def _kept(self, part: ClientPart) -> Bool[np.ndarray, " clients"]:
        """Which of the clients have their weights stored."""
        keep = self._run.keep
        if keep is None:
            return np.ones(len(part.ids), bool)
        if not keep.keeps_round(self._number):
            return np.zeros(len(part.ids), bool)
        return np.array([keep.keeps_client(client) for client in part.ids], bool)

    def _new_rows(self, part: MeasuredPart, kept: Bool[np.ndarray, " clients"]) -> ClientRows:
        """A part's rows of the table, before it is measured and written."""
        stored = kept[:, None] & self._leaf_kept[None, :]
        return ClientRows(
            part.of,
            np.where(kept, self._files, NOT_KEPT),
            np.where(kept, 0, NOT_KEPT),  # counted when the rows of all parts are known
            part.squares,
            part.checksums,
            stored,
            np.zeros(stored.shape),
            stored & self._leaf_scaled,
            np.full(len(kept), np.nan),
        )

    def _pieces(self, rows: Sequence[ClientRows], whole: Bool[np.ndarray, " leaves"]) -> Iterator[Any]:
        """The pieces of a weights file; leaves that are `whole` are written as they are."""
        count = 0
        for each in rows:
            kept = each.row != NOT_KEPT
            each.row[kept] = count + np.arange(int(kept.sum()))
            count += int(kept.sum())
        leaves = self._run.leaves
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        if self._files == 0:
            tensors |= {f"global/{leaf.name}": (leaf.dtype, leaf.shape) for leaf in leaves}
        tensors |= {
            f"local/{leaf.name}": (encodings.stored_dtype(leaf.encoding, leaf.dtype), (count, *leaf.shape))
            for leaf in self._run.kept_leaves
        }
        places = {f"{kind}/{leaf.name}": place for place, leaf in enumerate(leaves) for kind in ("global", "local")}
        start, order = tensorfile.layout(tensors)
        yield start
        for name in order:
            if name.startswith("global/"):
                yield tensorfile.as_bytes(self._global[places[name]])
            else:
                place = places[name]
                for each in rows:
                    if whole[place]:
                        yield tensorfile.as_bytes(np.asarray(each.of.weights[place]))
                    else:
                        yield from self._encoded(each, place)

    def _encoded(self, rows: ClientRows, place: int) -> Iterator[Any]:
        """The bytes of one leaf of those clients who are stored, block by block, and their checksums on the way."""
        leaf, reference = self._run.leaves[place], self._global[place]
        array = np.asarray(rows.of.weights[place])
        stored = np.flatnonzero(rows.stored[:, place])
        step = _step(reference)
        for first in range(0, len(stored), step):
            chosen = stored[first : first + step]
            start, stop = int(chosen[0]), int(chosen[-1]) + 1
            block = array[start:stop] if stop - start == len(chosen) else array[chosen]
            try:
                encoded, scales = encodings.encode(block, reference, leaf.encoding)
            except encodings.EncodingError as error:
                client = rows.of.ids[chosen[error.row]]
                raise LedgerError(f"{error} In leaf {leaf.name!r} of client {client!r}.") from None
            if scales is not None:
                rows.scales[chosen, place] = scales
            of_clients = np.zeros(len(chosen), np.uint32)
            yield from checksums.passed_on(tensorfile.as_bytes(encoded).reshape(len(chosen), -1), of_clients)
            rows.checksums[chosen, place] = of_clients

    def _with_cosines(self) -> list[ClientRows]:
        """The rows with the cosine of each client's update and the mean update."""
        length = math.sqrt(sum(total.squared_norm() for total in self._totals))
        if not (0 < length < np.inf):
            return self._rows
        starts = np.cumsum([len(each.of.ids) for each in self._rows])[:-1]
        known = None if self._products is None else np.split(self._products, starts)
        measured = []
        for number, (each, again) in enumerate(zip(self._rows, self._again, strict=True)):
            norms = np.sqrt(each.squares.sum(axis=1))
            products = self._products_of(again, len(norms)) if known is None else known[number]
            with np.errstate(all="ignore"):
                cosines = np.clip(products / norms / length, -1.0, 1.0)
            measured.append(replace(each, cosine=np.where((norms > 0) & np.isfinite(norms), cosines, np.nan)))
        return measured

    def _products_of(self, again: _Again, clients: int) -> PerRow:
        """The inner product of each client's update with the weighted sum of all updates, which the mean is along."""
        products = np.zeros(clients)
        for place, (reference, total) in enumerate(zip(self._global, self._totals, strict=True)):
            direction = total.sum.astype(np.float64)
            for first, block in again(place):
                products[first : first + len(block)] += measure.projections(block, reference, direction)
        return products

    def _whole(self, parts: Sequence[ClientPart]) -> Iterator[Any]:
        """The pieces of a file with all leaves of all clients, as they are."""
        clients = sum(len(part.ids) for part in parts)
        names = {leaf.name: place for place, leaf in enumerate(self._run.leaves)}
        start, order = tensorfile.layout({leaf.name: (leaf.dtype, (clients, *leaf.shape)) for leaf in self._run.leaves})
        yield start
        for name in order:
            for part in parts:
                yield tensorfile.as_bytes(np.asarray(part.weights[names[name]]))


def read_checkpoint(ledger: Path, run: Run, number: int) -> dict[str, AnyArray]:
    """Reads what resuming after round `number` needs, and verifies it.

    Raises:
      LedgerError: the checkpoint is missing or damaged.
    """
    path = folder.checkpoint_file(ledger, number)
    clients = folder.clients_file(ledger, number)
    expected = table.read_summary(table.read_table(clients, run.leaves), clients).checkpoint_checksums
    arrays = tensorfile.read_all(path)
    if set(arrays) != set(expected):
        raise LedgerError(f"Expected {sorted(expected)}, found {sorted(arrays)}, in {path}. Restore it from a copy.")
    for name, array in arrays.items():
        if checksums.of_array(array) != expected[name]:
            raise LedgerError(f"Expected the bytes that were written, found others, in {name!r} of {path}.")
    return {name: arrays[name] for name in expected}


def _from_memory(part: ClientPart) -> _Again:
    return lambda place: iter([(0, np.asarray(part.weights[place]))])


def _from_file(
    path: Path, rows: Sequence[ClientRows], prefix: str, run: Run, global_weights: Sequence[AnyArray]
) -> list[_Again]:
    """For each part of a delivery its leaves, from a file that has those of all of them.

    It holds no `RoundWriter`: one that held what holds it would keep its arrays until the next collection of cycles.
    """
    starts = np.cumsum([0, *(len(each.of.ids) for each in rows)])

    def again(start: int, clients: int) -> _Again:
        def blocks(place: int) -> Iterator[tuple[int, AnyArray]]:
            slot = tensorfile.read_slots(path)[prefix + run.leaves[place].name]
            step = _step(global_weights[place])
            for first in range(0, clients, step):
                last = min(first + step, clients)
                yield first, tensorfile.read_slot(path, slot, slice(start + first, start + last))

        return blocks

    return [again(int(start), len(each.of.ids)) for start, each in zip(starts, rows, strict=False)]


def _step(reference: AnyArray) -> int:
    """How many clients' rows of a leaf make a block: a power of two."""
    return 1 << max(0, (_BLOCK // max(1, reference.nbytes)).bit_length() - 1)
