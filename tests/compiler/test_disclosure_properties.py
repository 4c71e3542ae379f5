"""Properties of flows over computations that hypothesis makes: no level falls without a reason, and none lies."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import fedlens as fed
from fedlens.compiler.flow import Flow, joined, lowered, within
from fedlens.compiler.flows import flows, leaves_of
from fedlens.compiler.levels import Level, join
from fedlens.compiler.normalize import normalize
from fedlens.compiler.origins import Part, argument, origin_of, origins, parts_of

VECTOR = fed.TensorType(np.float32, (2,))
KEY = fed.TensorType(np.uint32, (2,))
AT_CLIENTS = fed.FederatedType(VECTOR, fed.CLIENTS)
AT_SERVER = fed.FederatedType(VECTOR, fed.SERVER)


@fed.jax_computation(VECTOR, VECTOR)
def mix(x, y):
    return x + 2 * y


@fed.jax_computation(VECTOR, VECTOR)
def pair(x, y):
    return {"mixed": x * y, "first": x, "second": y}


@fed.jax_computation(VECTOR, VECTOR)
def plus(x, y):
    return x + y


@fed.jax_computation(VECTOR)
def after(total):
    return total + 1


@fed.jax_computation(VECTOR)
def weigh(value):
    return value[0] ** 2 + 1


STEPS = ["mix", "pair", "broadcast", "sum", "mean", "weighted mean", "max", "aggregate", "clip", "noise", "local noise"]
PROGRAMS = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=6)


def build(program):
    """A computation of these steps, each over values that are there already; all values are handed out."""

    @fed.federated_computation(
        AT_CLIENTS, AT_SERVER, fed.FederatedType(KEY, fed.CLIENTS), fed.FederatedType(KEY, fed.SERVER)
    )
    def computation(x, w, keys, key):
        at_clients, at_server, all_equal = [x], [w], [fed.federated_broadcast(w)]
        for step, one, other in program:
            own = at_clients + all_equal
            first, second = own[one % len(own)], own[other % len(own)]
            held = at_server[one % len(at_server)]
            if step == "mix":
                at_clients.append(fed.federated_map(mix, (first, second)))
                at_server.append(fed.federated_map(mix, (held, at_server[other % len(at_server)])))
            elif step == "pair":
                both = fed.federated_map(pair, (first, second))
                at_clients += [both.mixed, both.first, both.second]
            elif step == "broadcast":
                all_equal.append(fed.federated_broadcast(held))
            elif step == "sum":
                at_server.append(fed.federated_sum(first))
            elif step == "mean":
                at_server.append(fed.federated_mean(first))
            elif step == "weighted mean":
                weight = fed.federated_map(weigh, second)
                at_server.append(fed.federated_mean(first, weight))
            elif step == "max":
                at_server.append(fed.federated_max(first))
            elif step == "aggregate":
                at_server.append(fed.federated_aggregate(first, np.zeros(2, np.float32), mix, plus, after))
            elif step == "clip":
                at_clients.append(fed.federated_map(fed.privacy.clip(0.5 + one % 3), first))
            elif step == "noise":
                noise = fed.privacy.gaussian_noise(1.0, sensitivity=0.5 + other % 3)
                at_server.append(fed.federated_map(noise, (held, key)))
            elif step == "local noise":
                at_clients.append(fed.federated_map(fed.privacy.local_gaussian(1.0, norm=1.0), (first, keys)))
        return {"clients": tuple(at_clients), "server": tuple(at_server)}

    return computation


def tells_less(flow: Flow, other: Flow) -> bool:
    """Whether one is within a limit that the other is not within."""
    return any(within(flow, limit) and not within(other, limit) for limit in Level)


def read_by(call, known, moved):
    """The flows of what a call reads, each field by itself."""
    mapped = call.function.uri in ("federated_map", "federated_apply")
    several = mapped or call.function.uri in ("federated_weighted_mean", "federated_aggregate")
    blocks = [argument(call, int(mapped))] if several else [call.argument]
    if call.function.uri == "federated_weighted_mean":
        blocks.append(argument(call, 1))
    return [known[part.name].at(part.path) for block in blocks for part in parts_of(origin_of(block, moved))]


@settings(max_examples=25, deadline=None)
@given(PROGRAMS)
def test_a_level_never_falls_without_a_named_reason(program):
    normal_form = normalize(build(program))
    known, calls = flows(normal_form), normal_form.result.locals
    moved = origins(calls)
    for name, call in calls:
        if "zip" in call.function.uri or moved[name] != Part(name):
            continue
        together = joined(*read_by(call, known, moved))
        for leaf in leaves_of(known[name]):
            if tells_less(leaf, together):
                assert len(leaf.reasons) > 0
                assert leaf.reasons[-1] not in together.reasons or len(leaf.reasons) > len(together.reasons)


@settings(max_examples=25, deadline=None)
@given(PROGRAMS)
def test_a_level_between_public_and_raw_has_the_reasons_that_it_needs(program):
    needed = {
        Level.CENTRAL_DP: "gaussian noise of 1 for a sensitivity of",
        Level.LOCAL_DP: "local gaussian noise of 1 after a clip to 1: noise multiplier",
        Level.AGGREGATE: "over all clients",
    }
    for output in fed.disclosure(build(program)).outputs:
        assert (output.path[0] in ("x", "keys")) == (output.level is not Level.PUBLIC)
        for level in (output.level, *output.also):
            assert any(needed.get(level, "") in reason for reason in output.reasons) or level in (
                Level.PUBLIC,
                Level.RAW,
            )


@settings(max_examples=6, deadline=None)
@given(PROGRAMS)
def test_what_is_public_does_not_change_with_a_clients_data(program):
    computation = build(program)
    rng = np.random.default_rng(0)
    keys = fed.Cohort({name: np.array([1, n], np.uint32) for n, name in enumerate(("alice", "bob", "carol"))})
    data = {name: rng.normal(size=2).astype(np.float32) for name in keys.ids}
    others = {**data, "bob": np.array([5, -7], np.float32)}
    rest = (np.array([0.5, 2], np.float32), keys, np.array([3, 4], np.uint32))
    with fed.use("debug"):
        before, after = (computation(fed.Cohort(values), *rest) for values in (data, others))
    for output in fed.disclosure(computation).outputs:
        if output.level is Level.PUBLIC:
            where, position = output.name.split("/")[:2]
            one, other = before[where][int(position)], after[where][int(position)]
            for client in keys.ids if where == "clients" else [None]:
                np.testing.assert_array_equal(
                    one if client is None else one[client], other if client is None else other[client]
                )


LEVELS = st.sampled_from(list(Level))
FLOWS = st.builds(lambda level: Flow(frozenset({level}), (level.value,)), LEVELS)


@given(st.lists(FLOWS, min_size=1, max_size=4))
def test_values_together_tell_no_less_than_each_of_them(several):
    together = joined(*several)
    assert together.level is join(*(flow.level for flow in several))
    assert all(within(flow, limit) for limit in Level for flow in several if within(together, limit))


@given(FLOWS, LEVELS)
def test_a_fall_keeps_what_held_before_and_says_why_exactly_if_it_happens(flow, to):
    found = lowered(flow, to, "why")
    assert within(found, to)
    assert all(within(found, limit) for limit in Level if within(flow, limit))
    assert found.reasons == (("why",) if found.bounds != flow.bounds else ())


@given(FLOWS)
def test_what_is_private_and_an_aggregate_stays_an_aggregate_beside_another(flow):
    both = lowered(Flow(frozenset({Level.LOCAL_DP})), Level.AGGREGATE, "mean")
    assert both.level is Level.LOCAL_DP
    assert within(both, Level.AGGREGATE)
    together = joined(both, flow)
    assert within(together, Level.AGGREGATE) == within(flow, Level.AGGREGATE)
