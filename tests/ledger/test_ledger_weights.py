"""Weights in several files, encoded, or kept in part: read as from one file, by the bytes that are asked for."""

from __future__ import annotations

import json
import os
import re
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlens.errors import LedgerError
from fedlens.ledger import ClientPart, Keep, Ledger, LedgerWriter, NotInLedgerError, storage

WEIGHTS = {"dense": {"kernel": np.zeros((4, 3), np.float32), "bias": np.zeros(3, np.float32)}}
LEAVES = ["dense/kernel", "dense/bias"]


def write(path, deliveries, seed=0, **options):
    """A round whose clients come in several deliveries, each given as their positions; client 7 is "client 7"."""
    rng = np.random.default_rng(seed)
    shapes = [(4, 3), (3,)]

    def part(positions):
        return ClientPart(
            ids=tuple(f"client {position}" for position in positions),
            positions=np.array(positions),
            weights=[rng.normal(size=(len(positions), *shape)).astype(np.float32) for shape in shapes],
            num_examples=np.ones(len(positions), np.int64),
            metrics={},
        )

    with LedgerWriter.create(path, weights=WEIGHTS, config={}, rounds=1, **options) as writer:
        writer.begin(0, [rng.normal(size=shape).astype(np.float32) for shape in shapes])
        for positions in deliveries:
            writer.add([part(positions)])
        writer.commit({}, {"key": np.uint32(0)})
    return Ledger(path).round(0)


def rewrite(path, change):
    """Puts another table in place of round 0's, its metadata kept but for the checksum, as another program may."""
    file = path / "rounds" / "000000.parquet"
    table = pq.read_table(file)
    fields = json.loads(table.schema.metadata[b"fedlens"])
    del fields["checksum"]
    pq.write_table(change(table).replace_schema_metadata({"fedlens": json.dumps(fields)}), file)


def replaced(table, name, values, dtype=None):
    place = table.column_names.index(name)
    return table.set_column(place, name, pa.array(values, dtype or table.column(name).type))


@pytest.fixture
def spans(monkeypatch):
    """What is read from files by ranges: (name, start, end)."""
    found = []
    fill = storage.LocalStore.fill

    def counted(store, pieces):
        found.extend((name, start, start + memory.nbytes) for name, start, memory in pieces)
        fill(store, pieces)

    monkeypatch.setattr(storage.LocalStore, "fill", counted)
    return found


@pytest.mark.parametrize("encodings", [None, "bf16-delta", "int8-delta", {"*bias": "int8-delta", "*": "bf16-delta"}])
def test_several_files_and_encodings_read_as_safetensors_and_pyarrow_read_them(tmp_path, encodings, stored_models_of):
    stored = write(tmp_path / "run", [(5, 1, 3), (0,), (4, 2, 6)], encodings=encodings)
    assert len(list((tmp_path / "run" / "rounds").glob("*.safetensors"))) == 3
    assert stored.ids == stored.kept_ids == tuple(f"client {position}" for position in range(7))
    expected = stored_models_of(tmp_path / "run", 0)
    for name in LEAVES:
        np.testing.assert_allclose(stored.leaf(name), [expected[client][name] for client in stored.ids], rtol=1e-6)
    for client, model in stored.items():
        for name in LEAVES:
            np.testing.assert_array_equal(model.leaves[name], stored.leaf(name)[stored.ids.index(client)])
    if encodings is None:
        assert (
            stored.leaf(LEAVES[0]).tobytes() == np.array([expected[each][LEAVES[0]] for each in stored.ids]).tobytes()
        )


def test_decoding_by_blocks_changes_nothing(tmp_path, monkeypatch):
    stored = write(tmp_path / "run", [range(9)], encodings="int8-delta")
    whole = stored.leaf("dense/kernel")
    monkeypatch.setattr("fedlens.ledger.weights._BLOCK", 100)
    np.testing.assert_array_equal(stored.leaf("dense/kernel"), whole)


@pytest.mark.parametrize("encoding", ["raw", "bf16-delta", "int8-delta"])
def test_some_elements_are_those_of_the_leaf_and_nothing_else_is_read(tmp_path, spans, encoding):
    stored = write(tmp_path / "run", [(5, 1, 3), (0,), (4, 2)], encodings=encoding)
    clients = ["client 2", "client 5", "client 0"]
    whole = stored.leaf("dense/kernel", clients).reshape(3, 12)
    spans.clear()
    np.testing.assert_array_equal(stored.elements("dense/kernel", slice(4, 9), clients), whole[:, 4:9])
    per_element = {"raw": 4, "bf16-delta": 2, "int8-delta": 1}[encoding]
    of_global = 0 if encoding == "raw" else 5 * 4
    assert sum(end - start for _, start, end in spans) == 3 * 5 * per_element + of_global
    expected = stored.global_leaf("dense/kernel").ravel()[10:12]
    np.testing.assert_array_equal(stored.elements("dense/kernel", slice(10, 12), None), expected)


@settings(max_examples=30, deadline=None)
@given(chosen=st.lists(st.integers(0, 11), unique=True))
def test_any_clients_in_any_order(tmp_path_factory, chosen):
    path = tmp_path_factory.getbasetemp() / "any_clients"
    if not path.exists():
        write(path, [(3, 1, 2, 0, 9), (4, 5, 6, 7), (8, 11, 10)])
    stored = Ledger(path).round(0)
    expected = stored.leaf("dense/kernel")[chosen] if chosen else np.zeros((0, 4, 3), np.float32)
    found = stored.leaf("dense/kernel", [f"client {place}" for place in chosen])
    np.testing.assert_array_equal(found, expected)
    assert found.flags.owndata
    assert found.flags.writeable


def tensors_of(file):
    """Name -> (start, end) in a safetensors file, by its header; and where the header ends."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return {
        name: tuple(8 + length + end for end in entry["data_offsets"]) for name, entry in header.items()
    }, 8 + length


def test_one_leaf_of_all_clients_reads_that_leaf_and_headers_only(tmp_path, spans):
    stored = write(tmp_path / "run", [(1, 0, 2), (4, 3)])
    spans.clear()
    stored.leaf("dense/bias")
    for part, name in enumerate(["rounds/000000.safetensors", "rounds/000000.1.safetensors"]):
        tensors, header = tensors_of(tmp_path / "run" / name)
        read = sorted((start, end) for file, start, end in spans if file == name)
        assert read == [(0, 8), (8, header), tensors["local/dense/bias"]], part


@pytest.mark.parametrize("encoding", ["raw", "int8-delta"])
def test_one_client_reads_its_rows_only(tmp_path, spans, encoding):
    stored = write(tmp_path / "run", [(1, 0, 2), (4, 3)], encodings=encoding)
    spans.clear()
    assert stored["client 3"].weights
    tensors, _ = tensors_of(tmp_path / "run" / "rounds" / "000000.1.safetensors")
    first_part = [(start, end) for name, start, end in spans if name == "rounds/000000.safetensors"]
    second_part = [(start, end) for name, start, end in spans if name == "rounds/000000.1.safetensors"]
    width = {name: (end - start) // 2 for name, (start, end) in tensors.items()}
    expected = [
        (tensors[name][0] + width[name], tensors[name][1]) for name in ("local/dense/kernel", "local/dense/bias")
    ]
    assert sorted(second_part[2:]) == sorted(expected)
    if encoding == "raw":
        assert first_part == []
    else:  # the update is of the global model, which is read too
        found, header = tensors_of(tmp_path / "run" / "rounds" / "000000.safetensors")
        assert sorted(first_part) == sorted([(0, 8), (8, header), *(found[f"global/{name}"] for name in LEAVES)])


def test_weights_that_were_not_kept(tmp_path):
    stored = write(tmp_path / "run", [(0, 1), (2, 3)], keep=Keep(leaves="*kernel", clients=["client 1", "client 2"]))
    assert stored.kept_ids == ("client 1", "client 2")
    assert stored.leaf("dense/kernel", stored.kept_ids).shape == (2, 4, 3)
    assert list(stored["client 1"].leaves) == ["dense/kernel"]
    assert stored["client 0"].update_norm > 0
    with pytest.raises(
        NotInLedgerError, match=r"not kept, in leaf 'dense/kernel' of client 'client 0', round 0.*kept_ids"
    ):
        stored.leaf("dense/kernel")
    with pytest.raises(NotInLedgerError, match=r"weights were not kept.*client 'client 3'"):
        stored["client 3"].leaves  # noqa: B018
    with pytest.raises(NotInLedgerError, match=r"not kept, in leaf 'dense/bias' of client 'client 1'"):
        stored["client 1"].weights  # noqa: B018
    with pytest.raises(LedgerError, match="weights were not kept"):
        Ledger(tmp_path / "run").export(0, "client 0", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_statistics_only(tmp_path):
    stored = write(tmp_path / "run", [(0, 1)], keep=Keep(statistics_only=True))
    assert stored.kept_ids == ()
    assert stored["client 0"].cosine is not None
    assert stored.global_weights["dense"]["bias"].shape == (3,)
    with pytest.raises(KeyError, match="were not kept"):
        stored["client 0"].update  # noqa: B018


BAD_TABLES = {
    "a part without a file": (lambda table: replaced(table, "part", [0, 0, 7]), "000000.7.safetensors"),
    "a part far beyond": (lambda table: replaced(table, "part", [0, 0, 2**62]), "No such file"),
    "a part below -1": (lambda table: replaced(table, "part", [0, 0, -2]), "each with a row of its own"),
    "a part without a row": (lambda table: replaced(table, "row", [0, 1, -1]), "each with a row of its own"),
    "a row without a part": (lambda table: replaced(table, "part", [0, 0, -1]), "each with a row of its own"),
    "a row that two have": (lambda table: replaced(table, "row", [0, 1, 1]), "each with a row of its own"),
    "a row outside": (lambda table: replaced(table, "row", [0, 1, 3]), r"at least 4.*found float32\[3, 4, 3\]"),
    "a row far outside": (lambda table: replaced(table, "row", [0, 1, 2**62]), "at least 46"),
    "rows exchanged": (lambda table: replaced(table, "row", [1, 0, 2]), "leaf 'dense/kernel' of client 'client 0'"),
    "another round": (lambda table: replaced(table, "round", [0, 0, 1]), "clients of round 0"),
    "a client twice": (lambda table: replaced(table, "client", ["a", "b", "a"]), "a client twice"),
    "a client null": (lambda table: replaced(table, "client", ["a", None, "c"]), "nulls in column 'client'"),
    "rows as text": (lambda table: replaced(table, "row", ["0", "1", "2"], pa.string()), "'row' of type int64"),
    "rows as floats": (lambda table: replaced(table, "row", [0.0, 1.0, 2.0], pa.float64()), "'row' of type int64"),
    "no leaves": (lambda table: table.drop_columns(["leaves"]), "no column 'leaves'"),
    "text": (lambda table: table.append_column("note", pa.array(["x", "y", "z"])), "found string, in column 'note'"),
    "lists": (lambda table: table.append_column("l", pa.array([[1], [], [2]])), "in column 'l'"),
    "a column twice": (lambda table: table.append_column("row", table.column("row")), "000000.parquet"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_table_that_lies(tmp_path, change, message):
    path = tmp_path / "run"
    write(path, [(0, 1, 2)])
    rewrite(path, change)
    with pytest.raises(LedgerError, match=message) as found:
        [Ledger(path).round(0).leaf(name) for name in LEAVES]
    assert re.search(r"000000(\.\d+)?\.(parquet|safetensors)", str(found.value))


def test_foreign_numbers_are_metrics(tmp_path):
    path = tmp_path / "run"
    write(path, [(0, 1, 2)])
    rewrite(path, lambda table: table.append_column("temperature", pa.array([1.5, None, 3.0])))
    assert Ledger(path).round(0)["client 2"].metrics["temperature"] == 3.0
    assert "temperature" not in Ledger(path).round(0)["client 1"].metrics


def test_scales_that_vanished(tmp_path):
    path = tmp_path / "run"
    write(path, [(0, 1)], encodings="int8-delta")

    def without_scales(table):
        rows = [[leaf | {"scale": None} for leaf in row] for row in table.column("leaves").to_pylist()]
        return replaced(table, "leaves", rows)

    rewrite(path, without_scales)
    with pytest.raises(LedgerError, match="the scales of leaf 'dense/bias'"):
        Ledger(path).round(0).leaf("dense/bias")


def test_a_flipped_byte_in_the_second_file(tmp_path):
    stored = write(tmp_path / "run", [(0, 1), (2, 3)])
    file = tmp_path / "run" / "rounds" / "000000.1.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert stored["client 2"].weights
    with pytest.raises(
        LedgerError, match=r"leaf 'dense/bias' of client 'client 3', round 0, in .*000000\.1\.safetensors"
    ):
        stored.leaf("dense/bias")


def test_the_table_of_a_round_is_read_once_until_its_file_is_another(tmp_path, monkeypatch):
    path = tmp_path / "run"
    write(path, [(0, 1, 2)])
    reads = []
    read = storage.LocalStore.read
    monkeypatch.setattr(storage.LocalStore, "read", lambda store, name: reads.append(name) or read(store, name))
    ledger = Ledger(path)
    assert ledger.clients == ["client 0", "client 1", "client 2"]
    assert ledger.round(0).ids == ("client 0", "client 1", "client 2")
    assert reads == ["run.json", "rounds/000000.parquet"]
    rewrite(path, lambda table: replaced(table, "client", ["a", "b", "c"]))
    assert ledger.round(0).ids == ("a", "b", "c")
    assert ledger.clients == ["a", "b", "c"]
    assert reads == ["run.json", "rounds/000000.parquet", "rounds/000000.parquet"]


def test_tables_beyond_what_is_kept_in_memory_are_read_again(ledger_path, monkeypatch):
    monkeypatch.setattr("fedlens.ledger.catalogue._KEPT", 1)
    ledger = Ledger(ledger_path)
    for _ in range(2):
        assert ledger.table().num_rows == 10
        assert [ledger.round(number).number for number in (1, 0)] == [1, 0]


@pytest.mark.parametrize("name", ["run.json", "rounds/000000.parquet", "rounds/000000.safetensors"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(ledger_path, name):
    (ledger_path / name).unlink()
    os.mkfifo(ledger_path / name)
    with pytest.raises(LedgerError, match=f"Expected a file, found something else, in .*{name}"):
        Ledger(ledger_path).round(0).leaf("dense/bias")


@pytest.mark.parametrize("number", [-1, 2, 10**30, 0.5, "0", "../0", None, True])
def test_a_round_that_there_is_not(ledger_path, number):
    with pytest.raises(NotInLedgerError, match="Expected a committed round, found rounds 0 to 1"):
        Ledger(ledger_path).round(number)


def test_nothing_outside_the_folder_is_named_by_what_stands_in_it(tmp_path, spans):
    """Ids and leaves that look like paths are data."""
    name = "../../secret"
    (tmp_path / "secret").write_bytes(b"x" * 100)
    weights = {name: np.zeros(2, np.float32), "a\0b": np.zeros(2, np.float32)}
    part = ClientPart(
        ("../../secret", "/etc/passwd", "x\0y", "🙂" * 2500),
        np.arange(4),
        [np.arange(8, dtype=np.float32).reshape(4, 2)] * 2,
        np.ones(4, np.int64),
        {"../m": np.zeros(4)},
    )
    with LedgerWriter.create(tmp_path / "deep" / "run", weights=weights, config={}, rounds=None) as writer:
        writer.begin(0, list(weights.values()))
        writer.add([part])
        writer.commit({}, {})
    ledger = Ledger(tmp_path / "deep" / "run")
    for place, client in enumerate(part.ids):
        np.testing.assert_array_equal(ledger.round(0)[client].leaves[name], [2 * place, 2 * place + 1])
        assert ledger.client(client)[0]["../m"] == 0
    assert {name for name, _, _ in spans} == {"rounds/000000.safetensors"}
