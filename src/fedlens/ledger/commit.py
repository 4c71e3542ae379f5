"""One round on its way to the disk: its weights, its checkpoint, and last its table of clients, which commits it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedlens.errors import LedgerError
from fedlens.ledger import durable, folder, measure, table, tensorfile
from fedlens.ledger.format import Run
from fedlens.ledger.records import RoundRecord
from fedlens.ledger.tensorfile import AnyArray

_BLOCK = 4 << 20  # bytes of clients' rows that are measured and written in one go


def write_round(path: Path, run: Run, record: RoundRecord) -> None:
    """Writes and commits one checked round, and removes the checkpoints before it.

    Raises:
      OSError: what the operating system reports; the round may then be torn.
    """
    number = int(record.round)
    clients = sum(len(part.ids) for part in record.parts)
    squares = np.zeros((clients, len(run.leaves)))
    checksums = np.zeros((clients, len(run.leaves)), np.uint32)
    durable.write_file(folder.weights_file(path, number), _weights(run, record, squares, checksums))
    durable.write_file(folder.checkpoint_file(path, number), tensorfile.whole_file(record.checkpoint))
    durable.sync_folder(path / folder.ROUNDS)
    durable.sync_folder(path / folder.CHECKPOINTS)
    summary = table.RoundSummary(
        number,
        record.metrics,
        {leaf.name: _checksum(array) for leaf, array in zip(run.leaves, record.global_weights, strict=True)},
        {name: _checksum(array) for name, array in record.checkpoint.items()},
    )
    rows = table.build_table(record, run.leaves, squares, checksums, summary)
    durable.replace_file(folder.clients_file(path, number), [table.to_parquet(rows)])
    folder.clear_checkpoints(path, number)


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
        if _checksum(array) != expected[name]:
            raise LedgerError(f"Expected the bytes that were written, found others, in {name!r} of {path}.")
    return {name: arrays[name] for name in expected}


def _weights(run: Run, record: RoundRecord, squares: AnyArray, checksums: AnyArray) -> Iterator[Any]:
    """The pieces of a round's weights file; fills in each client's squared norms and checksums as they pass."""
    clients = len(squares)
    tensors = {f"global/{leaf.name}": (leaf.dtype, leaf.shape) for leaf in run.leaves}
    tensors |= {f"local/{leaf.name}": (leaf.dtype, (clients, *leaf.shape)) for leaf in run.leaves}
    columns = {name: column % len(run.leaves) for column, name in enumerate(tensors)}
    start, order = tensorfile.layout(tensors)
    yield start
    for name in order:
        column = columns[name]
        reference = np.asarray(record.global_weights[column])
        if name.startswith("global/"):
            yield tensorfile.as_bytes(reference)
            continue
        step = max(1, _BLOCK // max(1, reference.nbytes))
        row = 0
        for part in record.parts:
            for first in range(0, len(part.ids), step):
                block = np.asarray(part.weights[column])[first : first + step]
                stored = tensorfile.as_bytes(block)
                rows = slice(row, row + len(block))
                squares[rows, column] = measure.squared_norms(block, reference)
                checksums[rows, column] = measure.checksums(stored.reshape(len(block), -1))
                row += len(block)
                yield stored


def _checksum(array: AnyArray) -> int:
    return zlib.crc32(tensorfile.as_bytes(np.asarray(array)))
