"""A client's result depends on its id, its data, the round, the seed and the global model, and on nothing else."""

import dataclasses
import hashlib

import jax
import numpy as np
import optax
import pytest

import fedlens as fed
from fedlens import Cohort
from fedlens.data import FederatedData
from fedlens.errors import ConfigError
from fedlens.learning import build_weighted_fed_avg
from fedlens.learning.randomness import client_keys, run_key
from fedlens.runtime import Local


@pytest.fixture(scope="module")
def process(data):
    """A process in which everything that can be random is: the order of examples, and noise in the model."""
    model = fed.models.from_functions(
        init=lambda key: {"w": jax.random.normal(key, (4, 3))},
        apply=lambda weights, x, key: x @ weights["w"] + jax.random.normal(key, (len(x), 3)),
        inputs=data.element_type,
        loss=fed.losses.cross_entropy,
    )
    return build_weighted_fed_avg(model, optax.sgd(0.3), batch_size=4, epochs=2).with_local_models()


@pytest.fixture(scope="module")
def state(process):
    return process.initialize(0)


@pytest.fixture(scope="module")
def together(process, state, data):
    """The local models of all clients in one cohort."""
    return process.next(state, data.cohort(0))[2]


def assert_agrees(local_models, expected, distance):
    for client_id, model in local_models.items():
        assert distance(model.weights, expected[client_id].weights) < 1e-5
        assert model.metrics == pytest.approx(expected[client_id].metrics, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("ids", [("eve", "dora", "nil", "bob", "ann"), ("dora",)], ids=["reversed", "alone"])
def test_not_on_position_or_company(process, state, data, together, distance, ids):
    local_models = process.next(state, data.select(ids).cohort(0))[2]
    assert local_models.ids == ids
    assert_agrees(local_models, together, distance)


def test_not_on_the_chunk(process, state, data, together, distance):
    cohort = Cohort.from_examples(data.ids, data.cohort(0).examples, chunk_size=2)
    assert_agrees(process.next(state, cohort)[2], together, distance)


def test_not_on_the_devices(process, state, data, together, distance):
    with fed.use(Local(jax.local_devices()[:1])):
        assert_agrees(process.next(state, data.cohort(0))[2], together, distance)


def test_not_on_the_engine(process, state, data, together, distance):
    with fed.use("debug"):
        assert_agrees(process.next(state, data.select(["bob", "eve"]).cohort(0))[2], together, distance)


def test_not_on_what_the_others_hold(process, state, data, make, together, same_bits):
    others = make(seed=9)  # clients of the same sizes: one setting, so that even the bits are equal
    mixed = {client_id: (data if client_id == "dora" else others).client(client_id) for client_id in data}
    local_models = process.next(state, FederatedData.from_clients(mixed).cohort(0))[2]
    assert same_bits(local_models["dora"].weights, together["dora"].weights)
    assert not same_bits(local_models["eve"].weights, together["eve"].weights)


def test_a_repetition_gives_the_same_bits(process, data, together, same_bits):
    again = process.next(process.initialize(0), data.cohort(0))[2]
    assert same_bits(again.stacked, together.stacked)


def test_on_the_id(process, state, data, together, distance):
    renamed = {("dan" if client_id == "dora" else client_id): data.client(client_id) for client_id in data}
    local_models = process.next(state, FederatedData.from_clients(renamed).cohort(0))[2]
    assert distance(local_models["dan"].weights, together["dora"].weights) > 1e-3


def test_on_the_round(process, state, data, together, distance):
    later = dataclasses.replace(state, round=np.int32(1))
    assert distance(process.next(later, data.cohort(0))[2]["dora"].weights, together["dora"].weights) > 1e-3


def test_on_the_seed(process, state, data, together, distance, same_bits):
    assert not same_bits(process.initialize(1).weights, state.weights)
    other = dataclasses.replace(state, key=process.initialize(1).key)
    assert distance(process.next(other, data.cohort(0))[2]["dora"].weights, together["dora"].weights) > 1e-3


def test_keys_are_the_documented_chain():
    ids = ("ann", "form-03", "名前", "x" * 1000)
    found = client_keys(run_key(7), 12, ids)
    for client_id, key in zip(ids, found, strict=True):
        digest = hashlib.blake2b(client_id.encode(), digest_size=8).digest()
        low, high = np.frombuffer(digest, "<u4")
        expected = jax.random.fold_in(jax.random.key(7, impl="threefry2x32"), 12)
        expected = jax.random.fold_in(jax.random.fold_in(expected, low), high)
        np.testing.assert_array_equal(key, jax.random.key_data(expected))


def test_keys_are_known_values():
    # Computed once: a change would make every rerun of a published experiment another experiment.
    np.testing.assert_array_equal(client_keys(run_key(0), 0, ["alice"]), [[2751333207, 2661393949]])


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, np.int64(5)])
def test_the_key_of_a_small_seed_is_that_of_jax(seed):
    expected = jax.random.key_data(jax.random.key(int(seed), impl="threefry2x32"))
    np.testing.assert_array_equal(run_key(seed), expected)


def test_seeds_use_all_of_their_64_bits():
    seeds = [0, 1, -1, 2**31, 2**32, 2**32 - 1, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63)]
    assert len({run_key(seed).tobytes() for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("seed", [2**63, -(2**70), 1.0, "0", None])
def test_what_is_no_seed(seed):
    with pytest.raises(ConfigError, match="Expected a seed from"):
        run_key(seed)


def test_keys_do_not_follow_the_users_default():
    expected = client_keys(run_key(3), 1, ["a", "b"])
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(client_keys(run_key(3), 1, ["a", "b"]), expected)


def test_keys_differ_by_id_round_and_seed():
    ids = [f"client-{number}" for number in range(200)]
    keys = np.concatenate([client_keys(run_key(seed), number, ids) for seed in range(3) for number in range(3)])
    assert keys.dtype == np.uint32
    assert len(np.unique(keys, axis=0)) == 3 * 3 * 200


def test_a_key_does_not_depend_on_the_cohort():
    ids = [f"client-{number}" for number in range(21)]
    everyone = client_keys(run_key(0), 5, ids)
    np.testing.assert_array_equal(client_keys(run_key(0), 5, ids[::-1])[::-1], everyone)
    np.testing.assert_array_equal(client_keys(run_key(0), 5, ids[17:18]), everyone[17:18])
