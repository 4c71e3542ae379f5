"""Random computations over random types and cohorts: the local engine, however it is set, gives what `debug` gives."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fedlens as fed
from fedlens import trees
from fedlens.language.types import tensor_types
from fedlens.runtime import Context, Debug, Local

DTYPES = ["int8", "uint16", "int32", "int64", "float16", "float32", "float64"]


@pytest.fixture(scope="module")
def debug():
    return Context(Debug())


@pytest.fixture(scope="module")
def settings_of_local():
    one, two = jax.local_devices()[:1], jax.local_devices()[:2]
    return [
        Context(Local(two)),
        Context(Local(one)),
        Context(Local(two, clients_per_step=16)),
        Context(Local(one, clients_per_step=3)),
    ]


@dataclass(frozen=True)
class Call:
    """One operator of a random computation, and the values that it takes, as positions among those made so far."""

    operator: str
    first: int
    second: int


def leaf(dtype, shape, seed):
    """Positive values, so that no sum cancels: errors are then relative to the result."""
    drawn = np.random.default_rng(seed).uniform(0.5, 2.0, shape)
    return np.asarray(drawn * (1 if np.dtype(dtype).kind == "f" else 3)).astype(dtype)


def example(structure, seed):
    if isinstance(structure, tuple) and structure and structure[0] == "leaf":
        return leaf(structure[1], structure[2], seed)
    if isinstance(structure, dict):
        return {name: example(child, seed * 31 + place) for place, (name, child) in enumerate(structure.items())}
    return [example(child, seed * 37 + place) for place, child in enumerate(structure)]


leaves = st.tuples(st.just("leaf"), st.sampled_from(DTYPES), st.lists(st.integers(1, 3), max_size=2).map(tuple))
structures = st.recursive(
    leaves,
    lambda inner: (
        st.dictionaries(st.sampled_from(["w", "b", "z"]), inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=2)
    ),
    max_leaves=3,
)
OPERATORS = [
    "scale",
    "grow",
    "pair",
    "first",
    "zip",
    "broadcast",
    "sum",
    "mean",
    "weighted mean",
    "max",
    "min",
    "count",
]
calls = st.builds(Call, st.sampled_from(OPERATORS), st.integers(0, 10), st.integers(0, 10))


def scale(value):
    return jax.tree.map(lambda part: (part * 2).astype(part.dtype), value)


def grow(value):
    return jax.tree.map(lambda part: jnp.stack([part, part + part]), value)


def first_leaf(value):
    return jax.tree.leaves(value)[0]


def is_floating(value):
    return all(tensor.dtype.kind == "f" for tensor in tensor_types(value.type_signature))


def counted(value):
    """How many clients there are, and the largest first leaf seen, by an aggregation of one's own."""
    kind = tensor_types(value.type_signature)[0]

    @fed.jax_computation
    def zero():
        return {"count": jnp.int32(0), "sum": jnp.zeros(kind.shape, kind.dtype)}

    state = zero.type_signature.result

    @fed.jax_computation(state, value.type_signature.member)
    def accumulate(state, one):
        return {"count": state["count"] + 1, "sum": state["sum"] + first_leaf(one)}

    @fed.jax_computation(state, state)
    def merge(first, second):
        return jax.tree.map(jnp.add, first, second)

    @fed.jax_computation(state)
    def report(state):
        return {"count": state["count"], "sum": state["sum"], "twice": state["sum"] + state["sum"]}

    return fed.federated_aggregate(value, zero(), accumulate, merge, report)


def pick(values, wanted):
    return values[wanted % len(values)]


def applied(call, made):
    """The value of `call` over what was made so far; None if the language has none for such types."""
    at_clients = [value for value in made if value.type_signature.placement is fed.CLIENTS]
    at_server = [value for value in made if value.type_signature.placement is fed.SERVER]
    first, second = pick(at_clients, call.first), pick(at_clients, call.second)
    match call.operator:
        case "scale" | "grow" | "first":
            function = {"scale": scale, "grow": grow, "first": first_leaf}[call.operator]
            return fed.federated_map(function, pick(made, call.first))
        case "pair":
            return fed.federated_map(lambda value: (value, value), first)
        case "zip":
            return fed.federated_zip((first, second))
        case "broadcast":
            return fed.federated_broadcast(pick(at_server, call.first)) if at_server else None
        case "sum":
            return fed.federated_sum(first)
        case "mean":
            return fed.federated_mean(first) if is_floating(first) else None
        case "weighted mean":
            if not is_floating(first):
                return None
            weight = fed.federated_map(lambda value: 1 + jnp.abs(jnp.sum(first_leaf(value))).astype(jnp.int32), second)
            return fed.federated_mean(first, weight)
        case "max":
            return fed.federated_max(first)
        case "min":
            return fed.federated_min(first)
        case "count":
            return counted(first)
    raise AssertionError(call)


def build(client_type, server_type, program):
    @fed.federated_computation(fed.FederatedType(client_type, fed.CLIENTS), fed.FederatedType(server_type, fed.SERVER))
    def computation(at_clients, at_server):
        made = [at_clients, at_server]
        for call in program:
            value = applied(call, made)
            if value is not None:
                made.append(value)
        return tuple(made)

    return computation


def assert_agree(found, expected):
    if isinstance(expected, fed.ClientValues):
        assert found.ids == expected.ids
        found, expected = found.stacked, expected.stacked
    found_leaves, expected_leaves = trees.leaves(found), trees.leaves(expected)
    for one, other in zip(found_leaves, expected_leaves, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if other.dtype.kind == "f":
            # Half precision is rounded once more when a result is put into it.
            tolerance = 1e-5 if other.dtype.itemsize > 2 else 2e-3
            wide, expected_wide = one.astype(np.float64), other.astype(np.float64)
            assert np.linalg.norm(wide - expected_wide) <= tolerance * np.linalg.norm(expected_wide)
        else:
            np.testing.assert_array_equal(one, other)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    structures, structures, st.lists(calls, min_size=1, max_size=5), st.integers(1, 9), st.sampled_from([None, 1, 3])
)
def test_local_gives_what_debug_gives(settings_of_local, debug, structure, at_server, program, clients, chunk_size):
    values = [example(structure, seed) for seed in range(clients)]
    server_value = example(at_server, 1000)
    computation = build(fed.type_of(values[0]), fed.type_of(server_value), program)
    argument: Any = (fed.Cohort(values, chunk_size=chunk_size), server_value)
    expected = debug.run(computation, argument).value
    for local in settings_of_local:
        found = local.run(computation, argument).value
        for one, other in zip(found, expected, strict=True):
            assert_agree(one, other)
    again = settings_of_local[0].run(computation, argument).value
    once = settings_of_local[0].run(computation, argument).value
    for one, other in zip(
        trees.leaves([leaves_of(v) for v in again]), trees.leaves([leaves_of(v) for v in once]), strict=True
    ):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def leaves_of(value):
    return list(trees.leaves(value.stacked if isinstance(value, fed.ClientValues) else value))
