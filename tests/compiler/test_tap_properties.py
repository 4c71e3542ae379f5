"""Taps of random computations: the result keeps its bits, and what is tapped is what the functions give by hand.

The computations are those of tests/contracts/test_engine_properties.py, with only their server values handed out. Their
functions double, stack, select and copy, which changes no bit whoever does it.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fedlens as fed
from fedlens import trees
from fedlens.compiler.levels import Level
from fedlens.language.types import tensor_types
from fedlens.runtime import Context, Local

_SOURCE = Path(__file__).parents[1] / "contracts" / "test_engine_properties.py"
_SPEC = importlib.util.spec_from_file_location("random_computations", _SOURCE)
random_computations = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(random_computations)


@pytest.fixture(scope="module")
def contexts():
    one, two = jax.local_devices()[:1], jax.local_devices()[:2]
    return [Context(Local(one)), Context(Local(two))]


@dataclass(frozen=True, eq=False)
class Made:
    """A value of a random computation.

    Attributes:
      value: in the language.
      by_hand: what each client holds, one after the other, given the results of the computation.
      reads: what it was made from.
      function: what was mapped to make it; None if nothing was.
    """

    value: fed.Value
    by_hand: Any = None
    reads: tuple[Made, ...] = ()
    function: Any = None

    @property
    def at_server(self):
        return self.value.type_signature.placement is fed.SERVER


def mapped(function, made):
    value = fed.federated_map(function, made.value)
    return Made(value, lambda results: [function(one) for one in made.by_hand(results)], (made,), function)


def pair(value):
    return value, value


CLIENT_FUNCTIONS = {
    "scale": random_computations.scale,
    "grow": random_computations.grow,
    "first": random_computations.first_leaf,
    "pair": pair,
}


def weight_of(value):
    return 1 + jnp.sum(random_computations.first_leaf(value) > 1, dtype=jnp.int32)


def applied(call, made, clients):
    """What a call of a random computation makes of the values so far; None if the language has none for their types."""
    at_clients, at_server = [[one for one in made if one.at_server is place] for place in (False, True)]
    first, second = (at_clients[place % len(at_clients)] for place in (call.first, call.second))
    reduce = {"sum": fed.federated_sum, "max": fed.federated_max, "min": fed.federated_min}.get(call.operator)
    if call.operator in CLIENT_FUNCTIONS:
        return mapped(CLIENT_FUNCTIONS[call.operator], first)
    if call.operator == "zip":
        return Made(
            fed.federated_zip((first.value, second.value)),
            lambda results: list(zip(first.by_hand(results), second.by_hand(results), strict=True)),
            (first, second),
        )
    if call.operator == "broadcast":
        server = at_server[call.first % len(at_server)]
        number = at_server.index(server)
        return Made(fed.federated_broadcast(server.value), lambda results: [results[number]] * clients, (server,))
    if reduce is not None:
        return Made(reduce(first.value), reads=(first,))
    if call.operator == "count":
        is_wide = tensor_types(first.value.type_signature)[0].dtype.itemsize == 8  # its zero is made in 32-bit mode
        return None if is_wide else Made(random_computations.counted(first.value), reads=(first,))
    if not random_computations.is_floating(first.value):
        return None
    if call.operator == "mean":
        return Made(fed.federated_mean(first.value), reads=(first,))
    weight = mapped(weight_of, second)
    return Made(fed.federated_mean(first.value, weight.value), reads=(first, weight))


def build(values, server_value, program):
    """A random computation that hands out its server values alone, and what it made on the way."""
    made: list[Made] = []
    types = (
        fed.FederatedType(fed.type_of(values[0]), fed.CLIENTS),
        fed.FederatedType(fed.type_of(server_value), fed.SERVER),
    )

    @fed.federated_computation(*types)
    def computation(at_clients, at_server):
        made[:] = [Made(at_clients, lambda results: values), Made(at_server)]
        for call in program:
            made.extend(one for one in [applied(call, made, len(values))] if one is not None)
        # At least one value that its client alone knows, and that is aggregated.
        last = mapped(random_computations.grow, next(one for one in reversed(made) if not one.at_server))
        made.extend([last, Made(fed.federated_max(last.value), reads=(last,))])
        return tuple(one.value for one in made if one.at_server)

    return computation, made


def all_made(made):
    """Everything that the results need, in the order in which it was made."""
    found: list[Made] = []

    def visit(one):
        for before in one.reads:
            visit(before)
        if not any(one is other for other in found):
            found.append(one)

    for one in made:
        if one.at_server:
            visit(one)
    return found


def bits(value):
    leaves = [
        np.asarray(leaf) for leaf in trees.leaves(value.stacked if isinstance(value, fed.ClientValues) else value)
    ]
    return [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in leaves]


@settings(max_examples=6, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(
    random_computations.structures,
    random_computations.structures,
    st.lists(random_computations.calls, min_size=1, max_size=5),
    st.integers(1, 9),
    st.sampled_from([None, 1, 3]),
)
def test_the_result_keeps_its_bits_and_taps_are_what_functions_give(
    contexts, structure, at_server, program, clients, chunk_size
):
    values = [random_computations.example(structure, seed) for seed in range(clients)]
    server_value = random_computations.example(at_server, 1000)
    computation, made = build(values, server_value, program)
    expected = [one for one in all_made(made) if one.function is not None]
    points = [tap for tap in fed.taps(computation) if re.fullmatch(r"map\.\d+", tap.name)]
    assert [tap.function for tap in points] == [one.function.__name__ for one in expected]
    wanted = [(tap.name, one) for tap, one in zip(points, expected, strict=True) if tap.level is not Level.RAW]
    for tap in points:
        if tap.level is Level.RAW:
            with pytest.raises(fed.DisclosureError):
                fed.tap(computation, tap.name)
    if not wanted:
        return
    tapped_computation = fed.tap(computation, [name for name, _ in wanted])
    argument = (fed.Cohort(values, chunk_size=chunk_size), server_value)
    for context in contexts:
        original = context.run(computation, argument).value
        result, tapped = context.run(tapped_computation, argument).value
        assert bits(result) == bits(original)
        for name, one in wanted:
            with jax.enable_x64(True):
                by_hand = one.by_hand(result)
            assert [bits(value) for value in tapped[name]] == [bits(value) for value in by_hand]
