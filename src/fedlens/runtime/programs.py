"""The context of a federated program: a call returns references at once, and what clients hand out goes to a sink.

`federated_language.program` describes program logic: a coroutine that calls computations, passes what they return on to
the next ones, and releases it. It sees references instead of values, and nothing that is placed at the clients. The
language's own `NativeFederatedContext` does that over any asynchronous context, fedlens's included, and refuses
computations that return clients-placed values. This one runs them: the program gets None in such a place, and a sink
outside of the program gets the values together with the call that they are from, to store local models in a ledger.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import federated_language as fl
import numpy as np
from federated_language import framework
from federated_language.common_libs import structure

from fedlens import trees
from fedlens.errors import ConfigError, UnsupportedError
from fedlens.runtime.asynchronous import AsyncContext
from fedlens.runtime.context import Outcome, engine_of
from fedlens.runtime.engine import Engine, OnNonFinite, check_on_nonfinite


@dataclass(frozen=True)
class ProgramCall:
    """One call of a computation in a program, as its sink sees it.

    Attributes:
      computation: what was called.
      arguments: the arguments in the order of its parameters; references of the program are values here.
      result: all of the result, `ClientValues` included. Dataclasses are dicts, as in what the program gets.
      dropped: the clients that were left out of a reduction because their values were not finite.
    """

    computation: framework.ConcreteComputation
    arguments: tuple[Any, ...]
    result: Any
    dropped: tuple[str, ...]


# Takes the calls whose results have clients-placed parts: one at a time, in a thread of fedlens, before the program can
# see the result. What it raises, the program meets when it reads the result.
ProgramSink = Callable[[ProgramCall], None]


class ProgramContext(fl.program.NativeFederatedContext):
    """Runs the computations of federated programs; `program_context` makes one."""

    def __init__(self, ctx: AsyncContext, sink: ProgramSink | None = None, on_nonfinite: OnNonFinite = "ignore"):
        """Takes the context that runs, and what `program_context` says of the other two."""
        super().__init__(ctx)
        self._runs = ctx
        self._sink = sink
        self._on_nonfinite: OnNonFinite = on_nonfinite
        self._sinking = threading.Lock()

    def invoke(self, comp: framework.ConcreteComputation, arg: Any) -> Any:
        """Starts `comp` on `arg`; called by the language when a program calls a computation.

        Returns:
          The structure of the result, with a reference for each tensor and None for each clients-placed part. Its
          containers are those that `federated_language.program` reads: dataclasses and attrs classes become dicts.

        Raises:
          ConfigError: the result has clients-placed parts and there is no sink, or it holds a function.
          UnsupportedError: no event loop is running.
        """
        template = _template(comp.type_signature.result)
        types = trees.leaves(template)
        shows_clients = any(map(_is_at_clients, types))
        sink = self._sink if shows_clients else None
        if shows_clients and sink is None:
            raise ConfigError(
                f"Expected a result at the server, found single clients' values in {comp.type_signature.result}: "
                "a program may not see them. fed.program_context(sink=...) takes them out."
            )

        def then(argument: Any, outcome: Outcome) -> list[Any]:
            values = _parts(template, outcome.value)
            if sink is not None:
                remaining = iter(values)
                result = trees.map(lambda _: next(remaining), template)
                with self._sinking:
                    sink(ProgramCall(comp, _arguments(argument), result, outcome.dropped))
            return [None if _is_at_clients(type_) else value for type_, value in zip(types, values, strict=True)]

        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise UnsupportedError(
                "Expected a computation that a program calls while asyncio runs it, found no running event loop. Call "
                "it inside of asyncio.run(program()); outside of programs, in fed.use('local')."
            ) from None
        task = loop.create_task(self._runs.run(comp, arg, on_nonfinite=self._on_nonfinite, then=then))
        references = iter(
            None if _is_at_clients(type_) else _Reference(type_, task, number) for number, type_ in enumerate(types)
        )
        return trees.map(lambda _: next(references), template)


class _Reference(fl.program.MaterializableValueReference):
    """A tensor of a call's result. Awaited, it is the array as it was computed: what the next call takes."""

    def __init__(self, type_: fl.Type, task: asyncio.Task[list[Any]], number: int):
        self._type = type_
        self._task = task
        self._number = number

    @property
    def type_signature(self) -> fl.Type:
        """The type of the tensor, without a placement."""
        return self._type

    async def get_value(self) -> Any:
        """The value as NumPy has it, which is what the language's release managers expect."""
        value = await self
        return np.asarray(value)[()] if hasattr(value, "dtype") else value

    def __await__(self) -> Generator[Any, None, Any]:
        return self._value().__await__()

    async def _value(self) -> Any:
        # Who no longer waits for one tensor does not cancel the call that gives the others too.
        return (await asyncio.shield(self._task))[self._number]

    def __repr__(self) -> str:
        return f"<reference to {self._type}>"


def program_context(
    engine: str | Engine = "local",
    *,
    sink: ProgramSink | None = None,
    on_nonfinite: OnNonFinite = "ignore",
    min_clients: int = 1,
) -> ProgramContext:
    """A context for federated programs: the language's `NativeFederatedContext`, and a way out for local models.

    Example:
      >>> with fed.use(fed.program_context()):
      ...     asyncio.run(program())

    Args:
      engine: "local", "debug", or an engine.
      sink: takes every call whose result has clients-placed parts, before the program sees the rest of it. One call at
        a time, in a thread of fedlens.
      on_nonfinite: what to do with a client that sends infinities or NaNs into a reduction: "raise" names client and
        leaf, "drop" leaves it out, "ignore" aggregates it.
      min_clients: how many clients an aggregate has to be over, see `use`.

    Raises:
      ConfigError: there is no engine of that name, `on_nonfinite` is none of its values, or `min_clients` is below 1.
    """
    check_on_nonfinite(on_nonfinite)
    return ProgramContext(AsyncContext(engine_of(engine), min_clients), sink, on_nonfinite)


def _template(type_: fl.Type) -> Any:
    """A result type as a tree in the containers of programs; its leaves are the types of tensors and clients' values.

    Raises:
      ConfigError: it holds a function.
    """
    if isinstance(type_, fl.FederatedType) and type_.placement is fl.SERVER:
        return _template(type_.member)
    if isinstance(type_, fl.StructType):
        container = type_.python_container
        is_class = container is not None and (
            dataclasses.is_dataclass(container) or hasattr(container, "__attrs_attrs__")
        )
        return trees.build(None if is_class else container, [(name, _template(field)) for name, field in type_.items()])
    if isinstance(type_, fl.FunctionType):
        raise ConfigError(f"Expected a result made of values, found a function of type {type_}.")
    return type_


def _is_at_clients(type_: fl.Type) -> bool:
    return isinstance(type_, fl.FederatedType)  # what is placed at the server is in the template as its member


def _parts(template: Any, value: Any) -> list[Any]:
    """What `value` holds for each leaf of a template."""
    fields = trees.fields_of(template)
    if fields is None:
        return [value]
    children = zip(fields, trees.fields_of(value) or [], strict=True)
    return [part for (_, of_template), (_, child) in children for part in _parts(of_template, child)]


def _arguments(argument: Any) -> tuple[Any, ...]:
    """The arguments of a call: the language hands one over as it is, and several as a struct."""
    if isinstance(argument, structure.Struct):
        return tuple(child for _, child in structure.iter_elements(argument))
    return () if argument is None else (argument,)
