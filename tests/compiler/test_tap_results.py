"""`tap` on algorithms: the original result keeps its bits, and what is tapped is what was averaged.

Each algorithm says what its global model changed by, and which tapped values that change is the weighted mean of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedlens as fed
from fedlens.compiler import ClientStage, plan
from fedlens.learning.randomness import client_keys
from fedlens.runtime import Local

WEIGHTS = fed.type_of({"bias": np.float32(0), "slope": np.zeros(3, np.float32)})
EXAMPLE = fed.type_of({"x": np.zeros(3, np.float32), "y": np.float32(0)})
AT_SERVER = fed.FederatedType(WEIGHTS, fed.SERVER)
DATA = fed.FederatedType(fed.SequenceType(EXAMPLE), fed.CLIENTS)
COUNTS = [4, 1, 7, 2, 5]
START = {"bias": np.float32(0.1), "slope": np.array([0.5, -1, 0.25], np.float32)}


def examples_of_clients():
    random = np.random.default_rng(1)
    return {
        f"client {number}": [
            {"x": random.normal(size=3).astype(np.float32), "y": np.float32(random.normal())} for _ in range(count)
        ]
        for number, count in enumerate(COUNTS)
    }


EXAMPLES = examples_of_clients()
COHORT = fed.Cohort(EXAMPLES, chunk_size=2)


class Learned(NamedTuple):
    """What a client's work gives."""

    update: Any
    num_examples: Any


def gradient(weights, example):
    def loss(weights):
        return (example["x"] @ weights["slope"] + weights["bias"] - example["y"]) ** 2 / 2

    return jax.grad(loss)(weights)


def sgd(weights, examples, pull):
    """SGD over a client's examples; `pull` is what an algorithm adds to each gradient."""

    def step(state, example):
        weights, count = state
        direction = jax.tree.map(jnp.add, gradient(weights, example), pull(weights))
        return jax.tree.map(lambda weight, part: weight - 0.05 * part, weights, direction), count + 1

    local, count = examples.reduce((weights, jnp.float32(0)), step)
    return Learned(jax.tree.map(jnp.subtract, local, weights), count)


def trained(weights, examples):
    return sgd(weights, examples, lambda local: jax.tree.map(jnp.zeros_like, local))


def add(first, second):
    return jax.tree.map(jnp.add, first, second)


@fed.federated_computation(AT_SERVER, DATA)
def fed_avg(weights, data):
    learned = fed.federated_map(trained, (fed.federated_broadcast(weights), data))
    return fed.federated_map(add, (weights, fed.federated_mean(learned.update, learned.num_examples)))


@fed.jax_computation(WEIGHTS, DATA.member)
def trained_near(weights, examples):
    """FedProx (Li et al., MLSys 2020): the local loss has a term 0.5 * |w - w_global|^2."""
    return sgd(weights, examples, lambda local: jax.tree.map(lambda one, other: 0.5 * (one - other), local, weights))


@fed.federated_computation(AT_SERVER, DATA)
def fed_prox(weights, data):
    learned = fed.federated_map(trained_near, (fed.federated_broadcast(weights), data))
    change = fed.federated_mean(learned.update, learned.num_examples)
    return {"weights": fed.federated_map(add, (weights, change)), "change": change}


def mean_gradient(weights, examples):
    total, count = examples.reduce(
        (jax.tree.map(jnp.zeros_like, weights), jnp.float32(0)),
        lambda state, example: (add(state[0], gradient(weights, example)), state[1] + 1),
    )
    return {"gradient": jax.tree.map(lambda leaf: leaf / count, total), "num_examples": count}


def trained_towards(weights, mean, examples):
    """A second phase that knows the mean gradient of the first, as in FedDANE (Li et al., 2020, arXiv:2001.01920)."""
    return sgd(weights, examples, lambda _: jax.tree.map(lambda leaf: 0.1 * leaf, mean))


@fed.federated_computation(AT_SERVER, DATA)
def two_phases(weights, data):
    there = fed.federated_broadcast(weights)
    first = fed.federated_map(mean_gradient, (there, data))
    mean = fed.federated_mean(first["gradient"], first["num_examples"])
    learned = fed.federated_map(trained_towards, (there, fed.federated_broadcast(mean), data))
    change = fed.federated_mean(learned.update, learned.num_examples)
    return fed.federated_map(add, (weights, change))


@fed.federated_computation(AT_SERVER, DATA)
def nested(weights, data):
    """Two rounds in one, each a computation of its own."""
    return fed_avg(fed_avg(weights, data), data)


PAIR = fed.to_type([("count", np.float32), ("total", WEIGHTS)])


@fed.federated_computation(AT_SERVER, DATA)
def own_aggregation(weights, data):
    """A weighted mean written as an aggregate."""
    learned = fed.federated_map(trained, (fed.federated_broadcast(weights), data))
    weighted = fed.federated_map(
        lambda one: {
            "count": one.num_examples,
            "total": jax.tree.map(lambda leaf: leaf * one.num_examples, one.update),
        },
        learned,
    )
    zero = fed.jax_computation(
        lambda: {"count": jnp.float32(0), "total": {"bias": jnp.float32(0), "slope": jnp.zeros(3)}}
    )
    plus = fed.jax_computation(add, [PAIR, PAIR])
    report = fed.jax_computation(lambda sums: jax.tree.map(lambda leaf: leaf / sums["count"], sums["total"]), PAIR)
    return fed.federated_map(add, (weights, fed.federated_aggregate(weighted, zero(), plus, plus, report)))


SCALE, CLIENTS_IN_COHORT = 2.0**26, len(COUNTS)


def encoded(learned):
    """Updates in [-1, 1) as non-negative integers of 27 bits, as secure sums take them."""
    return jax.tree.map(lambda leaf: jnp.round((leaf + 1) * SCALE).astype(jnp.int32), learned.update)


def decoded(total, count=CLIENTS_IN_COHORT):
    return jax.tree.map(lambda leaf: ((leaf / count) / SCALE - 1).astype(jnp.float32), total)


@fed.federated_computation(AT_SERVER, DATA)
def secure(weights, data):
    learned = fed.federated_map(trained, (fed.federated_broadcast(weights), data))
    total = fed.federated_secure_sum_bitwidth(fed.federated_map(encoded, learned), 27)
    return fed.federated_map(add, (weights, fed.federated_map(lambda total: decoded(total), total)))


def weighted_mean(values, weights):
    """Of the clients' trees of arrays, in NumPy and 64 bits."""
    share = np.asarray(weights, np.float64) / np.sum(weights, dtype=np.float64)
    return jax.tree.map(lambda leaf: np.tensordot(share, np.asarray(leaf, np.float64), 1), values.stacked)


def of_examples(update, count):
    return lambda tapped: weighted_mean(tapped[update], tapped[count].stacked)


def of_two_rounds(tapped):
    rounds = [
        weighted_mean(tapped[f"client_work.{number}.update"], tapped[f"client_work.{number}.num_examples"].stacked)
        for number in (0, 1)
    ]
    return jax.tree.map(np.add, *rounds)


def of_sums(tapped):
    sums, counts = tapped["aggregate.0.value"].stacked["total"], tapped["aggregate.0.value"].stacked["count"]
    return jax.tree.map(lambda leaf: leaf.astype(np.float64).sum(axis=0) / counts.sum(dtype=np.float64), sums)


def of_integers(tapped):
    total = jax.tree.map(lambda leaf: leaf.astype(np.float64).sum(axis=0), tapped["aggregate.0.value"].stacked)
    return jax.tree.map(lambda leaf: leaf / CLIENTS_IN_COHORT / SCALE - 1, total)


@dataclass(frozen=True)
class Algorithm:
    """A computation, what to tap in it, and the change of the global model as a function of what is tapped."""

    computation: Any
    at: tuple[str, ...]
    change: Any
    allow_bypass: bool = False


WORK = ("client_work.update", "client_work.num_examples")
SECOND = ("client_work.1.update", "client_work.1.num_examples")
ALGORITHMS = {
    "FedAvg": Algorithm(fed_avg, WORK, of_examples(*WORK)),
    "FedAvg, what is averaged": Algorithm(
        fed_avg, ("aggregate.0.value", "aggregate.0.weight"), of_examples("aggregate.0.value", "aggregate.0.weight")
    ),
    "FedProx": Algorithm(fed_prox, WORK, of_examples(*WORK)),
    "two phases": Algorithm(two_phases, SECOND, of_examples(*SECOND)),
    "nested": Algorithm(
        nested,
        tuple(f"client_work.{number}.{field}" for number in (0, 1) for field in ("update", "num_examples")),
        of_two_rounds,
    ),
    "aggregate": Algorithm(own_aggregation, ("aggregate.0.value",), of_sums),
    "secure sum": Algorithm(secure, ("aggregate.0.value",), of_integers, allow_bypass=True),
    "secure sum, decoded": Algorithm(
        secure,
        ("client_work.update",),
        lambda tapped: weighted_mean(tapped["client_work.update"], np.ones(CLIENTS_IN_COHORT)),
        allow_bypass=True,
    ),
}


def bits(value):
    if isinstance(value, fed.ClientValues):
        value = value.stacked
    return [np.asarray(leaf).tobytes() for leaf in fed.trees.leaves(value)]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_mean_of_what_is_tapped_is_the_change_of_the_global_model(name, two_devices):
    of = ALGORITHMS[name]
    tapped_round = fed.tap(of.computation, list(of.at), allow_bypass=of.allow_bypass)
    with fed.use(two_devices):
        original = of.computation(START, COHORT)
        result, tapped = tapped_round(START, COHORT)
    assert bits(result) == bits(original)
    assert tuple(tapped) == of.at
    assert all(values.ids == tuple(EXAMPLES) for values in tapped.values())
    new = result["weights"] if name == "FedProx" else result
    for leaf, change in of.change(tapped).items():
        np.testing.assert_allclose(np.float64(new[leaf]) - START[leaf], change, atol=1e-6)


def test_the_original_result_keeps_its_bits_on_every_engine(engine):
    cohort = fed.Cohort(EXAMPLES, chunk_size=2)
    tapped_round = fed.tap(fed_prox, ["client_work", "aggregate.0.value"])
    with fed.use(engine):
        result, tapped = tapped_round(START, cohort)
        assert bits(result) == bits(fed_prox(START, cohort))
    for averaged, learned in zip(tapped["aggregate.0.value"], tapped["client_work"], strict=True):
        assert bits(averaged) == bits(learned.update)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_process_keeps_its_bits_over_several_chunks(devices):
    data = fed.data.digits()
    model = fed.models.from_functions(
        init=lambda key: {"kernel": 0.01 * jax.random.normal(key, (64, 10)), "bias": jnp.zeros(10)},
        apply=lambda weights, x: x.reshape(x.shape[0], 64) @ weights["kernel"] + weights["bias"],
        inputs=data.element_type,
        loss=fed.losses.cross_entropy,
    )
    process = fed.learning.build_weighted_fed_avg(model, optax.sgd(0.1))
    state = process.initialize(3)
    whole = data.cohort(0)
    cohort = fed.Cohort.from_examples(whole.ids, whole.source, chunk_size=4)
    keys = fed.Cohort(dict(zip(cohort.ids, client_keys(np.asarray(state.key), 0, cohort.ids), strict=True)))
    tapped_round = fed.tap(process.next_computation, "client_work.update")
    with fed.use(Local(jax.local_devices()[:devices])):
        expected_state, expected_metrics = process.next_computation(state, keys, cohort)
        (new_state, metrics), updates = tapped_round(state, keys, cohort)
    assert type(new_state) is type(expected_state)  # the containers of the result are the original's
    assert (bits(new_state), metrics) == (bits(expected_state), expected_metrics)
    for name, change in weighted_mean(updates, cohort.source.lengths).items():
        np.testing.assert_allclose(np.float64(new_state.weights[name]) - state.weights[name], change, atol=1e-6)


def test_what_is_tapped_is_what_the_client_function_returns():
    """By hand: the function, called without the language, on one client's examples."""
    _, learned = fed.tap(fed_avg, "client_work")(START, COHORT)
    for client_id, examples in EXAMPLES.items():
        weights = START
        for example in examples:
            part = jax.jit(gradient)(weights, example)
            weights = {name: weights[name] - np.float32(0.05) * np.asarray(part[name]) for name in weights}
        one = learned[client_id]
        assert int(one.num_examples) == len(examples)
        for name in weights:
            np.testing.assert_allclose(one.update[name], weights[name] - START[name], rtol=1e-4, atol=1e-6)


def test_one_leaf_costs_one_leaf_and_no_pass():
    before, after = plan(fed_avg), plan(fed.tap(fed_avg, "client_work.update/slope"))
    stage = next(stage for stage in after.stages if isinstance(stage, ClientStage))
    assert [str(type_) for type_ in stage.output_types] == ["float32[3]"]
    assert [type(stage) for stage in after.stages] == [type(stage) for stage in before.stages]
    untapped = next(stage for stage in before.stages if isinstance(stage, ClientStage))
    assert [step.operation for step in stage.reductions] == [step.operation for step in untapped.reductions]
    assert untapped.outputs == ()


def test_what_two_names_share_leaves_the_clients_once():
    tapped = plan(fed.tap(fed_avg, ["aggregate.0.value", "aggregate.0.weight", "aggregate.0.value"]))
    stage = next(stage for stage in tapped.stages if isinstance(stage, ClientStage))
    assert sorted(str(type_) for type_ in stage.output_types) == ["<bias=float32,slope=float32[3]>", "float32"]


def test_a_value_arrives_alone_for_one_name_and_in_a_dict_otherwise():
    _, alone = fed.tap(fed_avg, "client_work.num_examples")(START, COHORT)
    _, several = fed.tap(fed_avg, ["client_work.num_examples"])(START, COHORT)
    _, wanted = fed.tap(fed_avg, lambda tap: tap.name.endswith("num_examples"))(START, COHORT)
    assert alone.stacked.tolist() == COUNTS
    assert several["client_work.num_examples"].stacked.tolist() == COUNTS
    assert list(wanted) == ["client_work.num_examples"]
    assert alone["client 2"] == 7


def test_values_come_in_the_containers_of_the_function_that_gives_them():
    result, tapped = fed.tap(fed_prox, ["client_work", "aggregate.0.value"])(START, COHORT)
    assert isinstance(tapped["client_work"]["client 0"], Learned)
    assert list(tapped["aggregate.0.value"]["client 0"]) == ["bias", "slope"]
    assert list(result) == ["weights", "change"]


def test_a_tapped_computation_is_tapped_again_and_explained():
    once = fed.tap(fed_avg, "client_work.num_examples")
    twice = fed.tap(once, "aggregate.0.weight")
    (result, counts), weights = twice(START, COHORT)
    assert counts.stacked.tolist() == weights.stacked.tolist() == COUNTS
    assert bits(result) == bits(fed_avg(START, COHORT))
    assert [value.name for value in fed.compiler.explain(twice).leaves_clients] == ["0/1", "1"]


def test_a_tap_needs_no_parameter_at_the_server():
    @fed.federated_computation(DATA)
    def count(data):
        return fed.federated_sum(fed.federated_map(lambda examples: examples.num_batches, data))

    total, counts = fed.tap(count, "client_work")(COHORT)
    assert (int(total), counts.stacked.tolist()) == (sum(COUNTS), COUNTS)
