"""The language's sequence operators, selects and generic operators on every engine, against NumPy."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from federated_language import framework

import fedlens as fed
from fedlens.errors import BoundError, LanguageError, UnsupportedError

BATCHES = [[3, 1], [], [4, 1, 5], [9]]  # ragged, one client without any
TABLE = np.arange(10, dtype=np.float32).reshape(5, 2)
KEYS = np.array([[0, 1, 0], [4, 4, 4], [3, 2, 1], [0, 0, 4]], np.int32)


class Example(NamedTuple):
    x: Any
    y: Any


@pytest.fixture(autouse=True)
def _on_every_engine(engine):
    with fed.use(engine):
        yield


def at_clients(type_):
    return fed.FederatedType(type_, fed.CLIENTS)


def at_server(type_):
    return fed.FederatedType(type_, fed.SERVER)


def cohort(values):
    return fed.Cohort({f"client {i}": value for i, value in enumerate(values)}, chunk_size=3)


half = fed.jax_computation(lambda x: x / 2, np.int32)
add = fed.jax_computation(lambda a, b: a + b, np.float32, np.float32)


@fed.federated_computation(at_clients(fed.SequenceType(np.int32)))
def over_clients(numbers):
    halves = fed.sequence_map(half, numbers)
    inside = fed.federated_computation(
        lambda sequence: fed.sequence_reduce(fed.sequence_map(half, sequence), np.float32(1), add),
        fed.SequenceType(np.int32),
    )
    return {
        "sum": fed.sequence_sum(numbers),
        "reduced": fed.sequence_reduce(halves, fed.federated_value(np.float32(0), fed.CLIENTS), add),
        "inside": fed.federated_map(inside, numbers),
        "total": fed.federated_sum(fed.sequence_sum(halves)),
    }


def test_over_clients_sequences():
    result = over_clients(cohort([[np.int32(n) for n in numbers] for numbers in BATCHES]))
    sums = [sum(numbers) for numbers in BATCHES]
    assert [int(found) for found in result["sum"]] == sums
    assert {found.dtype for found in result["sum"]} == {np.dtype(np.int32)}
    assert [float(found) for found in result["reduced"]] == [total / 2 for total in sums]
    assert [float(found) for found in result["inside"]] == [1 + total / 2 for total in sums]
    assert float(result["total"]) == sum(sums) / 2


@fed.federated_computation(at_server(fed.SequenceType(np.int32)), fed.SequenceType(np.int64))
def elsewhere(there, unplaced):
    exact = fed.jax_computation(lambda x: x + 1, np.int64)
    more = fed.sequence_map(exact, unplaced)
    halves = fed.sequence_map(half, there)
    add_wide = fed.jax_computation(lambda a, b: a + b, np.int64, np.int64)
    return {
        "server": fed.sequence_sum(halves),
        "unplaced": fed.sequence_sum(more),
        "reduced": fed.sequence_reduce(unplaced, np.int64(2**41), add_wide),
        "halves": halves,
        "more": more,
        "as it came": unplaced,
    }


def test_at_the_server_and_at_no_place():
    result = elsewhere([np.int32(1), np.int32(4)], [np.int64(2**40), np.int64(7), np.int64(-8)])
    assert float(result["server"]) == 2.5
    assert (int(result["unplaced"]), int(result["reduced"])) == (2**40 + 2, 2**41 + 2**40 - 1)
    assert [float(x) for x in result["halves"]] == [0.5, 2]  # a sequence that is handed out is a list
    assert [(int(x), x.dtype) for x in result["more"]] == [(n + 1, np.int64) for n in (2**40, 7, -8)]
    assert [int(x) for x in result["as it came"]] == [2**40, 7, -8]


def test_a_sequence_of_none():
    result = elsewhere([], [])
    assert (float(result["server"]), int(result["unplaced"]), int(result["reduced"])) == (0, 0, 2**41)
    assert (result["halves"], result["more"]) == ([], [])


def test_batches_keep_their_containers_through_maps():
    """Functions get the containers of their own types, whatever came before."""
    example = fed.type_of(Example(np.zeros(2, np.float32), np.int32(0)))

    @fed.jax_computation(example)
    def scaled(batch):
        return Example(batch.x * 2, batch.y)

    @fed.jax_computation(fed.SequenceType(example))
    def fold(batches):
        return batches.reduce(jnp.float32(0), lambda total, batch: total + batch.x.sum() * batch.y)

    @fed.federated_computation(at_clients(fed.SequenceType(example)))
    def folded(batches):
        return fed.federated_map(fold, fed.sequence_map(scaled, batches)), fed.federated_map(fold, batches)

    values = [[Example(np.array([i, 1], np.float32), np.int32(k)) for k in range(3)] for i in range(3)]
    again = framework.ConcreteComputation.from_proto(folded.to_proto())  # which drops Python's containers
    for computation in (folded, again):
        twice, once = computation(cohort(values)).__iter__()
        assert [float(x) for x in once] == [3 * (i + 1) for i in range(3)]
        assert [float(x) for x in twice] == [6 * (i + 1) for i in range(3)]


def test_wide_numbers_under_a_narrow_fold():
    small = fed.jax_computation(lambda n: (n // 2**40).astype(jnp.float32), np.int64)
    fold = fed.jax_computation(
        lambda batches: batches.reduce(jnp.float32(0), lambda total, batch: total + batch), fed.SequenceType(np.float32)
    )
    total = fed.federated_computation(
        lambda numbers: fed.federated_sum(fed.federated_map(fold, fed.sequence_map(small, numbers))),
        at_clients(fed.SequenceType(np.int64)),
    )
    assert float(total(cohort([[np.int64(2**40), np.int64(2**42)], [], [np.int64(2**41)]]))) == 7


def test_a_sequence_that_two_passes_read():
    """What makes a sequence is repeated in the second pass: sequences do not leave a stage."""

    @fed.federated_computation(at_clients(fed.SequenceType(np.int32)))
    def distances(numbers):
        halves = fed.sequence_map(half, numbers)
        mean = fed.federated_broadcast(fed.federated_mean(fed.sequence_sum(halves)))
        return fed.federated_map(add, (fed.sequence_reduce(halves, mean, add), mean))

    result = distances(cohort([[np.int32(n) for n in numbers] for numbers in BATCHES]))
    sums = np.array([sum(numbers) / 2 for numbers in BATCHES])
    np.testing.assert_allclose(result.stacked, sums + 2 * sums.mean(), rtol=1e-6)


def test_a_servers_sequence_at_the_clients():
    @fed.federated_computation(at_clients(np.float32), at_server(fed.SequenceType(np.int32)))
    def shifted(values, numbers):
        sent = fed.federated_broadcast(fed.sequence_map(half, numbers))
        return fed.federated_map(add, (values, fed.sequence_sum(sent)))

    result = shifted(cohort([np.float32(i) for i in range(4)]), [np.int32(3), np.int32(4)])
    assert [float(x) for x in result] == [3.5 + i for i in range(4)]


def test_sequences_in_the_functions_of_an_aggregate():
    """The report runs after the pass, where no step makes a sequence."""

    @fed.federated_computation(at_clients(fed.SequenceType(np.float32)), fed.SequenceType(np.int32))
    def aggregated(numbers, more):
        halves = fed.sequence_map(half, more)
        accumulate = fed.federated_computation(
            lambda total, sequence: fed.sequence_reduce(sequence, total, add),
            fed.to_type([np.float32, fed.SequenceType(np.float32)]),
        )
        report = fed.federated_computation(lambda total: fed.sequence_reduce(halves, total, add), np.float32)
        return fed.federated_aggregate(numbers, np.float32(0), accumulate, add, report)

    result = aggregated(cohort([[np.float32(n) for n in numbers] for numbers in BATCHES]), [np.int32(3), np.int32(4)])
    assert float(result) == sum(sum(numbers) for numbers in BATCHES) + 3.5


def test_clients_sequences_are_not_handed_back():
    mapped = fed.federated_computation(
        lambda numbers: fed.sequence_map(half, numbers), at_clients(fed.SequenceType(np.int32))
    )
    with pytest.raises(
        UnsupportedError, match="result made of tensors, found sequences at the clients in federated_map"
    ):
        mapped(cohort([[np.int32(1)]]))


row = fed.jax_computation(lambda table, key: {"row": table[key], "key": key}, (np.float32, (5, 2)), np.int32)


@fed.jax_computation(fed.SequenceType(row.type_signature.result))
def sum_of_rows(rows):
    return rows.reduce(jnp.zeros(2, jnp.float32), lambda total, each: total + each["row"])


SELECT = [at_clients((np.int32, (3,))), at_server(np.int32), at_server((np.float32, (5, 2)))]


@fed.federated_computation(*SELECT)
def selecting(keys, max_key, table):
    selected = fed.federated_select(keys, max_key, table, row)
    sums = fed.federated_map(sum_of_rows, selected)
    mean = fed.federated_broadcast(fed.federated_mean(sums))
    difference = fed.jax_computation(
        lambda rows, mean: rows.reduce(jnp.zeros(2, jnp.float32), lambda total, each: total + each["row"] - mean / 3),
        fed.SequenceType(row.type_signature.result),
        (np.float32, (2,)),
    )
    return selected, sums, fed.federated_map(difference, (selected, mean))


def test_select():
    selected, sums, differences = selecting(cohort(list(KEYS)), np.int32(4), TABLE)
    rows = TABLE[KEYS]
    for client, keys in zip(selected.ids, KEYS, strict=True):
        assert [int(element["key"]) for element in selected[client]] == list(keys)
        np.testing.assert_array_equal([element["row"] for element in selected[client]], TABLE[keys])
    np.testing.assert_array_equal(selected.stacked[1]["row"], TABLE[KEYS[:, 1]])
    np.testing.assert_array_equal(sums.stacked, rows.sum(1))
    np.testing.assert_allclose(differences.stacked, rows.sum(1) - rows.sum(1).mean(0), atol=1e-5)


@fed.federated_computation(*SELECT)
def selecting_securely(keys, max_key, table):
    return fed.federated_sum(fed.federated_map(sum_of_rows, fed.federated_secure_select(keys, max_key, table, row)))


def test_secure_select():
    np.testing.assert_array_equal(
        selecting_securely(cohort(list(KEYS)), np.int32(5), TABLE), TABLE[KEYS].sum(axis=(0, 1))
    )


@pytest.mark.parametrize(
    ("computation", "max_key", "key", "message"),
    [
        # As the language documents them: max_key is the highest key of a select, and beyond all of a secure one.
        (selecting, 3, 3, "keys from 0 to 3, found 4 in client 'client 1', leaf 'keys', client stage 0"),
        (selecting, 4, -2, "keys from 0 to 4, found -2 in client 'client 3'"),
        (selecting_securely, 4, 3, "keys from 0 to 3, found 4 in client 'client 1'"),
    ],
)
def test_a_key_that_does_not_exist_names_the_client(computation, max_key, key, message):
    keys = KEYS.copy()
    keys[3, 1] = key
    with pytest.raises(BoundError, match=message):
        computation(cohort(list(keys)), np.int32(max_key), TABLE)


def generic(uri, *operands):
    type_ = operands[0].type_signature
    function = framework.Intrinsic(uri, fed.FunctionType(fed.StructType([type_, type_]), type_))
    return framework.Call(function, framework.Struct(operands))


def built(parameter_type, body):
    """A computation that is written as building blocks, as other compilers write them."""
    parameter = framework.Reference("x", fed.to_type(parameter_type))
    return framework.ConcreteComputation.from_building_block(
        framework.Lambda("x", parameter.type_signature, body(parameter))
    )


def select_field(block, index):
    return framework.Selection(block, index=index)


NUMBERS = fed.to_type([("a", np.int32), ("b", (np.float64, (2,)))])


def test_generic_operators_at_no_place():
    def body(x):
        first, second = select_field(x, 0), select_field(x, 1)
        zero = framework.Intrinsic("generic_zero", NUMBERS)
        return framework.Struct(
            [
                generic("generic_plus", generic("generic_plus", first, zero), second),
                generic("generic_multiply", first, second),
            ]
        )

    first, second = {"a": 3, "b": np.array([1.5, -2])}, {"a": -7, "b": np.array([2.0, 0.5])}
    plus, times = built([NUMBERS, NUMBERS], body)(first, second)
    assert (int(plus["a"]), int(times["a"]), plus["a"].dtype) == (-4, -21, np.int32)
    np.testing.assert_array_equal(plus["b"], first["b"] + second["b"])
    np.testing.assert_array_equal(times["b"], first["b"] * second["b"])


def test_a_generic_quotient_has_the_declared_dtype():
    def quotient(operand, result):
        function = framework.Intrinsic(
            "generic_divide", fed.FunctionType(fed.to_type([operand, operand]), fed.TensorType(result))
        )
        return built(
            [operand, operand],
            lambda x: framework.Call(function, framework.Struct([select_field(x, 0), select_field(x, 1)])),
        )

    found = quotient(np.int32, np.float64)(2, 3)
    assert (float(found), found.dtype) == (2 / 3, np.float64)
    assert float(quotient(np.float32, np.float32)(np.float32(1), np.float32(4))) == 0.25
    with pytest.raises(LanguageError, match="quotient of generic_divide, found int32"):
        quotient(np.int32, np.int32)(2, 3)


def test_generic_operators_of_federated_values():
    """A sum of structs of federated values is a map at each place."""
    type_ = fed.to_type([("at server", at_server(NUMBERS)), ("at clients", at_clients(np.float32))])
    added = built([type_, type_], lambda x: generic("generic_plus", select_field(x, 0), select_field(x, 1)))
    numbers = {"a": 3, "b": np.array([1.5, -2])}
    clients = cohort([np.float32(i) for i in range(4)])
    result = added(*[{"at server": numbers, "at clients": clients}] * 2)
    assert int(result["at server"]["a"]) == 6
    np.testing.assert_array_equal(result["at server"]["b"], [3, -4])
    assert [float(x) for x in result["at clients"]] == [0, 2, 4, 6]


def test_a_generic_zero_at_the_server_and_at_the_clients():
    def body(x):
        zeros = framework.Struct(
            [framework.Intrinsic("generic_zero", at_server(NUMBERS)), framework.Intrinsic("generic_zero", NUMBERS)]
        )
        return framework.Struct([x, zeros])

    _, (there, unplaced) = built(at_clients(np.float32), body)(cohort([np.float32(1)]))
    for zero in (there, unplaced):
        assert (int(zero["a"]), zero["b"].dtype) == (0, np.float64)
        np.testing.assert_array_equal(zero["b"], [0, 0])
