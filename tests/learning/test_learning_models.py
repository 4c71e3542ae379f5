"""Models from Flax modules and from functions: randomness in training only, any container, and what is refused."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedlens as fed
from fedlens import Cohort, trees
from fedlens.data import FederatedData
from fedlens.errors import CohortError, StructureError, UnsupportedError
from fedlens.learning import build_weighted_fed_avg


class WithTrain(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


class WithTraining(nn.Module):
    @nn.compact
    def __call__(self, x, *, training):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not training)(x))


class WithDeterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return nn.Dense(3)(nn.Dropout(0.5)(x, deterministic=deterministic))


@pytest.fixture(scope="module")
def from_flax(data):
    def build(module, metrics=(), loss=fed.losses.cross_entropy):
        return fed.models.from_flax(module, inputs=data.element_type, loss=loss, metrics=metrics)

    return build


@pytest.mark.parametrize("module", [WithTrain(), WithTraining(), WithDeterministic()], ids=lambda m: type(m).__name__)
def test_dropout_in_training_only(from_flax, module):
    model = from_flax(module)
    weights = model.init(jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    dense = weights["Dense_0"]
    np.testing.assert_allclose(model.apply(weights, x, None), x @ dense["kernel"] + dense["bias"], rtol=1e-5, atol=1e-6)
    trained = model.apply(weights, x, jax.random.key(1))
    np.testing.assert_array_equal(model.apply(weights, x, jax.random.key(1)), trained)
    assert np.abs(trained - model.apply(weights, x, jax.random.key(2))).max() > 0.01


def test_dropout_follows_from_the_seed(from_flax, data, same_bits):
    process = build_weighted_fed_avg(from_flax(WithTrain()), optax.sgd(0.1), shuffle=False)
    (first, _), (again, _), (other, _) = (process.next(process.initialize(seed), data.cohort(0)) for seed in (0, 0, 1))
    assert same_bits(first, again)
    assert not same_bits(first.weights, other.weights)


def test_batch_statistics_are_refused(from_flax):
    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))

    with pytest.raises(UnsupportedError, match=r"parameters only, found the collection 'batch_stats'.*GroupNorm"):
        from_flax(Normalized())


def test_a_class_is_no_module(from_flax):
    with pytest.raises(StructureError, match=r"Expected a flax.linen module, found type"):
        from_flax(WithTrain)


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ({"image": np.zeros(3), "label": 1}, "found image, label"),
        ({"x": np.zeros(3)}, "found x"),
        (np.zeros(3), r"found float64\[3\]"),
        ({"x": {"left": np.zeros(3), "right": np.zeros(3)}, "y": 1}, "field 'x', found <left="),
    ],
    ids=["other names", "no target", "no fields", "nested"],
)
def test_inputs_that_no_model_reads(inputs, found):
    with pytest.raises(StructureError, match=found):
        fed.models.from_functions(jnp.zeros, jnp.dot, inputs=inputs, loss=fed.losses.squared_error)


@pytest.mark.parametrize("names", [["hits", "hits"], ["loss"], ["num_examples"]])
def test_metrics_of_one_name(from_flax, names):
    metrics = [fed.metrics.Metric(name, lambda outputs, labels: labels) for name in names]
    with pytest.raises(StructureError, match=f"found '{names[0]}' twice"):
        from_flax(WithTrain(), metrics)


def mean_cross_entropy(outputs, labels):
    return fed.losses.cross_entropy(outputs, labels).mean()


def test_a_loss_that_is_a_mean_already(from_flax):
    model = from_flax(WithTrain(), loss=mean_cross_entropy)
    with pytest.raises(StructureError, match=r"Expected a loss for each of 6 examples.*found the shape \(\)"):
        build_weighted_fed_avg(model, optax.sgd(0.1), batch_size=6)


@pytest.mark.parametrize("measure", [mean_cross_entropy, lambda outputs, labels: outputs], ids=["scalar", "matrix"])
def test_a_metric_that_does_not_measure_each_example(from_flax, measure):
    model = from_flax(WithTrain(), metrics=[fed.metrics.Metric("odd", measure)])
    with pytest.raises(StructureError, match=r"the metric 'odd' to measure each of 6 examples"):
        build_weighted_fed_avg(model, optax.sgd(0.1), batch_size=6)


def test_a_function_with_keyword_options_takes_no_key(data):
    model = fed.models.from_functions(
        lambda key: jnp.ones((4, 3)), jnp.matmul, inputs=data.element_type, loss=fed.losses.cross_entropy
    )
    x = np.eye(4, dtype=np.float32)
    np.testing.assert_array_equal(model.apply(2 * x, x, jax.random.key(0)), 2 * x)


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


@pytest.mark.parametrize("nested", [True, False], ids=["list, NamedTuple, tuple", "one array"])
def test_any_container_goes_through_rounds_and_ledger(data, tmp_path, nested, same_bits, distance):
    def init(key):
        kernels = jax.random.normal(key, (2, 4, 4))
        if not nested:
            return kernels[0]
        layers = [Layer(kernel, jnp.zeros(4)) for kernel in kernels]
        return {"layers": layers, "ends": (jnp.float32(1), {"shift": jnp.zeros(3)})}

    def apply(weights, x):
        if not nested:
            return (x @ weights)[:, :3]
        for layer in weights["layers"]:
            x = jnp.tanh(x @ layer.kernel + layer.bias)
        scale, rest = weights["ends"]
        return scale * x[:, :3] + rest["shift"]

    model = fed.models.from_functions(init, apply, inputs=data.element_type, loss=fed.losses.cross_entropy)
    process = build_weighted_fed_avg(model, optax.sgd(0.1), optax.sgd(1.0, momentum=0.9)).with_local_models()
    finished = fed.run(process, data, rounds=2, ledger=tmp_path / "run", progress=False)
    state = process.initialize(0)
    for number in range(2):
        before = state
        state, _, local_models = process.next(state, data.cohort(number))
        stored = finished.ledger.round(number)
        for client_id, model in local_models.items():
            assert jax.tree.structure(model.weights) == jax.tree.structure(before.weights)
            assert same_bits(stored[client_id].weights, model.weights)
    assert same_bits(finished.state, state)
    assert jax.tree.structure(state.weights) == jax.tree.structure(before.weights)
    assert distance(state.weights, before.weights) > 1e-4
    names = [path or "weights" for path, _ in trees.items(state.weights)]
    assert finished.ledger.leaf_names == names
    if nested:
        assert "layers/1/kernel" in names
        assert "ends/1/shift" in names


@pytest.fixture(scope="module")
def process(logistic):
    return build_weighted_fed_avg(logistic, optax.sgd(0.3), batch_size=4, shuffle=False).with_local_models()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"x": np.zeros((2, 5), np.float32), "y": np.zeros(2, np.int32)},
            r"float32\[4\] in field 'x', found float32\[5\]",
        ),
        ({"x": np.zeros((2, 4)), "y": np.zeros(2, np.int32)}, r"float32\[4\] in field 'x', found float64\[4\]"),
        ({"x": np.zeros((2, 4), np.float32), "y": np.zeros(2, np.int64)}, "int32 in field 'y', found int64"),
        ({"x": np.zeros((2, 4), np.float32), "label": np.zeros(2, np.int32)}, "fields x, y, mask, found x, label"),
    ],
    ids=["shape", "dtype", "target", "field"],
)
def test_data_that_the_model_does_not_read(process, columns, message):
    with pytest.raises(CohortError, match=message):
        process.next(process.initialize(0), FederatedData.from_clients({"a": columns}).cohort(0))


def test_single_values_are_no_data(process):
    with pytest.raises(CohortError, match="in client 'a'"):
        process.next(process.initialize(0), Cohort({"a": 3.0}))
    with pytest.raises(CohortError, match=r"Wrap the mapping: fed\.Cohort"):
        process.next(process.initialize(0), {"a": []})


def batches(columns, size=4):
    """The batches of one client as a list, the last one filled up with nines."""
    result = []
    for start in range(0, len(columns["y"]), size):
        x, y = columns["x"][start : start + size], columns["y"][start : start + size]
        missing = size - len(y)
        result.append(
            {
                "x": np.concatenate([x, np.full((missing, 4), 9, np.float32)]),
                "y": np.concatenate([y, np.zeros(missing, np.int32)]),
                "mask": np.arange(size) < len(y),
            }
        )
    return result


def test_masked_batches_are_data_too(process, data, distance):
    state = process.initialize(0)
    after, metrics, local_models = process.next(state, Cohort({name: batches(data.client(name)) for name in data}))
    expected, expected_metrics, expected_models = process.next(state, data.cohort(0))
    assert distance(after.weights, expected.weights) < 1e-6
    assert metrics == pytest.approx(expected_metrics, rel=1e-6)
    for client_id, model in local_models.items():
        assert distance(model.weights, expected_models[client_id].weights) < 1e-6


def test_a_wrong_batch_is_named(process, data):
    good = batches(data.client("ann"))
    wrong = [good[0], {**good[1], "y": good[1]["y"].astype(np.int64)}]
    with pytest.raises(CohortError, match=r"int32\[4\] at 'batch 1/y'.*found int64\[4\], in client 'bob'"):
        process.next(process.initialize(0), Cohort({"ann": good, "bob": wrong}))
