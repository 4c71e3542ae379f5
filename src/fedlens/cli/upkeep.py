"""`fedlens verify`, `prune` and `du`: whether a ledger is whole, what to remove from it, where its bytes go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fedlens.cli.printing import print_json
from fedlens.ledger import Ledger, Pruned, Usage
from fedlens.report import tables
from fedlens.report.consoles import messages, results


def verify(folder: Path, *, as_json: bool) -> bool:
    """Checks a ledger and prints what is damaged; returns whether nothing is.

    Raises:
      LedgerError: there is no ledger, or its description is damaged.
    """
    ledger = Ledger(folder)
    with _progress("Verifying") as on_progress:
        damage = ledger.verify(on_progress)
    if as_json:
        print_json({"path": str(folder), "rounds": len(ledger.rounds), "damage": [asdict(each) for each in damage]})
    elif damage:
        results().print(tables.rows_table([asdict(each) for each in damage]))
        where = f"{len({each.round for each in damage})} of {len(ledger.rounds)} rounds"
        messages().print(f"{len(damage)} damaged, in {where}. Restore the files from a copy.")
    else:
        results().print(f"{folder} is whole: {len(ledger.rounds)} rounds, {len(ledger.table()):,} local models.")
    return not damage


def prune(folder: Path, keep_every: int | None, drop_clients: Sequence[str], *, dry_run: bool) -> None:
    """Removes rounds and clients from a ledger, and says what; see `Ledger.prune`.

    Raises:
      LedgerError: see `Ledger.prune`.
    """
    ledger = Ledger(folder)
    with _progress("Removing") as on_progress:
        pruned = ledger.prune(
            keep_every=keep_every, drop_clients=drop_clients, dry_run=dry_run, on_progress=on_progress
        )
    for line in _said(pruned, dry_run):
        results().print(line)
    for where in pruned.mentioned:
        messages().print(f"Note: a removed client's id still stands in {folder / 'run.json'}, at {where}.")


def usage(folder: Path, *, as_json: bool) -> None:
    """Prints what a ledger's bytes are spent on.

    Raises:
      LedgerError: there is no ledger, or it cannot be listed.
    """
    found = Ledger(folder).usage()
    if as_json:
        print_json(_as_json(found))
        return
    facts = {"checkpoints": found.checkpoints, "catalogue": found.catalogue, "other": found.other, "total": found.total}
    rounds = [{"round": number, **_sizes(asdict(each))} for number, each in found.rounds.items()]
    leaves = [{"leaf": name, "local": each.local, "global": each.global_} for name, each in found.leaves.items()]
    for rows in (rounds, [_sizes(row) for row in leaves], [_sizes(facts)]):
        if rows:
            results().print(tables.rows_table(rows))
            results().print()


def _said(pruned: Pruned, dry_run: bool) -> Iterator[str]:
    verb = "Would remove" if dry_run else "Removed"
    size = tables.size(pruned.size_bytes)
    if not pruned.rounds and not pruned.clients:
        yield "Nothing to remove."
        return
    if pruned.rounds:
        yield f"{verb} {len(pruned.rounds)} rounds: {', '.join(map(str, pruned.rounds))}."
    for client, rounds in pruned.clients.items():
        yield f"{verb} client {client!r} from {len(rounds)} rounds{' that stay' if pruned.rounds else ''}."
    yield f"{verb} {size} in all."


def _as_json(found: Usage) -> dict[str, object]:
    return {
        "rounds": [{"round": number, **asdict(each)} for number, each in found.rounds.items()],
        "leaves": [{"leaf": name, "local": each.local, "global": each.global_} for name, each in found.leaves.items()],
        "checkpoints": found.checkpoints,
        "catalogue": found.catalogue,
        "other": found.other,
        "total": found.total,
    }


def _sizes(row: Mapping[str, object]) -> dict[str, object]:
    return {name: tables.size(value) if isinstance(value, int) else value for name, value in row.items()}


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], object]]:
    """A bar on a terminal's standard error, which goes when the work is done; elsewhere nothing."""
    columns = [TextColumn(what), BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn(compact=True)]
    console = messages()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
