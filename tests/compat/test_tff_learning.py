"""TFF's training loop, against federated averaging of a linear model in NumPy."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedlens as fed
import fedlens.compat.tff as tff
from fedlens.compat.tff.client_data import client_batches
from fedlens.errors import CohortError, StructureError, UnsupportedError

RATE = 0.1
KERNEL, BIAS = np.array([[0.5], [-1.0], [0.25]], np.float32), np.zeros(1, np.float32)
SPEC = collections.OrderedDict(x=tff.TensorType(np.float32, [None, 3]), y=tff.TensorType(np.float32, [None, 1]))


def predict(weights, x, training):
    del training
    (kernel, bias), _ = weights
    return x @ kernel + bias


def mean_squared_error(output, label, sample_weight=None):
    del sample_weight
    return jnp.mean((output - label) ** 2)


def forward_pass(weights, batch, training):
    x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
    predictions = predict(weights, x, training)
    return tff.learning.models.BatchOutput(mean_squared_error(predictions, y), predictions, x.shape[0])


def linear_model(**changes):
    arguments = {
        "initial_weights": ((KERNEL, BIAS), ()),
        "predict_on_batch_fn": predict,
        "loss_fn": mean_squared_error,
        "input_spec": SPEC,
    }
    return tff.learning.models.FunctionalModel(**(arguments | changes))


def forward_pass_model(spec=SPEC):
    return tff.learning.models.FunctionalModel(((KERNEL, BIAS), ()), forward_pass, predict, spec)


def fedlens_model():
    return fed.models.from_functions(
        init=lambda key: (jnp.asarray(KERNEL), jnp.asarray(BIAS)),
        apply=lambda weights, x: x @ weights[0] + weights[1],
        inputs={"x": np.zeros(3, np.float32), "y": np.zeros(1, np.float32)},
        loss=lambda outputs, targets: jnp.mean((outputs - targets) ** 2, axis=1),
    )


def dataset(rng, count, size, as_pair=False):
    """The batches of one client, the last of which is smaller."""
    x, y = rng.normal(size=(count, 3)).astype(np.float32), rng.normal(size=(count, 1)).astype(np.float32)
    pairs = [(x[start : start + size], y[start : start + size]) for start in range(0, count, size)]
    return pairs if as_pair else [collections.OrderedDict(x=x, y=y) for x, y in pairs]


@pytest.fixture
def train_data():
    rng = np.random.default_rng(0)
    return [dataset(rng, count, 5) for count in (12, 5, 3, 17)]


def round_in_numpy(weights, data, weighted=True, proximal=0.0):
    """One round: the new weights, and the mean loss over all examples while training."""
    results, counts, losses = [], [], []
    for batches in data:
        kernel, bias = (leaf.astype(np.float64) for leaf in weights)
        for batch in batches:
            x, y = batch.values() if isinstance(batch, dict) else batch
            residuals = x @ kernel + bias - y
            losses.extend(residuals[:, 0] ** 2)
            pulls = proximal * (kernel - weights[0]), proximal * (bias - weights[1])
            kernel = kernel - RATE * (2 * x.T @ residuals / len(x) + pulls[0])
            bias = bias - RATE * (2 * residuals.mean(axis=0) + pulls[1])
        results.append((kernel, bias))
        counts.append(
            sum(len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0]) for batch in batches)
        )
    shares = counts if weighted else [count > 0 for count in counts]
    means = [np.average([each[leaf] for each in results], axis=0, weights=shares) for leaf in range(2)]
    return means, np.mean(losses)


MODELS = {
    "loss_fn": linear_model,
    "forward_pass_fn, an instance": forward_pass_model(),
    "forward_pass_fn of pairs": lambda: forward_pass_model(tuple(SPEC.values())),
    "fed.Model": fedlens_model,
}


@pytest.mark.parametrize("model_fn", MODELS.values(), ids=MODELS)
def test_the_usual_loop_is_federated_averaging(model_fn, train_data):
    process = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn,
        client_optimizer_fn=lambda: tff.learning.optimizers.build_sgdm(RATE),
        server_optimizer_fn=lambda: tff.learning.optimizers.build_sgdm(1.0),
    )
    state = process.initialize()
    expected = [KERNEL, BIAS]
    for _ in range(3):
        result = process.next(state, train_data)
        state = result.state
        expected, loss = round_in_numpy(expected, train_data)
        found = result.metrics["client_work"]["train"]
        assert found.loss == pytest.approx(loss, rel=1e-5)
        assert (found.num_examples, found.num_batches) == (37, 9)
    weights = process.get_model_weights(state)
    assert weights.non_trainable == ()
    for leaf, wanted in zip(weights.trainable, expected, strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighted", [True, False])
def test_pairs_ids_and_clients_without_data(weighted):
    rng = np.random.default_rng(1)
    data = [dataset(rng, 7, 4, as_pair=True), dataset(rng, 4, 4, as_pair=True)]
    build = "build_weighted_fed_avg" if weighted else "build_unweighted_fed_avg"
    process = getattr(tff.learning.algorithms, build)(linear_model(), tff.learning.optimizers.build_sgdm(RATE))
    expected, _ = round_in_numpy([KERNEL, BIAS], data, weighted)
    named = {"ann": data[0], "ben": data[1], "nobody": [], "empty": [(np.zeros((0, 3)), np.zeros((0, 1)))]}
    state, metrics = process.next(process.initialize(), named)
    assert metrics["client_work"]["clients_without_examples"] == 2
    for leaf, wanted in zip(state.global_model_weights.trainable, expected, strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-6)


def test_uniform_weighting_is_the_unweighted_algorithm(train_data):
    client = tff.learning.optimizers.build_sgdm(RATE)
    uniform = tff.learning.algorithms.build_weighted_fed_avg(
        linear_model(), client, client_weighting=tff.learning.ClientWeighting.UNIFORM
    )
    state = uniform.next(uniform.initialize(), train_data).state
    expected, _ = round_in_numpy([KERNEL, BIAS], train_data, weighted=False)
    np.testing.assert_allclose(state.global_model_weights.trainable[0], expected[0], rtol=1e-5)
    with pytest.raises(UnsupportedError, match="an aggregator"):
        tff.learning.algorithms.build_weighted_fed_avg(linear_model(), client, client_weighting=len)


def test_model_aggregators_are_fedlens_aggregators(train_data):
    norm = 0.1
    process = tff.learning.algorithms.build_weighted_fed_avg(
        linear_model(),
        tff.learning.optimizers.build_sgdm(RATE),
        model_aggregator=tff.aggregators.clipping_factory(norm, tff.aggregators.MeanFactory()),
    )
    state = process.initialize()
    after = process.next(state, train_data).state
    update = jax.tree.map(jnp.subtract, after.global_model_weights.trainable, state.global_model_weights.trainable)
    assert 0 < float(jnp.sqrt(sum((leaf**2).sum() for leaf in update))) <= norm * (1 + 1e-5)


@pytest.mark.parametrize("weighted", [True, False])
def test_fed_prox_pulls_clients_to_the_global_model(train_data, weighted):
    build = "build_weighted_fed_prox" if weighted else "build_unweighted_fed_prox"
    process = getattr(tff.learning.algorithms, build)(linear_model, 3.0, tff.learning.optimizers.build_sgdm(RATE))
    state = process.next(process.initialize(), train_data).state
    expected, _ = round_in_numpy([KERNEL, BIAS], train_data, weighted, proximal=3.0)
    for leaf, wanted in zip(state.global_model_weights.trainable, expected, strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-6)


def test_set_model_weights_is_what_get_model_weights_gives(train_data):
    process = tff.learning.algorithms.build_weighted_fed_avg(linear_model(), tff.learning.optimizers.build_sgdm(RATE))
    state = process.initialize()
    trained = process.next(state, train_data).state
    moved = process.set_model_weights(state, process.get_model_weights(trained))
    for leaf, wanted in zip(process.get_model_weights(moved).trainable, trained[0].trainable, strict=True):
        np.testing.assert_array_equal(leaf, wanted)
    assert int(moved.client_work["round"]) == 0
    assert int(trained.client_work["round"]) == 1


def test_local_models_come_from_the_same_round(train_data):
    process = tff.learning.algorithms.build_weighted_fed_avg(linear_model(), tff.learning.optimizers.build_sgdm(RATE))
    state = process.initialize()
    plain = process.next(state, train_data)
    with_local_models = process.with_local_models()
    tapped = with_local_models.next(state, train_data)
    assert with_local_models.of_batch_size(5) is with_local_models.of_batch_size(5)  # and what is compiled for it
    np.testing.assert_array_equal(
        tapped.state.global_model_weights.trainable[0], plain.state.global_model_weights.trainable[0]
    )
    assert tapped.metrics == plain.metrics
    mean = np.average(
        [local.weights[0] for local in tapped.local_models],
        axis=0,
        weights=[local.num_examples for local in tapped.local_models],
    )
    np.testing.assert_allclose(plain.state.global_model_weights.trainable[0], mean, rtol=1e-5, atol=1e-6)
    assert "client_weights" not in str(process.of_batch_size(5).next_computation.type_signature)


def test_a_client_that_diverges_counts_for_nothing(train_data):
    broken = [collections.OrderedDict(x=np.full((2, 3), np.inf, np.float32), y=np.ones((2, 1), np.float32))]
    process = tff.learning.algorithms.build_weighted_fed_avg(linear_model(), tff.learning.optimizers.build_sgdm(RATE))
    result = process.next(process.initialize(), [*train_data, broken])
    expected, _ = round_in_numpy([KERNEL, BIAS], train_data)
    np.testing.assert_allclose(result.state.global_model_weights.trainable[0], expected[0], rtol=1e-5)
    assert result.metrics.client_work.clients_dropped == 1


def test_types_read_as_tff_s():
    process = tff.learning.algorithms.build_weighted_fed_avg(linear_model(), tff.learning.optimizers.build_sgdm(RATE))
    assert process.initialize.type_signature.parameter is None
    state = process.initialize.type_signature.result
    assert state.placement is tff.SERVER
    assert str(state.member.global_model_weights) == "<trainable=<float32[3,1],float32[1]>,non_trainable=<>>"
    next_type = process.next.type_signature
    assert next_type.parameter.state == next_type.result.state == state
    assert str(next_type.parameter.client_data) == "{<x=float32[?,3],y=float32[?,1]>*}@CLIENTS"
    assert fed.type_of(process.initialize()).is_equivalent_to(state.member)


def test_evaluation_is_the_mean_over_all_examples_of_all_rounds(train_data):
    process = tff.learning.algorithms.build_fed_eval(linear_model)
    weights = tff.learning.models.ModelWeights((KERNEL + 1, BIAS), ())
    state = process.set_model_weights(process.initialize(), weights)
    first = process.next(state, train_data[:2])
    second = process.next(first.state, train_data[2:])

    def losses(data):
        return np.concatenate([((each["x"] @ (KERNEL + 1) - each["y"]) ** 2).ravel() for ds in data for each in ds])

    found = second.metrics["client_work"]["eval"]
    assert found["current_round_metrics"]["loss"] == pytest.approx(losses(train_data[2:]).mean(), rel=1e-5)
    assert found["total_rounds_metrics"]["loss"] == pytest.approx(losses(train_data).mean(), rel=1e-5)
    assert found["total_rounds_metrics"]["num_examples"] == 37
    np.testing.assert_array_equal(process.get_model_weights(second.state).trainable[0], KERNEL + 1)


def squares(state, labels, batch_output, sample_weight=None):
    del sample_weight
    return {
        "total": state["total"] + jnp.abs(batch_output.predictions - labels).sum(),
        "count": state["count"] + labels.shape[0],
    }


def test_metrics_that_are_means_over_examples_are_measured(train_data):
    metrics_fns = (
        lambda: {"total": jnp.float32(0), "count": jnp.float32(0)},
        squares,
        lambda state: {"mean_absolute_error": state["total"] / state["count"], "num_examples": state["count"]},
    )
    process = tff.learning.algorithms.build_fed_eval(linear_model(metrics_fns=metrics_fns))
    result = process.next(process.initialize(), train_data)
    errors = [np.abs(each["x"] @ KERNEL - each["y"]) for batches in train_data for each in batches]
    found = result.metrics.client_work.eval.current_round_metrics
    assert found.mean_absolute_error == pytest.approx(np.concatenate(errors).mean(), rel=1e-5)
    summed = (*metrics_fns[:2], lambda state: {"total_error": state["total"]})
    with pytest.raises(UnsupportedError, match="'total_error' of a batch to be the mean over its examples"):
        tff.learning.algorithms.build_fed_eval(linear_model(metrics_fns=summed))


def test_a_loss_that_is_no_mean_over_examples_is_refused():
    def total(output, label, sample_weight=None):
        return jnp.sum((output - label) ** 2)

    for model in (
        linear_model(loss_fn=total),
        linear_model(
            loss_fn=None,
            forward_pass_fn=lambda weights, batch, training: tff.learning.models.BatchOutput(
                total(predict(weights, batch["x"], training), batch["y"])
            ),
        ),
        linear_model(loss_fn=lambda output, label: ((output - label) ** 2)[:, 0]),
    ):
        with pytest.raises(UnsupportedError, match="'loss' of a batch to be the mean over its examples"):
            tff.learning.algorithms.build_weighted_fed_avg(model, tff.learning.optimizers.build_sgdm(RATE))


def test_integers_of_64_bits_fit_or_are_refused():
    model = linear_model(
        initial_weights=((np.zeros((3, 4)), np.zeros(4)), ()),
        loss_fn=lambda output, label, weight: (
            -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(output), label[:, None], axis=1))
        ),
        input_spec=(tff.TensorType(np.float32, [None, 3]), tff.TensorType(np.int64, [None])),
    )
    process = tff.learning.algorithms.build_weighted_fed_avg(model, tff.learning.optimizers.build_sgdm(RATE))
    x = np.ones((2, 3), np.float32)
    result = process.next(process.initialize(), [[(x, np.array([0, 3]))]])
    assert result.metrics.client_work.train.loss == pytest.approx(np.log(4), rel=1e-6)
    with pytest.raises(CohortError, match="batch 0 of client '0'"):
        process.next(process.initialize(), [[(x, np.array([0, 2**40]))]])


@given(
    st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=4),  # clients, their batches, rows in each
    st.booleans(),
)
def test_batches_are_filled_up_each_on_its_own(sizes, as_pairs):
    rows = iter(range(1000))
    data = [
        [(np.array([[next(rows)] * 3 for _ in range(size)], np.float32).reshape(size, 3),) * 2 for size in of_client]
        for of_client in sizes
    ]
    inputs = fedlens_model().inputs
    given_as = data if as_pairs else [[{"y": y, "x": x} for x, y in batches] for batches in data]
    found = client_batches(given_as, inputs)
    held = [[x for x, _ in batches if len(x)] for batches in data]
    assert found.batch_size == max((len(x) for batches in held for x in batches), default=1)
    assert found.num_batches == sum(map(len, held))
    for batches, wanted in zip(found.cohort.source, held, strict=True):
        assert len(batches) == len(wanted)
        for batch, x in zip(batches, wanted, strict=True):
            assert batch["mask"].shape == (found.batch_size,) == batch["x"].shape[:1] == batch["y"].shape[:1]
            np.testing.assert_array_equal(batch["x"][batch["mask"]], x)
            np.testing.assert_array_equal(batch["y"][batch["mask"]], x)
            assert set(batch["x"].ravel()) == set(x.ravel())  # no other value than the batch's own


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([[{"pixels": np.zeros((2, 3))}]], "found dict with fields pixels, in batch 0 of client '0'"),
        ([[], {"x": 1}], "a list of batches or a tf.data.Dataset, found dict with fields x, in client '1'"),
        ([[(np.zeros((2, 3), np.float32), np.zeros((3, 1), np.float32))]], "as many rows in 'y' as in 'x'"),
        ([[(np.zeros((2, 4), np.float32), np.zeros((2, 1), np.float32))]], "client '0'"),
        ([[(np.zeros((2, 3)), np.zeros((2, 1)))]], "float32"),
        ([], "at least one client"),
    ],
)
def test_data_of_another_form_is_refused_by_client(data, message):
    process = tff.learning.algorithms.build_weighted_fed_avg(linear_model(), tff.learning.optimizers.build_sgdm(RATE))
    with pytest.raises(CohortError, match=message):
        process.next(process.initialize(), data)


def test_a_cohort_of_lists_is_taken_and_one_of_examples_refused(train_data):
    process = tff.learning.algorithms.build_weighted_fed_avg(linear_model(), tff.learning.optimizers.build_sgdm(RATE))
    state = process.initialize()
    names = [f"client-{number}" for number in range(4)]
    cohort = fed.Cohort(dict(zip(names, train_data, strict=True)))
    found = process.next(state, cohort).state.global_model_weights.trainable[0]
    np.testing.assert_array_equal(found, process.next(state, train_data).state.global_model_weights.trainable[0])
    examples = fed.runtime.Examples({"x": np.zeros((2, 3), np.float32)}, np.array([0]), np.array([2]))
    with pytest.raises(CohortError, match="Train on it with"):
        process.next(state, fed.Cohort.from_examples(["ann"], examples))


class KerasModel:
    trainable_variables = ()


@pytest.mark.parametrize("model_fn", [KerasModel(), lambda: KerasModel(), 3])
def test_models_of_tensorflow_are_refused_with_what_to_do(model_fn):
    with pytest.raises(UnsupportedError, match="Write its forward pass in JAX"):
        tff.learning.algorithms.build_weighted_fed_avg(model_fn, tff.learning.optimizers.build_sgdm(RATE))


@pytest.mark.parametrize(
    "changes", [{"input_spec": (np.float32, np.float32)}, {"loss_fn": None}, {"forward_pass_fn": forward_pass}]
)
def test_incomplete_functional_models_are_refused(changes):
    with pytest.raises(StructureError, match="Expected"):
        tff.learning.algorithms.build_weighted_fed_avg(linear_model(**changes), tff.learning.optimizers.build_sgdm())


def test_the_type_of_a_model_s_weights():
    assert str(tff.learning.models.weights_type_from_model(linear_model)) == (
        "<trainable=<float32[3,1],float32[1]>,non_trainable=<>>"
    )


def test_a_process_of_one_s_own_has_tff_s_form():
    process = tff.learning.templates.LearningProcess(
        lambda: 0, lambda state, data: tff.learning.templates.LearningProcessOutput(state + sum(data), {}), abs, min
    )
    state, _ = process.next(process.initialize(), [1, 2])
    assert (process.get_model_weights(state), process.set_model_weights(state, 1)) == (3, 1)
    assert isinstance(process, tff.templates.IterativeProcess)
