"""Damaged files: every one is answered by a `LedgerError` that names file and round, or is harmless."""

from __future__ import annotations

import json
import os
import shutil
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlens.errors import LedgerError
from fedlens.ledger import Ledger, LedgerWriter


def read_everything(path):
    ledger = Ledger(path)
    ledger.table()
    ledger.metrics()
    for number in ledger.rounds:
        stored = ledger.round(number)
        assert stored.global_weights is not None
        for name in ledger.leaf_names:
            stored.leaf(name)
        for model in stored.values():
            assert model.update is not None


def change_header(path, change):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def change_run(path, **fields):
    run = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(run | fields))


def change_summary(path, change):
    """Changes what a round's table says of the round, and takes its checksum away."""
    table = pq.read_table(path)
    summary = json.loads(table.schema.metadata[b"fedlens"])
    del summary["checksum"]
    change(summary)
    pq.write_table(table.replace_schema_metadata({"fedlens": json.dumps(summary)}), path)


def test_a_flipped_byte_is_found_in_its_leaf_and_nowhere_else(ledger_path):
    file = ledger_path / "rounds" / "000001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # the last client's part of the last local leaf
    file.write_bytes(data)
    stored = Ledger(ledger_path).round(1)
    last = stored.table().column("row").to_pylist().index(4)
    for place, client_id in enumerate(stored):
        if place != last:
            assert stored[client_id].weights is not None
    with pytest.raises(LedgerError, match=r"leaf 'dense/bias' of client .*round 1.*000001.safetensors"):
        stored.leaf("dense/bias")
    with pytest.raises(LedgerError, match="leaf 'dense/bias' of client"):
        assert stored[stored.ids[last]].weights
    stored.leaf("dense/kernel")
    read_everything_of_round_0 = Ledger(ledger_path).round(0)
    assert all(model.weights for model in read_everything_of_round_0.values())


def test_a_flipped_byte_of_the_global_model(ledger_path):
    file = ledger_path / "rounds" / "000000.safetensors"
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    data[8 + length] ^= 0x80
    file.write_bytes(data)
    with pytest.raises(LedgerError, match="leaf 'dense/kernel' of the global model, round 0"):
        assert Ledger(ledger_path).round(0).global_weights


def test_a_flipped_byte_of_the_checkpoint(ledger_path):
    file = ledger_path / "checkpoints" / "000001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with (
        LedgerWriter.open(ledger_path) as writer,
        pytest.raises(LedgerError, match=r"found others.*000001.safetensors"),
    ):
        writer.checkpoint()


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -2])
def test_a_truncated_file(ledger_path, kept):
    for name in ("rounds/000001.safetensors", "rounds/000001.parquet", "run.json"):
        file = ledger_path / name
        whole = file.read_bytes()
        file.write_bytes(whole[:kept])
        with pytest.raises(LedgerError, match=name.rpartition("/")[2] if name == "run.json" else "000001"):
            read_everything(ledger_path)
        file.write_bytes(whole)
    read_everything(ledger_path)


def test_bytes_too_many(ledger_path):
    with (ledger_path / "rounds" / "000000.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(LedgerError, match="header describes"):
        read_everything(ledger_path)


HEADER_CHANGES = {
    "unknown dtype": lambda header: header["local/dense/bias"].update(dtype="F128"),
    "other dtype": lambda header: header["local/dense/bias"].update(dtype="I32"),
    "other shape": lambda header: header["local/dense/bias"].update(shape=[3, 5]),
    "negative shape": lambda header: header["local/dense/bias"].update(shape=[-5, -3]),
    "shape of text": lambda header: header["local/dense/bias"].update(shape=["5", 3]),
    "huge shape": lambda header: header["local/dense/bias"].update(shape=[2**70, 3]),
    "offsets outside": lambda header: header["local/dense/bias"].update(data_offsets=[0, 2**40]),
    "offsets negative": lambda header: header["local/dense/bias"].update(data_offsets=[-60, 0]),
    "offsets of text": lambda header: header["local/dense/bias"].update(data_offsets="ab"),
    "no offsets": lambda header: header["local/dense/bias"].pop("data_offsets"),
    "leaf missing": lambda header: header.pop("local/dense/bias"),
    "leaf renamed": lambda header: header.update({"local/dense/b": header.pop("local/dense/bias")}),
    "entry no object": lambda header: header.update({"local/dense/bias": 3}),
}


@pytest.mark.parametrize("change", HEADER_CHANGES.values(), ids=HEADER_CHANGES.keys())
def test_a_header_that_lies(ledger_path, change):
    change_header(ledger_path / "rounds" / "000001.safetensors", change)
    with pytest.raises(LedgerError, match=r"Round 1: .*000001.safetensors"):
        Ledger(ledger_path).round(1).leaf("dense/bias")


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 200, b"\x05" + b"\0" * 7 + b"[[[[[", b"\x02" + b"\0" * 7 + b"[]", b"\0" * 9]
)
def test_a_garbage_header(ledger_path, garbage):
    (ledger_path / "rounds" / "000000.safetensors").write_bytes(garbage)
    with pytest.raises(LedgerError, match=r"Round 0: .*000000.safetensors"):
        Ledger(ledger_path).round(0).leaf("dense/bias")


def test_a_missing_weights_file(ledger_path):
    (ledger_path / "rounds" / "000000.safetensors").unlink()
    with pytest.raises(LedgerError, match=r"Round 0: .*No such file"):
        Ledger(ledger_path).round(0).leaf("dense/bias")


def test_tables_of_two_rounds_exchanged(ledger_path):
    shutil.copy(ledger_path / "rounds" / "000001.parquet", ledger_path / "rounds" / "000000.parquet")
    with pytest.raises(LedgerError, match=r"the clients of round 0.*000000.parquet"):
        Ledger(ledger_path).round(0)


def test_a_folder_or_another_table_in_place_of_the_table(ledger_path):
    file = ledger_path / "rounds" / "000000.parquet"
    file.unlink()
    file.mkdir()
    with pytest.raises(LedgerError, match=r"000000\.parquet"):
        Ledger(ledger_path).round(0)


SUMMARY_CHANGES = [
    *({"round": value} for value in (float("inf"), 10**400, 0.0, "0", True, None, -1)),
    *({"metrics": value} for value in (None, 3, {"a": [1]}, {"a": None}, {"a": "NaN"}, {"a": "1_0"}, {"a": 2**64})),
    *({"global_checksums": {"dense/bias": value}} for value in (float("nan"), float("inf"), -1, 2**32, 0.5, "1")),
    *({"checkpoint_checksums": value} for value in ([], {"key": float("-inf")}, {"key": True})),
]


@pytest.mark.parametrize("change", SUMMARY_CHANGES, ids=lambda change: str(change)[:40])
def test_what_a_table_says_of_its_round_is_of_the_kind_that_the_format_has(ledger_path, change):
    change_summary(ledger_path / "rounds" / "000000.parquet", lambda summary: summary.update(change))
    with pytest.raises(LedgerError, match=r"Expected a round's metadata, found damage.*in .*run"):
        Ledger(ledger_path).metrics()
    with pytest.raises(LedgerError, match=r"Expected a round's metadata, found damage.*000000\.parquet"):
        Ledger(ledger_path).round(0)
    assert [damage.file for damage in Ledger(ledger_path).verify()] == ["rounds/000000.parquet"]


def test_metrics_that_json_has_no_number_for_stand_as_text(ledger_path):
    metrics = {"a": "nan", "b": "inf", "c": "-inf", "d": 2**64 - 1, "e": -(2**63), "f": True, "g": 0.5}
    change_summary(ledger_path / "rounds" / "000000.parquet", lambda summary: summary.update(metrics=metrics))
    found = Ledger(ledger_path).round(0).metrics
    assert list(found.values())[1:] == [float("inf"), float("-inf"), 2**64 - 1, -(2**63), True, 0.5]
    assert np.isnan(found["a"])


def test_flipped_bytes_anywhere_give_our_error_or_nothing(ledger_path):
    rng = np.random.default_rng(0)
    for name in ("rounds/000000.parquet", "rounds/000000.safetensors", "run.json"):
        file = ledger_path / name
        whole = file.read_bytes()
        for place in rng.choice(len(whole), 60, replace=False):
            data = bytearray(whole)
            data[place] ^= 1 << rng.integers(8)
            file.write_bytes(data)
            try:
                read_everything(ledger_path)
            except LedgerError as error:
                assert str(ledger_path) in str(error)  # noqa: PT017
        file.write_bytes(whole)
    read_everything(ledger_path)


def test_unknown_format_version_and_encoding(ledger_path):
    change_run(ledger_path, format_version=3, versions={"fedlens": "3.1"})
    with pytest.raises(LedgerError, match=r"1 \(fedlens 0.1 and later\).*found 3, written by fedlens 3.1"):
        Ledger(ledger_path)
    change_run(ledger_path, format_version=1, encoding="zip-delta")
    with pytest.raises(LedgerError, match="encodings raw, bf16-delta, int8-delta, found 'zip-delta'"):
        Ledger(ledger_path)


RUN_CHANGES = [
    {"leaves": [{"name": "dense/kernel", "shape": [4, 3], "dtype": "float32"}]},
    {"leaves": [{"name": "dense/kernel", "shape": [4, -3], "dtype": "float32"}]},
    {"leaves": 3},
    {"skeleton": {"fields": [["a", None], ["b", None]]}},
    {"skeleton": {"fields": 3}},
    {"skeleton": "text"},
    {"planned_rounds": "3"},
    {"planned_rounds": 0},
    {"config": []},
    {"config": {"rates": [0.5, float("inf")]}},
    {"config": {"\ud800": 1}},
    {"versions": 1},
    {"versions": {"fedlens": "\udfff"}},
    {"format": "other"},
]


@pytest.mark.parametrize("change", RUN_CHANGES, ids=str)
def test_a_damaged_run_json(ledger_path, change):
    change_run(ledger_path, **change)
    with pytest.raises(LedgerError, match=r"run\.json"):
        Ledger(ledger_path)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff", b'{"format": "fedlens-ledger"}', b"[" * 100_000])
def test_a_garbage_run_json(ledger_path, text):
    (ledger_path / "run.json").write_bytes(text)
    with pytest.raises(LedgerError, match=r"run\.json"):
        Ledger(ledger_path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_another_encoding_than_the_format_s_is_refused(ledger_path, encoding):
    run = (ledger_path / "run.json").read_text()
    (ledger_path / "run.json").write_bytes(run.encode(encoding))
    with pytest.raises(LedgerError, match=r"run\.json"):
        Ledger(ledger_path)


def test_a_client_whose_id_is_no_text(ledger_path):
    file = ledger_path / "rounds" / "000000.parquet"
    table = pq.read_table(file)
    summary = json.loads(table.schema.metadata[b"fedlens"])
    del summary["checksum"]
    ids = pa.array([b"\xff", *(b"%d" % place for place in range(1, len(table)))]).view(pa.string())
    table = table.set_column(table.column_names.index("client"), "client", ids)
    pq.write_table(table.replace_schema_metadata({"fedlens": json.dumps(summary)}), file)
    with pytest.raises(LedgerError, match=r"Invalid UTF8.*000000\.parquet"):
        Ledger(ledger_path).round(0)


def test_no_ledger(tmp_path):
    with pytest.raises(LedgerError, match=r"a folder with run.json, found: No such file"):
        Ledger(tmp_path / "nowhere")
    with pytest.raises(LedgerError, match=os.strerror(2)):
        LedgerWriter.open(tmp_path)
