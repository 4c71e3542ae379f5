"""Removes from a ledger what it should not hold any longer: rounds, or clients with everything that is known of them.

Whatever is removed stands in `removals.jsonl` first (see `removals`), round by round it is there or gone, and one that
was interrupted is finished by the next. The files' bytes are given back to the file system, which may keep them on the
disk until it needs the room, and keeps them in snapshots: so does every copy of the ledger.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fedlens.errors import LedgerError
from fedlens.ledger import durable, format, removals, rewrite
from fedlens.ledger import folder as folders
from fedlens.ledger.catalogue import Catalogue
from fedlens.ledger.claim import claim
from fedlens.ledger.format import NotInLedgerError, Run
from fedlens.ledger.removals import CLIENTS, ROUNDS, Removal, digest
from fedlens.ledger.storage import LocalStore
from fedlens.ledger.table import NOT_KEPT
from fedlens.ledger.tensorfile import dtype_of

Progress = Callable[[int, int], object]  # is told how many rounds are done, and of how many

_PICTURE = "overview.png"  # drawn from local models by `report.overview`; it can be drawn again


@dataclass(frozen=True)
class Pruned:
    """What was removed, or with `dry_run` would be.

    Attributes:
      rounds: the rounds removed altogether.
      clients: client -> the other rounds from which it was removed.
      size_bytes: how many bytes of files and of clients' weights those were.
      mentioned: where in the run's config the ids of removed clients stand; fedlens does not know what for, and leaves
        it to you to change them there.
    """

    rounds: tuple[int, ...] = ()
    clients: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    size_bytes: int = 0
    mentioned: tuple[str, ...] = ()


def prune(
    path: str | os.PathLike[str],
    *,
    keep_every: int | None = None,
    drop_clients: Sequence[str] = (),
    dry_run: bool = False,
    on_progress: Progress | None = None,
) -> Pruned:
    """Removes rounds and clients from a ledger, and finishes a removal that was interrupted; see `Ledger.prune`.

    Raises:
      LedgerError: a writer has the ledger, a round to be changed is damaged, or the disk refuses.
      NotInLedgerError: a client was never in the ledger. Nothing is removed then.
    """
    folder = Path(path)
    if keep_every is not None and (type(keep_every) is not int or keep_every < 1):
        raise LedgerError(f"Expected every first or further round to be kept, found {keep_every!r}, in keep_every.")
    if isinstance(drop_clients, str):
        raise LedgerError(f"Expected a list of client ids, found the text {drop_clients!r}, in drop_clients.")
    if dry_run:
        return _plan(folder, format.read_run(folder), keep_every, drop_clients)[0]
    pruning = _Pruning(folder, on_progress or (lambda done, total: None))
    try:
        pruning.finish_last()
        pruned, to_do = _plan(folder, pruning.run, keep_every, drop_clients)
        for removal in to_do:
            pruning.do(removal)
    except OSError as error:
        if isinstance(error, LedgerError):
            raise
        raise LedgerError(
            f"Expected to remove from a ledger, found: {error.strerror or error!r}, in {folder}. "
            f"What was begun is finished by the next `fedlens prune`, with these options or with none."
        ) from error
    finally:
        os.close(pruning.lock)
    return pruned


class _Pruning:
    """A claimed ledger, and how removals are done to it."""

    def __init__(self, folder: Path, on_progress: Progress) -> None:
        self.run, self.lock = claim(folder)
        self._folder, self._on_progress = folder, on_progress

    def finish_last(self) -> None:
        """Does the last removal once more: the earlier ones were done before it was begun."""
        for removal in removals.read_removals(LocalStore(self._folder))[-1:]:
            self._do(removal)

    def do(self, removal: Removal) -> None:
        """Records a removal, and does it."""
        removals.add_removal(self._folder, removal)
        self._do(removal)

    def _do(self, removal: Removal) -> None:
        present = set(folders.committed_rounds(self._folder))
        files = rewrite.files_of_rounds(self._folder)
        if removal.kind == ROUNDS:
            self._remove_rounds([number for number in removal.rounds if number in present], files)
            return
        gone = frozenset(removal.clients)
        (self._folder / _PICTURE).unlink(missing_ok=True)
        self._forget(gone)
        rounds = [number for number in removal.rounds if number in present]
        tables = Catalogue(LocalStore(self._folder), self.run)
        for done, number in enumerate(rounds, 1):
            found = tables.table(number)
            rewrite.take_out(self._folder, number, files.get(number, ()), found, lambda client: digest(client) in gone)
            self._on_progress(done, len(rounds))

    def _remove_rounds(self, rounds: Sequence[int], files: Mapping[int, Sequence[Path]]) -> None:
        # Without its table a round does not exist. What is left of it when this dies, the next claim clears away.
        for number in rounds:
            folders.clients_file(self._folder, number).unlink(missing_ok=True)
        durable.sync_folder(self._folder / folders.ROUNDS)
        for done, number in enumerate(rounds, 1):
            for path in files.get(number, ()):
                path.unlink(missing_ok=True)
            self._on_progress(done, len(rounds))
        durable.sync_folder(self._folder / folders.ROUNDS)

    def _forget(self, gone: Collection[str]) -> None:
        """Takes clients' ids out of what the run was to keep."""
        keep = self.run.keep
        if keep is None or keep.clients is None:
            return
        named = (keep.clients,) if isinstance(keep.clients, str) else tuple(keep.clients)
        left = tuple(name for name in named if digest(name) not in gone)
        if left != named:
            self.run = replace(self.run, keep=replace(keep, clients=left))
            self.lock = folders.replace_run(self._folder, format.to_json(self.run), self.lock)


def _plan(folder: Path, run: Run, keep_every: int | None, drop_clients: Sequence[str]) -> tuple[Pruned, list[Removal]]:
    """What is to be removed, by the ledger's files as they are."""
    committed = folders.committed_rounds(folder)
    files = rewrite.files_of_rounds(folder)
    # The last round stays: with its checkpoint a run is resumed, and by it a complete run is known.
    rounds = tuple(number for number in committed[:-1] if keep_every is not None and number % keep_every)
    size = sum(
        each.stat().st_size
        for number in rounds
        for each in (*files.get(number, ()), folders.clients_file(folder, number))
    )
    wanted = dict.fromkeys(drop_clients)
    clients: dict[str, list[int]] = {client: [] for client in wanted}
    met: set[str] = set()
    tables = Catalogue(LocalStore(folder), run)
    for number in committed if wanted else []:
        found = tables.table(number)
        ids = [] if found is None else found.column("client").to_pylist()
        here = [place for place, client in enumerate(ids) if client in wanted]
        met |= {ids[place] for place in here}
        if found is not None and here and number not in rounds:
            size += _size_of(folder, run, number, found, np.array(here))
            for place in here:
                clients[ids[place]].append(number)
    _check_known([client for client in wanted if client not in met], folder, tables)
    changed = sorted({number for numbers in clients.values() for number in numbers})
    to_do = [Removal(ROUNDS, rounds)] if rounds else []
    if met:
        to_do.append(Removal(CLIENTS, tuple(changed), tuple(sorted(map(digest, met)))))
    pruned = Pruned(
        rounds,
        {client: tuple(numbers) for client, numbers in clients.items() if client in met},
        size,
        tuple(_mentions(run.config, wanted, "config")),
    )
    return pruned, to_do


def _size_of(folder: Path, run: Run, number: int, found: pa.Table, places: Any) -> int:
    """The bytes of some clients' weights in a round, whose files are checked for what removing them reads."""
    parts, rows = (found.column(name).to_numpy() for name in ("part", "row"))
    size = 0
    for part in np.unique(parts[places]).tolist():
        if part == NOT_KEPT:
            continue
        slots = rewrite.check_rows(folders.weights_file(folder, number, part), rows[parts == part])
        count = int((parts[places] == part).sum())
        for leaf in run.leaves:
            slot = slots.get(f"local/{leaf.name}")
            size += 0 if slot is None else count * int(np.prod(slot.shape[1:])) * dtype_of(slot.dtype).itemsize
    return size


def _check_known(unknown: Sequence[str], folder: Path, tables: Catalogue) -> None:
    """Refuses clients that are not in the ledger, but for those that were removed from it before."""
    removed = {client for each in removals.read_removals(LocalStore(folder)) for client in each.clients}
    for client in unknown:
        if digest(client) not in removed:
            known = dict.fromkeys(name for each in tables.tables() for name in each.column("client").to_pylist())
            hint = format.nearest(client, known)
            raise NotInLedgerError(f"Expected a client of this run, found {client!r}, in {folder}. {hint}")


def _mentions(value: Any, clients: Collection[str], where: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in clients:
                yield f"{where}.{key}"
            yield from _mentions(item, clients, f"{where}.{key}")
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _mentions(item, clients, f"{where}[{place}]")
    elif isinstance(value, str) and value in clients:
        yield where
