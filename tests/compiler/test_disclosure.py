"""Disclosure: every rule of docs/disclosure.md with the smallest computation that it decides."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from disclosed import (
    AT_CLIENTS,
    AT_SERVER,
    CLIENT_KEYS,
    SERVER_KEY,
    VECTOR,
    F,
    aggregate,
    double,
    levels_of,
    local_noise,
    noised,
    plus,
    reasons_of,
    subtract,
)

import fedlens as fed

PAGE = Path(__file__).parents[2] / "docs" / "disclosure.md"


def input_at_clients():
    @fed.federated_computation(AT_CLIENTS)
    def computation(x):
        return x

    return computation, {"": "raw data"}


def input_of_the_server():
    @fed.federated_computation(AT_CLIENTS, AT_SERVER, VECTOR, fed.FederatedType(VECTOR, fed.CLIENTS, True))
    def computation(x, at_server, unplaced, shared):
        return {"server": at_server, "unplaced": unplaced, "shared": shared}

    return computation, {"server": "public", "unplaced": "public", "shared": "public"}


def constant():
    @fed.federated_computation(AT_CLIENTS)
    def computation(x):
        made = fed.federated_eval(fed.jax_computation(lambda: jnp.ones(3)), fed.CLIENTS)
        return {"made": made, "literal": fed.federated_value(1.0, fed.SERVER)}

    return computation, {"made": "public", "literal": "public"}


def move():
    @fed.federated_computation(
        fed.FederatedType(fed.StructType([("a", VECTOR), ("b", VECTOR)]), fed.CLIENTS), AT_SERVER
    )
    def computation(x, w):
        both = fed.federated_zip((fed.federated_map(double, x.a), fed.federated_broadcast(w), x.b))
        return {"both": both, "picked": both[1]}

    return computation, {"both/0": "per-client", "both/1": "public", "both/2": "raw data", "picked": "public"}


def computed():
    @fed.jax_computation(VECTOR, VECTOR)
    def mixed(x, w):
        return {"of_x": 2 * x, "of_w": 2 * w}

    @fed.federated_computation(AT_CLIENTS, AT_SERVER)
    def computation(x, w):
        return fed.federated_map(mixed, (x, fed.federated_broadcast(w))), fed.federated_map(double, w)

    return computation, {"0": "per-client", "1": "public"}


def unchanged():
    @fed.jax_computation(VECTOR, VECTOR)
    def passing(x, w):
        return {"new": x + w, "same": x}

    @fed.federated_computation(AT_CLIENTS, AT_SERVER)
    def computation(x, w):
        return fed.federated_map(passing, (x, fed.federated_broadcast(w)))

    return computation, {"new": "per-client", "same": "raw data"}


def sum_and_mean():
    @fed.federated_computation(AT_CLIENTS)
    def computation(x):
        return {
            "sum": fed.federated_sum(x),
            "mean": fed.federated_mean(fed.federated_map(double, x)),
            "again": fed.federated_map(double, fed.federated_broadcast(fed.federated_mean(x))),
        }

    return computation, {"sum": "aggregate", "mean": "aggregate", "again": "aggregate"}


def weighted_mean():
    @fed.federated_computation(AT_CLIENTS, fed.FederatedType(F, fed.CLIENTS), AT_SERVER)
    def computation(x, n, w):
        shared = fed.federated_broadcast(w)
        return fed.federated_mean(x, n), fed.federated_mean(shared, n), fed.federated_mean(shared)

    return computation, {"0": "aggregate", "1": "aggregate", "2": "public"}


def secure_sum():
    @fed.federated_computation(fed.FederatedType(np.int32, fed.CLIENTS))
    def computation(x):
        return fed.federated_secure_sum_bitwidth(x, 8), fed.federated_secure_sum(x, 100)

    return computation, {"0": "aggregate", "1": "aggregate"}


def extremes():
    @fed.federated_computation(AT_CLIENTS, AT_SERVER)
    def computation(x, w):
        return fed.federated_min(x), fed.federated_max(x), fed.federated_max(fed.federated_broadcast(w))

    return computation, {"0": "per-client", "1": "per-client", "2": "public"}


def aggregate_that_is_a_sum():
    return aggregate(plus), {"": "aggregate"}


def aggregate_that_is_no_sum():
    return aggregate(subtract), {"": "per-client"}


def sequences():
    rows = fed.SequenceType(VECTOR)

    @fed.jax_computation(rows)
    def fold(batches):
        return batches.reduce(jnp.zeros(3), lambda total, row: total + row)

    @fed.federated_computation(fed.FederatedType(rows, fed.CLIENTS))
    def computation(x):
        mapped = fed.federated_map(lambda_over(double, rows), x)
        return {"folded": fed.federated_map(fold, mapped), "rows": mapped}

    return computation, {"folded": "per-client", "rows": "raw data"}


def lambda_over(function, rows):
    @fed.federated_computation(rows)
    def mapped(sequence):
        return fed.sequence_map(function, sequence)

    return mapped


def select(operator):
    @fed.federated_computation(
        fed.FederatedType(fed.TensorType(np.int32, (2,)), fed.CLIENTS),
        fed.FederatedType(fed.TensorType(F, (5,)), fed.SERVER),
    )
    def computation(keys, table):
        pick = fed.jax_computation(lambda table, key: table[key], fed.TensorType(F, (5,)), np.int32)
        return operator(keys, fed.federated_value(5, fed.SERVER), table, pick)

    return computation


def open_select():
    return select(fed.federated_select), {"": "per-client", "select.0.keys": "raw data"}


def secure_select():
    return select(fed.federated_secure_select), {"": "per-client"}


def clip():
    @fed.federated_computation(AT_CLIENTS)
    def computation(x):
        return fed.federated_map(fed.privacy.clip(1.0), x)

    return computation, {"": "per-client"}


def central_noise():
    return noised(norm=0.5), {"": "central-dp"}


def local_noise_with_own_keys():
    return local_noise(), {"0": "local-dp", "1": "local-dp and aggregate", "2": "local-dp"}


def post_processing():
    inner = noised()

    @fed.federated_computation(AT_CLIENTS, SERVER_KEY, CLIENT_KEYS, AT_SERVER)
    def computation(x, key, keys, w):
        private = inner(x, key, keys)
        return {
            "with_public": fed.federated_map(plus, (private, w)),
            "with_aggregate": fed.federated_map(plus, (private, fed.federated_sum(x))),
            "with_data": fed.federated_map(plus, (fed.federated_broadcast(private), x)),
        }

    return computation, {"with_public": "central-dp", "with_aggregate": "aggregate", "with_data": "per-client"}


RULES = {
    "input at the clients": input_at_clients,
    "input of the server": input_of_the_server,
    "constant": constant,
    "move": move,
    "computation": computed,
    "array returned unchanged": unchanged,
    "sequence": sequences,
    "sum, mean": sum_and_mean,
    "weighted mean": weighted_mean,
    "secure sum": secure_sum,
    "min, max": extremes,
    "aggregate that is a sum": aggregate_that_is_a_sum,
    "aggregate that is no sum": aggregate_that_is_no_sum,
    "select": open_select,
    "secure select": secure_select,
    "clip": clip,
    "gaussian noise": central_noise,
    "local gaussian noise": local_noise_with_own_keys,
    "what is computed from it": post_processing,
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    computation, expected = RULES[rule]()
    assert levels_of(computation) == expected


def test_the_page_has_these_rules_and_no_others():
    table = PAGE.read_text().split("## The rules")[1].split("\n##")[0]
    named = re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)
    assert named == ["value", "---", *RULES]


def test_the_path_leads_from_the_input_over_the_functions_to_the_output():
    @fed.federated_computation(AT_CLIENTS, AT_SERVER)
    def computation(data, weights):
        trained = fed.federated_map(plus, (data, fed.federated_broadcast(weights)))
        return {"average": fed.federated_map(double, fed.federated_mean(trained))}

    (output,) = fed.disclosure(computation).outputs
    assert output.path == ("data", "plus", "mean", "double", "average")
    assert output.reasons == ("plus computes it from the data", "mean over all clients")


def test_of_several_inputs_the_path_begins_at_the_data():
    @fed.federated_computation(CLIENT_KEYS, fed.FederatedType(fed.SequenceType(VECTOR), fed.CLIENTS))
    def computation(keys, data):
        def last(keys, data):
            return data.reduce(jnp.zeros(3), lambda _, row: row)

        return fed.federated_map(last, (keys, data))

    assert fed.disclosure(computation).outputs[0].path == ("data", "last", "result")


def test_the_reason_of_a_user_written_aggregate_names_its_function():
    assert "subtract is not shown to be a sum" in reasons_of(aggregate(subtract))[0]


@pytest.mark.parametrize(
    ("function", "level"),
    [
        (lambda total, x: total + x, "aggregate"),
        (lambda total, x: x + total, "aggregate"),
        (lambda total, x: total + 2 * x, "per-client"),
        (lambda total, x: x + x, "per-client"),
        (lambda total, x: jnp.maximum(total, x), "per-client"),
        (lambda total, x: x, "per-client"),
        (lambda total, x: total + x + 1e9 * x[::-1], "per-client"),
    ],
)
def test_an_accumulation_is_a_sum_if_it_adds_and_does_nothing_else(function, level):
    assert levels_of(aggregate(fed.jax_computation(function, VECTOR, VECTOR))) == {"": level}


def test_partial_sums_that_are_merged_in_another_way_are_no_sum():
    assert levels_of(
        aggregate(plus, merge=fed.jax_computation(lambda one, other: jnp.maximum(one, other), VECTOR, VECTOR))
    ) == {"": "per-client"}


def test_an_accumulation_in_the_language_is_looked_into():
    adding = fed.federated_computation(lambda total, x: plus(total, x), [VECTOR, VECTOR])
    doubling = fed.federated_computation(lambda total, x: plus(x, x), [VECTOR, VECTOR])
    assert levels_of(aggregate(adding)) == {"": "aggregate"}
    assert levels_of(aggregate(doubling)) == {"": "per-client"}


def test_mechanisms_and_unchanged_arrays_are_known_after_serialisation():
    for rule in ("gaussian noise", "local gaussian noise", "array returned unchanged"):
        computation, expected = RULES[rule]()
        again = fed.framework.ConcreteComputation.from_proto(fed.to_portable(computation).to_proto())
        assert levels_of(again) == expected
