"""Reads a ledger: its rounds, and over the rounds its clients, metrics and table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fedlens.errors import LedgerError
from fedlens.ledger import durable, folder, format, tensorfile
from fedlens.ledger.format import NotInLedgerError, Run
from fedlens.ledger.stored import LedgerRound


class Ledger:
    """A ledger, read from its folder; one that is still being written shows the rounds committed so far.

    Attributes:
      path: the folder.
      run: what `run.json` says.

    Raises:
      LedgerError: there is no ledger, its `run.json` is damaged, or this fedlens does not read its format.

    Example:
      >>> ledger = Ledger("runs/digits")
      >>> ledger.round(12)["form-03"].update_norm
      0.8312
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.run: Run = format.read_run(self.path)

    def __repr__(self) -> str:
        return f"Ledger({str(self.path)!r}, {len(self.rounds)} of {self.planned_rounds} rounds, {self.state})"

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's configuration."""
        return self.run.config

    @property
    def planned_rounds(self) -> int:
        """How many rounds make the run complete."""
        return self.run.planned_rounds

    @property
    def leaf_names(self) -> list[str]:
        """The model's leaves, in field order."""
        return [leaf.name for leaf in self.run.leaves]

    @property
    def rounds(self) -> list[int]:
        """The committed rounds."""
        return folder.committed_rounds(self.path)

    @property
    def state(self) -> str:
        """`complete` when all planned rounds are committed, else `running` while a writer has it or `interrupted`."""
        # The lock is looked at first: a writer that commits its last round and goes in between leaves `complete`.
        locked = self._is_locked()
        if self.planned_rounds - 1 in self.rounds:
            return "complete"
        return "running" if locked else "interrupted"

    @property
    def clients(self) -> list[str]:
        """The ids of all clients that took part, in the order in which they first did."""
        return list(dict.fromkeys(client for number in self.rounds for client in self.round(number)))

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        return durable.size_below(self.path)

    def metrics(self) -> list[dict[str, Any]]:
        """The server's metrics, one dict a round: `round` and what the run reported."""
        return [{**self.round(number).metrics, "round": number} for number in self.rounds]

    def round(self, number: int) -> LedgerRound:
        """One round.

        Raises:
          NotInLedgerError: the round was not reached, or was not committed.
          LedgerError: its files are damaged.
        """
        rounds = self.rounds
        if number not in rounds:
            torn = folder.weights_file(self.path, number).exists() if isinstance(number, int) else False
            found = "one that was interrupted before its commit" if torn else f"rounds {_span(rounds)}"
            raise NotInLedgerError(f"Expected a committed round, found {found}, for round {number}, in {self.path}.")
        return LedgerRound(self.path, self.run, number)

    def table(self) -> pa.Table:
        """The tables of clients of all rounds, one row a client and round; a metric that a round lacks is null."""
        tables = [self.round(number).table() for number in self.rounds]
        return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})

    def client(self, client_id: str) -> list[dict[str, Any]]:
        """One client's way through the run: a dict for each round it took part in.

        Each has `round`, `position`, `num_examples`, the client's metrics, `update_norm` and `leaf_norms`, a dict from
        leaf to the norm of its update.

        Raises:
          NotInLedgerError: the client took part in no round.
        """
        rows = []
        for number in self.rounds:
            round_table = self.round(number).table()
            for row in round_table.filter(pc.equal(round_table.column("client"), client_id)).to_pylist():
                norms = {leaf["leaf"]: leaf["norm"] for leaf in row.pop("leaves")}
                rows.append({name: row[name] for name in row if name not in ("part", "row")} | {"leaf_norms": norms})
        if not rows:
            hint = format.nearest(client_id, self.clients)
            raise NotInLedgerError(f"Expected a client of this run, found {client_id!r}, in {self.path}. {hint}")
        return rows

    def export(self, round: int, client: str, path: str | os.PathLike[str]) -> None:  # noqa: A002
        """Writes one local model as a safetensors file with the leaves' own names; it appears whole or not at all.

        Raises:
          NotInLedgerError: there is no such round or client.
          LedgerError: the stored model is damaged, or the file cannot be written.
        """
        target = Path(path)
        pieces = tensorfile.whole_file(self.round(round)[client].leaves)
        try:
            durable.replace_file(target, pieces)
        except OSError as error:
            raise LedgerError(
                f"Expected to export client {client!r} of round {round}, found: {error.strerror}, in {target}."
            ) from error

    def _is_locked(self) -> bool:
        try:
            return durable.is_locked(self.path / folder.RUN)
        except OSError as error:
            raise LedgerError(
                f"Expected a readable file, found: {error.strerror}, in {self.path / folder.RUN}."
            ) from error


def _span(rounds: list[int]) -> str:
    return f"{rounds[0]} to {rounds[-1]}" if rounds else "none"
