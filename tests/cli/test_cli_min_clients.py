"""`min_clients` in the configuration of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlens.cli import config
from fedlens.errors import ConfigError


def parsed(tiny_text, line):
    return config.parse(tiny_text.replace("rounds = 3", f"rounds = 3\n{line}"), "x.toml")


def test_it_is_a_number_of_clients_and_1_if_left_out(tiny_text):
    assert config.parse(tiny_text, "x.toml").min_clients == 1
    assert parsed(tiny_text, "min_clients = 5").min_clients == 5


@pytest.mark.parametrize("wrong", ["0", "-2", "true", '"5"', "2.5"])
def test_anything_else_is_refused_by_name_and_line(tiny_text, wrong):
    with pytest.raises(ConfigError, match=r"Expected min_clients to be .* in x.toml, line 3"):
        parsed(tiny_text, f"min_clients = {wrong}")


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ("clients_per_round = 4\nmin_clients = 5", "clients_per_round"),
        ("min_clients = 5\n\n[evaluation]\nclients = 4\n", "evaluation clients"),
    ],
)
def test_no_fewer_clients_are_drawn_than_an_aggregate_may_be_over(tiny_text, lines, key):
    with pytest.raises(ConfigError, match=f"Expected {key} of at least 5, the min_clients .*found 4, in x.toml, line"):
        parsed(tiny_text, lines)


def test_a_run_over_fewer_clients_stops_before_its_first_round(fedlens, tiny_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("many.toml").write_text(tiny_text.replace("rounds = 3", "rounds = 3\nmin_clients = 15"))
    failed = fedlens("run", "many.toml")
    assert failed.exit_code == 1
    assert "Expected at least 15 clients in output" in failed.stderr
    assert "found 14." in failed.stderr
    assert not list(Path("runs").rglob("rounds/*.parquet"))
