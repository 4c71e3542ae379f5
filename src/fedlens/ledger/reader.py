"""Reads a ledger: its rounds, and over the rounds its clients, metrics and table, by SQL and as arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fedlens import trees  # not `from fedlens import`: see format.py
from fedlens.errors import LedgerError
from fedlens.ledger import convert, dataset, durable, folder, format, prune, sql, table, tensorfile, usage, verify
from fedlens.ledger.catalogue import Catalogue
from fedlens.ledger.format import NotInLedgerError, Run
from fedlens.ledger.keep import Keep
from fedlens.ledger.prune import Pruned
from fedlens.ledger.recorder import Recorder
from fedlens.ledger.storage import LocalStore, open_store
from fedlens.ledger.stored import LedgerRound
from fedlens.ledger.tensorfile import AnyArray
from fedlens.ledger.usage import Usage
from fedlens.ledger.verify import Damage


class Ledger:
    """A ledger, read where it lies; one that is still being written shows the rounds committed so far.

    Attributes:
      run: what `run.json` says.

    Raises:
      LedgerError: there is no ledger, its `run.json` is damaged, or this fedlens does not read its format.

    Example:
      >>> ledger = Ledger("runs/digits")
      >>> ledger.round(12)["form-03"].update_norm
      0.8312
    """

    def __init__(self, path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> None:
        """Opens a ledger.

        Args:
          path: its folder, or the URL of one that fsspec opens, such as `s3://bucket/runs/digits`; that is read in
            place, by ranges of bytes.
          storage_options: for a URL what fsspec's file system takes, such as `{"anon": True}`.
        """
        self._store = open_store(path, storage_options)
        if self._store.stamp(folder.RUN) is None:
            raise LedgerError(
                f"Expected a ledger, a folder with {folder.RUN}, found: No such file or directory, "
                f"in {self.location}. Check the path."
            )
        self.run: Run = format.parse_run(self._store.read(folder.RUN), self._store.where(folder.RUN))
        self._catalogue = Catalogue(self._store, self.run)

    @staticmethod
    def create(
        path: str | os.PathLike[str],
        *,
        weights: trees.PyTree,
        config: Mapping[str, Any] | None = None,
        rounds: int | None = None,
        encodings: str | Mapping[str, str] | None = None,
        keep: Keep | None = None,
    ) -> Recorder:
        """Starts a ledger that any training loop fills, client by client and from any thread; see `Recorder`.

        Args:
          path: a folder that does not exist or is empty.
          weights: the global model before the first round: a pytree of arrays, or a PyTorch `state_dict`.
          config: the run's configuration, as JSON has it.
          rounds: how many rounds are planned; None leaves it open.
          encodings: how clients' leaves are stored: "raw", "bf16-delta" or "int8-delta", or pattern of leaf names ->
            one of these; None is raw.
          keep: whose weights are stored, see `Keep`; None is everybody's.

        Raises:
          LedgerError: there is a ledger already, the folder is not empty or cannot be written, or an argument is not
            what a ledger can hold.
        """
        return Recorder.create(path, weights=weights, config=config, rounds=rounds, encodings=encodings, keep=keep)

    @staticmethod
    def append(path: str | os.PathLike[str]) -> Recorder:
        """Continues a ledger that `create` started, after its last committed round.

        Raises:
          LedgerError: there is none, it has no round yet or is damaged, or another writer has it.
        """
        return Recorder.append(path)

    def __repr__(self) -> str:
        planned = "" if self.planned_rounds is None else f" of {self.planned_rounds}"
        return f"Ledger({self.location!r}, {len(self.rounds)}{planned} rounds, {self.state})"

    @property
    def location(self) -> str:
        """The folder or the URL."""
        return self._store.where()

    @property
    def path(self) -> Path:
        """The folder.

        Raises:
          LedgerError: the ledger lies elsewhere than on this machine.
        """
        if not isinstance(self._store, LocalStore):
            raise LedgerError(f"Expected a ledger in a local folder, found one at {self.location}. Copy it first.")
        return self._store.path

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's configuration."""
        return self.run.config

    @property
    def planned_rounds(self) -> int | None:
        """How many rounds make the run complete; None in a run without a plan."""
        return self.run.planned_rounds

    @property
    def leaf_names(self) -> list[str]:
        """The model's leaves, in field order."""
        return [leaf.name for leaf in self.run.leaves]

    @property
    def rounds(self) -> list[int]:
        """The committed rounds."""
        return self._catalogue.rounds()

    @property
    def state(self) -> str:
        """`complete` when all planned rounds are committed, else `running` while a writer has it or `interrupted`.

        A run without a plan is `running` while a writer has it, and `complete` otherwise. From elsewhere than a local
        folder no writer is seen.
        """
        # The lock is looked at first: a writer that commits its last round and goes in between leaves `complete`.
        locked = self._store.is_locked(folder.RUN)
        if self.planned_rounds is None:
            return "running" if locked else "complete"
        if self.planned_rounds - 1 in self.rounds:
            return "complete"
        return "running" if locked else "interrupted"

    @property
    def clients(self) -> list[str]:
        """The ids of all clients that took part, in the order in which they first did."""
        tables = self._catalogue.tables()
        return list(dict.fromkeys(client for each in tables for client in each.column("client").to_pylist()))

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        return self._store.total_size()

    def metrics(self) -> list[dict[str, Any]]:
        """The server's metrics, one dict a round: `round` and what the run reported."""
        summaries = [table.read_summary(each, self.location) for each in self._catalogue.tables()]
        return [{**summary.metrics, "round": summary.round} for summary in summaries]

    def round(self, number: int) -> LedgerRound:
        """One round.

        Raises:
          NotInLedgerError: the round was not reached, or was not committed.
          LedgerError: its table is damaged.
        """
        found = self._catalogue.table(number)
        if found is not None:
            return LedgerRound(self._store, self.run, int(number), found)
        torn = type(number) is int and self._store.stamp(folder.weights_file(Path(), number).as_posix()) is not None
        there = "one that was interrupted before its commit" if torn else f"rounds {_span(self.rounds)}"
        raise NotInLedgerError(f"Expected a committed round, found {there}, for round {number}, in {self.location}.")

    def table(self) -> pa.Table:
        """The tables of clients of all rounds, one row a client and round; a metric that a round lacks is null.

        Raises:
          LedgerError: a table is damaged, or a metric has types in two rounds that do not go together.
        """
        return self._catalogue.whole()

    def client(self, client_id: str) -> list[dict[str, Any]]:
        """One client's way through the run: a dict for each round it took part in.

        Each has `round`, `position`, `num_examples`, the client's metrics, `update_norm` and `leaf_norms`, a dict from
        leaf to the norm of its update.

        Raises:
          NotInLedgerError: the client took part in no round.
        """
        rows = []
        for each in self._catalogue.tables():
            for row in each.filter(pc.equal(each.column("client"), pa.scalar(client_id, pa.string()))).to_pylist():
                norms = {leaf["leaf"]: leaf["norm"] for leaf in row.pop("leaves")}
                rows.append({name: row[name] for name in row if name not in ("part", "row")} | {"leaf_norms": norms})
        if not rows:
            hint = format.nearest(client_id, self.clients)
            raise NotInLedgerError(f"Expected a client of this run, found {client_id!r}, in {self.location}. {hint}")
        return rows

    def sql(self, query: str, parameters: Sequence[Any] | Mapping[str, Any] | None = None) -> sql.Result:
        """What a SQL query over the clients of all rounds gives; DuckDB runs it, and it reads nothing but these views.

        `clients` has a row for each client and round: all columns of `table` but `leaves`. `local_models` has one for
        each client, round and leaf: `round`, `client`, `leaf`, `norm` (of the leaf's update), `checksum` (of the stored
        bytes; null when the weights were not kept).

        Args:
          query: one query. A table or metric whose name is no SQL word goes in double quotes.
          parameters: values for `?` or `$1` (a sequence) or `$name` (a mapping) in it.

        Raises:
          LedgerError: the query is wrong, is no query, asks for anything outside the ledger, or a table is damaged.

        Example:
          >>> ledger.sql("select client, avg(norm) from local_models where round > ? group by 1", [10]).df()
        """
        return sql.run(self.table(), query, parameters)

    def to_numpy(
        self,
        round: int,  # noqa: A002
        client: str | None = None,
        leaves: str | Sequence[str] | None = None,
    ) -> dict[str, AnyArray]:
        """Local models of one round as NumPy arrays, leaf -> array.

        Args:
          round: which.
          client: whose; None is everybody whose weights were kept, in the order of `LedgerRound.kept_ids`.
          leaves: pattern or patterns of leaf names, such as "dense/*"; None is all that were kept.

        Returns:
          Each leaf as [*leaf] of the one client, [clients, *leaf] of all.

        Raises:
          NotInLedgerError: there is no such round, client or leaf, or its weights were not kept.
          LedgerError: the stored bytes are damaged.
        """
        return convert.to_numpy(self.round(round), client, leaves)

    def to_torch(
        self,
        round: int,  # noqa: A002
        client: str | None = None,
        leaves: str | Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Like `to_numpy`, as PyTorch tensors. Axes are those of the stored leaves, nothing is transposed.

        Raises:
          NotInLedgerError: see `to_numpy`.
          LedgerError: the stored bytes are damaged, PyTorch is not installed, or has no such dtype.
        """
        return convert.to_torch(self.round(round), client, leaves)

    def to_xarray(self) -> Any:
        """The run as an `xarray.Dataset` over `round`, `client` and `leaf`; weights are read when they are looked at.

        It has the clients' metrics and counts as variables over (round, client), `leaf_norm` and `kept` over (round,
        client, leaf), the server's metrics as `server/<name>` over (round), the weights as `local/<leaf>` and the
        global model before each round as `global/<leaf>`, both with the leaf's axes. What is not there, as a client
        was not in a round or its weights were not kept, is NaN (counts are float64 then), or 0 among whole numbers.

        Raises:
          LedgerError: a table is damaged, or xarray is not installed.

        Example:
          >>> ledger.to_xarray()["local/dense/kernel"].sel(client="form-03").diff("round").values
        """
        return dataset.to_xarray(self.run, self.table(), self.metrics(), self.round)

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

    def verify(self, on_progress: Callable[[int, int], object] | None = None) -> list[Damage]:
        """Checks every file: its structure, and the checksum of every leaf of every client and global model.

        Args:
          on_progress: is told how many bytes of weights are read so far, and of how many.

        Returns:
          What is damaged, round by round; nothing in a ledger that is as it was written.

        Raises:
          LedgerError: the folder of rounds cannot be listed.

        Example:
          >>> [str(damage) for damage in ledger.verify()]
          ["round 3, client 'form-03', leaf 'dense/bias', rounds/000003.safetensors: other bytes than were written"]
        """
        return verify.verify(self._store, self.run, on_progress)

    def usage(self) -> Usage:
        """What the bytes of all files are spent on.

        Raises:
          LedgerError: a folder cannot be listed.
        """
        return usage.measure_usage(self._store, self.run)

    def prune(
        self,
        *,
        keep_every: int | None = None,
        drop_clients: Sequence[str] = (),
        dry_run: bool = False,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> Pruned:
        """Removes rounds, or clients with their weights and statistics; what was removed stands in `removals.jsonl`.

        Rounds are changed one after the other, each in one step. Killed meanwhile, or with the disk full, the ledger is
        whole, and the next `prune`, with these arguments or with none, finishes what was begun.

        Args:
          keep_every: of the rounds, 0, `keep_every`, 2 `keep_every`, ... stay, and the last one, from which the run is
            resumed; None keeps all.
          drop_clients: ids of clients to be removed from all rounds.
          dry_run: whether only to say what would be removed.
          on_progress: is told how many rounds are done, and of how many.

        Raises:
          NotInLedgerError: a client was never in the ledger. Nothing is removed then.
          LedgerError: a writer has the ledger, a round to be changed is damaged, or the disk refuses.

        Example:
          >>> ledger.prune(drop_clients=["form-03"]).clients
          {'form-03': (0, 1, 2)}
        """
        pruned = prune.prune(
            self.path, keep_every=keep_every, drop_clients=drop_clients, dry_run=dry_run, on_progress=on_progress
        )
        if not dry_run:
            self.run = format.read_run(self.path)
        return pruned


def _span(rounds: list[int]) -> str:
    return f"{rounds[0]} to {rounds[-1]}" if rounds else "none"
