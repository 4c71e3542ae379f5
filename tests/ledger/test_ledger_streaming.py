"""Rounds handed over in pieces: what the parts are, what a failure leaves, and that memory stays where it is."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tracemalloc

import jax.numpy as jnp
import numpy as np
import optax
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

import fedlens as fed
from fedlens.errors import LedgerError, NonFiniteError
from fedlens.ledger import ClientPart, Ledger, LedgerWriter, commit, handover
from fedlens.runtime import engine

SMALL = np.zeros(3, np.float32)


def part_of(start: int, count: int, size: int = 3) -> ClientPart:
    places = np.arange(start, start + count)
    weights = np.repeat(places[:, None], size, axis=1).astype(np.float32)
    return ClientPart(tuple(f"c{place}" for place in places), places, [weights], places, {"loss": places / 8})


def create(path, size: int = 3, rounds: int = 2) -> LedgerWriter:
    return LedgerWriter.create(path, weights=np.zeros(size, np.float32), config={}, rounds=rounds)


def test_each_delivery_is_a_part(tmp_path, stored_models_of):
    with create(tmp_path / "run") as writer:
        writer.begin(0, [SMALL])
        for start, count in ((4, 3), (0, 4), (7, 1)):
            writer.add([part_of(start, count - 1), part_of(start + count - 1, 1)])
        writer.commit({"loss": 1.0}, {})
    table = pq.read_table(tmp_path / "run/rounds/000000.parquet")
    assert table.column("client").to_pylist() == [f"c{place}" for place in range(8)]
    assert table.column("part").to_pylist() == [1, 1, 1, 1, 0, 0, 0, 2]
    assert table.column("row").to_pylist() == [0, 1, 2, 3, 0, 1, 2, 0]
    for client, model in stored_models_of(tmp_path / "run", 0).items():
        np.testing.assert_array_equal(model["weights"], [float(client[1:])] * 3)
    assert list(load_file(tmp_path / "run/rounds/000000.2.safetensors")) == ["local/weights"]


def test_a_round_that_did_not_end_leaves_nothing(tmp_path):
    with create(tmp_path / "run") as writer:
        writer.begin(0, [SMALL])
        writer.add([part_of(0, 2)])
        writer.add([part_of(2, 2)])
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == ["run.json"]
    with LedgerWriter.open(tmp_path / "run") as writer:
        writer.begin(0, [SMALL])
        writer.commit({}, {})
    assert len(Ledger(tmp_path / "run").round(0)) == 0


def test_opening_clears_parts_and_scratch_of_a_torn_round(tmp_path):
    with create(tmp_path / "run") as writer:
        writer.begin(0, [SMALL])
        writer.add([part_of(0, 1)])
        writer.add([part_of(1, 1)])
        writer.commit({}, {})
    rounds = tmp_path / "run/rounds"
    before = {path.name: path.read_bytes() for path in rounds.iterdir()}
    for name in ("000001.safetensors", "000001.7.safetensors", "000001.7.scratch.tmp", "000001.parquet.tmp"):
        (rounds / name).write_bytes(b"half")
    LedgerWriter.open(tmp_path / "run").close()
    assert {path.name: path.read_bytes() for path in rounds.iterdir()} == before


def test_steps_out_of_order_are_refused(tmp_path):
    with create(tmp_path / "run") as writer:
        with pytest.raises(LedgerError, match="Expected a round that was begun, found none"):
            writer.add([part_of(0, 1)])
        with pytest.raises(LedgerError, match="Expected a round that was begun, found none"):
            writer.commit({}, {})
        writer.begin(0, [SMALL])
        with pytest.raises(LedgerError, match="Expected round 0 to end first, found round 1"):
            writer.begin(1, [SMALL])
        writer.add([part_of(0, 2)])
        with pytest.raises(LedgerError, match="each client once, found 'c1' twice"):
            writer.add([part_of(1, 2)])
        with pytest.raises(LedgerError, match="Expected a client of round 0, found 'c2', among those left out"):
            writer.commit({}, {}, dropped=["c2"])
        writer.add([part_of(2, 1)])
        writer.commit({}, {})
    assert list(Ledger(tmp_path / "run").round(0)) == ["c0", "c1", "c2"]


def peak_of(path, deliveries: int, rounds: int = 1) -> int:
    """The most memory in Python's and NumPy's hands while rounds are written."""
    size = 1 << 18
    tracemalloc.start()
    try:
        with create(path, size, rounds) as writer:
            for round_number in range(rounds):
                writer.begin(round_number, [np.zeros(size, np.float32)])
                for number in range(deliveries):
                    writer.add([part_of(number, 1, size)])
                writer.commit({}, {})
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("keep_in_full", [True, False])
def test_memory_does_not_grow_with_the_number_of_clients(tmp_path, monkeypatch, keep_in_full):
    # A megabyte a client; two of them may wait, and two are held until the round ends.
    monkeypatch.setattr(handover, "IN_FLIGHT", 2 << 20)
    monkeypatch.setattr(commit, "HELD", 2 << 20)
    if not keep_in_full:
        monkeypatch.setattr(fed.Keep, "keeps_round", lambda self, number: False)
    few, many = peak_of(tmp_path / "few", 12), peak_of(tmp_path / "many", 48)
    assert many < few + (4 << 20)
    assert many < 40 << 20


def test_memory_does_not_grow_with_the_number_of_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(handover, "IN_FLIGHT", 2 << 20)
    monkeypatch.setattr(commit, "HELD", 2 << 20)
    gc.disable()  # a round must not wait for the collector of cycles, which seldom runs where few objects are made
    try:
        few, many = peak_of(tmp_path / "few", 4, 2), peak_of(tmp_path / "many", 4, 10)
    finally:
        gc.enable()
    assert many < few + (4 << 20)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return fed.data.FederatedData.from_clients(
        {
            f"c{number}": {
                "x": rng.normal(size=(count, 3)).astype(np.float32),
                "y": rng.integers(0, 2, count).astype(np.int32),
            }
            for number, count in enumerate([6, 3, 0, 9, 4, 5, 7])
        }
    )


@pytest.fixture(scope="module")
def process(data):
    model = fed.models.from_functions(
        init=lambda key: {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)},
        apply=lambda weights, x: x @ weights["w"] + weights["b"],
        inputs=data.element_type,
        loss=fed.losses.cross_entropy,
    )
    return fed.learning.build_weighted_fed_avg(model, optax.sgd(0.3), batch_size=4)


def test_a_cohort_in_chunks_is_stored_as_it_was_computed(process, data, tmp_path, monkeypatch, stored_models_of):
    monkeypatch.setattr(engine, "_COMPUTED_BYTES", 300)
    fed.run(process, data, rounds=2, ledger=tmp_path / "run", progress=False)
    state, _, local_models = process.with_local_models().next(process.initialize(0), data.cohort(0))
    models = stored_models_of(tmp_path / "run", 0)
    assert list(models) == list(data.ids)
    for client, model in models.items():
        for name in ("w", "b"):
            assert model[name].tobytes() == np.asarray(local_models[client].weights[name]).tobytes()
    table = pq.read_table(tmp_path / "run/rounds/000000.parquet")
    assert table.column("num_examples").to_pylist() == [6, 3, 0, 9, 4, 5, 7]
    assert max(table.column("part").to_pylist()) >= 1
    after = load_file(tmp_path / "run/rounds/000001.safetensors")
    np.testing.assert_array_equal(after["global/w"], np.asarray(state.weights["w"]))


def test_a_chunk_that_is_not_finite_leaves_the_rounds_before(process, data, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_COMPUTED_BYTES", 1)
    with pytest.raises(ZeroDivisionError):
        fed.run(process, data, rounds=3, ledger=tmp_path / "run", progress=False, on_round=lambda report: 1 // 0)
    broken = {client: {"x": np.ones((2, 3), np.float32), "y": np.zeros(2, np.int32)} for client in data.ids}
    broken["c5"]["x"][0, 0] = np.inf
    with pytest.raises(NonFiniteError, match="'c5'"):
        fed.resume(process, fed.data.FederatedData.from_clients(broken), ledger=tmp_path / "run", progress=False)
    names = sorted(path.name for path in (tmp_path / "run/rounds").iterdir())
    assert {name[:6] for name in names} == {"000000"}
    fed.resume(process, data, ledger=tmp_path / "run", progress=False)
    assert Ledger(tmp_path / "run").state == "complete"


def test_a_dropped_client_is_marked_in_its_round(process, data, tmp_path):
    broken = {client: {"x": np.ones((2, 3), np.float32), "y": np.zeros(2, np.int32)} for client in data.ids}
    broken["c5"]["x"][0, 0] = np.nan
    dropping = fed.learning.build_weighted_fed_avg(process.model, optax.sgd(0.3), batch_size=4, on_nonfinite="drop")
    fed.run(dropping, fed.data.FederatedData.from_clients(broken), rounds=1, ledger=tmp_path / "run", progress=False)
    table = pq.read_table(tmp_path / "run/rounds/000000.parquet").to_pydict()
    dropped = dict(zip(table["client"], table["dropped"], strict=True))
    assert [client for client in dropped if dropped[client]] == ["c5"]
    assert table["cosine"][table["client"].index("c5")] is None


def test_a_run_takes_encodings_and_keep(process, data, tmp_path, stored_models_of):
    keep = fed.Keep(leaves="w", every=2)
    fed.run(process, data, rounds=2, ledger=tmp_path / "run", encodings="bf16-delta", keep=keep, progress=False)
    described = json.loads((tmp_path / "run/run.json").read_text())
    assert [leaf["encoding"] for leaf in described["leaves"]] == ["bf16-delta"] * 2
    assert {tuple(model) for model in stored_models_of(tmp_path / "run", 0).values()} == {("w",)}
    assert {tuple(model) for model in stored_models_of(tmp_path / "run", 1).values()} == {()}
    with pytest.raises(fed.ConfigError, match="Expected a ledger for encodings and keep"):
        fed.run(process, data, rounds=1, keep=keep, progress=False)


def test_the_writer_is_closed_at_the_end_of_a_program_that_forgot_to(tmp_path):
    program = (
        "import numpy as np\nfrom fedlens.ledger import Ledger\n"
        f"ledger = Ledger.create({str(tmp_path / 'run')!r}, weights=np.zeros(3, np.float32))\n"
        "ledger.record(0, 'ann', np.ones(3, np.float32))\nledger.finish_round(0)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert list(Ledger(tmp_path / "run").round(0)) == ["ann"]
