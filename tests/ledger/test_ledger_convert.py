"""Local models as NumPy, PyTorch and xarray have them."""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import pytest

from fedlens.errors import LedgerError
from fedlens.ledger import ClientPart, Keep, Ledger, LedgerWriter, storage

DTYPES = {
    "bool": np.bool_,
    "int8": np.int8,
    "int64": np.int64,
    "uint8": np.uint8,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "complex64": np.complex64,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


@pytest.fixture
def all_dtypes(tmp_path):
    """One round of two clients; a leaf of each dtype, one without axes, one without elements."""
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys(DTYPES, (3, 2)) | {"scalar": (), "empty": (0, 4)}
    arrays = {
        name: rng.integers(0, 2, (2, *shape)).astype(DTYPES.get(name, np.float32)) for name, shape in shapes.items()
    }
    start = {name: array[0] * 0 for name, array in arrays.items()}
    start = {name: np.asarray(array).astype(arrays[name].dtype) for name, array in start.items()}
    part = ClientPart(("ann", "bob"), np.arange(2), list(arrays.values()), np.ones(2, np.int64), {})
    with LedgerWriter.create(tmp_path / "run", weights=start, config={}, rounds=1) as writer:
        writer.begin(0, list(start.values()))
        writer.add([part])
        writer.commit({}, {})
    return Ledger(writer.path), arrays


def test_numpy_of_one_client_and_of_all(all_dtypes):
    ledger, arrays = all_dtypes
    of_bob, of_all = ledger.to_numpy(0, "bob"), ledger.to_numpy(0)
    assert list(of_bob) == list(of_all) == list(arrays)
    for name, array in arrays.items():
        assert (of_bob[name].dtype, of_all[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(of_bob[name], array[1])
        np.testing.assert_array_equal(of_all[name], array)


def test_leaves_by_pattern(all_dtypes):
    ledger, _ = all_dtypes
    assert list(ledger.to_numpy(0, "bob", "float8*")) == ["float8_e4m3fn", "float8_e5m2"]
    assert list(ledger.to_numpy(0, leaves=["scalar", "*int8", "int8"])) == ["int8", "uint8", "scalar"]
    with pytest.raises(KeyError, match=r"found 'flaot32'.*'float32'"):
        ledger.to_numpy(0, "bob", "flaot32")
    with pytest.raises(KeyError, match="client of round 0, found 'bo'"):
        ledger.to_numpy(0, "bo")


def test_a_leaf_whose_name_looks_like_a_pattern(tmp_path):
    weights = {"a[0]": np.zeros(1, np.float32), "a0": np.ones(1, np.float32)}
    with LedgerWriter.create(tmp_path / "run", weights=weights, config={}, rounds=1) as writer:
        writer.begin(0, list(weights.values()))
        writer.add([ClientPart(("x",), np.arange(1), [np.zeros((1, 1), np.float32)] * 2, np.ones(1, np.int64), {})])
        writer.commit({}, {})
    assert list(Ledger(writer.path).to_numpy(0, "x", "a[0]")) == ["a[0]"]


def test_what_was_kept(tmp_path, make_round):
    weights = {"dense": {"kernel": np.zeros((4, 3), np.float32), "bias": np.zeros(3, np.float32)}}
    keep = Keep(leaves="*bias", clients=["bob", "e"])
    with LedgerWriter.create(tmp_path / "run", weights=weights, config={}, rounds=1, keep=keep) as writer:
        writer.record(make_round(0))
    ledger = Ledger(writer.path)
    assert {name: array.shape for name, array in ledger.to_numpy(0).items()} == {"dense/bias": (2, 3)}
    assert {name: array.shape for name, array in ledger.to_numpy(0, "e").items()} == {"dense/bias": (3,)}
    with pytest.raises(KeyError, match="were not kept"):
        ledger.to_numpy(0, "e", "*")
    with pytest.raises(KeyError, match="were not kept"):
        ledger.to_numpy(0, "ann")


def test_torch(all_dtypes):
    torch = pytest.importorskip("torch")
    ledger, arrays = all_dtypes
    tensors, stacked = ledger.to_torch(0, "bob"), ledger.to_torch(0)
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        assert str(tensors[name].dtype).removeprefix("torch.") == array.dtype.name
        assert (tuple(tensors[name].shape), tuple(stacked[name].shape)) == (array.shape[1:], array.shape)
        wide = torch.complex128 if name == "complex64" else torch.float64
        np.testing.assert_array_equal(
            tensors[name].to(wide).numpy(), array[1].astype(complex if wide.is_complex else float)
        )
    assert list(ledger.to_torch(0, "bob", "scalar")) == ["scalar"]


def test_without_torch_and_xarray(ledger_path, monkeypatch):
    ledger = Ledger(ledger_path)
    for name in ("torch", "xarray"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LedgerError, match=r"pip install 'fedlens\[torch\]'"):
        ledger.to_torch(0, "ann")
    with pytest.raises(LedgerError, match=r"pip install 'fedlens\[xarray\]'"):
        ledger.to_xarray()


@pytest.fixture
def uneven(make_writer, make_round):
    """Three rounds with other clients each, b in all, the second without accuracy."""
    rounds = [make_round(number, ids) for number, ids in enumerate([("b", "a"), ("c", "b"), ("a", "d", "b")])]
    for part in rounds[1].parts:
        del part.metrics["accuracy"]
    with make_writer() as writer:
        for record in rounds:
            writer.record(record)
    return Ledger(writer.path)


def test_xarray_has_what_the_rounds_have(uneven):
    pytest.importorskip("xarray")
    data = uneven.to_xarray()
    assert dict(data.sizes) == {
        "round": 3,
        "client": 4,
        "leaf": 2,
        "dense/kernel.0": 4,
        "dense/kernel.1": 3,
        "dense/bias.0": 3,
    }
    assert data["client"].values.tolist() == ["b", "a", "c", "d"]
    assert data["server/loss"].values.tolist() == [1, 1 / 2, 1 / 3]
    for number in range(3):
        stored = uneven.round(number)
        start = data["global/dense/bias"].sel(round=number).values
        np.testing.assert_array_equal(start, stored.global_leaf("dense/bias"))
        for client in data["client"].values:
            cell = data.sel(round=number, client=client)
            if client in stored:
                model = stored[client]
                np.testing.assert_array_equal(cell["local/dense/kernel"].values, model.leaves["dense/kernel"])
                assert cell["num_examples"] == model.num_examples
                assert cell["loss"] == model.metrics["loss"]
                assert cell["leaf_norm"].sel(leaf="dense/bias") == model.leaf_norms["dense/bias"]
                assert cell["kept"].all()
                assert np.isnan(cell["accuracy"]) == (number == 1)
            else:
                assert np.isnan(cell["local/dense/kernel"].values).all()
                assert np.isnan(cell["num_examples"])
                assert not cell["kept"].any()


def test_xarray_indexes_as_numpy_does(uneven):
    pytest.importorskip("xarray")
    lazy = uneven.to_xarray()["local/dense/kernel"]
    whole = uneven.to_xarray()["local/dense/kernel"].values
    assert whole.shape == (3, 4, 4, 3)
    for key in [np.s_[1], np.s_[:, 0], np.s_[-1, 1:, 2], np.s_[::2, [3, 0], 1:3, ::-1], np.s_[1, 2, 3, 0], np.s_[0:0]]:
        found = lazy[key].values
        expected = (
            whole[::2][:, [3, 0]][:, :, 1:3, ::-1]
            if isinstance(key, tuple) and isinstance(key[1], list)
            else whole[key]
        )
        np.testing.assert_array_equal(found, expected)
    drift = lazy.sel(client="b").diff("round").values
    models = [uneven.round(number)["b"].leaves["dense/kernel"] for number in range(3)]
    np.testing.assert_array_equal(drift, [models[1] - models[0], models[2] - models[1]])


def test_xarray_reads_what_is_looked_at(uneven, monkeypatch):
    pytest.importorskip("xarray")
    read = []
    fill = storage.LocalStore.fill
    monkeypatch.setattr(storage.LocalStore, "fill", lambda store, pieces: read.extend(pieces) or fill(store, pieces))
    data = uneven.to_xarray()
    assert repr(data)
    assert read == []
    assert data["local/dense/bias"].sel(round=2, client="b").values.shape == (3,)
    assert {name for name, _, _ in read} == {"rounds/000002.safetensors"}
    assert [memory.nbytes for _, _, memory in read][-1] == 12


def test_xarray_of_every_dtype(all_dtypes):
    xarray = pytest.importorskip("xarray")
    ledger, arrays = all_dtypes
    data = ledger.to_xarray()
    assert isinstance(data, xarray.Dataset)
    for name, array in arrays.items():
        narrow = array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
        assert data[f"local/{name}"].dtype == (np.float32 if narrow else array.dtype)
        np.testing.assert_array_equal(data[f"local/{name}"].values[0], array.astype(data[f"local/{name}"].dtype))


def test_xarray_of_an_empty_ledger_and_of_metrics_with_its_names(make_writer, make_round):
    pytest.importorskip("xarray")
    with make_writer() as writer:
        assert dict(Ledger(writer.path).to_xarray().sizes)["round"] == 0
        record = make_round(0)
        for part in record.parts:
            part.metrics["kept"] = part.metrics["accuracy"]
        writer.record(record)
    data = Ledger(writer.path).to_xarray()
    assert data["kept"].dtype == bool
    assert data["metric/kept"].values.tolist() == data["accuracy"].values.tolist()
