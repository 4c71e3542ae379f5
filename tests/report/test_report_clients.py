"""The comparison of clients is what NumPy computes from the ledger and the data."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import fedlens as fed
from fedlens.ledger import Ledger
from fedlens.report import compare_clients, last_local_models


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 120).astype(np.int32)
    images = (np.eye(5, dtype=np.float32)[labels] + rng.normal(0, 0.4, (120, 5))).astype(np.float32)
    # "solo" has one example, and with it none to hold out.
    clients = ["solo"] + [f"c{number % 5}" for number in range(119)]
    return fed.data.FederatedData.from_arrays({"x": images, "y": labels}, clients=clients)


@pytest.fixture(scope="module")
def model(data):
    return fed.models.from_functions(
        init=lambda key: {"kernel": 0.1 * jax.random.normal(key, (5, 4)), "bias": jax.numpy.zeros(4)},
        apply=lambda weights, x: x @ weights["kernel"] + weights["bias"],
        inputs=data.element_type,
        loss=fed.losses.cross_entropy,
        metrics=[fed.metrics.accuracy],
    )


def accuracy(weights, examples) -> float:
    logits = examples["x"] @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"])
    return float(np.mean(logits.argmax(axis=1) == examples["y"])) if len(examples["y"]) else np.nan


def test_each_client_by_numpy(model, data, tmp_path):
    import optax

    train, held_out = data.split(0.3)
    process = fed.learning.build_weighted_fed_avg(model, optax.sgd(0.5), batch_size=4)
    finished = fed.run(process, train, rounds=5, clients_per_round=3, seed=1, ledger=tmp_path / "run", progress=False)
    assert finished.ledger is not None
    local_models = last_local_models(finished.ledger)
    assert [local.client_id for local in local_models] == sorted(finished.ledger.clients)
    assert "solo" in finished.ledger.clients
    for local in local_models:
        took_part = [number for number in finished.ledger.rounds if local.client_id in finished.ledger.round(number)]
        assert local.round == took_part[-1]

    rows = compare_clients(model, finished.state.weights, local_models, held_out, held_out)
    for row, local in zip(rows, local_models, strict=True):
        own = held_out.client(row.client_id)
        difference = [local.weights[name] - np.asarray(finished.state.weights[name]) for name in ("kernel", "bias")]
        assert (row.client_id, row.round) == (local.client_id, local.round)
        assert row.num_examples == len(train.client(row.client_id)["y"])
        assert row.held_out == len(own["y"])
        assert row.local_at_home == pytest.approx(accuracy(local.weights, own), nan_ok=True)
        assert row.global_at_home == pytest.approx(accuracy(finished.state.weights, own), nan_ok=True)
        assert row.local_everywhere == pytest.approx(accuracy(local.weights, held_out.columns))
        assert row.distance == pytest.approx(np.sqrt(sum(np.sum(part**2) for part in difference)), rel=1e-6)
    assert compare_clients(model, finished.state.weights, [], held_out, held_out) == []


def test_of_many_clients_those_of_the_last_round(make_ledger):
    ledger = make_ledger(rounds=2, ids=tuple(f"c{number}" for number in range(30)))
    chosen = last_local_models(Ledger(ledger.path))
    assert [local.client_id for local in chosen] == [f"c{number}" for number in range(20)]
    assert {local.round for local in chosen} == {1}
    assert len(last_local_models(ledger, limit=30)) == 30
