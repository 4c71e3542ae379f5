"""`Ledger.usage` and `fedlens du`: the bytes that the file system counts, and those that shapes and dtypes give."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fedlens.cli.app import app
from fedlens.ledger import Keep, Ledger
from fedlens.report.tables import size

CLIENTS, ROUNDS = 5, 3


def write(path, **options):
    """5 clients in 3 rounds: a leaf of 12 float32 and one of 7 int64."""
    weights = {"kernel": np.zeros((4, 3), np.float32), "counts": np.zeros(7, np.int64)}
    with Ledger.create(path, weights=weights, **options) as recorder:
        for number in range(ROUNDS):
            for client in range(CLIENTS):
                recorder.record(number, f"c{client}", weights)
    return path


@pytest.mark.parametrize(
    ("options", "kernel", "counts"),
    [
        ({}, 12 * 4 * CLIENTS * ROUNDS, 7 * 8 * CLIENTS * ROUNDS),
        ({"encodings": "int8-delta"}, 12 * CLIENTS * ROUNDS, 7 * 8 * CLIENTS * ROUNDS),
        ({"keep": Keep(leaves="counts", every=2, clients=["c0"])}, 0, 7 * 8 * 2),
    ],
    ids=["raw", "int8-delta", "kept"],
)
def test_every_byte_is_counted_once(tmp_path, options, kernel, counts):
    path = write(tmp_path / "run", **options)
    (path / "overview.png").write_bytes(b"x" * 321)
    (path / "rounds/000009.safetensors").write_bytes(b"torn")
    usage = Ledger(path).usage()
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    assert list(usage.rounds) == [0, 1, 2]
    for number, each in usage.rounds.items():
        assert each.table == sizes[f"rounds/{number:06d}.parquet"]
        assert each.weights == sum(
            count for name, count in sizes.items() if name.startswith(f"rounds/{number:06d}.") and "safe" in name
        )
    assert usage.checkpoints == sizes["checkpoints/000002.safetensors"]
    assert usage.catalogue == sizes["run.json"] + sum(each.table for each in usage.rounds.values())
    assert usage.other == 325
    assert usage.total == sum(sizes.values()) == Ledger(path).size_bytes
    assert usage.leaves["kernel"].local == kernel
    assert usage.leaves["counts"].local == counts
    assert (usage.leaves["kernel"].global_, usage.leaves["counts"].global_) == (12 * 4 * ROUNDS, 7 * 8 * ROUNDS)


def test_a_damaged_file_counts_in_its_round(tmp_path):
    path = write(tmp_path / "run")
    before = Ledger(path).usage()
    file = path / "rounds/000001.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    after = Ledger(path).usage()
    assert (after.rounds, after.total) == (before.rounds, before.total)
    assert after.leaves["kernel"].local == before.leaves["kernel"].local * 2 // 3


def test_the_command(tmp_path):
    path = write(tmp_path / "run")
    usage = Ledger(path).usage()
    shown = CliRunner().invoke(app, ["du", str(path)], prog_name="fedlens")
    assert shown.exit_code == 0, shown.stderr
    for count in (usage.total, usage.checkpoints, usage.rounds[1].weights, usage.leaves["kernel"].local):
        assert size(count) in shown.stdout
    as_json = json.loads(CliRunner().invoke(app, ["du", str(path), "--json"], prog_name="fedlens").stdout)
    assert as_json["total"] == usage.total
    assert [row["round"] for row in as_json["rounds"]] == [0, 1, 2]
    assert {row["leaf"]: row["local"] for row in as_json["leaves"]} == {
        name: each.local for name, each in usage.leaves.items()
    }
    missing = CliRunner().invoke(app, ["du", str(tmp_path / "nowhere")], prog_name="fedlens")
    assert (missing.exit_code, missing.stdout) == (1, "")
