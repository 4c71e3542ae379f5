"""Origins: which call computed each part of a value at the clients, seen through whatever only moves values.

Zips, selections of fields and maps of functions that do no more than these carry values from where they are computed to
where they are used, and drop the names and the containers on the way. Walking back over them, every value is a tree of
parts of the results of calls that compute, or of the argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import federated_language as fl
from federated_language import framework

from fedlens.compiler.functions import function_of
from fedlens.compiler.normalize import PARAMETER, Block, Calls
from fedlens.compiler.operations import EVAL, MAP, ZIP
from fedlens.language.types import member_of


@dataclass(frozen=True)
class Part:
    """A part of one result: of a call, or of the argument.

    Attributes:
      name: the name of the call, or `PARAMETER`.
      path: where the part stands in its result, position by position.
    """

    name: str
    path: tuple[int, ...] = ()

    def overlaps(self, other: Part) -> bool:
        """Whether the two have something in common: one is within the other, or they are equal."""
        shorter = min(len(self.path), len(other.path))
        return self.name == other.name and self.path[:shorter] == other.path[:shorter]


@dataclass(frozen=True)
class Parts:
    """A struct of origins."""

    names: tuple[str | None, ...]
    values: tuple[Origin, ...]


Origin: TypeAlias = Part | Parts


def origins(calls: Calls) -> dict[str, Origin]:
    """Where the result of each call comes from: itself if it computes, else what it moves."""
    found: dict[str, Origin] = {PARAMETER: Part(PARAMETER)}
    for name, call in calls:
        found[name] = Part(name)
        if operation_of(call) == ZIP:
            found[name] = _field_by_field(origin_of(call.argument, found), call.argument.type_signature)
        elif operation_of(call) == MAP and moves(argument(call, 0)):
            function = argument(call, 0)
            found[name] = origin_of(function.result, {function.parameter_name: origin_of(argument(call, 1), found)})
    return found


def origin_of(block: Block, known: Mapping[str, Origin]) -> Origin:
    """Where the value of a building block of references, selections and structs comes from."""
    match block:
        case framework.Reference():
            return known.get(block.name, Part(block.name))
        case framework.Selection():
            return select(origin_of(block.source, known), block.as_index())
        case framework.Struct():
            fields = list(block.items())
            return Parts(tuple(name for name, _ in fields), tuple(origin_of(value, known) for _, value in fields))
    raise TypeError(f"Expected a building block that only moves values, found {type(block).__name__}.")


def _field_by_field(origin: Origin, type_: fl.Type) -> Origin:
    """A struct of federated values as `Parts`, whose fields have types with members, even if it is one argument."""
    if not isinstance(type_, fl.StructType):
        return origin
    fields = list(type_.items())
    return Parts(
        tuple(name for name, _ in fields),
        tuple(_field_by_field(select(origin, index), field) for index, (_, field) in enumerate(fields)),
    )


def select(origin: Origin, index: int) -> Origin:
    """Where a field of a value comes from."""
    if isinstance(origin, Parts):
        return origin.values[index]
    return Part(origin.name, (*origin.path, index))


def parts_of(origin: Origin) -> Iterator[Part]:
    """The parts that a value is put together from."""
    if isinstance(origin, Part):
        yield origin
    else:
        for value in origin.values:
            yield from parts_of(value)


def moves(function: Block) -> bool:
    """Whether a function only selects from its argument and puts fields together."""
    return isinstance(function, framework.Lambda) and _is_made_of(function.result, function.parameter_name)


def _is_made_of(block: Block, name: str | None) -> bool:
    match block:
        case framework.Reference():
            return bool(block.name == name)
        case framework.Selection():
            return _is_made_of(block.source, name)
        case framework.Struct():
            return all(_is_made_of(value, name) for _, value in block.items())
    return False


def operation_of(call: framework.Call) -> str | None:
    """The URI of the intrinsic that is called; None for a local computation."""
    return str(call.function.uri) if isinstance(call.function, framework.Intrinsic) else None


def argument(call: framework.Call, index: int) -> Block:
    """One of the arguments of an intrinsic that takes several."""
    if isinstance(call.argument, framework.Struct):
        return call.argument[index]
    return framework.Selection(call.argument, index=index)


def member_type(origin: Origin, calls: Mapping[str, framework.Call], parameter: fl.Type | None) -> fl.Type:
    """The type of what an origin is, without its placement, in the containers of the functions that computed it.

    Args:
      origin: a value at the clients.
      calls: the calls of the normal form, by name.
      parameter: the type of the computation's argument, with containers.
    """
    if isinstance(origin, Parts):
        fields = [member_type(value, calls, parameter) for value in origin.values]
        named = zip(origin.names, fields, strict=True)
        return fl.StructType([field if name is None else (name, field) for name, field in named])
    type_ = parameter if origin.name == PARAMETER else _result_type(calls[origin.name])
    for index in origin.path:
        type_ = member_of(type_)[index]
    return member_of(type_)


def _result_type(call: framework.Call) -> fl.Type:
    if operation_of(call) == MAP:
        return _returned_type(argument(call, 0))
    if operation_of(call) == EVAL:
        return _returned_type(call.argument)
    return call.type_signature


def _returned_type(function: Block) -> fl.Type:
    """The type of a function's result, with the containers that its own declaration knows."""
    if isinstance(function, framework.CompiledComputation):
        local = function_of(function)
        return function.type_signature.result if local is None else local.type_signature.result
    if not isinstance(function, framework.Lambda):
        return function.type_signature.result
    body = function.result
    calls, result = (body.locals, body.result) if isinstance(body, framework.Block) else ((), body)
    types = {name: _returned_type(call.function) for name, call in calls}
    return _typed(result, types)


def _typed(block: Block, types: Mapping[str, fl.Type]) -> fl.Type:
    match block:
        case framework.Reference():
            return types.get(block.name, block.type_signature)
        case framework.Selection():
            return _typed(block.source, types)[block.as_index()]
        case framework.Struct():
            fields = [(name, _typed(value, types)) for name, value in block.items()]
            return fl.StructType([field if name is None else (name, field) for name, field in fields])
    return block.type_signature
