"""Federated programs: the language's own platform and release managers on fedlens, and what goes to a sink instead."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from typing import Any, NamedTuple

import federated_language as fl
import numpy as np
import pytest
from absl import logging
from federated_language import framework

import fedlens as fed
from fedlens.errors import CohortError, ConfigError, NonFiniteError, UnsupportedError
from fedlens.runtime import Debug, async_context, current_context, program_context

PATIENCE = 60  # seconds until a test that waits for another thread gives up

NUMBER = fl.TensorType(np.float32)
AT_CLIENTS = fed.FederatedType(np.float32, fed.CLIENTS)
AT_SERVER = fed.FederatedType(np.float32, fed.SERVER)


class Spread(NamedTuple):
    low: Any
    high: Any


@dataclasses.dataclass(frozen=True)
class State:
    model: Any
    optimizer: Any  # a tuple that holds an empty NamedTuple, as optax has them
    round: Any


class Nothing(NamedTuple):
    pass


@fed.federated_computation(AT_CLIENTS)
def measure(values):
    mean = fed.federated_mean(values)
    return {"mean": mean, "spread": fed.federated_map(lambda m: Spread(m - 1, m + 1), mean)}


@fed.federated_computation(AT_CLIENTS)
def double(values):
    return fed.federated_map(lambda x: 2 * x, values)


@fed.federated_computation
def initialize():
    def zero():
        return State({"w": np.zeros(2, np.float32)}, (Nothing(),), np.int32(0))

    return fed.federated_eval(fed.jax_computation(zero), fed.SERVER)


@fed.federated_computation(
    initialize.type_signature.result, fed.FederatedType(fl.TensorType(np.float32, (2,)), fed.CLIENTS)
)
def advance(state, values):
    local = fed.federated_map(lambda w, x: w + x, (fed.federated_broadcast(state.model.w), values))

    def new(state, mean):
        return State({"w": mean}, state.optimizer, state.round + 1)

    return fed.federated_map(new, (state, fed.federated_mean(local))), {"local": local}


def run(program, context):
    with fed.use(context):
        return asyncio.run(program())


def native(engine="local"):
    return fl.program.NativeFederatedContext(async_context(engine))


@pytest.mark.parametrize("make", [native, program_context], ids=["native", "fedlens"])
@pytest.mark.parametrize("engine", ["debug", "local"])
class TestEveryPlatform:
    def test_a_call_gives_references_in_the_containers_of_the_result(self, make, engine):
        async def program():
            result = measure([1.0, 2.0, 6.0])
            assert set(result) == {"mean", "spread"}
            assert type(result["spread"]) is Spread
            references = [result["mean"], *result["spread"]]
            assert all(isinstance(each, fl.program.MaterializableValueReference) for each in references)
            assert {each.type_signature for each in references} == {NUMBER}
            return await fl.program.materialize_value(result)

        assert run(program, make(engine)) == {"mean": 3.0, "spread": Spread(2.0, 4.0)}

    def test_references_are_arguments_of_further_calls(self, make, engine):
        add = fed.federated_computation(lambda a, b: fed.federated_map(lambda x, y: x + y, (a, b)), [AT_SERVER] * 2)

        async def program():
            first = measure([1.0, 3.0])
            return await add(add(first["mean"], first["spread"].high), 10.0).get_value()

        assert run(program, make(engine)) == 2.0 + 3.0 + 10.0

    def test_the_release_managers_of_the_language_release(self, make, engine, monkeypatch):
        logged = []
        monkeypatch.setattr(logging, "info", lambda text, *values: logged.append(text % values))
        memory, filtered, periodic, delayed = (fl.program.MemoryReleaseManager() for _ in range(4))
        manager = fl.program.GroupingReleaseManager(
            [
                memory,
                fl.program.FilteringReleaseManager(filtered, lambda path: path == ("mean",)),
                fl.program.PeriodicReleaseManager(periodic, 2),
                fl.program.DelayedReleaseManager(delayed, 3),
                fl.program.LoggingReleaseManager(),
            ]
        )

        async def program():
            fl.program.check_in_federated_context()
            for number in range(4):
                await manager.release(measure([float(number), float(number + 2)]), number)

        run(program, make(engine))
        expected = {number: {"mean": number + 1, "spread": Spread(number, number + 2)} for number in range(4)}
        assert memory.values() == expected
        assert filtered.values() == {number: {"mean": number + 1} for number in range(4)}
        assert periodic.values() == {number: expected[number] for number in (1, 3)}
        assert delayed.values() == {number: expected[number] for number in (2, 3)}
        assert logged.count("Releasing") == 4
        assert "  key: 3" in logged

    def test_an_error_arrives_where_a_reference_is_read(self, make, engine):
        async def program():
            result = measure(fed.Cohort({"ann": 1.0, "bob": np.zeros(3, np.float32)}))
            for reference in [result["mean"], *result["spread"]]:
                with pytest.raises(CohortError, match="client 'bob'"):
                    await reference.get_value()
            return await measure([4.0])["mean"].get_value()

        assert run(program, make(engine)) == 4.0

    def test_clients_values_are_kept_from_a_program(self, make, engine):
        async def program():
            double([1.0])

        with pytest.raises(ValueError, match=r"Expected .*result.*\{float32\}@CLIENTS"):
            run(program, make(engine))


def test_a_released_value_is_numpys():
    async def program():
        state, _ = advance(initialize(), [np.ones(2, np.float32)])
        return await state["model"]["w"].get_value(), await state["round"].get_value()

    array, number = run(program, program_context(sink=lambda call: None))
    assert type(array) is np.ndarray
    assert type(number) is np.int32


def test_dataclasses_become_what_the_program_library_reads():
    async def program():
        initial = initialize()
        state, locals_ = advance(initial, [np.ones(2, np.float32), np.full(2, 3, np.float32)])
        assert locals_ == {"local": None}
        assert [type(each) for each in (state, state["optimizer"], state["optimizer"][0])] == [dict, tuple, Nothing]
        state, _ = advance(state, [np.full(2, 5, np.float32)])
        return await fl.program.materialize_value([initial, state])

    initial, state = run(program, program_context(sink=lambda call: None))
    np.testing.assert_array_equal(initial["model"]["w"], [0, 0])
    np.testing.assert_array_equal(state["model"]["w"], [7, 7])  # the mean of 1 and 3, and 5
    assert (state["optimizer"], initial["round"], state["round"]) == ((Nothing(),), 0, 2)


def test_a_sink_gets_the_clients_values_with_the_call_they_are_from():
    calls = []
    cohort = fed.Cohort({"ann": np.ones(2, np.float32), "bob": np.full(2, 3, np.float32)})

    async def program():
        state = initialize()
        for _ in range(2):
            state, _ = advance(state, cohort)
        await state["round"].get_value()
        assert len(calls) == 2  # the sink had them before the program had the result

    run(program, program_context(sink=calls.append))
    assert [call.computation for call in calls] == [advance, advance]  # and not initialize
    for number, call in enumerate(calls):
        before, values = call.arguments
        after, locals_ = call.result
        assert values is cohort
        assert (int(before["round"]), int(after["round"])) == (number, number + 1)
        np.testing.assert_array_equal(locals_["local"]["bob"], np.asarray(before["model"]["w"]) + 3)
        np.testing.assert_array_equal(locals_["local"].stacked.mean(axis=0), after["model"]["w"])
        assert call.dropped == ()


def test_a_result_of_clients_values_alone_goes_to_the_sink_whole():
    calls, done = [], threading.Event()

    def sink(call):
        calls.append(call)
        done.set()

    async def program():
        assert double(fed.Cohort({"ann": 1.0, "bob": 4.0})) is None
        assert await asyncio.to_thread(done.wait, PATIENCE)

    run(program, program_context(sink=sink))
    assert list(calls[0].result.items()) == [("ann", 2.0), ("bob", 8.0)]


def test_a_sink_takes_one_call_at_a_time():
    both_computed, inside, seen = threading.Event(), [], set()

    class Counting(Debug):
        servers = 0

        def run_server(self, *arguments):
            result = super().run_server(*arguments)
            self.servers += 1
            if self.servers == 3:  # that of `initialize`, and the last stage of each call
                both_computed.set()
            return result

    def sink(call):
        inside.append(call)
        assert both_computed.wait(PATIENCE)
        seen.update(len(inside) for _ in range(2_000_000))  # long enough for the other call to come in, if it could
        inside.remove(call)

    async def program():
        start = await fl.program.materialize_value(initialize())
        states = [advance(start, [np.full(2, number, np.float32)])[0] for number in range(2)]
        return await fl.program.materialize_value([state["model"]["w"] for state in states])

    found = run(program, program_context(Counting(), sink=sink))
    np.testing.assert_array_equal(found, [[0, 0], [1, 1]])
    assert seen == {1}


def test_what_a_sink_raises_the_program_meets():
    def full(call):
        raise OSError("disk full")

    async def program():
        state, _ = advance(initialize(), [np.ones(2, np.float32)])
        await state["round"].get_value()

    with pytest.raises(OSError, match="disk full"):
        run(program, program_context(sink=full))


def test_who_no_longer_waits_for_one_value_leaves_the_others_their_call():
    may_end = threading.Event()

    async def program():
        state, _ = advance(initialize(), [np.ones(2, np.float32)])
        impatient = asyncio.create_task(state["round"].get_value())
        await asyncio.sleep(0)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        may_end.set()
        return await state["model"]["w"].get_value()

    def sink(call):
        assert may_end.wait(PATIENCE)

    np.testing.assert_array_equal(run(program, program_context(sink=sink)), [1, 1])


def test_infinities_are_the_contexts_affair():
    cohort = fed.Cohort({"ann": np.ones(2, np.float32), "bob": np.full(2, np.inf, np.float32)})
    calls = []

    async def program():
        state, _ = advance(initialize(), cohort)
        return await state["model"]["w"].get_value()

    with pytest.raises(NonFiniteError, match="client 'bob'"):
        run(program, program_context(sink=calls.append, on_nonfinite="raise"))
    assert calls == []
    np.testing.assert_array_equal(run(program, program_context(sink=calls.append, on_nonfinite="drop")), [1, 1])
    assert calls[0].dropped == ("bob",)
    with pytest.raises(ConfigError, match="one of ignore, raise, drop for on_nonfinite, found 'explode'"):
        program_context(on_nonfinite="explode")


def test_a_call_outside_of_a_running_program_is_refused():
    with fed.use(program_context()), pytest.raises(UnsupportedError, match="found no running event loop"):
        measure([1.0])


def test_a_function_is_no_result_of_a_program():
    identity = framework.Lambda("x", NUMBER, framework.Reference("x", NUMBER))
    computation = framework.ConcreteComputation.from_building_block(framework.Lambda(None, None, identity))

    async def program():
        computation()

    with pytest.raises(ConfigError, match="found a function"):
        run(program, program_context())


def test_a_program_in_the_usual_context_is_told_so():
    async def references():
        return initialize()

    state = run(references, program_context())
    with pytest.raises(ValueError, match=r"FederatedContext.*found .*Context"):
        fl.program.check_in_federated_context()
    with pytest.raises(UnsupportedError, match=r"a program's reference, in a context that waits.*program_context"):
        advance(state, [np.ones(2, np.float32)])
    with (
        fed.use(program_context()),
        pytest.raises(UnsupportedError, match="waits for its results, found ProgramContext"),
    ):
        current_context()
