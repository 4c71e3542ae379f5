"""Taps: what can be taken of the clients' values in a computation, and what taking it discloses.

`tap_points` says where the clients hold values of their own; here each of them is described: what reads it, how often
its function is called, what it discloses about a client, and which protection it would go around.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import federated_language as fl
from federated_language import framework

from fedlens.compiler.flows import flows
from fedlens.compiler.functions import function_names_in
from fedlens.compiler.levels import Level
from fedlens.compiler.normalize import PARAMETER, Block, calls_and_result, normalize
from fedlens.compiler.operations import EVAL, MAP, SELECTS
from fedlens.compiler.origins import (
    Origin,
    Part,
    argument,
    operation_of,
    origin_of,
    origins,
    parts_of,
)
from fedlens.compiler.protections import Protections
from fedlens.compiler.tap_points import Point, point_at, tap_points
from fedlens.errors import LanguageError
from fedlens.language.types import is_at_clients


@dataclass(frozen=True)
class Tap:
    """A point at which the clients' values can be taken, see `taps`.

    Attributes:
      name: what `tap` finds it by.
      type: the type of one client's value, in the containers of the function that gives it.
      feeds: what reads it: other taps by name, parts of the result; for what is aggregated, the kind of aggregation.
      calls: how often the computation calls the function that gives it at the clients.
      level: what the value discloses about its client.
      bypasses: the secure sums and mechanisms of differential privacy that it flows into, which a tap goes around.
      function: the name of the function that gives it; "" for what is put together from several, or is no function's.
    """

    name: str
    type: fl.Type
    feeds: tuple[str, ...]
    calls: int
    level: Level
    bypasses: tuple[str, ...]
    function: str = ""


At: TypeAlias = str | Iterable[str] | Callable[[Tap], bool]


def taps(computation: fl.Computation, at: At | None = None) -> tuple[Tap, ...]:
    """The points at which the clients' values can be taken, each with its fields, one level deep.

    Example:
      >>> for tap in fed.taps(process.next_computation):
      ...     print(tap.name, tap.feeds, tap.level)

    Args:
      computation: a computation with types.
      at: only these: a name (of a field at any depth too), several names, or a function of a tap that says whether it
        is wanted.

    Returns:
      The taps in the order client work, what is aggregated, what else is computed; within it as it happens. What only
      this computation's argument holds is listed too when it is aggregated, at level `Level.RAW`: `tap` refuses it.

    Raises:
      LanguageError: `computation` is no computation, or has no types yet.
      ConfigError: there is no tap of a name in `at`; or it is the client work, of which there are several or none.
      UnsupportedError: the computation has a building block that fedlens does not know.
    """
    return tuple(described for _, described in described_points(computation, at)[1])


def described_points(
    computation: fl.Computation, at: At | None
) -> tuple[framework.Lambda, tuple[tuple[Point, Tap], ...]]:
    """The normal form of a computation, and the points in it that `at` asks for, each as `taps` describes it."""
    check_is_computation(computation)
    normal_form = normalize(computation)
    points = tap_points(normal_form, computation.type_signature.parameter)
    if at is None or callable(at):
        chosen = [each for point in points for each in (point, *point.fields())]
    else:
        chosen = [point_at(points, name) for name in ([at] if isinstance(at, str) else dict.fromkeys(at))]
    describe = _describer(normal_form, points, computation.type_signature.result)
    described = tuple((point, describe(point)) for point in chosen)
    return normal_form, tuple(each for each in described if not callable(at) or at(each[1]))


def check_is_computation(computation: object) -> None:
    """Checks that something is a computation with types.

    Raises:
      LanguageError: it is not.
    """
    if isinstance(computation, framework.PolymorphicComputation):
        raise LanguageError(
            "Expected a computation with types, found one whose types depend on what it is called with. "
            "Give the types where it is defined, as in fed.jax_computation(fed.TensorType(np.float32, (3,)))."
        )
    if not isinstance(computation, framework.ConcreteComputation):
        hint = " Its round is its next_computation." if hasattr(computation, "next_computation") else ""
        raise LanguageError(
            "Expected a computation, such as fed.federated_computation makes, "
            f"found {type(computation).__name__}.{hint}"
        )


def _describer(
    normal_form: framework.Lambda, points: tuple[Point, ...], result_type: fl.Type
) -> Callable[[Point], Tap]:
    calls, _ = calls_and_result(normal_form)
    known = dict(calls)
    readers = list(_readers(normal_form, points, result_type))
    found_flows, protections = flows(normal_form), Protections(normal_form)
    often = Counter(_function_key(call) for _, call in calls if is_at_clients(call.type_signature))

    def feeds(point: Point) -> tuple[str, ...]:
        if point.reduction is not None:
            return (point.reduction.removeprefix("federated_").removesuffix("_bitwidth").replace("_", " "),)
        own = list(parts_of(point.origin))
        return tuple(
            dict.fromkeys(
                reader
                for reader, read in readers
                if any(one.overlaps(other) for one in parts_of(read) for other in own)
            )
        )

    def callers(point: Point) -> list[framework.Call]:
        return [known[name] for name in {part.name: None for part in parts_of(point.origin)} if name in known]

    def bypasses(point: Point) -> tuple[str, ...]:
        # What a function returns beside a protected value may tell the same: the weights tell the update.
        whole = {part if part.name == PARAMETER else Part(part.name): None for part in parts_of(point.origin)}
        return tuple(dict.fromkeys(name for part in whole for name in protections.names(part)))

    def describe(point: Point) -> Tap:
        called, name = callers(point), name_of(point.value)
        return Tap(
            point.name,
            point.type,
            feeds(point),
            max((often[_function_key(call)] for call in called), default=0),
            found_flows[name].at(point.path).level,
            bypasses(point),
            _called(called[0]) if len(called) == 1 else "",
        )

    return describe


def _readers(
    normal_form: framework.Lambda, points: tuple[Point, ...], result_type: fl.Type
) -> Iterator[tuple[str, Origin]]:
    """Who reads which value of the clients' own: taps by name, other functions, parts of the result."""
    calls, result = calls_and_result(normal_form)
    known = origins(calls)
    labels = {point.value.name: point.name for point in points if point.reduction is None}
    for point in points:
        if point.reduction is not None:
            yield point.name, point.origin
    for name, call in calls:
        operation = operation_of(call)
        if operation == MAP and known[name] == Part(name):
            yield labels.get(name, _called(call) or "a function"), origin_of(argument(call, 1), known)
        elif operation in SELECTS:
            yield "select", origin_of(argument(call, 0), known)
    yield from _of_result("result", result, result_type, known)


def _of_result(name: str, block: Block, type_: fl.Type, known: dict[str, Origin]) -> Iterator[tuple[str, Origin]]:
    if is_at_clients(type_):
        yield name, origin_of(block, known)
    elif isinstance(type_, fl.StructType):
        for index, (field, field_type) in enumerate(type_.items()):
            separator = "." if name == "result" else "/"
            inner = block[index] if isinstance(block, framework.Struct) else framework.Selection(block, index=index)
            yield from _of_result(f"{name}{separator}{index if field is None else field}", inner, field_type, known)


def _function_key(call: framework.Call) -> tuple[bytes, ...] | str:
    """What tells functions apart: the local computations that a call runs; its operation if it runs none."""
    function = _function(call)
    found = () if function is None else tuple(_payloads(function))
    return found or str(operation_of(call))


def _called(call: framework.Call) -> str:
    """The names of the user's functions that a call at the clients runs."""
    function = _function(call)
    return "" if function is None else ", ".join(dict.fromkeys(function_names_in(function)))


def _function(call: framework.Call) -> Block | None:
    operation = operation_of(call)
    return argument(call, 0) if operation == MAP else call.argument if operation == EVAL else None


def _payloads(block: Block) -> Iterator[bytes]:
    if isinstance(block, framework.CompiledComputation):
        yield block.to_proto().SerializeToString(deterministic=True)
    for child in block.children():
        yield from _payloads(child)


def name_of(value: Block) -> str:
    """What flows and protections call a value at the clients: a call's name, or that of a part of the argument."""
    if isinstance(value, framework.Selection):
        return f"{name_of(value.source)}[{value.as_index()}]"
    return str(value.name)
