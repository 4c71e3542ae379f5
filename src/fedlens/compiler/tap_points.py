"""Tap points: where, on a normal form, the clients hold values of their own, and what these points are called.

Nested computations, blocks, lambdas and structures are gone from a normal form, so that what is found does not depend
on how a computation was written, and a function that is called three times gives three points. They are named by what
they are, in the order in which they happen:

    client_work            what a client computes from its data: a map that reads a sequence and returns none;
                           client_work.0, client_work.1, ... if there are several
    aggregate.0.value      what enters the first aggregation, and
    aggregate.0.weight     what it is weighted by
    map.0                  what else is computed at the clients

A field follows after a dot, a field of that after a slash: `client_work.weights/dense/kernel`. Everything after that
dot is names of fields, with the dots and slashes that they have themselves; the longest name that fits counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import federated_language as fl
from federated_language import framework

from fedlens.compiler.normalize import Block, calls_and_result
from fedlens.compiler.operations import EVAL, MAP, REDUCTIONS
from fedlens.compiler.origins import (
    Origin,
    Part,
    argument,
    member_type,
    operation_of,
    origin_of,
    origins,
    select,
)
from fedlens.errors import ConfigError
from fedlens.language.types import contains_sequence, is_at_clients, is_static

CLIENT_WORK = "client_work"
_VALUE_FIRST = {"federated_aggregate", "federated_secure_sum", "federated_secure_sum_bitwidth"}


@dataclass(frozen=True)
class Point:
    """A tap point, or a field of one.

    Attributes:
      name: what it is called.
      value: the clients-placed value: a reference to a call, or a part of the argument.
      path: where in the value it is, position by position.
      origin: where what is there comes from.
      type: the type of what is there, with containers.
      reduction: the reduction that the value enters; None for a value that is computed.
    """

    name: str
    value: Block
    path: tuple[int, ...]
    origin: Origin
    type: fl.Type
    reduction: str | None = None

    def fields(self) -> tuple[Point, ...]:
        """The fields of what is there, one level deep; none if it is no struct."""
        fields = list(self.type.items()) if isinstance(self.type, fl.StructType) else []
        return tuple(self._field(index, _step(index, name), type_) for index, (name, type_) in enumerate(fields))

    def _field(self, index: int, step: str, type_: fl.Type) -> Point:
        name = f"{self.name}{'/' if self.path else '.'}{step}"
        return replace(self, name=name, path=(*self.path, index), origin=select(self.origin, index), type=type_)


def tap_points(normal_form: framework.Lambda, parameter: fl.Type | None) -> tuple[Point, ...]:
    """The tap points of a computation: client work, what is aggregated, what else is computed at the clients.

    Args:
      normal_form: the computation in normal form.
      parameter: the type of its argument, with containers.
    """
    calls, _ = calls_and_result(normal_form)
    known, named = origins(calls), dict(calls)
    found: dict[str, list[tuple[str, Block, str | None]]] = {"work": [], "aggregate": [], "map": []}
    aggregates = 0
    for name, call in calls:
        if operation_of(call) in REDUCTIONS:
            for what, operand in _operands(call):
                found["aggregate"].append((f"aggregate.{aggregates}.{what}", operand, operation_of(call)))
            aggregates += 1
        elif known[name] == Part(name) and _is_computed(call):
            kind = "work" if _reads_sequence(call) else "map"
            label = f"{CLIENT_WORK if kind == 'work' else kind}.{len(found[kind])}"
            found[kind].append((label, framework.Reference(name, call.type_signature), None))
    if len(found["work"]) == 1:
        found["work"] = [(CLIENT_WORK, *rest) for _, *rest in found["work"]]
    points = []
    for label, value, reduction in (each for kind in found.values() for each in kind):
        origin = origin_of(value, known)
        points.append(Point(label, value, (), origin, member_type(origin, named, parameter), reduction))
    return tuple(points)


def _operands(call: framework.Call) -> Iterator[tuple[str, Block]]:
    """What enters a reduction, client by client; not what is equal at all clients."""
    operation = operation_of(call)
    operands = [("value", argument(call, 0) if operation in _VALUE_FIRST else call.argument)]
    if operation == "federated_weighted_mean":
        operands = [(what, argument(call, index)) for index, what in enumerate(("value", "weight"))]
    return ((what, operand) for what, operand in operands if is_at_clients(operand.type_signature))


def _is_computed(call: framework.Call) -> bool:
    """Whether a call computes values of the clients' own that may leave them: tensors of one shape."""
    type_ = call.type_signature
    at_clients = operation_of(call) in (MAP, EVAL) and is_at_clients(type_)
    return at_clients and not contains_sequence(type_) and is_static(type_)


def _reads_sequence(call: framework.Call) -> bool:
    return operation_of(call) == MAP and contains_sequence(argument(call, 1).type_signature)


def point_at(points: Sequence[Point], name: str) -> Point:
    """The point of a name, or the field of a point.

    Raises:
      ConfigError: there is none of that name; or it is the client work, of which there are several or none.
    """
    for point in points:
        if name == point.name:
            return point
        if name.startswith(f"{point.name}.") and (path := _path(name[len(point.name) + 1 :], point.type)) is not None:
            return _within(point, path)
    work = [point.name for point in points if point.name.startswith(CLIENT_WORK)]
    known = [each.name for point in points for each in (point, *point.fields())]
    if not known:
        raise ConfigError(f"Expected a computation with values at the clients to tap, found none for {name!r}.")
    if name.split(".")[0] == CLIENT_WORK and len(work) != 1:
        found = f"several: {', '.join(work)}" if work else "none that reads a sequence and returns tensors"
        raise ConfigError(
            f"Expected one client work to tap, found {found}. Choose among the taps by name: {_few(known)}."
        )
    near = get_close_matches(name, known, n=5, cutoff=0.0)
    raise ConfigError(f"Expected the name of a tap, found {name!r}. The nearest names: {', '.join(near)}.")


def _few(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more (see fed.taps)" if len(names) > most else "")


def _within(point: Point, path: Sequence[int]) -> Point:
    for index in path:
        point = point.fields()[index]
    return point


def _path(text: str, type_: fl.Type) -> tuple[int, ...] | None:
    """The positions that a path of field names leads through; None if it leads nowhere."""
    if not isinstance(type_, fl.StructType):
        return None
    fields = [(_step(index, name), index, field) for index, (name, field) in enumerate(type_.items())]
    for step, index, field in sorted(fields, key=lambda each: -len(each[0])):
        if text == step:
            return (index,)
        if text.startswith(f"{step}/") and (rest := _path(text[len(step) + 1 :], field)) is not None:
            return (index, *rest)
    return None


def _step(index: int, name: str | None) -> str:
    return str(index) if name is None else name
