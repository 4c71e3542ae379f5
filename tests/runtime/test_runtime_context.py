"""The context: fedlens runs what no other context was set for, in every thread, chunk by chunk if asked to."""

import gc
import threading
import weakref
from typing import Any, NamedTuple

import federated_language as fl
import jax.numpy as jnp
import numpy as np
import pytest
from federated_language import framework

import fedlens as fed
from fedlens.errors import CohortError, ConfigError, NonFiniteError, UnsupportedError
from fedlens.runtime import Context, Debug, Local, current_context

AT_CLIENTS = fed.FederatedType(np.float32, fed.CLIENTS)


class Result(NamedTuple):
    twice: Any
    number: Any


@fed.federated_computation(AT_CLIENTS)
def total(values):
    return fed.federated_sum(values)


@fed.federated_computation(AT_CLIENTS)
def several(values):
    """Clients' values at two places of the result, the same one twice, and a server's."""
    results = fed.federated_map(lambda x: Result(x * 2, x), values)
    more = fed.federated_map(lambda x: x + 1, values)
    return {"a": [results, more], "again": results, "sum": fed.federated_sum(values)}


@fed.federated_computation(AT_CLIENTS)
def two_phases(values):
    mean = fed.federated_broadcast(fed.federated_mean(values))
    return fed.federated_map(lambda x, m: x - m, (values, mean))


def test_without_a_context_the_local_engine_runs():
    assert isinstance(current_context().engine, Local)
    assert total([1.0, 2.0]) == 3.0


def test_other_threads_need_no_set_up():
    found = {}

    def work(number):
        found[number] = float(total([1.0, float(number)])), type(current_context().engine)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: (1.0 + number, Local) for number in range(4)}


def test_use_is_for_a_while_and_for_this_thread():
    seen = []
    with fed.use("debug") as context:
        assert isinstance(context.engine, Debug)
        assert current_context() is context
        with fed.use("local") as inner:
            assert current_context() is inner
        thread = threading.Thread(target=lambda: seen.append(current_context().engine))
        thread.start()
        thread.join()
        assert current_context() is context
    assert isinstance(seen[0], Local)
    assert isinstance(current_context().engine, Local)


def test_use_ends_with_an_error_too():
    with pytest.raises(ZeroDivisionError), fed.use("debug"):
        raise ZeroDivisionError
    assert isinstance(current_context().engine, Local)


def test_one_name_is_one_engine_which_holds_the_compiled_programs():
    with fed.use("local") as first, fed.use("local") as second:
        assert first.engine is second.engine
    assert first.engine is current_context().engine


def test_an_unknown_engine_is_refused():
    with pytest.raises(ConfigError, match="one of the engines debug, local, found 'spark'"), fed.use("spark"):
        pass


def test_another_packages_context_is_left_alone():
    class Other(framework.SyncContext):
        def invoke(self, comp, arg):
            return "other"

    with framework.get_context_stack().install(Other()):
        assert total([1.0]) == "other"
        with pytest.raises(UnsupportedError, match=r"context of fedlens, found Other\. .*fed\.use"):
            current_context()


def test_the_debug_engine_shows_values_to_the_users_code():
    seen = []

    def look(x):
        try:
            seen.append(float(x))
        except TypeError:  # a tracer, when the type is inferred
            seen.append(None)
        return x

    computation = fed.federated_computation(lambda values: fed.federated_map(look, values), AT_CLIENTS)
    seen.clear()
    with fed.use("debug"):
        computation([1.5, 2.5])
    assert seen == [1.5, 2.5]


def test_the_debug_engine_says_where_an_error_happened():
    def positive(x):
        if not isinstance(x, jnp.ndarray) or hasattr(x, "_trace") or "Tracer" in type(x).__name__:
            return x
        if x < 0:
            raise ValueError("negative")
        return x

    computation = fed.federated_computation(lambda values: fed.federated_map(positive, values), AT_CLIENTS)
    with fed.use("debug"), pytest.raises(ValueError, match="negative") as error:
        computation(fed.Cohort({"ann": 1.0, "bob": -1.0}))
    assert "in client 'bob', client stage 0" in error.value.__notes__[0]


def test_a_computation_without_arguments():
    assert fed.federated_computation(lambda: fed.federated_value(3, fed.SERVER))() == 3


def test_without_a_cohort_nobody_takes_part():
    @fed.federated_computation(fed.FederatedType(np.float32, fed.SERVER))
    def nobody(x):
        return fed.federated_sum(fed.federated_broadcast(x))

    with pytest.raises(CohortError, match="clients-placed argument, which says who takes part"):
        nobody(1.0)


def test_clients_data_are_not_handed_back():
    identity = fed.federated_computation(lambda x: x, fed.FederatedType(fed.SequenceType(np.float32), fed.CLIENTS))
    with pytest.raises(UnsupportedError, match="clients' data is not handed back"):
        identity([[1.0]])


def test_a_function_is_no_result():
    number = fl.TensorType(np.float32)
    identity = framework.Lambda("x", number, framework.Reference("x", number))
    computation = framework.ConcreteComputation.from_building_block(framework.Lambda(None, None, identity))
    with pytest.raises(UnsupportedError, match="a value, found a function"):
        computation()


def test_computations_from_a_proto_run():
    again = framework.ConcreteComputation.from_proto(several.to_proto())
    result = again(fed.Cohort({"a": 1.0, "b": 2.0}))
    assert result["sum"] == 3.0
    assert result["again"]["b"] == {"twice": 4.0, "number": 2.0}  # a proto does not know the container


def test_a_sink_takes_the_clients_values_chunk_by_chunk_in_order(engine):
    chunks = []
    ids = [f"c{i}" for i in range(8)]
    cohort = fed.Cohort(dict(zip(ids, map(float, range(8)), strict=True)), chunk_size=3)
    outcome = Context(engine).run(several, cohort, sink=chunks.append)
    assert outcome.value == {"a": [None, None], "again": None, "sum": 28.0}
    assert [chunk["a/0"].ids for chunk in chunks] == [tuple(ids[:3]), tuple(ids[3:6]), tuple(ids[6:])]
    for chunk in chunks:
        assert chunk.keys() == {"a/0", "a/1", "again"}
        for client_id, value in chunk["again"].items():
            number = float(client_id[1:])
            assert value == chunk["a/0"][client_id] == Result(2 * number, number)
            assert type(value) is Result
            assert chunk["a/1"][client_id] == number + 1
        np.testing.assert_array_equal(chunk["a/0"].stacked.number, [float(name[1:]) for name in chunk["a/0"].ids])


def test_a_sink_hears_of_results_alone(engine):
    chunks = []
    Context(engine).run(total, fed.Cohort([1.0, 2.0, 3.0], chunk_size=1), sink=chunks.append)
    assert chunks == []
    Context(engine).run(two_phases, fed.Cohort([1.0, 2.0, 6.0], chunk_size=2), sink=chunks.append)
    assert [list(chunk[""]) for chunk in chunks] == [[-2.0, -1.0], [3.0]]


def test_a_sink_takes_what_a_later_pass_needs_as_well(engine):
    @fed.federated_computation(AT_CLIENTS)
    def kept(values):
        doubled = fed.federated_map(lambda x: x * 2, values)
        mean = fed.federated_broadcast(fed.federated_mean(doubled))
        return doubled, fed.federated_map(lambda x, m: x - m, (doubled, mean))

    chunks = []
    outcome = Context(engine).run(kept, fed.Cohort([1.0, 2.0, 6.0], chunk_size=2), sink=chunks.append)
    assert outcome.value == (None, None)
    found = {path: [] for path in ("0", "1")}
    for chunk in chunks:
        for path, values in chunk.items():
            found[path] += list(values.items())
    assert found["0"] == [("0", 2.0), ("1", 4.0), ("2", 12.0)]
    assert found["1"] == [("0", -4.0), ("1", -2.0), ("2", 6.0)]


def test_nothing_of_a_chunk_that_is_not_finite_goes_to_the_sink(engine):
    taken = []

    @fed.federated_computation(AT_CLIENTS)
    def computation(values):
        return fed.federated_map(lambda x: x, values), fed.federated_mean(values)

    cohort = fed.Cohort([1.0, 2.0, 3.0, float("nan"), 5.0, 6.0], chunk_size=2)
    with pytest.raises(NonFiniteError, match="in client '3', leaf 'value'"):
        Context(engine).run(computation, cohort, on_nonfinite="raise", sink=lambda chunk: taken.append(chunk["0"].ids))
    assert taken == [("0", "1")]


def test_a_weight_that_is_not_finite_is_found(engine):
    mean = fed.federated_computation(lambda x, w: fed.federated_mean(x, w), [AT_CLIENTS, AT_CLIENTS])
    argument = fl.common_libs.structure.Struct([("x", fed.Cohort([1.0, 2.0])), ("w", fed.Cohort([1.0, float("nan")]))])
    with pytest.raises(NonFiniteError, match="in client '1', leaf 'weight'"):
        Context(engine).run(mean, argument, on_nonfinite="raise")
    assert Context(engine).run(mean, argument, on_nonfinite="drop").value == 1.0


@pytest.mark.parametrize("on_nonfinite", ["raise", "drop"])
def test_integers_are_finite(engine, on_nonfinite):
    count = fed.federated_computation(lambda x: fed.federated_sum(x), fed.FederatedType(np.int32, fed.CLIENTS))
    outcome = Context(engine).run(count, fed.Cohort([1, 2, 3], chunk_size=2), on_nonfinite=on_nonfinite)
    assert (outcome.value, outcome.dropped) == (6, ())


def test_several_clients_that_are_not_finite_are_counted(engine):
    cohort = fed.Cohort({"a": 1.0, "b": float("inf"), "c": float("nan"), "d": float("-inf")})
    with pytest.raises(NonFiniteError, match=r"client 'b', leaf 'value', client stage 0"):
        Context(engine).run(total, cohort, on_nonfinite="raise")
    assert Context(engine).run(total, cohort, on_nonfinite="drop").dropped == ("b", "c", "d")


def test_an_unknown_way_with_infinities_is_refused():
    with pytest.raises(ConfigError, match="one of ignore, raise, drop for on_nonfinite, found 'explode'"):
        Context(Debug()).run(total, fed.Cohort([1.0]), on_nonfinite="explode")


def test_a_computation_that_is_gone_leaves_no_programs():
    engine = Local()

    def run_once():
        computation = fed.federated_computation(lambda x: fed.federated_sum(x), AT_CLIENTS)
        Context(engine).run(computation, fed.Cohort([1.0]))
        return weakref.ref(computation)

    gone = run_once()
    gc.collect()
    assert gone() is None
    assert len(engine._programs) == 0


def test_clients_that_are_dealt_to_devices_by_size_keep_their_names(two_devices):
    @fed.federated_computation(fed.FederatedType(fed.SequenceType(np.float32), fed.CLIENTS))
    def totals(data):
        of_clients = fed.federated_map(lambda batches: batches.sum(), data)
        return fed.federated_sum(of_clients), of_clients

    # Largest first to the least loaded device: neither holds a run of the cohort.
    data = {f"c{i}": [1.0] * length for i, length in enumerate([2, 9, 1, 8, 7, 3])}
    data["c3"][5] = float("nan")
    data["c5"][0] = float("inf")
    outcome = Context(two_devices).run(totals, fed.Cohort(data), on_nonfinite="drop")
    assert outcome.dropped == ("c3", "c5")
    assert outcome.value[0] == 2 + 9 + 1 + 7
    assert [value for value in outcome.value[1] if np.isfinite(value)] == [2, 9, 1, 7]
    with pytest.raises(NonFiniteError, match=r"client 'c3', leaf 'value', client stage 0 \(1 more clients too\)"):
        Context(two_devices).run(totals, fed.Cohort(data), on_nonfinite="raise")
