"""The asynchronous context: a call of a computation is a coroutine, and the event loop stays free while it computes.

A call runs in a thread of fedlens's own. Two calls are under way at a time: while one computes, the next converts its
arguments and results; further ones wait in order. What computes is one stage at a time, see `fedlens.runtime.context`.
Threads of asyncio's default executor would do as well, until calls that wait for the devices held them all and whatever
else the program gave to `asyncio.to_thread` had to wait too.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import federated_language as fl
from federated_language import framework
from federated_language.common_libs import structure

from fedlens import trees
from fedlens.errors import UnsupportedError
from fedlens.language.types import argument_fields
from fedlens.runtime.context import Context, Outcome, engine_of, is_asynchronous
from fedlens.runtime.engine import Engine, OnNonFinite
from fedlens.runtime.minimum import checked_min_clients

_CALLS_UNDER_WAY = 2

T = TypeVar("T")


class AsyncContext(framework.AsyncContext):
    """Runs computations on one engine; a call returns a coroutine.

    Attributes:
      engine: what executes the stages.
      min_clients: how many clients an aggregate has to be over, see `use`.
    """

    def __init__(self, engine: Engine, min_clients: int = 1):
        """Takes the engine that executes the stages, and how many clients an aggregate has to be over."""
        self.engine = engine
        self.min_clients = checked_min_clients(min_clients)

    async def invoke(self, comp: framework.ConcreteComputation, arg: Any) -> Any:
        """Runs `comp` on `arg`; called by the language when a computation is called."""
        return (await self.run(comp, arg)).value

    async def run(
        self,
        computation: framework.ConcreteComputation,
        argument: Any,
        *,
        on_nonfinite: OnNonFinite = "ignore",
        then: Callable[[Any, Outcome], T] | None = None,
    ) -> Any:
        """Runs a computation without blocking the event loop.

        Cancelling ends the wait at once. A call that waits for a thread never starts; one that computes ends before
        its next stage, as XLA cannot be interrupted, and what it gave is forgotten.

        Args:
          computation: what to run.
          argument: its argument, as the language hands it over. Coroutines and references of a program in it are
            awaited, so that calls nest: `await round(initialize(), cohort)`.
          on_nonfinite: what to do with a client that sends infinities or NaNs into a reduction.
          then: turns the argument, whose parts have been awaited, and the outcome into what is returned, in the same
            thread; not called once the call is cancelled.

        Returns:
          The `Outcome`, or what `then` made of it.

        Raises:
          UnsupportedError: `computation` is none of `federated_language`.
          FedlensError: whatever `Context.run` raises.
        """
        if not isinstance(computation, framework.ConcreteComputation):
            raise UnsupportedError(
                f"Expected a computation of federated_language, found {type(computation).__name__}. "
                "Build it with fed.federated_computation or fed.jax_computation."
            )
        arrived = await awaited(argument)
        cancelled = threading.Event()

        def work() -> Any:
            context = Context(self.engine, self.min_clients)
            try:
                # What user code calls in this thread runs on the same engine, and at once.
                with framework.get_context_stack().install(context):
                    outcome = context.run(computation, arrived, on_nonfinite=on_nonfinite, cancelled=cancelled)
                    return outcome if then is None or cancelled.is_set() else then(arrived, outcome)
            except StopIteration as error:  # a future refuses it, and the caller would wait for ever
                raise RuntimeError("Expected a computation that returns, found a StopIteration.") from error

        try:
            return await asyncio.wrap_future(_threads().submit(contextvars.copy_context().run, work))
        except asyncio.CancelledError:
            cancelled.set()
            raise


def async_context(engine: str | Engine = "local", *, min_clients: int = 1) -> AsyncContext:
    """A context in which a call of a computation is a coroutine.

    Example:
      >>> async def main():
      ...     return await asyncio.gather(computation(cohort), computation(other_cohort))
      >>> with fed.use(fed.async_context()):
      ...     results = asyncio.run(main())

    Args:
      engine: "local", "debug", or an engine.
      min_clients: how many clients an aggregate has to be over, see `use`.

    Raises:
      ConfigError: there is no engine of that name, or `min_clients` is below 1.
    """
    return AsyncContext(engine_of(engine), min_clients)


async def awaited(argument: Any) -> Any:
    """An argument with what is still to come in it, coroutines and a program's references, replaced by the values."""
    if isinstance(argument, Awaitable):
        return await argument
    if isinstance(argument, fl.program.MaterializableValueReference):
        return await argument.get_value()
    if not is_asynchronous(argument):
        return argument
    fields = argument_fields(argument) or []
    values = await asyncio.gather(*(awaited(child) for _, child in fields))
    pairs = [(name, value) for (name, _), value in zip(fields, values, strict=True)]
    return structure.Struct(pairs) if isinstance(argument, structure.Struct) else trees.build(type(argument), pairs)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_CALLS_UNDER_WAY, "fedlens-call")
