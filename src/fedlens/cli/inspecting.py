"""`fedlens ls`, `show` and `export`: what ledgers hold, without loading JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlens.cli.printing import print_json
from fedlens.errors import LedgerError
from fedlens.ledger import Ledger, find_ledgers
from fedlens.report import summaries, tables
from fedlens.report.consoles import messages, results

_RUNS = Path("runs")


def list_ledgers(folder: Path | None, *, as_json: bool) -> None:
    """Prints the ledgers in `folder`, or in runs; one that cannot be read says so in its row.

    Raises:
      LedgerError: `folder` is no folder.
    """
    root = folder or _RUNS
    paths = find_ledgers(root) if folder is not None or root.is_dir() else []
    found = [(_name(path, root), _summary(path)) for path in paths]
    if as_json:
        print_json([{"name": name} | summary for name, summary in found])
    elif found:
        results().print(tables.ledgers_table(found))
    else:
        messages().print(f"No ledgers in {root}. Start one: fedlens run digits")


def show(folder: Path, number: int | None, client: str | None, *, as_json: bool) -> None:
    """Prints a run, a round, a client's trajectory, or one local model.

    Raises:
      LedgerError: there is no such ledger, round or client, or it is damaged.
    """
    ledger = Ledger(folder)
    if number is None and client is None:
        _show(summaries.summarize_run(ledger), "metrics", as_json, heading=tables.run_table)
    elif number is None:
        _show(summaries.summarize_client(ledger, str(client)), "rounds", as_json)
    elif client is None:
        _show(summaries.summarize_round(ledger.round(number)), "clients", as_json, heading=_round_heading)
    else:
        _show(summaries.summarize_local_model(ledger.round(number), client), "leaves", as_json, heading=_model_heading)


def export(folder: Path, number: int, client: str, out: Path) -> None:
    """Writes one local model to a new file.

    Raises:
      LedgerError: there is no such ledger, round or client, `out` exists, or it cannot be written.
    """
    ledger = Ledger(folder)
    if out.exists():
        raise LedgerError(f"Expected the name of a new file, found one that exists: {out}. Choose another name.")
    ledger.export(number, client, out)
    messages().print(f"Wrote the local model of client {client!r} after round {number} to {out}.")


def _show(summary: summaries.Summary, rows: str, as_json: bool, heading: Any = None) -> None:
    if as_json:
        print_json(summary)
        return
    if heading is not None:
        results().print(heading(summary))
        results().print()
    if summary[rows]:
        results().print(tables.rows_table(summary[rows]))


def _round_heading(summary: summaries.Summary) -> Any:
    return tables.rows_table([{"round": summary["round"]} | summary["metrics"]])


def _model_heading(summary: summaries.Summary) -> Any:
    facts = {name: summary[name] for name in ("client", "round", "num_examples", "update_norm")}
    return tables.rows_table([facts | summary["metrics"]])


def _summary(path: Path) -> summaries.Summary:
    try:
        return summaries.summarize_ledger(Ledger(path))
    except LedgerError as error:
        return {"path": str(path), "error": str(error)}


def _name(path: Path, root: Path) -> str:
    return path.resolve().name if path == root else str(path.relative_to(root))
