"""What `with_local_models` hands out: every client's model, by id and in order, and nothing else changes."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from fedlens.errors import CohortError
from fedlens.learning import build_weighted_fed_avg


@pytest.fixture(scope="module")
def process(logistic):
    return build_weighted_fed_avg(logistic, optax.sgd(0.3), batch_size=5)


@pytest.fixture(scope="module")
def tapped(process):
    return process.with_local_models()


@pytest.fixture(scope="module")
def first_round(tapped, data):
    state = tapped.initialize(0)
    return state, *tapped.next(state, data.cohort(0))


def test_states_and_metrics_are_bit_identical_to_the_process_without(process, tapped, data, same_bits):
    state, tapped_state = process.initialize(0), tapped.initialize(0)
    for number in range(3):
        state, metrics = process.next(state, data.cohort(number))
        tapped_state, tapped_metrics, _ = tapped.next(tapped_state, data.cohort(number))
        assert same_bits(tapped_state, state)
        assert tapped_metrics == metrics


def test_asking_twice_is_asking_once(process, tapped):
    assert tapped.with_local_models() is tapped
    assert not process.hands_out_local_models


def test_the_weighted_mean_of_the_updates_is_the_change_of_the_global_model(first_round, vector):
    before, after, _, local_models = first_round
    updates = np.stack([vector(model.update) for model in local_models])
    mean = np.average(updates, axis=0, weights=[model.num_examples for model in local_models])
    change = vector(after.weights) - vector(before.weights)
    assert np.linalg.norm(change - mean) <= 1e-6 * np.linalg.norm(vector(after.weights))


def test_by_id_in_order_and_stacked(first_round, data, same_bits):
    before, _, _, local_models = first_round
    assert len(local_models) == 5
    assert local_models.ids == data.ids == tuple(model.client_id for model in local_models)
    assert "dora" in local_models
    assert "zoe" not in local_models
    assert local_models.stacked["w"].shape == (5, 4, 3)
    for position, (client_id, model) in enumerate(local_models.items()):
        assert client_id == data.ids[position]
        assert same_bits(model.weights, local_models[client_id].weights)
        assert same_bits(model.weights, {name: leaf[position] for name, leaf in local_models.stacked.items()})
        assert same_bits(model.global_weights, before.weights)
        assert same_bits(model.weights, local_models.weights[client_id])


def test_update_and_its_norm(first_round, vector):
    _, _, _, local_models = first_round
    model = local_models["ann"]
    expected = vector(model.weights) - vector(model.global_weights)
    np.testing.assert_allclose(vector(model.update), expected, rtol=1e-5, atol=1e-7)
    assert model.update_norm == pytest.approx(np.linalg.norm(expected), rel=1e-5)


def test_shown_in_a_few_words(first_round):
    _, _, _, local_models = first_round
    assert repr(local_models) == "LocalModels(5 clients, 15 parameters each)"
    assert repr(local_models["bob"]) == "LocalModel('bob', 3 examples, 15 parameters)"


def test_an_unknown_client_is_named_with_its_neighbours(first_round):
    with pytest.raises(CohortError, match=r"such as 'ann'.*found 'anne'"):
        first_round[3]["anne"]
    with pytest.raises(KeyError):
        first_round[3]["anne"]


def test_a_client_without_examples_keeps_the_global_model(first_round, tapped, data, same_bits, distance):
    before, after, metrics, local_models = first_round
    idle = local_models["nil"]
    assert idle.num_examples == 0
    assert same_bits(idle.weights, before.weights)
    assert idle.update_norm == 0
    assert np.isnan(idle.metrics["loss"])
    assert np.isnan(idle.metrics["accuracy"])
    assert metrics["clients_without_examples"] == 1
    assert metrics["num_clients"] == 4
    others = data.select([client_id for client_id in data if client_id != "nil"])
    without, metrics_without, _ = tapped.next(before, others.cohort(0))
    assert distance(after.weights, without.weights) < 1e-6
    assert metrics_without["clients_without_examples"] == 0
    assert metrics_without["loss"] == pytest.approx(metrics["loss"], rel=1e-6)


def test_a_round_without_any_example_changes_nothing(logistic, make, same_bits):
    process = build_weighted_fed_avg(logistic, optax.sgd(0.3), optax.adam(0.1)).with_local_models()
    fresh = process.initialize(0)
    under_way = jax.tree.map(lambda leaf: leaf + 1, fresh.optimizer_state)  # Adam would go on with its moments
    before = dataclasses.replace(fresh, optimizer_state=under_way)
    after, metrics, local_models = process.next(before, make({"a": 0, "b": 0}).cohort(0))
    assert same_bits(after.weights, before.weights)
    assert same_bits(after.optimizer_state, before.optimizer_state)
    assert int(after.round) == 1
    assert metrics["num_examples"] == metrics["num_clients"] == 0
    assert metrics["clients_without_examples"] == 2
    assert np.isnan(metrics["loss"])
    assert all(same_bits(model.weights, before.weights) for model in local_models)


def test_the_global_model_of_a_state(process):
    state = process.initialize(3)
    assert process.get_model_weights(state) is state.weights
