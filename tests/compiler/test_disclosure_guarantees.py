"""When noise counts as differential privacy and when it hides nothing: values, sensitivities, keys."""

from __future__ import annotations

import jax
import pytest
from disclosed import (
    AT_CLIENTS,
    CLIENT_KEYS,
    KEY,
    SERVER_KEY,
    VECTOR,
    double,
    levels_of,
    local_noise,
    noised,
    reasons_of,
)

import fedlens as fed


def weight_of(clipped):
    return fed.federated_mean(clipped, fed.federated_value(1.0, fed.CLIENTS))


def of_client_keys(key, keys):
    return fed.federated_sum(keys)


def constant_key(key, keys):
    return fed.federated_eval(fed.jax_computation(lambda: jax.random.PRNGKey(0)), fed.SERVER)


@pytest.mark.parametrize(
    ("computation", "level", "why"),
    [
        (noised(norm=1.5), "aggregate", "moves its value by up to 1.5, which is more than the sensitivity"),
        (noised(reduce=fed.federated_mean), "aggregate", "its value is no sum of clients' values"),
        (noised(reduce=weight_of), "aggregate", "its value is no sum of clients' values"),
        (noised(before=double), "aggregate", "its value is no sum of clients' values"),
        (noised(reduce=fed.federated_max), "per-client", "its value is no sum of clients' values"),
        (noised(key_of=of_client_keys), "aggregate", "its key depends on the clients"),
        (noised(key_of=constant_key), "aggregate", "its key is a constant"),
    ],
    ids=[
        "clip above sensitivity",
        "mean",
        "weighted mean",
        "function between",
        "max",
        "key of clients",
        "constant key",
    ],
)
def test_noise_that_hides_nothing_counts_for_nothing_and_says_why(computation, level, why):
    assert levels_of(computation) == {"": level}
    assert why in reasons_of(computation)[-1]


@pytest.mark.parametrize(
    ("key_of", "why"),
    [
        (lambda keys, key: fed.federated_broadcast(key), "its key is not the client's own"),
        (
            lambda keys, key: fed.federated_map(
                fed.jax_computation(lambda own, shared: own ^ shared, KEY, KEY), (keys, fed.federated_broadcast(key))
            ),
            "its key is not the client's own",
        ),
    ],
    ids=["the server's key", "a key that the server has a part in"],
)
def test_local_noise_that_the_server_can_take_off_counts_for_nothing(key_of, why):
    computation = local_noise(key_of)
    assert levels_of(computation) == {"0": "per-client", "1": "aggregate", "2": "per-client"}
    assert why in reasons_of(computation, "0")[-1]


def test_a_key_that_serves_twice_serves_nobody():
    inner = noised()

    @fed.federated_computation(AT_CLIENTS, SERVER_KEY, CLIENT_KEYS)
    def computation(x, key, keys):
        return inner(x, key, keys), inner(fed.federated_map(double, x), key, keys)

    assert levels_of(computation) == {"0": "aggregate", "1": "aggregate"}
    assert "its key serves another mechanism too" in reasons_of(computation, "0")[-1]


def test_a_key_that_is_handed_out_hides_nothing():
    inner = noised()

    @fed.federated_computation(AT_CLIENTS, SERVER_KEY, CLIENT_KEYS)
    def computation(x, key, keys):
        return inner(x, key, keys), key

    assert levels_of(computation)["0"] == "aggregate"
    assert "its key is handed out" in reasons_of(computation, "0")[-1]


def test_a_key_that_another_function_reads_hides_nothing():
    inner = noised()

    @fed.federated_computation(AT_CLIENTS, SERVER_KEY, CLIENT_KEYS)
    def computation(x, key, keys):
        return inner(x, key, keys), fed.federated_map(fed.jax_computation(lambda key: key + 1, KEY), key)

    assert levels_of(computation)["0"] == "aggregate"


def test_keys_that_are_summed_too_hide_nothing():
    inner = local_noise()

    @fed.federated_computation(AT_CLIENTS, CLIENT_KEYS, SERVER_KEY)
    def computation(x, keys, key):
        return inner(x, keys, key)[0], fed.federated_sum(keys)

    assert levels_of(computation) == {"0": "per-client", "1": "aggregate"}
    assert "its key is read by something else too" in reasons_of(computation, "0")[-1]


def test_two_keys_split_from_one_serve_two_mechanisms():
    inner = noised()
    split = fed.jax_computation(lambda key: tuple(jax.random.split(key)), KEY)

    @fed.federated_computation(AT_CLIENTS, SERVER_KEY, CLIENT_KEYS)
    def computation(x, key, keys):
        first, second = fed.federated_map(split, key)
        return inner(x, first, keys), inner(fed.federated_map(double, x), second, keys)

    assert levels_of(computation) == {"0": "central-dp", "1": "central-dp"}


def test_noise_inside_of_a_function_counts_for_nothing():
    secret_noise = fed.jax_computation(lambda x, key: x + 100 * jax.random.normal(key, (3,)), VECTOR, KEY)

    @fed.federated_computation(AT_CLIENTS, SERVER_KEY)
    def computation(x, key):
        return fed.federated_map(secret_noise, (fed.federated_sum(x), key))

    assert levels_of(computation) == {"": "aggregate"}
