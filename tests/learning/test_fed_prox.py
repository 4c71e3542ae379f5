"""FedProx against a loop in NumPy, its closed form on a quadratic, and federated averaging."""

import numpy as np
import optax
import pytest

import fedlens as fed
from fedlens.errors import ConfigError
from fedlens.learning import build_unweighted_fed_prox, build_weighted_fed_avg, build_weighted_fed_prox

STEP, STRENGTH = 0.3, 0.7


def test_without_strength_it_is_federated_averaging(logistic, data, same_bits):
    plain = build_weighted_fed_avg(logistic, optax.sgd(STEP), batch_size=5)
    prox = build_weighted_fed_prox(logistic, optax.sgd(STEP), proximal_strength=0, batch_size=5)
    states = [process.next(process.initialize(3), data.cohort(0)) for process in (plain, prox)]
    assert same_bits(*states)


@pytest.mark.parametrize("weighted", [True, False])
def test_a_round_equals_numpy(weighted):
    # One weight, targets y, predictions w x: the gradient of the mean of (w x - y)^2 / 2 is mean(x (w x - y)).
    rng = np.random.default_rng(0)
    sizes = {"ann": 3, "bob": 8, "cat": 5}
    clients = {
        name: {"x": rng.normal(size=(size, 1)).astype(np.float32), "y": rng.normal(size=(size, 1)).astype(np.float32)}
        for name, size in sizes.items()
    }
    data = fed.data.FederatedData.from_clients(clients)
    model = fed.models.from_functions(
        lambda key: np.full((1, 1), 2, np.float32),
        lambda weights, x: x @ weights,
        inputs=data.element_type,
        loss=fed.losses.squared_error,
    )
    build = build_weighted_fed_prox if weighted else build_unweighted_fed_prox
    process = build(
        model, optax.sgd(STEP), proximal_strength=STRENGTH, batch_size=4, epochs=2, shuffle=False
    ).with_local_models()
    state, _, local_models = process.next(process.initialize(0), data.cohort(0))

    expected = {}
    for name, columns in clients.items():
        weight = 2.0
        for _ in range(2):
            for start in range(0, sizes[name], 4):
                x, y = (columns[column][start : start + 4, 0].astype(np.float64) for column in "xy")
                weight -= STEP * (np.mean(x * (weight * x - y)) + STRENGTH * (weight - 2))
        expected[name] = weight
        np.testing.assert_allclose(local_models[name].weights, weight, rtol=1e-5)
    counts = list(sizes.values()) if weighted else None
    np.testing.assert_allclose(state.weights, np.average(list(expected.values()), weights=counts), rtol=1e-5)


def test_many_steps_end_at_the_proximal_point():
    # min over w of (w - 1)^2 / 2 + mu (w - w0)^2 / 2 is (1 + mu w0) / (1 + mu).
    data = fed.data.FederatedData.from_clients(
        {"ann": {"x": np.ones((1, 1), np.float32), "y": np.ones((1, 1), np.float32)}}
    )
    model = fed.models.from_functions(
        lambda key: np.full((1, 1), 5, np.float32),
        lambda weights, x: x @ weights,
        inputs=data.element_type,
        loss=fed.losses.squared_error,
    )
    process = build_weighted_fed_prox(model, optax.sgd(STEP), proximal_strength=3.0, batch_size=1, epochs=100)
    state, _ = process.next(process.initialize(0), data.cohort(0))
    np.testing.assert_allclose(state.weights, (1 + 3 * 5) / (1 + 3), rtol=1e-6)


@pytest.mark.parametrize("strength", [-1e-9, np.nan, np.inf])
def test_a_strength_that_is_none(logistic, strength):
    with pytest.raises(ConfigError, match="Expected a proximal strength of at least 0, found"):
        build_weighted_fed_prox(logistic, optax.sgd(0.1), proximal_strength=strength)
