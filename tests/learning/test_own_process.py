"""Processes that a user wrote in the language: run, tapped and captured like those of `fed.learning`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedlens as fed
from fedlens.errors import ConfigError, DisclosureError, StructureError

KEY = fed.TensorType(np.uint32, (2,))


@pytest.fixture(scope="module")
def numbers():
    rng = np.random.default_rng(1)
    clients = {
        f"c{number}": {
            "x": rng.normal(size=(3 + number, 4)).astype(np.float32),
            "y": np.arange(3 + number, dtype=np.float32),
        }
        for number in range(5)
    }
    return fed.data.FederatedData.from_clients(clients)


def build(
    data, returned="weights", *, keys=False, secure=False, count="num_examples", share=None, measure=jnp.linalg.norm
):
    """Linear regression, one step a batch, written by hand; what the client work returns is named by the arguments."""
    weights_type = fed.TensorType(np.float32, (4,))
    batches = fed.SequenceType(fed.batch_type(data.element_type, 4))
    state_fields = [("weights", weights_type), ("round", np.int32), ("key", KEY)]
    state_type = fed.FederatedType(fed.StructWithPythonType(state_fields, dict), fed.SERVER)

    @fed.jax_computation
    def start():
        return {"weights": jnp.zeros(4), "round": jnp.int32(0), "key": jnp.array([1, 2], jnp.uint32)}

    @fed.federated_computation
    def initialize():
        return fed.federated_eval(start, fed.SERVER)

    def trained_by(weights, data, noise):
        def step(state, batch):
            weights, seen = state
            error = (batch["x"] @ weights - batch["y"]) * batch["mask"]
            count = batch["mask"].sum(dtype=jnp.int32)
            return weights - 0.1 * (error @ batch["x"]) / count, seen + count

        trained, seen = data.reduce((weights, jnp.int32(0)), step)
        trained = trained + noise
        model = {"weights": trained, "update": trained - weights, "other": trained}[returned]
        seen = seen if share is None else seen * jnp.float32(share)
        return {returned: model, count: seen, "metrics": {"norm": measure(trained)}, "as_number": jnp.int32(7)}

    def train(weights, data):
        return trained_by(weights, data, 0)

    def train_with_key(weights, key_data, data):
        noise = jax.random.normal(jax.random.wrap_key_data(key_data, impl="threefry2x32"))
        return trained_by(weights, data, noise)

    def advance(state, total, clients):
        change = total / clients - (0 if returned == "update" else state["weights"])
        return {"weights": state["weights"] + change, "round": state["round"] + 1, "key": state["key"]}

    def body(state, keys, data):
        weights = fed.federated_broadcast(state.weights)
        if keys is None:
            results = fed.federated_map(train, (weights, data))
        else:
            results = fed.federated_map(train_with_key, (weights, keys, data))
        one = fed.federated_map(lambda result: jnp.float32(1), results)
        numbers = results.as_number
        number = fed.federated_secure_sum(numbers, 10) if secure else fed.federated_sum(numbers)
        total = fed.federated_sum(results[returned])
        clients = fed.federated_sum(one)
        state = fed.federated_map(advance, (state, total, clients))
        return state, fed.federated_map(lambda n: {"seven": n}, number)

    at_clients = fed.FederatedType(batches, fed.CLIENTS)
    if keys:

        @fed.federated_computation(state_type, fed.FederatedType(KEY, fed.CLIENTS), at_clients)
        def next_round(state, keys, data):
            return body(state, keys, data)
    else:

        @fed.federated_computation(state_type, at_clients)
        def next_round(state, data):
            return body(state, None, data)

    return fed.learning.from_computations(initialize, next_round)


@pytest.mark.parametrize("returned", ["weights", "update"])
@pytest.mark.parametrize("keys", [False, True])
def test_local_models_average_to_the_global_one(numbers, returned, keys):
    process = build(numbers, returned, keys=keys)
    state = process.initialize(0)
    alone, metrics = process.next(state, numbers.cohort(0))
    tapped, tapped_metrics, local_models = process.with_local_models().next(state, numbers.cohort(0))
    np.testing.assert_array_equal(alone["weights"], tapped["weights"])
    assert metrics == tapped_metrics == {"seven": 35, "clients_dropped": 0}
    assert local_models.ids == numbers.ids
    assert [model.num_examples for model in local_models] == [3, 4, 5, 6, 7]
    mean = np.mean([model.weights for model in local_models], axis=0)
    np.testing.assert_allclose(mean, tapped["weights"], rtol=1e-5, atol=1e-6)
    for model in local_models:
        np.testing.assert_allclose(model.metrics["norm"], np.linalg.norm(model.weights), rtol=1e-5)


def test_a_run_with_a_ledger(numbers, tmp_path):
    process = build(numbers)
    finished = fed.run(process, numbers, rounds=2, ledger=tmp_path / "run", progress=False)
    stored = finished.ledger.round(1)
    state, _ = process.next(process.initialize(0), numbers.cohort(0))
    *_, local_models = process.with_local_models().next(state, numbers.cohort(1))
    for client_id, model in local_models.items():
        np.testing.assert_array_equal(stored[client_id].weights, model.weights)
    policy = json.loads((tmp_path / "run" / "run.json").read_text())["policy"]
    names = ["client_work.weights", "client_work.num_examples", "client_work.metrics"]
    assert policy == {"taps": names, "level": "per-client", "bypasses": []}


def test_a_secure_sum_is_not_bypassed_unawares(numbers, tmp_path):
    process = build(numbers, secure=True)
    with pytest.raises(DisclosureError, match=r"bypasses secure sum of train\.as_number"):
        process.with_local_models()
    with pytest.raises(DisclosureError, match=r"bypasses secure sum of train\.as_number"):
        fed.run(process, numbers, rounds=1, ledger=tmp_path / "refused", progress=False)
    assert not (tmp_path / "refused").exists()
    allowed = process.with_local_models(allow_bypass=True)
    fed.run(allowed, numbers, rounds=1, ledger=tmp_path / "run", progress=False)
    (bypassed,) = json.loads((tmp_path / "run" / "run.json").read_text())["policy"]["bypasses"]
    assert "secure sum" in bypassed


@pytest.mark.parametrize("names", [{"returned": "other"}, {"count": "size"}])
def test_client_work_without_a_model_or_a_count(numbers, names):
    with pytest.raises(ConfigError, match=r"Expected client work that returns .*found a result of train .*client_work"):
        build(numbers, **names).with_local_models()


def test_evaluation_needs_the_model(numbers, tmp_path):
    with pytest.raises(ConfigError, match="Expected a process that knows its model"):
        fed.run(build(numbers), numbers, rounds=1, test=numbers, ledger=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_weight_counts_examples_in_whole_numbers(numbers, share):
    process = build(numbers, count="weight", share=share).with_local_models()
    state, cohort = process.initialize(0), numbers.cohort(0)
    if share == 1:
        *_, local_models = process.next(state, cohort)
        assert [model.num_examples for model in local_models] == [3, 4, 5, 6, 7]
        return
    with pytest.raises(
        StructureError, match=r"whole number of examples in 'client_work\.weight', found 1\.5 in client 'c0'"
    ):
        process.next(state, cohort)


def test_metrics_are_numbers(numbers):
    with pytest.raises(ConfigError, match=r"Expected numbers in the field 'metrics' of what train returns"):
        build(numbers, measure=lambda weights: weights).with_local_models()


def test_computations_of_other_types(numbers):
    process = build(numbers)

    @fed.federated_computation
    def no_model():
        return fed.federated_value({"round": 1}, fed.SERVER)

    with pytest.raises(
        ConfigError, match=r"Expected a state at the server with the field 'weights', found .* in initialize"
    ):
        fed.learning.from_computations(no_model, process.next_computation)
    with pytest.raises(ConfigError, match=r"in the argument of next\. Fields have an order"):
        fed.learning.from_computations(process.initialize_computation, process.initialize_computation)
