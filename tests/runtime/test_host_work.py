"""Stages with work for the host, over every engine and chunk size: NumPy says what they give."""

import traceback

import jax.numpy as jnp
import numpy as np
import pytest

import fedlens as fed
from fedlens.runtime import Context, Local

VECTOR = fed.TensorType(np.float32, (3,))
AT_CLIENTS = fed.FederatedType(VECTOR, fed.CLIENTS)
BATCHES = fed.SequenceType(fed.batch_type(fed.type_of({"x": np.zeros(3, np.float32)}), 4))
CHUNKS = pytest.mark.parametrize("chunk_size", [1, 3])


@fed.jax_computation(VECTOR)
def double(vector):
    return vector * 2


@fed.python_computation(VECTOR, VECTOR)
def descending(vector):
    return np.sort(vector)[::-1]


@pytest.fixture
def in_engine(engine):
    with fed.use(engine):
        yield


def vectors(count=7, **options):
    rng = np.random.default_rng(count)
    values = rng.normal(size=(count, 3)).astype(np.float32)
    return values, fed.Cohort({f"client-{number}": row for number, row in enumerate(values)}, **options)


def assert_close(found, expected):
    assert np.linalg.norm(np.asarray(found) - expected) <= 1e-5 * np.linalg.norm(expected)


@CHUNKS
def test_traced_and_host_steps_mix_in_one_pass(in_engine, chunk_size):
    @fed.federated_computation(AT_CLIENTS)
    def mixed(x):
        doubled = fed.federated_map(double, x)
        by_host = fed.federated_map(descending, doubled)
        last = fed.federated_map(double, by_host)
        return fed.federated_mean(last), fed.federated_sum(by_host), by_host, doubled, last

    values, cohort = vectors(chunk_size=chunk_size)
    mean, total, by_host, doubled, last = mixed(cohort)
    expected = -np.sort(-2 * values, axis=1)
    assert by_host.ids == cohort.ids
    np.testing.assert_array_equal(by_host.stacked, expected)
    np.testing.assert_array_equal(doubled.stacked, 2 * values)
    np.testing.assert_array_equal(last.stacked, 2 * expected)
    assert_close(mean, 2 * expected.mean(axis=0))
    assert_close(total, expected.sum(axis=0))


@CHUNKS
def test_the_host_works_once_for_each_client_in_cohort_order(in_engine, chunk_size):
    seen = []

    @fed.python_computation(VECTOR, {"first": np.float32, "rest": fed.TensorType(np.float32, (2,))})
    def record(vector):
        seen.append(vector[0])
        return {"first": vector[0], "rest": vector[1:]}

    @fed.federated_computation(AT_CLIENTS)
    def recorded(x):
        parts = fed.federated_map(record, x)
        return fed.federated_sum(parts.first), fed.federated_mean(parts.rest), parts

    values, cohort = vectors(chunk_size=chunk_size)
    recorded(cohort)
    np.testing.assert_array_equal(seen, values[:, 0])


@CHUNKS
def test_what_nothing_reads_but_the_result_is_computed_too(in_engine, chunk_size):
    roll = fed.python_computation(None, np.int64)(iter(range(2**40, 2**41)).__next__)

    @fed.federated_computation(AT_CLIENTS)
    def rolls(x):
        return fed.federated_eval(roll, fed.CLIENTS), fed.federated_sum(fed.federated_map(double, x))

    values, cohort = vectors(chunk_size=chunk_size)
    numbers, total = rolls(cohort)
    assert list(numbers) == [2**40 + number for number in range(7)]
    assert_close(total, 2 * values.sum(axis=0))


def test_training_on_the_host_from_a_broadcast_model(in_engine):
    @fed.python_computation([("model", VECTOR), ("batches", BATCHES)], {"model": VECTOR, "num_examples": np.float32})
    def move_to_mean(model, batches):
        rows = np.concatenate([batch["x"][batch["mask"]] for batch in batches])
        return {"model": (model + rows.mean(axis=0)) / 2, "num_examples": float(len(rows))}

    @fed.federated_computation(fed.FederatedType(VECTOR, fed.SERVER), fed.FederatedType(BATCHES, fed.CLIENTS))
    def training_round(model, data):
        work = {"model": fed.federated_broadcast(model), "batches": data}
        trained = fed.federated_map(move_to_mean, fed.federated_zip(work))
        return fed.federated_mean(trained.model, trained.num_examples), trained

    rng = np.random.default_rng(0)
    rows = {name: rng.normal(size=(count, 3)).astype(np.float32) for name, count in (("a", 1), ("b", 9), ("c", 4))}
    data = fed.data.FederatedData.from_clients({name: {"x": of_client} for name, of_client in rows.items()})
    model = np.array([1, 2, 3], np.float32)
    new_model, trained = training_round(model, data.cohort(0))
    local = {name: (model + of_client.mean(axis=0)) / 2 for name, of_client in rows.items()}
    for name, expected in local.items():
        assert_close(trained[name]["model"], expected)
        assert trained[name]["num_examples"] == len(rows[name])
    assert_close(new_model, np.average(list(local.values()), axis=0, weights=[1, 9, 4]))


def test_several_phases(in_engine):
    @fed.python_computation((VECTOR, VECTOR), VECTOR)
    def away_from(center, vector):
        return vector - center

    @fed.federated_computation(AT_CLIENTS)
    def centered(x):
        center = fed.federated_map(descending, fed.federated_mean(fed.federated_map(double, x)))
        moved = fed.federated_map(away_from, (fed.federated_broadcast(center), x))
        return fed.federated_sum(fed.federated_map(double, moved)), center

    values, cohort = vectors()
    total, center = centered(cohort)
    expected = -np.sort(-2 * values.mean(axis=0))
    assert_close(center, expected)
    assert np.linalg.norm(np.asarray(total) - 2 * (values - expected).sum(axis=0)) < 1e-4


def test_a_mixture_inside_of_a_mapped_computation(in_engine):
    @fed.federated_computation(VECTOR)
    def mixture(vector):
        return {"both": double(descending(double(vector))), "once": descending(vector)}

    @fed.federated_computation(AT_CLIENTS)
    def mapped(x):
        return fed.federated_sum(fed.federated_map(mixture, x))

    values, cohort = vectors()
    total = mapped(cohort)
    expected = -np.sort(-values, axis=1)
    assert_close(total["both"], 4 * expected.sum(axis=0))
    assert_close(total["once"], expected.sum(axis=0))
    np.testing.assert_array_equal(mixture(values[0])["both"], 4 * expected[0])


def test_the_host_under_a_mapped_sequence_and_over_one(in_engine):
    rows_type = fed.SequenceType(VECTOR)
    total = fed.jax_computation(lambda rows: rows.reduce(jnp.zeros(3), lambda state, row: state + row), rows_type)

    @fed.python_computation(rows_type, VECTOR)
    def largest(rows):
        return np.max([np.zeros(3, np.float32), *rows], axis=0)

    @fed.federated_computation(rows_type)
    def both(rows):
        return total(fed.sequence_map(descending, rows)), largest(fed.sequence_map(double, rows))

    @fed.federated_computation(fed.FederatedType(rows_type, fed.CLIENTS))
    def of_clients(rows):
        return fed.federated_map(both, rows)

    values, _ = vectors()
    first, second = of_clients(fed.Cohort({"some": list(values), "none": []}))
    assert_close(first[0], -np.sort(-values, axis=1).sum(axis=0))
    np.testing.assert_array_equal(first[1], np.maximum(2 * values.max(axis=0), 0))
    np.testing.assert_array_equal(second, np.zeros((2, 3)))


def test_results_go_to_a_sink_chunk_by_chunk(engine):
    @fed.federated_computation(AT_CLIENTS)
    def mixed(x):
        by_host = fed.federated_map(descending, x)
        return {"host": by_host, "after": fed.federated_map(double, by_host), "mean": fed.federated_mean(by_host)}

    values, cohort = vectors(chunk_size=3)
    taken = []
    result = Context(engine).run(mixed, cohort, sink=taken.append).value
    assert [part["host"].ids for part in taken] == [cohort.ids[:3], cohort.ids[3:6], cohort.ids[6:]]
    expected = -np.sort(-values, axis=1)
    np.testing.assert_array_equal(np.concatenate([part["host"].stacked for part in taken]), expected)
    np.testing.assert_array_equal(np.concatenate([part["after"].stacked for part in taken]), 2 * expected)
    assert_close(result["mean"], expected.mean(axis=0))


@fed.python_computation(VECTOR, VECTOR)
def one_over(vector):
    with np.errstate(divide="ignore"):
        return np.float32(1) / vector


@fed.federated_computation(AT_CLIENTS)
def mean_of_inverses(x):
    return fed.federated_mean(fed.federated_map(one_over, x))


def test_infinities_from_the_host_are_dropped(engine):
    cohort = fed.Cohort({"a": np.ones(3, np.float32), "b": np.zeros(3, np.float32), "c": np.full(3, 2, np.float32)})
    outcome = Context(engine).run(mean_of_inverses, cohort, on_nonfinite="drop")
    np.testing.assert_allclose(outcome.value, 0.75)
    assert outcome.dropped == ("b",)


def test_infinities_from_the_host_raise_with_the_client(engine):
    cohort = fed.Cohort({"a": np.ones(3, np.float32), "b": np.zeros(3, np.float32)}, chunk_size=1)
    with pytest.raises(fed.NonFiniteError, match="in client 'b'"):
        Context(engine).run(mean_of_inverses, cohort, on_nonfinite="raise")


def test_an_exception_keeps_its_type_and_traceback_and_names_the_client(in_engine):
    @fed.python_computation(VECTOR, VECTOR)
    def look_up(vector):
        return {0.0: vector}[float(vector[0])]

    @fed.federated_computation(AT_CLIENTS)
    def looked_up(x):
        return fed.federated_sum(fed.federated_map(look_up, fed.federated_map(double, x)))

    cohort = fed.Cohort({"good": np.zeros(3, np.float32), "bad": np.ones(3, np.float32)})
    with pytest.raises(KeyError) as caught:
        looked_up(cohort)
    assert caught.value.args == (2.0,)
    (note,) = [note for note in caught.value.__notes__ if "client 'bad'" in note]
    assert "client stage 0" in note
    assert "'look_up'" in note
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "look_up"


def test_a_result_of_another_type_names_the_client(in_engine):
    @fed.python_computation(VECTOR, {"w": VECTOR})
    def widen(vector):
        return {"w": vector.astype(np.float64) if vector[0] else vector}

    @fed.federated_computation(AT_CLIENTS)
    def widened(x):
        return fed.federated_mean(fed.federated_map(widen, x))

    cohort = fed.Cohort({"good": np.zeros(3, np.float32), "bad": np.ones(3, np.float32)})
    with pytest.raises(fed.StructureError) as caught:
        widened(cohort)
    message = str(caught.value)
    for part in ("Expected float32[3] at 'w'", "found float64[3]", "'widen'", "client 'bad'", "client stage 0"):
        assert part in message


def test_a_failure_is_not_tried_again_client_by_client():
    calls = []

    @fed.python_computation(VECTOR, VECTOR)
    def not_written_yet(vector):
        calls.append(vector)
        raise NotImplementedError("later")

    @fed.federated_computation(AT_CLIENTS)
    def failing(x):
        return fed.federated_mean(fed.federated_map(not_written_yet, x))

    # So many tiny clients are computed side by side, and NotImplementedError is what JAX raises where that fails.
    with fed.use(Local()), pytest.raises(NotImplementedError, match="later"):
        failing(list(np.zeros((2000, 3), np.float32)))
    assert len(calls) == 1


def test_keys_beyond_a_select_are_refused_where_the_host_reads_it(in_engine):
    rows_type = fed.SequenceType(VECTOR)
    table_type = fed.TensorType(np.float32, (4, 3))

    @fed.python_computation(rows_type, VECTOR)
    def add_up(rows):
        return sum(rows, np.zeros(3, np.float32))

    row_of = fed.jax_computation(lambda table, key: table[key], [table_type, np.int32])

    @fed.federated_computation(
        fed.FederatedType(fed.TensorType(np.int32, (2,)), fed.CLIENTS), fed.FederatedType(table_type, fed.SERVER)
    )
    def chosen(keys, table):
        last = fed.federated_value(3, fed.SERVER)
        return fed.federated_map(add_up, fed.federated_select(keys, last, table, row_of))

    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    found = chosen(fed.Cohort({"a": np.array([0, 2], np.int32), "b": np.array([3, 3], np.int32)}), table)
    np.testing.assert_array_equal(found.stacked, [table[0] + table[2], 2 * table[3]])
    with pytest.raises(fed.FedlensError, match="found 4 in client 'b'"):
        chosen(fed.Cohort({"a": np.array([0, 2], np.int32), "b": np.array([4, 3], np.int32)}), table)


def test_a_computation_may_be_called_on_the_host(in_engine):
    @fed.python_computation(VECTOR, VECTOR)
    def through_another(vector):
        return double(vector)

    @fed.federated_computation(AT_CLIENTS)
    def nested(x):
        return fed.federated_sum(fed.federated_map(through_another, x))

    values, cohort = vectors()
    assert_close(nested(cohort), 2 * values.sum(axis=0))
