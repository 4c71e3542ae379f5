"""What other programs find in a ledger's files, and what comes back from them bit by bit."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from fedlens.errors import LedgerError
from fedlens.ledger import ClientPart, Ledger, LedgerWriter, RoundRecord, tensorfile

DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64"),
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
]


def test_folder_has_the_specified_files(ledger_path):
    files = sorted(str(path.relative_to(ledger_path)) for path in ledger_path.rglob("*") if path.is_file())
    assert files == [
        "checkpoints/000001.safetensors",
        "rounds/000000.parquet",
        "rounds/000000.safetensors",
        "rounds/000001.parquet",
        "rounds/000001.safetensors",
        "run.json",
    ]


def test_run_json(ledger_path):
    run = json.loads((ledger_path / "run.json").read_text())
    assert list(run) == [
        *(
            "format",
            "format_version",
            "planned_rounds",
            "encodings",
            "keep",
            "config",
            "skeleton",
            "leaves",
            "versions",
            "policy",
            "checksum",
        )
    ]
    assert (run["format_version"], run["planned_rounds"], run["policy"]) == (2, 3, None)
    assert (run["encodings"], run["keep"]) == ([], None)
    assert run["leaves"] == [
        {"name": "dense/kernel", "shape": [4, 3], "dtype": "float32", "encoding": "raw"},
        {"name": "dense/bias", "shape": [3], "dtype": "float32", "encoding": "raw"},
    ]
    assert run["versions"]["numpy"] == np.__version__


def test_safetensors_reads_weights_and_checkpoint(ledger_path, make_round):
    record = make_round(1)
    tensors = load_file(ledger_path / "rounds/000001.safetensors")
    assert set(tensors) == {"global/dense/kernel", "global/dense/bias", "local/dense/kernel", "local/dense/bias"}
    np.testing.assert_array_equal(tensors["global/dense/kernel"], record.global_weights[0])
    np.testing.assert_array_equal(
        tensors["local/dense/bias"], np.concatenate([part.weights[1] for part in record.parts])
    )
    checkpoint = load_file(ledger_path / "checkpoints/000001.safetensors")
    np.testing.assert_array_equal(checkpoint["state/key"], record.checkpoint["state/key"])
    assert checkpoint["round"].shape == ()
    assert checkpoint["round"] == 1


def test_large_tensors_come_first_and_begin_where_memory_may_lie_alike(tmp_path):
    shapes = {"bias": (300,), "kernel": (700, 400), "half": (700, 800), "wide": (3,), "embedding": (900, 700)}
    dtypes = {"half": np.float16, "wide": np.float64}
    weights = {name: np.ones(shape, dtypes.get(name, np.float32)) for name, shape in shapes.items()}
    leaves = [leaf[None] * np.arange(1, 4, dtype=leaf.dtype).reshape(3, *[1] * leaf.ndim) for leaf in weights.values()]
    part = ClientPart(("ann", "bob", "cy"), np.arange(3), leaves, np.ones(3, int), {})
    with LedgerWriter.create(tmp_path / "run", weights=weights, config={}, rounds=1) as writer:
        writer.record(RoundRecord(0, list(weights.values()), [part], {}, {}))
    path = tmp_path / "run/rounds/000000.safetensors"
    slots = tensorfile.read_slots(path)
    # Wide items first; among those of four bytes those of 1 MiB and more by size, then the others as they come.
    assert [*slots][2:] == [
        *("local/embedding", "local/kernel", "global/embedding", "global/kernel"),
        *("global/bias", "local/bias", "local/half", "global/half"),
    ]
    assert {*[*slots][:2]} == {"global/wide", "local/wide"}
    assert slots["local/embedding"].start % 4096 == 64
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    for name, tensor in load_file(path).items():
        kind, leaf = name.split("/")
        expected = weights[leaf] if kind == "global" else leaves[[*weights].index(leaf)]
        np.testing.assert_array_equal(tensor, expected)
    assert Ledger(tmp_path / "run").round(0)["cy"].weights["kernel"][0, 0] == 3


def test_pyarrow_reads_the_table(ledger_path, make_round):
    record = make_round(0)
    table = pq.read_table(ledger_path / "rounds/000000.parquet")
    leaf_row = pa.struct(
        [("leaf", pa.string()), ("norm", pa.float64()), ("checksum", pa.uint32()), ("scale", pa.float64())]
    )
    assert [(field.name, field.type) for field in table.schema] == [
        ("round", pa.int64()),
        ("client", pa.string()),
        ("position", pa.int64()),
        ("part", pa.int64()),
        ("row", pa.int64()),
        ("num_examples", pa.int64()),
        ("dropped", pa.bool_()),
        ("loss", pa.float64()),
        ("accuracy", pa.float64()),
        ("update_norm", pa.float64()),
        ("cosine", pa.float64()),
        ("leaves", pa.list_(leaf_row)),
    ]
    assert json.loads(table.schema.metadata[b"fedlens"])["metrics"] == {"loss": 1.0, "clients": 5}
    rows = table.to_pylist()
    assert [row["position"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["client"] for row in rows] == ["ann", "bob", "form-03", "名前/..\n", "e"]

    stored = load_file(ledger_path / "rounds/000000.safetensors")
    for row in rows:
        assert (row["round"], row["part"], row["num_examples"]) == (0, 0, 10 * row["position"])
        assert row["accuracy"] == row["position"] / 8
        squares = []
        for leaf, reference in zip(row["leaves"], record.global_weights, strict=True):
            local = stored["local/" + leaf["leaf"]][row["row"]]
            assert leaf["checksum"] == zlib.crc32(local.tobytes())
            assert leaf["scale"] is None
            squares.append(np.sum((local.astype(np.float64) - reference.astype(np.float64)) ** 2))
            assert leaf["norm"] == pytest.approx(np.sqrt(squares[-1]), rel=1e-6)
        assert row["update_norm"] == pytest.approx(np.sqrt(sum(squares)), rel=1e-6)


def one_round(path: Path, weights: object, leaves: list[np.ndarray], parts: list[list[np.ndarray]]) -> Ledger:
    """A ledger of one round; `parts` holds stacked leaves."""
    count = 0
    client_parts = []
    for stacked in parts:
        clients = len(stacked[0])
        ids = tuple(f"client {count + row}" for row in range(clients))
        client_parts.append(ClientPart(ids, count + np.arange(clients), stacked, np.ones(clients, np.int32), {}))
        count += clients
    with LedgerWriter.create(path, weights=weights, config={}, rounds=1) as writer:
        writer.record(RoundRecord(0, leaves, client_parts, {}, {}))
    return Ledger(path)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_dtype_comes_back_bit_by_bit(tmp_path, dtype):
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        if dtype.kind == "b":
            return rng.integers(0, 2, shape).astype(bool)
        return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)

    weights = {"odd": random(3), "scalar": random(), "empty": random(0, 2), "byte": np.zeros(1, np.int8)}
    reference = list(weights.values())
    parts = [[random(clients, *leaf.shape) for leaf in reference[:3]] for clients in (2, 1)]
    for part in parts:
        part.append(np.zeros((len(part[0]), 1), np.int8))
    round_ = one_round(tmp_path / "run", weights, reference, parts).round(0)

    for client, part, row in (("client 0", parts[0], 0), ("client 1", parts[0], 1), ("client 2", parts[1], 0)):
        for (name, found), expected in zip(round_[client].weights.items(), part, strict=True):
            assert isinstance(found, np.ndarray), name
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape[1:])
            assert found.tobytes() == expected[row].tobytes()
    assert round_.global_weights["odd"].tobytes() == weights["odd"].tobytes()
    assert round_.leaf("odd").tobytes() == parts[0][0].tobytes() + parts[1][0].tobytes()

    seen = dict(safetensors.deserialize((tmp_path / "run/rounds/000000.safetensors").read_bytes()))
    assert seen["local/odd"]["shape"] == [3, 3]
    assert bytes(seen["local/odd"]["data"]) == parts[0][0].tobytes() + parts[1][0].tobytes()


def test_update_and_norm_of_integers_are_exact(tmp_path):
    leaves = [np.array([2**60, 0]), np.array([0, 2**32 - 1], np.uint32), np.array([True, False])]
    local = [np.array([[2**60 + 1, 0]]), np.array([[2, 2**32 - 1]], np.uint32), np.array([[False, False]])]
    model = one_round(tmp_path / "run", leaves, leaves, [local]).round(0)["client 0"]
    assert [update.tolist() for update in model.update] == [[1, 0], [2, 0], [-1, 0]]
    assert model.leaf_norms == {"0": 1.0, "1": 2.0, "2": 1.0}


def test_norms_accumulate_in_float64(tmp_path):
    # 2**20 steps of 1e-4 over a float32 model: a float32 sum of their squares would be off in the third digit. What
    # is left is the rounding of one square, here the same for all.
    reference = np.ones(2**20, np.float32)
    local = (reference + np.float32(1e-4))[None]
    step = float(local[0, 0]) - 1.0
    model = one_round(tmp_path / "run", reference, [reference], [[local]]).round(0)["client 0"]
    assert model.leaf_norms["weights"] == pytest.approx(2**10 * step, rel=1e-6)
    np.testing.assert_array_equal(model.weights, local[0])


def test_complex_norm_is_of_moduli(tmp_path):
    zero = np.zeros(1, np.complex64)
    model = one_round(tmp_path / "run", zero, [zero], [[np.array([[3 + 4j]], np.complex64)]]).round(0)["client 0"]
    assert model.update_norm == 5.0


def test_non_finite_weights_are_stored_as_they_are(tmp_path):
    zero = np.zeros(2, np.float32)
    local = np.array([[np.nan, np.inf], [np.inf, 0]], np.float32)
    round_ = one_round(tmp_path / "run", zero, [zero], [[local]]).round(0)
    assert np.isnan(round_["client 0"].update_norm)
    assert round_["client 1"].update_norm == np.inf
    np.testing.assert_array_equal(round_.leaf("weights"), local)


def test_big_endian_and_strided_arrays(tmp_path):
    leaves = [np.arange(6, dtype=">f4").reshape(2, 3)]
    local = np.arange(12, dtype=np.float32).reshape(3, 2, 2).T
    round_ = one_round(tmp_path / "run", leaves, leaves, [[local]]).round(0)
    np.testing.assert_array_equal(round_.leaf("0"), local)
    np.testing.assert_array_equal(round_.global_weights[0], leaves[0])
    assert round_["client 1"].update_norm == pytest.approx(np.linalg.norm(local[1] - leaves[0].astype(np.float32)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tree_of_arrays_comes_back(tmp_path_factory, data):
    dtypes = st.sampled_from([np.dtype(name) for name in ("bool", "int8", "uint16", "float16", "float32", "float64")])
    shapes = data.draw(
        st.lists(st.tuples(dtypes, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)), min_size=1, max_size=4)
    )
    names = data.draw(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), min_size=4, max_size=4, unique=True)
    )
    sizes = data.draw(st.lists(st.integers(1, 3), max_size=3))
    leaves = [data.draw(hnp.arrays(dtype, shape)) for dtype, shape in shapes]
    parts = [[data.draw(hnp.arrays(leaf.dtype, (size, *leaf.shape))) for leaf in leaves] for size in sizes]
    weights = {"tree": [{name: leaf} for name, leaf in zip(names, leaves, strict=False)]}
    round_ = one_round(tmp_path_factory.mktemp("any") / "run", weights, leaves, parts).round(0)
    models = [[leaf[row] for leaf in part] for part in parts for row in range(len(part[0]))]
    assert len(round_) == len(models)
    for stored, model in zip(round_.values(), models, strict=True):
        assert [list(node) for node in stored.weights["tree"]] == [[name] for name in names[: len(leaves)]]
        found = [leaf for node in stored.weights["tree"] for leaf in node.values()]
        assert [leaf.tobytes() for leaf in found] == [leaf.tobytes() for leaf in model]


def test_a_round_without_clients(tmp_path):
    zero = np.zeros(2, np.float32)
    ledger = one_round(tmp_path / "run", zero, [zero], [])
    assert len(ledger.round(0)) == 0
    assert ledger.round(0).leaf("weights").shape == (0, 2)
    assert ledger.table().num_rows == 0


def test_unsupported_dtype_is_refused(tmp_path):
    with pytest.raises(LedgerError, match=r"found 'complex128'.*leaf 'z'"):
        LedgerWriter.create(tmp_path / "run", weights={"z": np.zeros(1, np.complex128)}, config={}, rounds=1)
    assert not (tmp_path / "run").exists()


def test_importing_the_ledger_does_not_import_jax():
    program = "import sys, fedlens.ledger; print([name for name in ('jax', 'ml_dtypes') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
