"""The asynchronous context, as users of asyncio expect it: the loop stays free, errors arrive, cancelling works."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import inspect
import threading

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated_language import framework
from federated_language.proto import computation_pb2

import fedlens as fed
from fedlens.errors import CohortError, ConfigError, StructureError, UnsupportedError
from fedlens.runtime import Context, Debug, Local, async_context, current_context

PATIENCE = 60  # seconds until a test that waits for another thread gives up

AT_CLIENTS = fed.FederatedType(np.float32, fed.CLIENTS)
AT_SERVER = fed.FederatedType(np.float32, fed.SERVER)


@fed.federated_computation(AT_CLIENTS)
def total(values):
    return fed.federated_sum(values)


@fed.federated_computation(AT_CLIENTS)
def two_passes(values):
    mean = fed.federated_broadcast(fed.federated_mean(values))
    return fed.federated_map(lambda x, m: x - m, (values, mean)), fed.federated_sum(values)


@fed.federated_computation(AT_SERVER, AT_CLIENTS)
def add_total(start, values):
    return fed.federated_map(lambda a, b: a + b, (start, fed.federated_sum(values)))


def run(main, context):
    with fed.use(context):
        return asyncio.run(main())


class Watched:
    """Another engine, with something done at the beginning of each stage."""

    def __init__(self, engine, before):
        self.engine = engine
        self.before = before
        self.stages = 0

    def run_clients(self, *arguments, **named):
        self.stages += 1
        self.before()
        return self.engine.run_clients(*arguments, **named)

    def run_server(self, *arguments, **named):
        return self.engine.run_server(*arguments, **named)


def wait(event):
    assert event.wait(PATIENCE)


async def others_are_done(context):
    """Returns when no earlier call is in a thread any more: two calls that wait for each other need both threads."""
    barrier = threading.Barrier(2)
    other = async_context(Debug())
    await asyncio.gather(*(other.run(total, [1.0], then=lambda *_: barrier.wait(PATIENCE)) for _ in range(2)))


def test_a_call_is_awaited_and_gives_what_the_other_context_gives(engine):
    cohort = fed.Cohort({"ann": 1.0, "bob": 2.5, "eve": -4.0})

    async def main():
        return await two_passes(cohort)

    with fed.use(engine):
        expected, expected_sum = two_passes(cohort)
    found, found_sum = run(main, async_context(engine))
    assert found.ids == expected.ids == ("ann", "bob", "eve")
    assert [np.asarray(a).tobytes() for a in found] == [np.asarray(b).tobytes() for b in expected]
    assert np.asarray(found_sum).tobytes() == np.asarray(expected_sum).tobytes()


def test_nothing_runs_before_the_call_is_awaited():
    engine = Watched(Debug(), lambda: None)
    with fed.use(async_context(engine)):
        coroutine = total([1.0, 2.0])
    assert inspect.iscoroutine(coroutine)
    assert engine.stages == 0
    assert asyncio.run(coroutine) == 3.0  # the context is the one that was there at the call
    assert engine.stages == 1


def test_the_event_loop_is_free_while_a_call_computes():
    begun, may_end = threading.Event(), threading.Event()

    def before():
        begun.set()
        wait(may_end)  # for ever, if the loop did not go on

    async def main():
        call = asyncio.create_task(total([1.0, 2.0]))
        while not begun.is_set():
            await asyncio.sleep(0)
        assert not call.done()
        may_end.set()
        return await call

    assert run(main, async_context(Watched(Debug(), before))) == 3.0


def test_two_calls_are_under_way_at_a_time():
    second_computes = threading.Event()

    async def main():
        first = async_context(Debug()).run(total, [1.0], then=lambda _, outcome: (wait(second_computes), outcome.value))
        second = async_context(Watched(Debug(), second_computes.set)).run(total, [2.0])
        return await asyncio.gather(first, second)

    (_, first), second = asyncio.run(main())
    assert (first, second.value) == (1.0, 2.0)


def test_many_calls_at_once_on_two_devices_end_and_never_compute_at_the_same_time(two_devices):
    # Each call meets itself on both devices in an all_gather; two that start at once could wait for each other.
    at_once, most = 0, 0

    class Counting(Watched):
        def run_clients(self, *arguments, **named):
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            try:
                return super().run_clients(*arguments, **named)
            finally:
                at_once -= 1

    engine, other = Counting(two_devices, lambda: None), Counting(Local(two_devices.devices), lambda: None)
    results = {}

    def in_another_thread():
        with fed.use(other):
            results.update({number: float(total([1.0, float(number)])) for number in range(20)})

    async def main():
        return await asyncio.gather(*(two_passes([1.0, float(number)]) for number in range(40)))

    thread = threading.Thread(target=in_another_thread)
    thread.start()
    found = run(main, async_context(engine))
    thread.join()
    assert [float(sum_) for _, sum_ in found] == [1.0 + number for number in range(40)]
    assert results == {number: 1.0 + number for number in range(20)}
    assert most == 1


def test_a_stage_is_over_when_its_call_returns(two_devices):
    # What were still under way could meet the next call's all_gather on one device before its own on the other.
    def slow(x):
        return jax.lax.fori_loop(0, 300, lambda _, y: jnp.tanh(y @ x), x)

    @fed.federated_computation(fed.FederatedType(fed.TensorType(np.float32, (100, 100)), fed.CLIENTS))
    def computation(values):
        return fed.federated_sum(fed.federated_map(slow, values))

    cohort = fed.Cohort([np.eye(100, dtype=np.float32)] * 4)
    with fed.use(two_devices):
        assert [computation(cohort).is_ready() for _ in range(3)] == [True] * 3


def test_errors_arrive_where_the_call_is_awaited_and_the_context_goes_on():
    async def main():
        found = await asyncio.gather(
            total(fed.Cohort({"ann": 1.0, "bob": np.zeros(3, np.float32)})), total([1.0]), return_exceptions=True
        )
        return found, await total([2.0])

    (error, one), two = run(main, async_context())
    assert isinstance(error, CohortError)
    assert "client 'bob'" in str(error)
    assert (one, two) == (1.0, 2.0)


def test_an_error_in_user_code_keeps_its_place_and_its_traceback():
    def positive(x):
        if "Tracer" not in type(x).__name__ and x < 0:
            raise ZeroDivisionError("negative")
        return x

    computation = fed.federated_computation(lambda values: fed.federated_map(positive, values), AT_CLIENTS)

    async def main():
        await computation(fed.Cohort({"ann": 1.0, "bob": -1.0}))

    with pytest.raises(ZeroDivisionError, match="negative") as error:
        run(main, async_context("debug"))
    assert "in client 'bob'" in error.value.__notes__[0]
    assert error.traceback[-1].name == "positive"


def test_a_stop_iteration_does_not_hang_the_caller():
    def stop():
        raise StopIteration

    async def main():
        await total([1.0])

    with pytest.raises(RuntimeError, match="StopIteration"):
        run(main, async_context(Watched(Debug(), stop)))


def test_a_cancelled_call_ends_at_once_and_stops_before_its_next_stage():
    begun, may_end = threading.Event(), threading.Event()
    taken = []

    def before():
        begun.set()
        wait(may_end)

    engine = Watched(Debug(), before)
    context = async_context(engine)

    async def main():
        call = asyncio.create_task(context.run(two_passes, [1.0, 2.0], then=lambda *given: taken.append(given)))
        while not begun.is_set():
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call  # although the stage still computes
        assert not may_end.is_set()
        may_end.set()
        await others_are_done(context)

    asyncio.run(main())
    assert engine.stages == 1  # of two
    assert taken == []


def test_a_cancelled_call_that_waits_for_a_thread_never_starts():
    begun, may_end = threading.Barrier(3), threading.Event()
    busy, engine = async_context(Debug()), Watched(Debug(), lambda: None)

    async def main():
        hold = [
            asyncio.create_task(busy.run(total, [1.0], then=lambda *_: (begun.wait(PATIENCE), wait(may_end))))
            for _ in range(2)
        ]
        await asyncio.to_thread(begun.wait, PATIENCE)
        waiting = asyncio.create_task(total([1.0]))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        may_end.set()
        await asyncio.gather(*hold)
        await others_are_done(busy)

    run(main, async_context(engine))
    assert engine.stages == 0


def test_calls_nest_without_awaiting_each():
    async def main():
        return await add_total(total([1.0, 2.0]), [10.0]), await add_total(start=5.0, values=[1.0])

    assert run(main, async_context()) == (13.0, 6.0)


def test_what_is_to_be_awaited_is_found_in_every_container():
    @dataclasses.dataclass
    class Pair:
        left: object
        right: object

    number = fl.TensorType(np.float32)
    pair_type = fl.StructWithPythonType([("left", number), ("right", fl.StructWithPythonType([number], list))], Pair)

    @fed.federated_computation(fed.FederatedType(pair_type, fed.SERVER))
    def difference(pair):
        return fed.federated_map(lambda pair: pair.left - pair.right[0], pair)

    async def main():
        return await difference(Pair(total([5.0]), [total([1.0, 2.0])]))

    assert run(main, async_context()) == 2.0


def test_user_code_sees_the_callers_context_variables_and_computes_at_once():
    request = contextvars.ContextVar("request")
    seen = []

    def look(*_):
        seen.append((request.get(), float(total([1.0, 2.0])), type(current_context().engine)))

    async def main():
        request.set("a")
        await async_context("debug").run(total, [0.0], then=look)

    run(main, async_context())
    assert seen == [("a", 3.0, Debug)]


def test_it_may_be_the_default_of_a_thread():
    found = []

    def work():
        framework.set_default_context(fed.async_context("debug"))
        found.append(asyncio.run(main()))

    async def main():
        return await total([1.0, 2.0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [3.0]
    assert isinstance(current_context(), Context)  # this thread's is its own


def test_an_unknown_engine_is_refused():
    with pytest.raises(ConfigError, match="one of the engines debug, local, found 'spark'"):
        fed.async_context("spark")


def test_what_waits_for_its_results_says_so():
    data = fed.data.FederatedData.from_arrays({"x": np.zeros((2, 1), np.float32)}, clients=["a", "b"])
    with fed.use(async_context()), pytest.raises(UnsupportedError, match=r"waits for its results, found AsyncContext"):
        current_context()
    assert data.num_clients == 2


@pytest.mark.parametrize("argument", [[1.0], (2.0,)])
def test_a_coroutine_is_no_argument_of_a_context_that_waits(argument):
    with fed.use(async_context()):
        coroutine = total(list(argument))
    with pytest.raises(UnsupportedError, match="found a coroutine or a program's reference"):
        add_total(coroutine, [1.0])
    coroutine.close()
    with pytest.raises(StructureError, match="found str"):  # other wrong arguments are called what they are
        add_total("1", [1.0])


def test_only_computations_of_the_language_run():
    class Other:
        type_signature = total.type_signature

    with pytest.raises(UnsupportedError, match="a computation of federated_language, found Other"):
        asyncio.run(async_context().invoke(Other(), [1.0]))


def test_a_local_computation_of_another_runtime_is_refused_when_awaited():
    number = fl.TensorType(np.float32)
    proto = computation_pb2.Computation(type=fl.FunctionType(number, number).to_proto())
    proto.xla.hlo_module.type_url = "type.example.com/other"
    foreign = framework.ConcreteComputation.from_proto(proto)
    computation = fed.federated_computation(lambda values: fl.federated_map(foreign, values), AT_CLIENTS)

    async def main():
        await computation([1.0])

    with pytest.raises(UnsupportedError, match="made by fedlens"):
        run(main, async_context())
