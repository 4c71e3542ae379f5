"""Summaries are plain JSON, tables show them whole, and what a client is called cannot upset a terminal."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from fedlens.report import consoles, summaries, tables
from fedlens.report.clients import ClientComparison


def shown(table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=1000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def test_every_summary_is_json(make_ledger):
    ledger = make_ledger(metrics=lambda number: {"loss": math.nan, "test_accuracy": math.inf, "clients": 3})
    stored = ledger.round(1)
    for summary in (
        summaries.summarize_run(ledger),
        summaries.summarize_round(stored),
        summaries.summarize_client(ledger, "bob"),
        summaries.summarize_local_model(stored, "bob"),
    ):
        assert json.loads(json.dumps(summaries.finite(summary), allow_nan=False))
    assert summaries.finite(summaries.summarize_ledger(ledger))["last_metrics"]["loss"] is None


def test_a_ledger_in_short(make_ledger):
    summary = summaries.summarize_ledger(make_ledger(rounds=2, planned=5))
    assert (summary["rounds"], summary["planned_rounds"], summary["clients"]) == (2, 5, 3)
    assert (summary["state"], summary["parameters"]) == ("interrupted", 24)
    assert summary["last_metrics"]["test_accuracy"] == 0.1
    empty = summaries.summarize_ledger(make_ledger(rounds=0, planned=5))
    assert (empty["rounds"], empty["clients"], empty["last_metrics"]) == (0, 0, {})
    both = shown(tables.ledgers_table([("short", summary), ("empty", empty)]))
    assert "2/5" in both
    assert "test accuracy 0.1000" in both
    assert "0/5" in both


def test_a_local_model_is_measured_by_its_weights(make_ledger):
    stored = make_ledger().round(3)
    summary = summaries.summarize_local_model(stored, "cleo")
    for leaf in summary["leaves"]:
        weights = stored["cleo"].leaves[leaf["leaf"]].astype(float)
        update = weights - stored.global_leaf(leaf["leaf"])
        assert leaf["norm"] == pytest.approx(np.linalg.norm(weights.ravel()))
        assert leaf["update_norm"] == pytest.approx(np.linalg.norm(update.ravel()), rel=1e-6)
    norms = [leaf["update_norm"] for leaf in summary["leaves"]]
    assert summary["update_norm"] == pytest.approx(np.linalg.norm(norms))


def test_rows_with_different_keys_and_nested_ones():
    table = shown(tables.rows_table([{"a_b": 1, "norms": {"x/y_z": 0.5}}, {"a_b": 2.0, "c": "word", "none": None}]))
    assert table.splitlines()[0].split() == ["a", "b", "x/y_z", "c", "none"]
    assert table.splitlines()[2].split() == ["1", "0.5"]
    assert table.splitlines()[3].split() == ["2", "word"]


def test_trouble_is_shown_only_where_there_is_some():
    quiet, loud = ({"round": 0, "clients_dropped": 0}, {"round": 1, "clients_dropped": 2})
    assert "dropped" not in shown(tables.rows_table([quiet]))
    assert "clients dropped" in shown(tables.rows_table([quiet, loud]))


def test_a_client_id_cannot_speak_to_the_terminal():
    table = shown(tables.rows_table([{"client": "\x1b[31mred"}, {"client": "[bold]x[/bold]"}, {"client": "a\nb"}]))
    assert "\x1b" not in table
    assert "[bold]x[/bold]" in table
    assert r"'a\nb'" in table


COMPARED = ClientComparison("ann", 3, 1200, 0, math.nan, 0.5, 0.98765, 0.25)


def test_the_comparison_of_clients():
    table = shown(tables.comparison_table([COMPARED], clients=1, evaluated=50, evaluated_examples=1234))
    assert "ann 1,200 - 50.0 % 98.8 % 0.250" in " ".join(table.split())
    assert "those of 50 clients together (1,234)" in " ".join(table.split())
    assert "of the last round" not in table
    many = shown(tables.comparison_table([COMPARED], clients=656, evaluated=50, evaluated_examples=1))
    assert "1 of 656 clients, by their last stored models." in " ".join(many.split())


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (46_512_359, "46.5 MB"), (5e12, "5.0 TB")]
)
def test_sizes(count, text):
    assert tables.size(count) == text


def test_a_pipe_gets_tables_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    consoles.results().print(tables.rows_table([{f"metric number {number}": number for number in range(50)}]))
    consoles.messages().print("message")
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert "metric number 49" in out
    assert err == "message\n"
