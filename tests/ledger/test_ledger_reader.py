"""Reading a ledger: rounds, clients, leaves, tables, exports, and what a wrong name is answered."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlens.errors import LedgerError
from fedlens.ledger import Ledger, LedgerWriter, find_ledgers


def test_overview(ledger_path):
    ledger = Ledger(ledger_path)
    assert ledger.rounds == [0, 1]
    assert ledger.planned_rounds == 3
    assert ledger.config == {"learning_rate": 0.1, "optimizer": {"name": "sgd"}}
    assert ledger.leaf_names == ["dense/kernel", "dense/bias"]
    assert ledger.clients == ["ann", "bob", "form-03", "名前/..\n", "e"]
    assert ledger.metrics() == [{"loss": 1.0, "clients": 5, "round": 0}, {"loss": 0.5, "clients": 5, "round": 1}]
    assert ledger.size_bytes == sum(path.stat().st_size for path in ledger_path.rglob("*") if path.is_file())
    assert repr(ledger) == f"Ledger({str(ledger_path)!r}, 2 of 3 rounds, interrupted)"


def test_clients_over_all_rounds_in_first_seen_order(make_writer, make_round):
    with make_writer() as writer:
        for number, ids in enumerate([("b", "a"), ("c", "b"), ("a", "d")]):
            writer.record(make_round(number, ids))
    ledger = Ledger(writer.path)
    assert ledger.clients == ["b", "a", "c", "d"]
    assert [row["round"] for row in ledger.client("b")] == [0, 1]


def test_state(make_writer, make_round):
    writer = make_writer(rounds=2)
    ledger = Ledger(writer.path)
    assert ledger.state == "running"
    writer.record(make_round(0))
    writer.close()
    assert ledger.state == "interrupted"
    with LedgerWriter.open(writer.path) as writer:
        writer.record(make_round(1))
    assert ledger.state == "complete"


def test_round_is_a_mapping_in_cohort_order(ledger_path, make_round, local_model_of):
    record = make_round(1)
    stored = Ledger(ledger_path).round(1)
    assert stored.ids == tuple(stored) == ("ann", "bob", "form-03", "名前/..\n", "e")
    assert len(stored) == 5
    assert "form-03" in stored
    assert "form-04" not in stored
    assert 3 not in stored
    np.testing.assert_array_equal(stored.global_weights["dense"]["bias"], record.global_weights[1])
    for client_id, model in stored.items():
        kernel, bias = local_model_of(record, client_id)
        assert (model.client_id, model.round) == (client_id, 1)
        np.testing.assert_array_equal(model.weights["dense"]["kernel"], kernel)
        np.testing.assert_array_equal(model.update["dense"]["bias"], bias - record.global_weights[1])
        assert model.update_norm == pytest.approx(np.hypot(*model.leaf_norms.values()))
    kernels = stored.leaf("dense/kernel")
    np.testing.assert_array_equal(kernels, [local_model_of(record, client_id)[0] for client_id in stored])


def test_one_client(ledger_path, make_round):
    model = Ledger(ledger_path).round(0)["form-03"]
    assert model.num_examples == 20
    assert model.metrics["accuracy"] == 0.25
    assert set(model.metrics) == {"loss", "accuracy"}
    assert list(model.leaf_norms) == ["dense/kernel", "dense/bias"]
    assert "weights" not in repr(model)


def test_table_and_trajectory(ledger_path):
    ledger = Ledger(ledger_path)
    table = ledger.table()
    assert table.num_rows == 10
    assert table.column("round").to_pylist() == [0] * 5 + [1] * 5
    trajectory = ledger.client("bob")
    assert [row["round"] for row in trajectory] == [0, 1]
    for row in trajectory:
        model = ledger.round(row["round"])["bob"]
        assert row["leaf_norms"] == model.leaf_norms
        assert row["update_norm"] == model.update_norm
        assert row["loss"] == model.metrics["loss"]


def test_export_reads_back_with_safetensors(ledger_path, tmp_path, make_round, local_model_of):
    Ledger(ledger_path).export(1, "e", tmp_path / "e.safetensors")
    found = load_file(tmp_path / "e.safetensors")
    kernel, bias = local_model_of(make_round(1), "e")
    np.testing.assert_array_equal(found["dense/kernel"], kernel)
    np.testing.assert_array_equal(found["dense/bias"], bias)
    assert [path.name for path in tmp_path.glob("e.*")] == ["e.safetensors"]
    with pytest.raises(LedgerError, match="client 'e' of round 1"):
        Ledger(ledger_path).export(1, "e", tmp_path / "missing" / "e.safetensors")


def test_unknown_names_get_the_nearest(ledger_path):
    ledger = Ledger(ledger_path)
    stored = ledger.round(0)
    with pytest.raises(KeyError, match=r"round 0, found 'form-3'.*'form-03'"):
        stored["form-3"]
    with pytest.raises(LedgerError, match=r"found 'dense/kernle'.*'dense/kernel'"):
        stored.leaf("dense/kernle")
    with pytest.raises(LedgerError, match="rounds 0 to 1, for round 7"):
        ledger.round(7)
    with pytest.raises(KeyError, match="Did you mean 'bob'"):
        ledger.client("bobb")
    with pytest.raises(KeyError, match="There are 5, such as 'ann'"):
        ledger.client("zzz")
    assert stored.get("nobody") is None


def test_reading_while_a_round_is_torn(ledger_path):
    (ledger_path / "rounds" / "000002.safetensors").write_bytes(b"half")
    ledger = Ledger(ledger_path)
    assert ledger.rounds == [0, 1]
    with pytest.raises(LedgerError, match="interrupted before its commit, for round 2"):
        ledger.round(2)


def test_metrics_that_differ_between_rounds(make_writer, make_round):
    first, second = make_round(0), make_round(1)
    for part in second.parts:
        del part.metrics["accuracy"]
    with make_writer() as writer:
        writer.record(first)
        writer.record(second)
    assert Ledger(writer.path).table().column("accuracy").null_count == 5


def test_find_ledgers(tmp_path, make_writer):
    for name in ("b", "a", "deep/c", "deep/er/d"):
        make_writer(name).close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("{}")
    assert find_ledgers(tmp_path) == [tmp_path / "a", tmp_path / "b", tmp_path / "deep" / "c"]
    assert find_ledgers(tmp_path / "a") == [tmp_path / "a"]
    with pytest.raises(LedgerError, match="Expected a folder"):
        find_ledgers(tmp_path / "nowhere")
