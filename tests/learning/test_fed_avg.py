"""Federated averaging against plain NumPy, closed forms, and optax applied by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedlens as fed
from fedlens.data import FederatedData
from fedlens.errors import ConfigError
from fedlens.learning import build_unweighted_fed_avg, build_weighted_fed_avg


def softmax_sgd(weights, x, y, *, rate, batch_size, epochs, momentum):
    """One client in float64: its local weights, and the sums of loss and hits over all that it visited."""
    w, b = (np.asarray(weights[name], np.float64) for name in ("w", "b"))
    trace_w, trace_b = np.zeros_like(w), np.zeros_like(b)
    loss = hits = 0.0
    for _ in range(epochs):
        for start in range(0, len(x), batch_size):
            rows, labels = x[start : start + batch_size].astype(np.float64), y[start : start + batch_size]
            logits = rows @ w + b
            shifted = logits - logits.max(axis=1, keepdims=True)
            log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
            loss -= log_probabilities[np.arange(len(labels)), labels].sum()
            hits += (logits.argmax(axis=1) == labels).sum()
            error = (np.exp(log_probabilities) - np.eye(3)[labels]) / len(labels)
            trace_w, trace_b = momentum * trace_w + rows.T @ error, momentum * trace_b + error.sum(axis=0)
            w, b = w - rate * trace_w, b - rate * trace_b
    return {"w": w, "b": b}, loss, hits


@pytest.mark.parametrize(
    ("build", "epochs", "momentum"),
    [
        (build_weighted_fed_avg, 1, None),
        (build_weighted_fed_avg, 3, None),
        (build_weighted_fed_avg, 3, 0.9),  # a momentum that outlived its round would show in the second
        (build_unweighted_fed_avg, 1, None),
    ],
    ids=["weighted", "3 epochs", "momentum", "unweighted"],
)
def test_three_rounds_equal_numpy(data, logistic, distance, build, epochs, momentum):
    process = build(logistic, optax.sgd(0.3, momentum), batch_size=5, epochs=epochs, shuffle=False)
    process = process.with_local_models()
    state = process.initialize(1)
    expected = {name: np.asarray(leaf, np.float64) for name, leaf in state.weights.items()}
    for number in range(3):
        state, metrics, local_models = process.next(state, data.cohort(number))
        results = {
            client_id: softmax_sgd(
                expected,
                *data.client(client_id).values(),
                rate=0.3,
                batch_size=5,
                epochs=epochs,
                momentum=momentum or 0.0,
            )
            for client_id in data
        }
        sizes = {client_id: len(data.client(client_id)["y"]) for client_id in data}
        for client_id, (weights, loss, hits) in results.items():
            found = local_models[client_id]
            assert distance(found.weights, weights) < 2e-6
            assert found.num_examples == sizes[client_id]
            if sizes[client_id]:
                assert found.metrics["loss"] == pytest.approx(loss / sizes[client_id] / epochs, rel=2e-6)
                assert found.metrics["accuracy"] == pytest.approx(hits / sizes[client_id] / epochs, rel=1e-6)
        share = {
            client_id: float(size if build is build_weighted_fed_avg else size > 0) for client_id, size in sizes.items()
        }
        total = sum(share.values())
        expected = {
            name: sum(share[client_id] * results[client_id][0][name] for client_id in data) / total
            for name in ("w", "b")
        }
        assert distance(state.weights, expected) < 2e-6
        visited = epochs * sum(sizes.values())
        assert metrics["loss"] == pytest.approx(sum(loss for _, loss, _ in results.values()) / visited, rel=2e-6)
        assert metrics["accuracy"] == pytest.approx(sum(hits for *_, hits in results.values()) / visited, rel=1e-6)
        assert int(state.round) == number + 1
        counts = {name: metrics[name] for name in metrics if name not in ("loss", "accuracy")}
        assert counts == {
            "num_examples": 27,
            "num_clients": 4,
            "clients_without_examples": 1,
            "clients_dropped": 0,
        }
        assert list(metrics)[:2] == ["loss", "accuracy"]


@pytest.fixture(scope="module")
def regression():
    """A linear regression over three unequal clients, and its process: one step over all that a client has."""
    rng = np.random.default_rng(5)
    sizes = {"a": 4, "b": 9, "c": 6}
    columns = {}
    for client_id, count in sizes.items():
        x = rng.normal(size=(count, 3)).astype(np.float32)
        y = (x @ [1.0, -2.0, 0.5] + 0.3 * rng.normal(size=count)).astype(np.float32)
        columns[client_id] = {"x": x, "y": y}
    data = FederatedData.from_clients(columns)
    model = fed.models.from_functions(
        init=lambda key: jnp.zeros(3),
        apply=lambda weights, x: x @ weights,
        inputs=data.element_type,
        loss=fed.losses.squared_error,
    )
    return data, build_weighted_fed_avg(model, optax.sgd(0.5), batch_size=9, shuffle=False).with_local_models()


def test_one_full_batch_step_is_the_closed_form(regression, distance):
    data, process = regression
    state, metrics, local_models = process.next(process.initialize(0), data.cohort(0))
    x, y = data.columns["x"].astype(np.float64), data.columns["y"].astype(np.float64)
    for client_id in data:
        own_x, own_y = (column.astype(np.float64) for column in data.client(client_id).values())
        assert distance(local_models[client_id].weights, 0.5 * own_x.T @ own_y / len(own_y)) < 1e-6
    assert distance(state.weights, 0.5 * x.T @ y / len(y)) < 1e-6
    assert metrics["loss"] == pytest.approx(0.5 * np.mean(y**2), rel=1e-6)


def test_rounds_of_one_full_batch_step_reach_the_least_squares_solution(regression, distance):
    data, process = regression
    state = process.initialize(0)
    for number in range(100):
        state, *_ = process.next(state, data.cohort(number))
    optimum = np.linalg.lstsq(data.columns["x"].astype(np.float64), data.columns["y"].astype(np.float64))[0]
    assert distance(state.weights, optimum) < 1e-5


def test_sgd_of_rate_one_at_the_server_is_the_default(data, logistic, same_bits):
    default, explicit = (
        build_weighted_fed_avg(logistic, optax.sgd(0.3), server, batch_size=5) for server in (None, optax.sgd(1.0))
    )
    found, expected = (process.next(process.initialize(0), data.cohort(0)) for process in (explicit, default))
    assert same_bits(found[0].weights, expected[0].weights)
    assert found[1] == expected[1]


def test_the_server_optimizer_is_given_the_negated_mean_update(data, logistic, distance):
    optimizer = optax.adam(0.05, eps=1e-3)
    process = build_weighted_fed_avg(logistic, optax.sgd(0.3), optimizer, batch_size=5).with_local_models()
    state = process.initialize(0)
    weights = state.weights
    by_hand = optimizer.init(weights)
    for number in range(3):
        before = state.weights
        state, _, local_models = process.next(state, data.cohort(number))
        sizes = [model.num_examples for model in local_models]
        gradient = {
            name: -(np.average(leaf.astype(np.float64), axis=0, weights=sizes) - before[name]).astype(np.float32)
            for name, leaf in local_models.stacked.items()
        }
        updates, by_hand = optimizer.update(gradient, by_hand, weights)
        weights = optax.apply_updates(weights, updates)
        assert distance(state.weights, weights) < 1e-5
        assert distance(state.optimizer_state, by_hand) < 1e-5


def test_adam_at_the_clients_starts_anew_in_every_round(data, logistic, vector):
    # Adam's first step from a fresh state is rate * gradient / (|gradient| + eps), whatever happened before.
    process = build_weighted_fed_avg(logistic, optax.adam(0.01), batch_size=12).with_local_models()
    state = process.initialize(0)
    for number in range(3):
        state, _, local_models = process.next(state, data.cohort(number))
        for client_id in ("ann", "bob", "dora", "eve"):
            np.testing.assert_allclose(np.abs(vector(local_models[client_id].update)), 0.01, rtol=1e-4)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"epochs": 0}, {"on_nonfinite": "warn"}])
def test_arguments_out_of_range(logistic, arguments):
    with pytest.raises(ConfigError, match=f"Expected .*found.*{next(iter(arguments.values()))}"):
        build_weighted_fed_avg(logistic, optax.sgd(0.1), **arguments)
