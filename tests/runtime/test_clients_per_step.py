"""Clients computed side by side: the same results, whatever the group, and only where it helps."""

import jax
import numpy as np
import optax
import pytest

import fedlens as fed
from fedlens.errors import ConfigError
from fedlens.runtime import Context, Examples, Local

DEVICES = jax.local_devices()[:2]
BATCHES = fed.SequenceType(fed.batch_type(fed.type_of({"x": np.float32(0)}), 4))


@pytest.fixture(scope="module")
def contexts():
    return {group: Context(Local(DEVICES, clients_per_step=group)) for group in (1, 3, 16)}


@fed.federated_computation(fed.FederatedType(BATCHES, fed.CLIENTS))
def totals(data):
    def total(batches):
        return batches.map(lambda batch: (batch["x"] * batch["mask"]).sum()).sum()

    of_clients = fed.federated_map(total, data)
    return fed.federated_sum(of_clients), fed.federated_mean(of_clients), of_clients


def ragged(sizes, seed=0):
    rows = np.random.default_rng(seed).normal(size=int(sum(sizes))).astype(np.float32)
    ends = np.cumsum(sizes)
    ids = [f"client {number}" for number in range(len(sizes))]
    examples = Examples({"x": rows}, ends - sizes, np.array(sizes))
    return fed.Cohort.from_examples(ids, examples), [
        rows[end - size : end] for size, end in zip(sizes, ends, strict=True)
    ]


@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize(
    "sizes",
    [[5] * 37, [8] * 37, [24] * 37, [0] * 3, list(range(1, 34)), [0, 7, 0, 1], [3]],
    ids=["alike", "two full batches", "six full batches", "none has any", "ragged", "empty", "one"],
)
def test_every_client_counts_once_and_gets_its_own_result(contexts, group, sizes):
    cohort, rows = ragged(sizes)
    total, mean, of_clients = contexts[group].run(totals, cohort).value
    expected = np.array([values.sum() for values in rows])
    tolerance = 1e-5 * max(np.abs(np.concatenate(rows)).sum(), 1)
    assert abs(total - expected.sum()) <= tolerance
    assert abs(mean - expected.mean()) <= tolerance
    assert of_clients.ids == cohort.ids
    np.testing.assert_allclose(of_clients.stacked, expected, atol=tolerance)


def test_a_weighted_mean_in_groups(contexts):
    @fed.federated_computation(
        fed.FederatedType(fed.TensorType(np.float32, (3,)), fed.CLIENTS), fed.FederatedType(np.int32, fed.CLIENTS)
    )
    def average(values, weights):
        return fed.federated_mean(values, weights)

    generator = np.random.default_rng(1)
    values, weights = generator.normal(size=(37, 3)).astype(np.float32), generator.integers(0, 9, 37).astype(np.int32)
    with fed.use(Local(DEVICES, clients_per_step=16)):
        found = average(list(values), list(weights))
    np.testing.assert_allclose(found, np.average(values, axis=0, weights=weights), rtol=1e-5)


def build(features=4):
    data_type = fed.type_of({"x": np.zeros(features, np.float32), "y": np.float32(0)})
    model = fed.models.from_functions(
        init=lambda key: {"w": jax.random.normal(key, (features,))},
        apply=lambda weights, x: x @ weights["w"],
        inputs=data_type,
        loss=fed.losses.squared_error,
    )
    return fed.learning.build_weighted_fed_avg(model, optax.sgd(0.05), batch_size=4)


@pytest.fixture(scope="module")
def crowd():
    """Clients enough that tiny models are trained side by side."""
    generator = np.random.default_rng(2)
    count, rows = 600, 6
    columns = {
        "x": generator.normal(size=(count * rows, 4)).astype(np.float32),
        "y": generator.normal(size=count * rows).astype(np.float32),
    }
    return fed.data.FederatedData.from_arrays(columns, np.repeat(np.arange(count), rows))


def test_a_crowd_of_tiny_clients_is_computed_in_groups_with_the_same_results(crowd, monkeypatch):
    chosen = []
    group = Local._group
    monkeypatch.setattr(Local, "_group", lambda *args: chosen.append(group(*args)) or chosen[-1])
    process = build().with_local_models()
    results = []
    for engine in (Local(DEVICES), Local(DEVICES, clients_per_step=1)):
        with fed.use(engine):
            state, metrics, local_models = process.next(process.initialize(0), crowd.cohort(0))
            results.append(
                (
                    np.asarray(state.weights["w"]),
                    metrics["loss"],
                    np.stack([model.weights["w"] for model in local_models]),
                )
            )
    assert chosen[0] > 1
    assert chosen[1] == 1
    for found, expected in zip(*results, strict=True):
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_capturing_a_crowd_changes_no_bit(crowd):
    process = build()
    engine = Local(DEVICES)
    with fed.use(engine):
        state = process.initialize(0)
        plain, _ = process.next(state, crowd.cohort(0))
        captured, *_ = process.with_local_models().next(state, crowd.cohort(0))
    assert np.asarray(plain.weights["w"]).tobytes() == np.asarray(captured.weights["w"]).tobytes()


def test_what_has_no_rule_for_batches_runs_one_by_one():
    exported = jax.export.export(jax.jit(lambda x: x * 2))(jax.ShapeDtypeStruct((), np.float32))

    @fed.federated_computation(fed.FederatedType(np.float32, fed.CLIENTS))
    def doubled(values):
        return fed.federated_sum(fed.federated_map(lambda x: exported.call(x), values))

    values = list(np.ones(600, np.float32))
    assert Context(Local(DEVICES)).run(doubled, values).value == 1200
    with pytest.raises(NotImplementedError, match="atching rule"):
        Context(Local(DEVICES, clients_per_step=16)).run(doubled, values)


def test_a_group_of_none_is_refused():
    with pytest.raises(ConfigError, match="clients_per_step to be at least 1, found 0"):
        Local(DEVICES, clients_per_step=0)
