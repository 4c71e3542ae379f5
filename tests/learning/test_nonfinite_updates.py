"""A client whose update is not finite: named, left out, or let through, as the process says."""

import numpy as np
import optax
import pytest

from fedlens.data import FederatedData
from fedlens.errors import NonFiniteError
from fedlens.learning import build_weighted_fed_avg


@pytest.fixture(scope="module")
def spoiled(data):
    """The data in which one value of dora's is infinite."""
    columns = {
        client_id: {name: column.copy() for name, column in data.client(client_id).items()} for client_id in data
    }
    columns["dora"]["x"][3, 1] = np.inf
    return FederatedData.from_clients(columns)


def build(logistic, on_nonfinite):
    return build_weighted_fed_avg(logistic, optax.sgd(0.3), batch_size=5, shuffle=False, on_nonfinite=on_nonfinite)


@pytest.fixture(scope="module")
def raising(logistic):
    return build(logistic, "raise")


@pytest.fixture(scope="module")
def dropping(logistic):
    return build(logistic, "drop").with_local_models()


def test_raise_names_client_and_leaf_and_the_caller_can_go_on(raising, spoiled, data, same_bits):
    state = raising.initialize(0)
    expected, _ = raising.next(state, data.cohort(0))
    with pytest.raises(NonFiniteError, match=r"found infinity or NaN in client 'dora', leaf '.*\bw'"):
        raising.next(state, spoiled.cohort(0))
    found, metrics = raising.next(state, data.cohort(0))
    assert same_bits(found, expected)
    assert metrics["clients_dropped"] == 0


def test_raise_is_the_default(logistic):
    assert build_weighted_fed_avg(logistic, optax.sgd(0.3)).on_nonfinite == "raise"


def test_drop_equals_the_round_without_the_client_and_counts_it(dropping, raising, spoiled, data, distance):
    state = dropping.initialize(0)
    found, metrics, local_models = dropping.next(state, spoiled.cohort(0))
    others = data.select([client_id for client_id in data if client_id != "dora"])
    expected, expected_metrics = raising.next(state, others.cohort(0))
    assert distance(found.weights, expected.weights) < 1e-6
    assert metrics.pop("clients_dropped") == 1
    assert expected_metrics.pop("clients_dropped") == 0
    assert metrics == pytest.approx(expected_metrics, rel=1e-6)
    assert not np.isfinite(local_models["dora"].weights["w"]).all()  # what was learned is handed out all the same
    assert np.isfinite(local_models["ann"].weights["w"]).all()


def test_dropping_everybody_changes_nothing(dropping, spoiled, same_bits):
    state = dropping.initialize(0)
    after, metrics, _ = dropping.next(state, spoiled.select(["dora"]).cohort(0))
    assert same_bits(after.weights, state.weights)
    assert metrics["clients_dropped"] == 1
    assert metrics["num_clients"] == metrics["clients_without_examples"] == 0


def test_ignore_aggregates_it(logistic, spoiled):
    process = build(logistic, "ignore")
    after, metrics = process.next(process.initialize(0), spoiled.cohort(0))
    assert not np.isfinite(after.weights["w"]).any()
    assert metrics["clients_dropped"] == 0
