"""A ledger of format version 1, as its specification had it, written with safetensors and pyarrow alone."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from fedlens.ledger import ClientPart, Ledger, LedgerWriter, RoundRecord

RNG = np.random.default_rng(0)
GLOBAL = RNG.normal(size=3).astype(np.float32)
LOCAL = RNG.normal(size=(2, 3)).astype(np.float32)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Two rounds of three planned, whose clients report a metric that version 2 has a column of its own for."""
    folder = tmp_path / "old"
    for name in ("rounds", "checkpoints"):
        (folder / name).mkdir(parents=True)
    run = {
        "format": "fedlens-ledger",
        "format_version": 1,
        "planned_rounds": 3,
        "encoding": "raw",
        "config": {"lr": 0.1},
        "skeleton": {"fields": [["w", None]]},
        "leaves": [{"name": "w", "shape": [3], "dtype": "float32"}],
        "versions": {"fedlens": "0.1.0"},
        "policy": None,
    }
    (folder / "run.json").write_text(json.dumps(run))
    for number in range(2):
        save_file({"global/w": GLOBAL, "local/w": LOCAL}, folder / f"rounds/{number:06d}.safetensors")
        norms = np.linalg.norm(LOCAL - GLOBAL, axis=1)
        leaves = [
            [{"leaf": "w", "norm": norm, "checksum": zlib.crc32(row)}] for norm, row in zip(norms, LOCAL, strict=True)
        ]
        leaf_row = pa.struct([("leaf", pa.string()), ("norm", pa.float64()), ("checksum", pa.uint32())])
        summary = {
            "round": number,
            "metrics": {"loss": 1.0},
            "global_checksums": {"w": zlib.crc32(GLOBAL)},
            "checkpoint_checksums": {"key": zlib.crc32(np.uint32(number).tobytes())},
        }
        table = pa.table(
            {
                "round": pa.array([number] * 2, pa.int64()),
                "client": ["ann", "bob"],
                "position": pa.array([0, 1], pa.int64()),
                "part": pa.array([0, 0], pa.int64()),
                "row": pa.array([0, 1], pa.int64()),
                "num_examples": pa.array([4, 5], pa.int64()),
                "loss": [0.5, 0.25],
                "cosine": [0.125, 8.0],
                "update_norm": norms.astype(np.float64),
                "leaves": pa.array(leaves, pa.list_(leaf_row)),
            }
        ).replace_schema_metadata({"fedlens": json.dumps(summary)})
        pq.write_table(table, folder / f"rounds/{number:06d}.parquet")
    save_file({"key": np.array(1, np.uint32)}, folder / "checkpoints/000001.safetensors")
    return folder


def test_version_1_is_read(old):
    ledger = Ledger(old)
    assert ledger.run.format_version == 1
    assert ledger.rounds == [0, 1]
    round_ = ledger.round(1)
    np.testing.assert_array_equal(round_["bob"].weights["w"], LOCAL[1])
    np.testing.assert_array_equal(round_.leaf("w"), LOCAL)
    row = round_.table().to_pylist()[1]
    assert (row["dropped"], row["cosine"], row["own_cosine"]) == (None, None, 8.0)
    assert row["leaves"][0]["scale"] is None
    assert round_.table().schema.names[-4:] == ["dropped", "update_norm", "cosine", "leaves"]


def test_version_1_is_continued_as_version_2(old):
    part = ClientPart(("ann",), np.array([0]), [LOCAL[:1]], np.array([4]), {"loss": np.array([0.125])})
    with LedgerWriter.open(old) as writer:
        assert writer.checkpoint()["key"] == 1
        writer.record(RoundRecord(2, [GLOBAL], [part], {}, {"key": np.uint32(2)}))
    ledger = Ledger(old)
    assert json.loads((old / "run.json").read_text())["format_version"] == 2
    assert ledger.run.format_version == 2
    assert ledger.run.leaves[0].encoding == "raw"
    assert ledger.state == "complete"
    assert ledger.table().column("loss").to_pylist() == [0.5, 0.25, 0.5, 0.25, 0.125]
    np.testing.assert_array_equal(ledger.round(0)["bob"].weights["w"], LOCAL[1])


def test_clients_are_removed_from_version_1_and_the_rest_stays(old):
    before = pq.read_table(old / "rounds/000001.parquet").to_pylist()[1]
    Ledger(old).prune(drop_clients=["ann"])
    ledger = Ledger(old)
    assert ledger.run.format_version == 2
    assert ledger.verify() == []
    np.testing.assert_array_equal(ledger.round(1)["bob"].weights["w"], LOCAL[1])
    (after,) = pq.read_table(old / "rounds/000001.parquet").to_pylist()
    assert after == before | {"part": 1, "row": 0}
    assert ledger.clients == ["bob"]
