"""Tables of ledgers, rounds, clients and local models, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fedlens.report.clients import ClientComparison
from fedlens.report.summaries import Summary

_TROUBLE = ("clients_without_examples", "clients_dropped")
_STATES = {"complete": "green", "running": "cyan", "interrupted": "yellow", "damaged": "red"}


def ledgers_table(ledgers: Iterable[tuple[str, Summary]]) -> Table:
    """Ledgers by name, each with its `summarize_ledger`, or with an `error` when it cannot be read."""
    table = _table(["Name", "Rounds", "Clients", "Size", "State", "Last metric"], text_columns={0, 4, 5})
    for name, summary in ledgers:
        if "error" in summary:
            table.add_row(_text(name), "", "", "", _state("damaged"), _text(summary["error"]))
            continue
        table.add_row(
            _text(name),
            f"{summary['rounds']}/{summary['planned_rounds']}",
            f"{summary['clients']:,}",
            size(summary["size_bytes"]),
            _state(summary["state"]),
            last_metric(summary["last_metrics"]),
        )
    return table


def run_table(summary: Summary) -> Table:
    """What a run is, one fact a line; `summary` is of `summarize_ledger`."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("Ledger", _text(summary["path"]))
    table.add_row("State", _state(summary["state"]))
    table.add_row("Rounds", f"{summary['rounds']} of {summary['planned_rounds']}")
    table.add_row("Clients", f"{summary['clients']:,}")
    table.add_row("Parameters", f"{summary['parameters']:,}")
    table.add_row("Size", size(summary["size_bytes"]))
    return table


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of numbers and text, one column for each key that any of them has.

    The entries of a nested mapping get a column each, headed by their own names. A key that a row lacks leaves its cell
    empty; what counts clients that went wrong is left out while none did.
    """
    flat = [dict(_flatten(row)) for row in rows]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    keys = [key for key in keys if key[-1] not in _TROUBLE or any(row.get(key) for row in flat)]
    text_columns = {place for place, key in enumerate(keys) if any(isinstance(row.get(key), str) for row in flat)}
    table = _table([key[-1] if len(key) > 1 else key[0].replace("_", " ") for key in keys], text_columns)
    for row in flat:
        table.add_row(*(_cell(row.get(key)) for key in keys))
    return table


def comparison_table(rows: Sequence[ClientComparison], clients: int, evaluated: int, evaluated_examples: int) -> Table:
    """What local training did for each client.

    Args:
      rows: the clients to show.
      clients: how many took part in the run.
      evaluated: how many clients' held-out examples "everybody's" are.
      evaluated_examples: how many examples those are.
    """
    headings = ["Client", "Examples", "Own: local", "Own: global", "Everybody's: local", "Distance"]
    table = _table(headings, text_columns={0})
    for row in rows:
        table.add_row(
            _text(row.client_id),
            f"{row.num_examples:,}",
            percent(row.local_at_home),
            percent(row.global_at_home),
            percent(row.local_everywhere),
            f"{row.distance:.3f}",
        )
    shown = f"{len(rows)} of {clients:,} clients, by their last stored models. " if len(rows) < clients else ""
    table.caption = Text(
        f"{shown}Accuracy of a client's local model and of the global model on its own held-out examples, and of the "
        f"local model on those of {evaluated:,} clients together ({evaluated_examples:,}). Distance: L2 norm between "
        "the weights of local and global model.",
        style="dim",
    )
    table.caption_justify = "left"
    return table


def last_metric(metrics: Mapping[str, float]) -> str:
    """The metric that says most about a run: held-out accuracy, else accuracy, else a loss."""
    for name in ("test_accuracy", "accuracy", "test_loss", "loss"):
        if name in metrics:
            return f"{name.replace('_', ' ')} {metrics[name]:.4f}"
    return ""


def percent(share: float) -> str:
    """A share as a percentage; a dash for the share of nothing."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else "-"


def size(count: float) -> str:
    """A number of bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _table(headings: Sequence[str], text_columns: set[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for place, heading in enumerate(headings):
        table.add_column(_text(heading), justify="left" if place in text_columns else "right", overflow="fold")
    return table


def _flatten(row: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*above, key))
        else:
            yield (*above, key), value


def _cell(value: Any) -> Text:
    if value is None:
        return Text("")
    if isinstance(value, float):
        return Text(f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}")
    if isinstance(value, list):
        return Text("x".join(map(str, value)) or "scalar")
    return _text(str(value))


def _text(value: str) -> Text:
    """Text as it is; what a terminal would not print, or would obey, is escaped."""
    return Text(value if value.isprintable() else repr(value))


def _state(state: str) -> Text:
    return Text(state, style=_STATES[state])
