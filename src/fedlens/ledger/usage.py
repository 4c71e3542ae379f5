"""What a ledger's bytes are spent on: by round, by leaf, and on what is not weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlens.errors import LedgerError
from fedlens.ledger import folder, removals, tensorfile
from fedlens.ledger.format import Run
from fedlens.ledger.storage import Store


@dataclass(frozen=True)
class RoundUsage:
    """One committed round's bytes: in its files of weights, and in its table of clients."""

    weights: int
    table: int


@dataclass(frozen=True)
class LeafUsage:
    """One leaf's bytes over all committed rounds: of the clients' weights, and of the global models."""

    local: int
    global_: int


@dataclass(frozen=True)
class Usage:
    """The bytes of a ledger's files.

    Attributes:
      rounds: by committed round.
      leaves: by leaf, in field order; headers of files, and files with damaged ones, are in no leaf.
      checkpoints: what resuming needs.
      catalogue: `run.json`, the tables of clients, and the list of removals.
      other: all else in the folder: pictures, torn rounds, what others put there.
      total: all of it: weights, checkpoints, catalogue and other.
    """

    rounds: Mapping[int, RoundUsage]
    leaves: Mapping[str, LeafUsage]
    checkpoints: int
    catalogue: int
    other: int
    total: int


def measure_usage(store: Store, run: Run) -> Usage:
    """Measures a ledger's files; of those with weights it reads the headers. See `Ledger.usage`.

    Raises:
      LedgerError: a folder cannot be listed.
    """
    tables = {
        number: size
        for name, size in _sizes(store, folder.ROUNDS, ".parquet").items()
        if (number := folder.number_of(name, ".parquet")) is not None
    }
    weights = dict.fromkeys(tables, 0)
    spent = {f"{kind}/{leaf.name}": 0 for leaf in run.leaves for kind in ("local", "global")}
    for name, size in _sizes(store, folder.ROUNDS, ".safetensors").items():
        part = folder.part_of(name)
        if part is None or part[0] not in tables:
            continue
        weights[part[0]] += size
        try:
            slots = tensorfile.slots_in(store, f"{folder.ROUNDS}/{name}")
        except LedgerError:
            continue
        for tensor in spent.keys() & slots.keys():
            spent[tensor] += slots[tensor].size
    checkpoints = sum(
        size
        for name, size in _sizes(store, folder.CHECKPOINTS, ".safetensors").items()
        if folder.number_of(name, ".safetensors") is not None
    )
    lone = sum(store.size(name) for name in (folder.RUN, removals.FILE) if store.stamp(name) is not None)
    catalogue = lone + sum(tables.values())
    total = store.total_size()
    return Usage(
        {number: RoundUsage(weights[number], tables[number]) for number in sorted(tables)},
        {leaf.name: LeafUsage(spent[f"local/{leaf.name}"], spent[f"global/{leaf.name}"]) for leaf in run.leaves},
        checkpoints,
        catalogue,
        max(0, total - sum(weights.values()) - checkpoints - catalogue),
        total,
    )


def _sizes(store: Store, name: str, suffix: str) -> dict[str, int]:
    """File -> bytes; what vanishes meanwhile, or is no file, counts nothing."""
    sizes = {}
    for file in store.stamps(name, suffix):
        try:
            sizes[file] = store.size((Path(name) / file).as_posix())
        except LedgerError:
            continue
    return sizes
