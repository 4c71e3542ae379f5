"""`with_local_models` as a tap: what leaves the clients, and what the host works out of a local model from that."""

from functools import partial

import jax
import numpy as np
import optax
import pytest

import fedlens as fed
from fedlens.compiler import ClientStage, plan
from fedlens.language.types import num_bytes
from fedlens.learning import build_unweighted_fed_prox, build_weighted_fed_avg
from fedlens.learning.metrics import finalize
from fedlens.learning.randomness import client_keys
from fedlens.runtime.values import of_array

BUILDERS = {
    "weighted FedAvg": build_weighted_fed_avg,
    "unweighted FedProx": partial(build_unweighted_fed_prox, proximal_strength=0.1),
}


@pytest.fixture(scope="module", params=BUILDERS)
def process(request, logistic):
    return BUILDERS[request.param](logistic, optax.sgd(0.3), optax.adam(0.1), batch_size=5, epochs=2)


def run(computation, state, cohort):
    keys = client_keys(np.asarray(state.key), int(state.round), cohort.ids)
    return computation(state, of_array(cohort.ids, keys), cohort)


def client_stages(computation):
    return [stage for stage in plan(computation).stages if isinstance(stage, ClientStage)]


def test_the_result_keeps_its_bits_and_the_rest_is_exact(process, data, same_bits):
    state, cohort = process.initialize(4), data.cohort(0)
    after, metrics = process.next(state, cohort)
    tapped, tapped_metrics, local_models = process.with_local_models().next(state, cohort)
    names = ("client_work.update", "client_work.sums")
    _, direct = run(fed.tap(process.next_computation, at=names), state, cohort)
    assert same_bits(tapped, after)
    assert metrics == tapped_metrics
    finalized = jax.jit(finalize)
    for client_id, model in local_models.items():
        # `update` is worked out from the weights, `metrics` from the sums: the clients would have got the same bits.
        assert same_bits(model.update, direct["client_work.update"][client_id])
        sums = direct["client_work.sums"][client_id]
        means = {name: float(mean) for name, mean in finalized(sums).items()}
        assert list(model.metrics) == sorted(means)
        np.testing.assert_array_equal(list(model.metrics.values()), [means[name] for name in model.metrics])
        assert model.num_examples == sums["num_examples"] // 2


def test_nothing_else_leaves_the_clients(process):
    untapped, tapped = (client_stages(each.next_computation) for each in (process, process.with_local_models()))
    assert [len(stage.reductions) for stage in tapped] == [len(stage.reductions) for stage in untapped] == [2]
    assert untapped[0].outputs == ()
    weights, num_examples, sums = 4 * (4 * 3 + 3), 4, 3 * 4  # loss, accuracy, and how many examples they are of
    assert sum(map(num_bytes, tapped[0].output_types)) == weights + num_examples + sums


def test_a_leaf_alone_costs_a_leaf(process):
    (stage,) = client_stages(fed.tap(process.next_computation, at="client_work.weights/b"))
    assert list(map(num_bytes, stage.output_types)) == [4 * 3]


def test_the_mean_of_the_updates_moves_the_model(logistic, data, vector):
    process = build_unweighted_fed_prox(logistic, optax.sgd(0.3), proximal_strength=0.1, batch_size=5)
    before = process.initialize(1)
    after, _, local_models = process.with_local_models().next(before, data.cohort(0))
    working = [vector(model.update) for model in local_models if model.num_examples]
    change = vector(after.weights) - vector(before.weights)
    assert np.linalg.norm(change - np.mean(working, axis=0)) <= 1e-6 * np.linalg.norm(vector(after.weights))


def test_the_capture_says_what_it_took(process):
    assert process.capture is None
    capture = process.with_local_models().capture
    assert capture.names == ("client_work.weights", "client_work.num_examples", "client_work.sums")
    assert capture.level is fed.Level.PER_CLIENT
    assert capture.bypasses == ()
