"""`Keep`: whose weights are in the files, and that the statistics of everybody are in the table."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

import fedlens as fed
from fedlens.errors import LedgerError
from fedlens.ledger import LedgerWriter

WEIGHTS = {"dense": {"kernel": np.zeros((4, 3), np.float32), "bias": np.zeros(3, np.float32)}}


def write(path, make_round, keep, rounds=3):
    with LedgerWriter.create(path, weights=WEIGHTS, config={}, rounds=rounds, keep=keep) as writer:
        for number in range(rounds):
            writer.record(make_round(number))


def rows_of(path, number):
    return pq.read_table(path / "rounds" / f"{number:06d}.parquet").to_pylist()


def test_keeping_everything_is_no_keep_at_all(tmp_path, make_round):
    write(tmp_path / "all", make_round, None)
    write(tmp_path / "keep", make_round, fed.Keep())
    for path in (tmp_path / "all").rglob("rounds/*"):
        assert path.read_bytes() == (tmp_path / "keep" / "rounds" / path.name).read_bytes()


def test_leaves(tmp_path, make_round, stored_models_of, local_model_of):
    write(tmp_path / "run", make_round, fed.Keep(leaves="*/kernel"))
    assert set(load_file(tmp_path / "run/rounds/000001.safetensors")) == {
        "global/dense/kernel",
        "global/dense/bias",
        "local/dense/kernel",
    }
    for client, model in stored_models_of(tmp_path / "run", 1).items():
        assert list(model) == ["dense/kernel"]
        np.testing.assert_array_equal(model["dense/kernel"], local_model_of(make_round(1), client)[0])


def test_every_so_many_rounds(tmp_path, make_round, stored_models_of):
    write(tmp_path / "run", make_round, fed.Keep(every=2))
    assert [len(stored_models_of(tmp_path / "run", number)["ann"]) for number in range(3)] == [2, 0, 2]
    assert load_file(tmp_path / "run/rounds/000001.safetensors")["local/dense/bias"].shape == (0, 3)
    assert {(row["part"], row["row"]) for row in rows_of(tmp_path / "run", 1)} == {(-1, -1)}


@pytest.mark.parametrize(
    ("clients", "kept"),
    [
        (["ann", "名前/..\n", "nobody"], {"ann", "名前/..\n"}),
        ("form-*", {"form-03"}),
        ("[ab]*", {"ann", "bob"}),
        ([], set()),
    ],
)
def test_clients(tmp_path, make_round, stored_models_of, local_model_of, clients, kept):
    write(tmp_path / "run", make_round, fed.Keep(clients=clients), rounds=1)
    models = stored_models_of(tmp_path / "run", 0)
    assert {client for client, model in models.items() if model} == kept
    for client in kept:
        np.testing.assert_array_equal(models[client]["dense/bias"], local_model_of(make_round(0), client)[1])
    rows = rows_of(tmp_path / "run", 0)
    assert sorted(row["row"] for row in rows if row["row"] >= 0) == list(range(len(kept)))


@pytest.mark.parametrize(
    "keep", [fed.Keep(statistics_only=True), fed.Keep(leaves="*/bias", every=2, clients="a*")], ids=["none", "some"]
)
def test_statistics_of_everybody_are_recorded_always(tmp_path, make_round, keep):
    write(tmp_path / "all", make_round, None)
    write(tmp_path / "run", make_round, keep)
    for number in range(3):
        for kept, all_ in zip(rows_of(tmp_path / "run", number), rows_of(tmp_path / "all", number), strict=True):
            for name in ("client", "position", "num_examples", "loss", "accuracy", "update_norm", "cosine"):
                assert kept[name] == all_[name]
            assert [leaf["norm"] for leaf in kept["leaves"]] == [leaf["norm"] for leaf in all_["leaves"]]


def test_statistics_only_stores_the_global_models_alone(tmp_path, make_round):
    write(tmp_path / "run", make_round, fed.Keep(statistics_only=True))
    tensors = load_file(tmp_path / "run/rounds/000002.safetensors")
    np.testing.assert_array_equal(tensors["global/dense/kernel"], make_round(2).global_weights[0])
    assert tensors["local/dense/kernel"].shape == (0, 4, 3)


def test_what_is_kept_stands_in_run_json_and_holds_after_a_resume(tmp_path, make_round, stored_models_of):
    keep = fed.Keep(leaves=["*/bias"], every=2, clients="a*")
    with LedgerWriter.create(tmp_path / "run", weights=WEIGHTS, config={}, rounds=3, keep=keep) as writer:
        writer.record(make_round(0))
    assert json.loads((tmp_path / "run/run.json").read_text())["keep"] == {
        "leaves": ["*/bias"],
        "every": 2,
        "clients": "a*",
        "statistics_only": False,
    }
    with LedgerWriter.open(tmp_path / "run") as writer:
        assert writer.run.keep == keep
        writer.record(make_round(1))
        writer.record(make_round(2))
    kept = [{name for name, model in stored_models_of(tmp_path / "run", number).items() if model} for number in (0, 2)]
    assert kept == [{"ann"}, {"ann"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "at least 1, found 0, in Keep.every"),
        ({"every": 2.0}, "found 2.0, in Keep.every"),
        ({"leaves": 3}, "found 3, in Keep.leaves"),
        ({"leaves": ["a", 3]}, "found 3, in Keep.leaves"),
        ({"clients": [1]}, "found 1, in Keep.clients"),
        ({"clients": ["\ud800"]}, "valid Unicode"),
        ({"clients": "\ud800*"}, "valid Unicode"),
        ({"leaves": "[\ud800d]*"}, "valid Unicode"),
        ({"statistics_only": 1}, "True or False, found 1"),
    ],
)
def test_values_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(LedgerError, match=message):
        fed.Keep(**arguments)


def test_a_pattern_without_a_leaf_is_refused(tmp_path):
    with pytest.raises(LedgerError, match=r"found 'conv\*', in Keep.leaves. The leaves are 'dense/kernel', 'dense/b"):
        LedgerWriter.create(tmp_path / "run", weights=WEIGHTS, config={}, rounds=1, keep=fed.Keep(leaves="conv*"))
    assert not (tmp_path / "run").exists()


def test_a_text_and_a_list_are_equal_to_themselves():
    assert fed.Keep(clients=["a", "b"]) == fed.Keep(clients=("a", "b"))
    assert fed.Keep.from_json(fed.Keep(leaves=["a"], clients=["b"]).to_json()) == fed.Keep(leaves=["a"], clients=["b"])
