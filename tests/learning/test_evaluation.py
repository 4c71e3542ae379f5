"""Evaluation against NumPy: over all examples and by client, of one model and of each client's own."""

import jax
import numpy as np
import pytest

import fedlens as fed
from fedlens.errors import CohortError
from fedlens.learning import build_fed_eval
from fedlens.runtime import ClientValues
from fedlens.runtime.values import Part


def measure(weights, x, y):
    """Mean cross-entropy and accuracy in float64."""
    logits = x.astype(np.float64) @ weights["w"] + weights["b"]
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return {
        "loss": -log_probabilities[np.arange(len(y)), y].mean(),
        "accuracy": (logits.argmax(axis=1) == y).mean(),
        "num_examples": len(y),
    }


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(3)
    return {"b": rng.normal(size=3).astype(np.float32), "w": rng.normal(size=(4, 3)).astype(np.float32)}


@pytest.fixture(scope="module")
def own_weights(data):
    """A model of its own for each client, in another order than the data's."""
    rng = np.random.default_rng(4)
    ids = data.ids[::-1]
    stacked = {
        name: rng.normal(size=(len(ids), *shape)).astype(np.float32) for name, shape in (("b", (3,)), ("w", (4, 3)))
    }
    type_ = fed.type_of({name: leaf[0] for name, leaf in stacked.items()})
    return ClientValues(ids, type_, [Part(np.arange(len(ids)), tuple(stacked.values()))])


@pytest.fixture(scope="module")
def evaluate(logistic):
    return build_fed_eval(logistic, batch_size=4)


@pytest.fixture(scope="module")
def of_one_model(evaluate, weights, data):
    return evaluate(weights, data.cohort(0))


def test_one_model(of_one_model, weights, data):
    assert of_one_model.metrics == pytest.approx(measure(weights, **data.columns), rel=2e-6)
    assert tuple(of_one_model.by_client) == data.ids
    for client_id in set(data) - {"nil"}:
        assert of_one_model.by_client[client_id] == pytest.approx(measure(weights, **data.client(client_id)), rel=2e-6)


def test_a_client_without_examples_has_no_mean(of_one_model):
    none = of_one_model.by_client["nil"]
    assert none["num_examples"] == 0
    assert np.isnan([none["loss"], none["accuracy"]]).all()


def test_the_batch_size_changes_nothing_beyond_rounding(logistic, of_one_model, weights, data):
    at_once = build_fed_eval(logistic)(weights, data.cohort(0))
    assert at_once.metrics == pytest.approx(of_one_model.metrics, rel=1e-6)
    for client_id in data:
        assert at_once.by_client[client_id] == pytest.approx(of_one_model.by_client[client_id], rel=1e-6, nan_ok=True)


def test_each_clients_own_model(evaluate, own_weights, data):
    found = evaluate(own_weights, data.cohort(0))
    expected = {
        client_id: measure(own_weights[client_id], **data.client(client_id)) for client_id in data if client_id != "nil"
    }
    assert set(found.by_client) == set(data)
    for client_id, metrics in expected.items():
        assert found.by_client[client_id] == pytest.approx(metrics, rel=2e-6)
    loss = np.average(
        [each["loss"] for each in expected.values()], weights=[each["num_examples"] for each in expected.values()]
    )
    assert found.metrics["loss"] == pytest.approx(loss, rel=2e-6)
    assert found.metrics["num_examples"] == 27


def test_each_clients_model_on_the_same_examples(evaluate, own_weights, data):
    shared = data.client("dora")
    found = evaluate.on_examples(own_weights, **shared)
    assert list(found) == list(own_weights.ids)
    for client_id, metrics in found.items():
        assert metrics == pytest.approx(measure(own_weights[client_id], **shared), rel=2e-6)


def test_no_key_and_so_no_dropout_in_evaluation(data, weights, own_weights):
    def apply(weights, x, key):
        assert key is None
        return x @ weights["w"] + weights["b"]

    model = fed.models.from_functions(
        lambda key: weights, apply, inputs=data.element_type, loss=fed.losses.cross_entropy
    )
    evaluate = build_fed_eval(model)  # traces the model
    assert evaluate.on_examples(own_weights, **data.client("bob"))["ann"]["num_examples"] == 3


def test_models_and_data_of_other_clients(evaluate, own_weights, data):
    with pytest.raises(CohortError, match="Expected the same clients in all cohorts of one call"):
        evaluate(own_weights, data.select(["ann"]).cohort(0))


def test_sequences_count_as_one_example():
    # Over the steps of a sequence loss and accuracy are means, so that a sequence weighs as much as any other example.
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(5, 7, 3)).astype(np.float32)
    labels = rng.integers(0, 3, (5, 7)).astype(np.int32)
    log_probabilities = jax.nn.log_softmax(logits.astype(np.float32))
    expected = -np.take_along_axis(np.asarray(log_probabilities), labels[..., None], axis=2)[..., 0].mean(axis=1)
    np.testing.assert_allclose(fed.losses.cross_entropy(logits, labels), expected, rtol=1e-5)
    hits = (logits.argmax(axis=2) == labels).mean(axis=1)
    np.testing.assert_allclose(fed.metrics.accuracy.measure(logits, labels), hits, rtol=1e-6)


def test_squared_error_is_half_the_mean_square():
    rng = np.random.default_rng(7)
    outputs, targets = rng.normal(size=(2, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(
        fed.losses.squared_error(outputs, targets), 0.5 * np.mean((outputs - targets) ** 2, axis=1), rtol=1e-6
    )
    np.testing.assert_allclose(
        fed.losses.squared_error(outputs[:, 0], targets[:, 0]), 0.5 * (outputs - targets)[:, 0] ** 2, rtol=1e-6
    )
