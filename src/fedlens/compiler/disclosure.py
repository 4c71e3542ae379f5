"""`disclosure`: what each output of a computation tells about one client, the way that decides it, and why.

Levels follow the information through the normal form (`fedlens.compiler.flows`); what a per-client output goes around
is read off the same graph (`fedlens.compiler.protections`). Both hold for the computation as it is written, whatever
cohort it runs over: how few clients an aggregate may have is for the runtime to check (`min_clients`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import federated_language as fl
from federated_language import framework

from fedlens.compiler.flow import Flow, moved, struct_of
from fedlens.compiler.flows import flows_and_result
from fedlens.compiler.levels import Level
from fedlens.compiler.normalize import Block, calls_and_result, normalize
from fedlens.compiler.origins import Origin, Part, argument, operation_of, select
from fedlens.compiler.outputs import Disclosure, Output
from fedlens.compiler.protections import Protections
from fedlens.compiler.taps import check_is_computation
from fedlens.language.type_summaries import summarize
from fedlens.language.types import is_at_clients, member_of


def disclosure(computation: fl.Computation | Any) -> Disclosure:
    """What each output of a computation tells about one client.

    Example:
      >>> print(fed.disclosure(average_with_extraction))
      >>> fed.disclosure(process.with_local_models()).level
      <Level.PER_CLIENT: 'per-client'>

    Args:
      computation: a computation with types; or a learning process, whose round is looked at.

    Returns:
      The outputs, each at one level: a part of the result that is at several is taken apart into its fields. The keys
      of a `federated_select` are an output too: whoever serves the rows sees them.

    Raises:
      LanguageError: `computation` is no computation, or has no types yet.
      UnsupportedError: it has an intrinsic that fedlens does not execute, or a mechanism that it does not know.
    """
    computation = getattr(computation, "next_computation", computation)
    check_is_computation(computation)
    normal_form = normalize(computation)
    calls, result = calls_and_result(normal_form)
    known, of_result = flows_and_result(normal_form)
    found = Protections(normal_form)
    outputs = list(_parts(result, of_result, computation.type_signature.result, "", found))
    selects = [call for _, call in calls if operation_of(call) == "federated_select"]
    for index, call in enumerate(selects):  # not secure: whoever serves the rows sees who asks for which
        keys = argument(call, 0)
        origin = found.origin(keys)
        flow = _flow_of(origin, known)
        outputs.append(_output(flow, keys.type_signature.member, f"select.{index}.keys", origin, found))
    return Disclosure(tuple(outputs))


def _parts(block: Block, flow: Flow, type_: fl.Type, name: str, found: Protections) -> Iterator[Output]:
    """The parts of a result at one placement, as `explain` has them."""
    if isinstance(type_, fl.StructType) and isinstance(block, framework.Struct) and _holds_federated(type_):
        for index, ((field, part), (_, child)) in enumerate(zip(type_.items(), block.items(), strict=True)):
            yield from _parts(child, flow.field(index), part, _joined(name, index, field), found)
        return
    origin = found.origin(block) if is_at_clients(type_) else None
    yield from _fields(flow, member_of(type_), name, origin, found)


def _fields(flow: Flow, type_: fl.Type, name: str, origin: Origin | None, found: Protections) -> Iterator[Output]:
    """A part of a result; its fields if they are at several levels."""
    if isinstance(type_, fl.StructType) and len({_standing(field) for _, field in flow.fields}) > 1:
        for index, (field, part) in enumerate(type_.items()):
            inner = None if origin is None else select(origin, index)
            yield from _fields(flow.field(index), part, _joined(name, index, field), inner, found)
        return
    yield _output(flow, type_, name, origin, found)


def _standing(flow: Flow) -> object:
    """What tells fields apart: the levels inside, and why."""
    if not flow.fields:
        return flow.bounds, flow.reasons
    inside = {_standing(field) for _, field in flow.fields}
    return inside.pop() if len(inside) == 1 else frozenset(inside)


def _output(flow: Flow, type_: fl.Type, name: str, origin: Origin | None, found: Protections) -> Output:
    bypasses = found.names(origin) if origin is not None and flow.level is not Level.PUBLIC else ()
    bounds = tuple(sorted(flow.bounds - {flow.level}, key=lambda level: level.value))
    path = moved(flow, name or "result").path
    return Output(name, flow.level, path, flow.reasons, bypasses, bounds, summarize(type_))


def _flow_of(origin: Origin, known: Mapping[str, Flow]) -> Flow:
    """The flow of a value at the clients that was moved at most."""
    if isinstance(origin, Part):
        return known[origin.name].at(origin.path)
    return struct_of(zip(origin.names, (_flow_of(value, known) for value in origin.values), strict=True))


def _joined(name: str, index: int, field: str | None) -> str:
    return f"{name}/{index if field is None else field}".lstrip("/")


def _holds_federated(type_: fl.Type) -> bool:
    return bool(framework.type_contains(type_, lambda part: isinstance(part, fl.FederatedType)))
