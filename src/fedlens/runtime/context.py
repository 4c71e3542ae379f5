"""The context: where the call of a computation becomes a run of its plan.

`federated_language` leaves the execution of a computation to the context at the top of a thread-local stack. fedlens's
own context is what runs when no other was set, in every thread; `use` puts another engine in place for a while.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import federated_language as fl
import jax
import numpy as np
from federated_language import framework

from fedlens import trees
from fedlens.compiler import ClientStage, Plan, ServerStage, segments
from fedlens.errors import CohortError, ConfigError, StructureError, UnsupportedError
from fedlens.language.types import argument_fields
from fedlens.runtime import stage_log
from fedlens.runtime.arguments import as_cohort, column_of, join, part_of, server_value
from fedlens.runtime.columns import Column, TensorColumn
from fedlens.runtime.debug import Debug
from fedlens.runtime.engine import Engine, OnNonFinite, StageCohort, check_on_nonfinite
from fedlens.runtime.interpreter import eager, evaluate
from fedlens.runtime.local import Local
from fedlens.runtime.minimum import checked_min_clients, refuse_few
from fedlens.runtime.plans import plan_of
from fedlens.runtime.results import client_results, handed_out
from fedlens.runtime.sequences import client_values
from fedlens.runtime.values import ClientValues, Part

ENGINES: dict[str, Callable[[], Engine]] = {"debug": Debug, "local": Local}

# Takes the clients-placed parts of a result chunk by chunk: path in the result -> the values of the chunk's clients.
ResultSink = Callable[[Mapping[str, ClientValues]], None]

# One stage computes at a time, whichever thread or context asks for it, and its clients are done when another begins.
# A program on several devices meets itself in an all_gather; with two under way, XLA:CPU's threads may take up one for
# device 0 and the other for device 1, and each waits for the other for ever (JAX 0.10.2 did; JAX 0.12 did not). All
# engines share the devices, and this lock. Reentrant: a user's function may call a computation while it is traced.
_computing = threading.RLock()


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
      value: the result, in the containers of its type; None in place of what went to a sink.
      dropped: the clients that were left out of a reduction because their values were not finite.
    """

    value: Any
    dropped: tuple[str, ...]


class Context(framework.SyncContext):
    """Runs computations on one engine."""

    def __init__(self, engine: Engine, min_clients: int = 1):
        """Takes the engine that executes the stages, and how many clients an aggregate has to be over."""
        self.engine = engine
        self.min_clients = checked_min_clients(min_clients)

    def invoke(self, comp: framework.ConcreteComputation, arg: Any) -> Any:
        """Runs `comp` on `arg`; called by the language when a computation is called."""
        try:
            return self.run(comp, arg).value
        except (StructureError, CohortError) as error:
            if is_asynchronous(arg):
                raise UnsupportedError(
                    "Expected values as arguments, found a coroutine or a program's reference, in a context that waits "
                    "for its results. Await the argument first, or run the caller in fed.use(fed.async_context()) or "
                    "fed.use(fed.program_context())."
                ) from error
            raise

    def run(
        self,
        computation: framework.ConcreteComputation,
        argument: Any,
        *,
        on_nonfinite: OnNonFinite = "ignore",
        sink: ResultSink | None = None,
        cancelled: threading.Event | None = None,
    ) -> Outcome:
        """Runs a computation.

        Args:
          computation: what to run.
          argument: its argument, as the language hands it over: raw if there is one, a struct of several, or None.
          on_nonfinite: what to do with a client that sends infinities or NaNs into a reduction.
          sink: takes the clients-placed parts of the result, chunk by chunk, instead of holding them in memory.
          cancelled: set by another thread to end the run before its next stage.

        Raises:
          CohortError: the cohorts of the call do not fit together, or a client's value is not of its type.
          StructureError: a server value is not of its type.
          NonFiniteError: see `on_nonfinite`.
          DisclosureError: an aggregate is over fewer clients than the context's `min_clients`.
          ConfigError: `on_nonfinite` is none of its values.
          UnsupportedError: the computation needs something that fedlens does not execute.
          CancelledError: `cancelled` was set.
        """
        check_on_nonfinite(on_nonfinite)
        run = _Run(self, plan_of(computation), computation.type_signature, on_nonfinite, sink)
        return run(argument, cancelled)


class _Run:
    """One run of a plan: what is known so far under the names of its inputs and steps."""

    def __init__(
        self, context: Context, of: Plan, type_: fl.FunctionType, on_nonfinite: OnNonFinite, sink: ResultSink | None
    ):
        self._engine = context.engine
        self._min_clients = context.min_clients
        self._plan = of
        self._parameter_type = type_.parameter
        self._result_type = type_.result
        self._on_nonfinite = on_nonfinite
        self._sink = sink
        self._ids: tuple[str, ...] = ()
        self._chunk_size: int | None = None
        self._server: dict[str, Any] = {}
        self._columns: dict[str, Column] = {}
        self._outputs: dict[str, ClientValues] = {}
        self._dropped: set[int] = set()

    def __call__(self, argument: Any, cancelled: threading.Event | None) -> Outcome:
        with stage_log.timed("arguments", lambda: {"clients": len(self._ids)}), stage_log.phase("packing"):
            self._bind(argument)
        stages = self._plan.stages
        self._refuse_few(*stages)
        started: dict[str, Any] | None = None  # what a server stage gives that is under way already
        outcome: Outcome | None = None
        for number, stage in enumerate(stages):
            with _computing:
                if cancelled is not None and cancelled.is_set():
                    raise CancelledError
                with stage_log.timed_stage(stage, stages, self._engine, self._cohort):
                    if isinstance(stage, ServerStage):
                        self._server |= self._engine.run_server(stage, self._server) if started is None else started
                        started = None
                    else:
                        confirm = self._run_clients(stage, stages[number + 1 :])
                        if confirm is not None:
                            # The server's program may wait for the devices while what clients sent is checked.
                            following = next(iter(stages[number + 1 :]), None)
                            if isinstance(following, ServerStage) and not (segments(following) or stage_log.is_on()):
                                started = self._engine.run_server(following, self._server)
                                # What a sink takes is in no result.
                                if following is stages[-1] and (self._sink is not None or not stage.outputs):
                                    self._server |= started
                                    outcome = self._outcome()
                            confirm()
                        jax.block_until_ready(self._server)
                    stage_log.wait(self._server)
        return self._outcome() if outcome is None else outcome

    def _outcome(self) -> Outcome:
        """The result in its containers; its arrays may be under way still."""
        value = self._result(self._plan.result, self._result_type)
        return Outcome(value, tuple(self._ids[position] for position in sorted(self._dropped)))

    def _bind(self, argument: Any) -> None:
        cohorts = {}
        for each in self._plan.inputs:
            value = part_of(argument, self._parameter_type, each)
            if each.at_clients:
                cohorts[each.name] = as_cohort(value, each.name)
            else:
                member = each.type.member if isinstance(each.type, fl.FederatedType) else each.type
                self._server[each.name] = server_value(value, member, each.name)
        if cohorts:
            self._ids, self._chunk_size, order = join(cohorts)
            types = {each.name: each.type.member for each in self._plan.inputs if each.at_clients}
            self._columns = {name: column_of(cohort, types[name], order[name]) for name, cohort in cohorts.items()}

    def _run_clients(
        self, stage: ClientStage, later: tuple[ServerStage | ClientStage, ...]
    ) -> Callable[[], None] | None:
        if not self._ids:
            raise CohortError(
                "Expected a clients-placed argument, which says who takes part, found a computation without one. Add a "
                "parameter of type fed.FederatedType(..., fed.CLIENTS), and call the computation with a fed.Cohort."
            )
        needed_later = {name for other in later if isinstance(other, ClientStage) for name in other.columns}
        streamed = self._sink is not None and not needed_later.intersection(stage.outputs)
        types = dict(zip(stage.outputs, stage.output_types, strict=True))
        handed_out = [
            result for result in client_results(self._plan.result, self._result_type) if result[1] in stage.outputs
        ]
        done = 0

        def forward(parts: Mapping[str, list[Part]]) -> None:
            nonlocal done
            count = sum(len(part.positions) for part in next(iter(parts.values()), []))
            ids, start = self._ids[done : done + count], done
            done += count
            if self._sink is not None and handed_out:
                with stage_log.phase("writing"):
                    self._sink(
                        {
                            path: client_values(
                                ids, member, [Part(part.positions - start, part.leaves) for part in parts[name]]
                            )
                            for path, name, member in handed_out
                        }
                    )

        result = self._engine.run_clients(
            stage,
            {name: self._server[name] for name in stage.shared},
            self._cohort(stage),
            forward if streamed else None,
            self._on_nonfinite,
        )
        self._refuse_few(stage, dropped=len(result.dropped))
        self._dropped.update(int(position) for position in result.dropped)
        self._server |= result.reductions

        def take_outputs() -> None:
            if result.confirm is not None:
                result.confirm()
            for name, parts in result.outputs.items():
                values = self._outputs[name] = ClientValues(self._ids, types[name], parts)
                if name in needed_later:
                    self._columns[name] = TensorColumn(types[name], tuple(values.stacked_leaves()), len(self._ids))
            if self._sink is not None and not streamed:
                forward(result.outputs)

        if result.confirm is not None:
            return take_outputs
        take_outputs()
        return None

    def _refuse_few(self, *stages: ServerStage | ClientStage, dropped: int = 0) -> None:
        refuse_few(self._plan, stages, self._result_type, len(self._ids), dropped, self._min_clients)

    def _cohort(self, stage: ClientStage) -> StageCohort:
        return StageCohort(self._ids, {name: self._columns[name] for name in stage.columns}, self._chunk_size)

    def _result(self, block: Any, type_: fl.Type) -> Any:
        if isinstance(type_, fl.FederatedType):
            name = block.name
            if self._plan.placements[name] == "clients":
                return self._client_values(name, type_.member)
            return handed_out(self._server[name], type_.member)
        if isinstance(type_, fl.StructType) and isinstance(block, framework.Struct):
            fields = zip(type_.items(), block.items(), strict=True)
            return trees.build(
                type_.python_container, [(name, self._result(child, field)) for (name, field), (_, child) in fields]
            )
        if isinstance(type_, fl.FunctionType):
            raise UnsupportedError(f"Expected a result that is a value, found a function of type {type_}.")
        return handed_out(evaluate(block, self._server, eager), type_)

    def _client_values(self, name: str, member: fl.Type) -> ClientValues | None:
        if name in self._outputs:
            values = self._outputs[name]
            return client_values(values.ids, member, values.parts) if self._sink is None else None
        if name not in self._columns:  # its stage streamed it
            return None
        column = self._columns[name]
        if not isinstance(column, TensorColumn):
            raise UnsupportedError(
                f"Expected a result made of tensors of known shape, found {member}: clients' data is not handed back."
            )
        return ClientValues(self._ids, member, [Part(np.arange(len(self._ids)), column.leaves)])


def is_asynchronous(argument: Any) -> bool:
    """Whether something in an argument is still to be awaited."""
    fields = argument_fields(argument)
    if fields is not None:
        return any(is_asynchronous(child) for _, child in fields)
    return isinstance(argument, Awaitable | fl.program.MaterializableValueReference)


_lock = threading.Lock()


@cache
def _engine(name: str) -> Engine:
    """One engine for each name: it holds the compiled programs."""
    return ENGINES[name]()


@cache
def _default_context() -> Context:
    return Context(_engine("local"))


def current_context() -> Context:
    """The context that runs computations in this thread: the one set with `use`, or fedlens's default.

    Raises:
      UnsupportedError: another package's context is in place, or one whose results are awaited.
    """
    context = framework.get_context_stack().current
    if isinstance(context, Context):
        return context
    if isinstance(context, framework.RuntimeErrorContext):
        with _lock:
            return _default_context()
    if isinstance(context, framework.AsyncContext | fl.program.FederatedContext):
        raise UnsupportedError(
            f"Expected a context that waits for its results, found {type(context).__name__}. Call the computations "
            "themselves (process.next_computation) and await what they return, or wrap the call in fed.use('local')."
        )
    raise UnsupportedError(
        f"Expected a context of fedlens, found {type(context).__name__}. Wrap the call in fed.use('local')."
    )


def engine_of(engine: str | Engine) -> Engine:
    """The engine of that name, one for each name; an engine is returned as it is.

    Raises:
      ConfigError: there is no engine of that name.
    """
    if not isinstance(engine, str):
        return engine
    if engine not in ENGINES:
        raise ConfigError(f"Expected one of the engines {', '.join(ENGINES)}, found {engine!r}.")
    with _lock:
        return _engine(engine)


@contextmanager
def use(
    engine: str | Engine | framework.SyncContext | framework.AsyncContext = "local", *, min_clients: int | None = None
) -> Iterator[Any]:
    """Runs the computations that are called inside on another engine, or in another context, in this thread.

    Example:
      >>> with fed.use("debug"):
      ...     result = computation(cohort)  # prints and breakpoints in client code see values
      >>> with fed.use(fed.async_context()):
      ...     result = asyncio.run(main())  # in main: await computation(cohort)

    The language's stack of contexts belongs to the thread, not to a task: put `use` around `asyncio.run`, not around
    an `await`, where another task could find it.

    Args:
      engine: "local", "debug", an engine; or a context, such as `fed.async_context()` or `fed.program_context()`.
      min_clients: how many clients an aggregate has to be over, those left out as not finite not counted; an aggregate
        over fewer, and whatever derives from it, is refused with a `DisclosureError`. 1 if not given.

    Raises:
      ConfigError: there is no engine of that name; `min_clients` is below 1, or given with a context.
    """
    is_context = isinstance(engine, framework.SyncContext | framework.AsyncContext)
    if is_context and min_clients is not None:
        raise ConfigError("Expected min_clients with an engine, found it with a context. Give it to the context.")
    context = engine if is_context else Context(engine_of(engine), 1 if min_clients is None else min_clients)
    with framework.get_context_stack().install(context):
        yield context


def become_default() -> None:
    """Makes fedlens's context the one that runs where no other was set.

    The language's context stack is thread-local, so setting a default would serve one thread only. All threads start
    with one and the same context object that refuses to run anything; that object is taught to run things.
    """
    found: list[Any] = []
    fresh = threading.Thread(target=lambda: found.append(framework.get_context_stack().current))
    fresh.start()
    fresh.join()
    if isinstance(found[0], framework.RuntimeErrorContext):
        found[0].invoke = lambda comp, arg: current_context().invoke(comp, arg)
