"""Normal form: one list of named calls, in the order in which they happen, and a result that selects from them.

A computation as a user wrote it nests lambdas, blocks, selections and other computations. `normalize` evaluates it
symbolically: functions are applied, blocks opened, selections from structs resolved, until only calls of intrinsics and
of local computations are left. Each gets a name and is emitted once, unused ones are dropped. The result is again a
building block of the language,

    (arg -> (let federated_map_0=federated_map(<local, arg>), federated_mean_1=federated_mean(federated_map_0)
             in <mean=federated_mean_1,locals=federated_map_0>))

so it can be printed, serialised, rewritten, and handed to another runtime. TensorFlow Federated's compiler calls such a
form "call dominant"; the language package has no transformation to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import federated_language as fl
from federated_language import framework

from fedlens.compiler.generic import holds_federated, placed, placed_zero
from fedlens.compiler.operations import GENERIC
from fedlens.errors import UnsupportedError

Block: TypeAlias = framework.ComputationBuildingBlock
Calls: TypeAlias = Sequence[tuple[str, framework.Call]]
PARAMETER = "arg"


@dataclass(frozen=True)
class _Closure:
    """A function with the values of the names around it: what a lambda evaluates to."""

    function: framework.Lambda
    environment: dict[str, _Value]


@dataclass(frozen=True)
class _Fields:
    """A struct of values: what a struct, or a selection's source, evaluates to."""

    names: tuple[str | None, ...]
    values: tuple[_Value, ...]


# A value is a _Closure, a _Fields, or a Block that stands for itself: a reference to an emitted call or
# to the parameter, a selection from one, a literal, a placement, an intrinsic, a local computation.
_Value: TypeAlias = Any


class _Emitter:
    """The calls of one let-list, named and in order."""

    def __init__(self, names: Iterator[int]):
        self.calls: list[tuple[str, framework.Call]] = []
        self._names = names

    def emit(self, call: framework.Call, label: str) -> framework.Reference:
        name = f"{label}_{next(self._names)}"
        self.calls.append((name, call))
        return framework.Reference(name, call.type_signature)

    def within(self) -> _Emitter:
        """An emitter for the body of a function that stays a function; names are unique across both."""
        return _Emitter(self._names)


def normalize(computation: fl.Computation | Block) -> framework.Lambda:
    """The normal form of a computation.

    Args:
      computation: a computation, or its building block: a lambda, or a bare local computation.

    Returns:
      A lambda whose result is a block: called intrinsics and called local computations, each under its own name, then a
      struct of selections from them. Functions that intrinsics take (what a map maps) are lambdas in normal form
      themselves, or local computations.

    Raises:
      UnsupportedError: the computation contains a building block that fedlens does not know.
    """
    is_block = isinstance(computation, framework.ComputationBuildingBlock)
    block = computation if is_block else Block.from_proto(computation.to_proto())
    counter = iter(range(1 << 62))
    emitter = _Emitter(counter)
    function = _evaluate(block, {}, emitter)
    parameter = block.type_signature.parameter
    argument = None if parameter is None else framework.Reference(PARAMETER, parameter)
    result = _reify(_apply(function, argument, emitter), emitter)
    return framework.Lambda(None if parameter is None else PARAMETER, parameter, _let(emitter.calls, result))


def _evaluate(block: Block, environment: dict[str, _Value], emitter: _Emitter) -> _Value:
    match block:
        case framework.Reference():
            return environment.get(block.name, block)
        case framework.Selection():
            return _select(_evaluate(block.source, environment, emitter), block.as_index())
        case framework.Struct():
            fields = list(block.items())
            return _Fields(
                tuple(name for name, _ in fields),
                tuple(_evaluate(value, environment, emitter) for _, value in fields),
            )
        case framework.Lambda():
            return _Closure(block, dict(environment))
        case framework.Block():
            inner = dict(environment)
            for name, value in block.locals:
                inner[name] = _evaluate(value, inner, emitter)
            return _evaluate(block.result, inner, emitter)
        case framework.Call():
            argument = None if block.argument is None else _evaluate(block.argument, environment, emitter)
            return _apply(_evaluate(block.function, environment, emitter), argument, emitter)
        case framework.CompiledComputation():
            # A computation used inside another is held as a proto of any kind: open it, unless it is a local payload.
            opened = Block.from_proto(block.to_proto())
            return opened if isinstance(opened, framework.CompiledComputation) else _evaluate(opened, {}, emitter)
        case framework.Intrinsic() if block.uri == "generic_zero" and holds_federated(block.type_signature):
            return _evaluate(placed_zero(block.uri, block.type_signature), {}, emitter)
        case framework.Literal() | framework.Intrinsic() | framework.Placement():
            return block
    raise UnsupportedError(f"Expected a building block that fedlens executes, found {type(block).__name__}: {block}.")


def _select(value: _Value, index: int) -> _Value:
    if isinstance(value, _Fields):
        return value.values[index]
    return framework.Selection(value, index=index)


def _apply(function: _Value, argument: _Value | None, emitter: _Emitter) -> _Value:
    match function:
        case _Closure():
            environment = dict(function.environment)
            if function.function.parameter_name is not None and argument is not None:
                environment[function.function.parameter_name] = argument
            return _evaluate(function.function.result, environment, emitter)
        case framework.Intrinsic() if function.uri in GENERIC and holds_federated(function.type_signature.result):
            operands = [_reify(_select(argument, index), emitter) for index in (0, 1)]
            return _evaluate(placed(function.uri, function.type_signature.result, *operands), {}, emitter)
        case framework.Intrinsic():
            return emitter.emit(framework.Call(function, _reified(argument, emitter)), function.uri)
        case framework.CompiledComputation():
            return emitter.emit(framework.Call(function, _reified(argument, emitter)), "local")
    raise UnsupportedError(f"Expected a call of a function that is known, found a call of {function}.")


def _reified(argument: _Value | None, emitter: _Emitter) -> Block | None:
    return None if argument is None else _reify(argument, emitter)


def _reify(value: _Value, emitter: _Emitter) -> Block:
    """A value as a building block; a closure becomes a lambda in normal form, with what it captured inlined."""
    match value:
        case _Fields():
            return framework.Struct(
                [(name, _reify(field, emitter)) for name, field in zip(value.names, value.values, strict=True)]
            )
        case _Closure():
            function, inner = value.function, emitter.within()
            environment = dict(value.environment)
            parameter = function.parameter_name
            if parameter is not None:
                # A fresh name: what the body captured from outside may hold a parameter of the same name.
                parameter = f"{PARAMETER}_{next(emitter._names)}"
                environment[function.parameter_name] = framework.Reference(parameter, function.parameter_type)
            result = _reify(_evaluate(function.result, environment, inner), inner)
            return framework.Lambda(parameter, function.parameter_type, _let(inner.calls, result))
    return value


def _let(calls: list[tuple[str, framework.Call]], result: Block) -> Block:
    """A block of the calls that `result` needs; `result` itself when it needs none."""
    needed = referenced_names(result)
    kept: list[tuple[str, framework.Call]] = []
    for name, call in reversed(calls):
        if name in needed:
            kept.append((name, call))
            needed |= referenced_names(call)
    return framework.Block(list(reversed(kept)), result) if kept else result


def calls_and_result(normal_form: framework.Lambda) -> tuple[Calls, Block]:
    """The named calls of a normal form, in their order, and its result."""
    body = normal_form.result
    return (body.locals, body.result) if isinstance(body, framework.Block) else ((), body)


def referenced_names(block: Block) -> set[str]:
    """The names of all references in a building block (bound ones too: names are unique in a normal form)."""
    if isinstance(block, framework.Reference):
        return {block.name}
    return {name for child in block.children() for name in referenced_names(child)}
