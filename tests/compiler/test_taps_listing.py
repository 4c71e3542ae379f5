"""`taps`: which points there are, what they are called, what they feed and disclose, and what is refused."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from federated_language import framework

import fedlens as fed
from fedlens.compiler.levels import Level

BATCHES = fed.SequenceType(fed.TensorType(np.float32, (2,)))
DATA = fed.FederatedType(BATCHES, fed.CLIENTS)
NUMBER = fed.FederatedType(np.float32, fed.CLIENTS)
COHORT = fed.Cohort([[np.full(2, k, np.float32) for k in range(n)] for n in (3, 1)])

plus = fed.jax_computation(lambda a, b: a + b, np.float32, np.float32)
identity = fed.jax_computation(lambda x: x, np.float32)


class Result(NamedTuple):
    """What a client's work gives."""

    update: dict
    count: int


@fed.jax_computation(np.float32, BATCHES)
def train(start, batches):
    total = batches.reduce(start, lambda total, batch: total + batch.sum())
    return Result({"dense": {"kernel": total, "bias": total + 1}}, batches.num_batches)


@fed.jax_computation(train.type_signature.result)
def summed_up(result):
    return result.update["dense"]["kernel"] + 1


@fed.federated_computation(fed.FederatedType(np.float32, fed.SERVER), DATA)
def one_round(start, data):
    results = fed.federated_map(train, (fed.federated_broadcast(start), data))
    weight = fed.federated_map(lambda count: count.astype(jnp.float32), results.count)
    return fed.federated_mean(results.update, weight), fed.federated_max(fed.federated_map(summed_up, results))


def names(found):
    return [tap.name for tap in found]


def by_name(computation, at=None):
    return {tap.name: tap for tap in fed.taps(computation, at)}


def again(computation):
    """The computation as a reader of its bytes gets it."""
    proto = computation.to_proto()
    return framework.ConcreteComputation.from_proto(type(proto).FromString(proto.SerializeToString()))


@pytest.mark.parametrize("read", [lambda computation: computation, again], ids=["as built", "from a proto"])
def test_points_and_their_fields_by_name(read):
    assert names(fed.taps(read(one_round))) == [
        "client_work",
        "client_work.update",
        "client_work.count",
        "aggregate.0.value",
        "aggregate.0.value.dense",
        "aggregate.0.weight",
        "aggregate.1.value",
        "map.0",
        "map.1",
    ]


def test_what_a_point_feeds_is_read_field_by_field():
    found = by_name(one_round)
    assert found["client_work.update"].feeds == ("aggregate.0.value", "map.1")
    assert found["client_work.count"].feeds == ("map.0", "map.1")
    assert found["client_work"].feeds == ("aggregate.0.value", "map.0", "map.1")
    assert found["map.0"].feeds == ("aggregate.0.weight",)
    assert found["aggregate.0.value"].feeds == ("weighted mean",)
    assert found["aggregate.1.value"].feeds == ("max",)
    deep = by_name(one_round, "client_work.update/dense/bias")["client_work.update/dense/bias"]
    assert deep.feeds == ("aggregate.0.value", "map.1")


def test_types_have_the_containers_of_the_function_and_functions_their_names():
    found = by_name(one_round)
    assert found["client_work"].type.python_container is Result
    assert found["client_work.update"].type.python_container is dict
    assert str(found["aggregate.0.value"].type) == "<dense=<kernel=float32,bias=float32>>"
    assert found["aggregate.0.value"].type.python_container is dict
    assert [found[name].function for name in ("client_work", "aggregate.0.value", "map.1")] == [
        "train",
        "train",
        "summed_up",
    ]


def test_a_part_of_the_result_is_named():
    @fed.federated_computation(DATA)
    def handed_out(data):
        lengths = fed.federated_map(lambda batches: batches.num_batches, data)
        return {"all": (fed.federated_sum(lengths), lengths), "lengths": lengths}

    assert by_name(handed_out)["client_work"].feeds == ("aggregate.0.value", "result.all/1", "result.lengths")


@fed.federated_computation(np.float32, BATCHES)
def twice(start, batches):
    """Calls `train` inside of a function that is mapped, and hands out half of what it gives."""
    return {"first": train(start, batches), "start": plus(start, start)}


@fed.federated_computation(fed.FederatedType(np.float32, fed.SERVER), DATA)
def three_rounds(start, data):
    @fed.federated_computation(fed.FederatedType(np.float32, fed.SERVER), DATA)
    def once(start, data):
        results = fed.federated_map(twice, (fed.federated_broadcast(start), data))
        return fed.federated_sum(results.first.update["dense"]["kernel"])

    return once(once(once(start, data), data), data)


def test_a_function_that_is_called_three_times_gives_three_taps():
    found = by_name(three_rounds)
    work = [tap for name, tap in found.items() if name.startswith("client_work") and name.count(".") == 1]
    assert names(work) == ["client_work.0", "client_work.1", "client_work.2"]
    assert [tap.calls for tap in work] == [3, 3, 3]
    assert [tap.feeds for tap in work] == [(f"aggregate.{number}.value",) for number in range(3)]
    assert work[0].type["first"].python_container is Result  # through the function that is mapped
    _, tapped = fed.tap(three_rounds, ["client_work.0.first/count", "client_work.2.start"])(1.0, COHORT)
    assert tapped["client_work.0.first/count"].stacked.tolist() == [3, 1]
    # 1 at first; a round adds to 2 clients' sums of 0 + 2 + 4 and 0 what it starts from: x -> 2 x + 6
    assert tapped["client_work.2.start"].stacked.tolist() == [2 * 22, 2 * 22]


def test_what_only_moves_values_is_no_tap_and_equal_values_are_none():
    @fed.federated_computation(NUMBER, fed.FederatedType(np.float32, fed.SERVER))
    def moving(values, offset):
        there = fed.federated_broadcast(offset)
        pairs = fed.federated_zip((values, there))
        shifted = fed.federated_map(plus, pairs)
        both = fed.federated_zip({"shifted": shifted, "again": (shifted,)})
        return fed.federated_sum(both), fed.federated_sum(there)

    assert names(fed.taps(moving)) == [
        "aggregate.0.value",
        "aggregate.0.value.shifted",
        "aggregate.0.value.again",
        "map.0",
    ]
    assert by_name(moving)["aggregate.0.value.again"].function == by_name(moving)["map.0"].function


FIELDS = {"a.b": np.float32(1), "a/b": {"c": np.float32(2)}, "a": {"b/c": np.float32(3)}}


@fed.federated_computation(fed.FederatedType(np.float32, fed.CLIENTS))
def strange_names(values):
    @fed.python_computation(np.float32, fed.type_of(FIELDS))
    def named(value):
        return {"a.b": value + 1, "a/b": {"c": value + 2}, "a": {"b/c": value + 3}}

    return fed.federated_sum(fed.federated_map(lambda one: one["a.b"], fed.federated_map(named, values)))


@pytest.mark.parametrize(("name", "added"), [("map.0.a.b", 1), ("map.0.a/b/c", 2)])
def test_dots_and_slashes_in_field_names(name, added):
    _, tapped = fed.tap(strange_names, name)(fed.Cohort([0.0, 10.0]))
    assert tapped.stacked.tolist() == [added, 10 + added]


def test_positions_name_the_fields_of_tuples():
    @fed.federated_computation(NUMBER)
    def pairs(values):
        return fed.federated_sum(fed.federated_map(lambda value: (value + 1, (value + 2, value + 3)), values))

    _, tapped = fed.tap(pairs, "map.0.1/0")(fed.Cohort([0.0, 10.0]))
    assert tapped.stacked.tolist() == [2, 12]


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("client_wrk.update", "found 'client_wrk.update'. The nearest names: client_work.update"),
        ("client_work.update/dense/kernle", "found 'client_work.update/dense/kernle'."),
        ("client_work.0", "found 'client_work.0'."),
        (["client_work", "aggregate.2.value"], "found 'aggregate.2.value'. The nearest names: aggregate.1.value"),
        (lambda tap: False, "found none that is wanted"),
    ],
)
def test_unknown_names(at, message):
    with pytest.raises(fed.ConfigError, match=r"^Expected ") as error:
        fed.tap(one_round, at)
    assert message in str(error.value)


def test_several_client_works_are_listed_and_none_is_said():
    with pytest.raises(fed.ConfigError, match=r"found several: client_work\.0, client_work\.1, client_work\.2\."):
        fed.tap(three_rounds, "client_work.first")

    @fed.federated_computation(NUMBER)
    def without(values):
        return fed.federated_sum(fed.federated_map(lambda value: value + 1, values))

    with pytest.raises(fed.ConfigError, match=r"found none that reads a sequence.*aggregate\.0\.value, map\.0\."):
        fed.tap(without, "client_work")

    @fed.federated_computation(fed.FederatedType(np.float32, fed.SERVER))
    def at_the_server(value):
        return value

    assert fed.taps(at_the_server) == ()
    with pytest.raises(fed.ConfigError, match="found none for 'client_work'"):
        fed.tap(at_the_server, "client_work")


def test_what_is_no_computation_with_types():
    with pytest.raises(fed.LanguageError, match="whose types depend on what it is called with"):
        fed.taps(fed.jax_computation(lambda x: x))
    with pytest.raises(fed.LanguageError, match="found int"):
        fed.tap(3, "map.0")


@fed.federated_computation(NUMBER)
def mean_of_data(values):
    return fed.federated_mean(values)


@fed.federated_computation(NUMBER)
def mean_of_the_same(values):
    return fed.federated_mean(fed.federated_map(identity, values))


@fed.federated_computation(fed.FederatedType([("x", np.float32), ("y", np.float32)], fed.CLIENTS))
def mean_of_a_field(values):
    return fed.federated_mean(fed.federated_zip((values.y, fed.federated_map(identity, values.x))))


@fed.federated_computation(DATA)
def fold_of_data(data):
    zero = fed.jax_computation(lambda: jnp.float32(0))
    add = fed.jax_computation(
        lambda total, batches: batches.reduce(total, lambda so_far, batch: so_far + batch.sum()), np.float32, BATCHES
    )
    return fed.federated_aggregate(data, zero(), add, plus, identity)


@pytest.mark.parametrize(
    ("computation", "at"),
    [
        (mean_of_data, "aggregate.0.value"),
        (mean_of_the_same, "aggregate.0.value"),
        (mean_of_the_same, "map.0"),
        (mean_of_a_field, "aggregate.0.value"),
        (mean_of_a_field, "aggregate.0.value.0"),
        (fold_of_data, "aggregate.0.value"),
    ],
)
@pytest.mark.parametrize("allow_bypass", [False, True])
def test_raw_data_is_refused_always(computation, at, allow_bypass):
    assert by_name(computation)[at].level is Level.RAW
    with pytest.raises(fed.DisclosureError, match=f"raw data in '{at}'"):
        fed.tap(computation, at, allow_bypass=allow_bypass)


@fed.federated_computation(NUMBER)
def secure(values):
    encoded = fed.federated_map(lambda value: jnp.round(value * 8).astype(jnp.int32), values)
    clipped = fed.federated_map(lambda value: jnp.clip(value, 0, 255), encoded)
    other = fed.federated_map(lambda value: value + 1, values)
    return fed.federated_secure_sum_bitwidth(clipped, 8), fed.federated_sum(other)


def test_a_bypass_is_named_and_refused_unless_it_is_allowed():
    found = by_name(secure)
    for name in ("map.0", "map.1", "aggregate.0.value"):
        assert len(found[name].bypasses) == 1
        assert "secure" in found[name].bypasses[0]
        with pytest.raises(fed.DisclosureError, match=f"'{name}', which bypasses .*secure.*allow_bypass=True"):
            fed.tap(secure, name)
    assert found["map.2"].bypasses == found["aggregate.1.value"].bypasses == ()
    assert {tap.level for tap in found.values()} == {Level.PER_CLIENT}
    cohort = fed.Cohort([0.25, 40.0])
    (total, _), tapped = fed.tap(secure, ["map.0", "map.1", "map.2"], allow_bypass=True)(cohort)
    assert int(total) == 2 + 255
    assert [values.stacked.tolist() for values in tapped.values()] == [[2, 320], [2, 255], [1.25, 41]]
    _, beside = fed.tap(secure, "map.2")(cohort)
    assert beside.stacked.tolist() == [1.25, 41]


def test_what_was_selected_is_no_tensor():
    @fed.federated_computation(fed.FederatedType(fed.TensorType(np.int32, (2,)), fed.CLIENTS))
    def selecting(values):
        keys = fed.federated_map(lambda value: value % 3, values)
        slices = fed.federated_select(
            keys,
            fed.federated_value(np.int32(3), fed.SERVER),
            fed.federated_value(np.float32(10), fed.SERVER),
            fed.jax_computation(lambda value, key: value * key.astype(jnp.float32), np.float32, np.int32),
        )
        folded = fed.federated_map(
            lambda slices: slices.reduce(jnp.float32(0), lambda so_far, one: so_far + one), slices
        )
        return fed.federated_sum(folded)

    found = by_name(selecting)
    assert list(found) == ["client_work", "aggregate.0.value", "map.0"]
    assert found["map.0"].feeds == ("select",)
    _, keys = fed.tap(selecting, "map.0")(fed.Cohort([np.array([4, 2], np.int32), np.array([3, 3], np.int32)]))
    assert keys.stacked.tolist() == [[1, 2], [0, 0]]
