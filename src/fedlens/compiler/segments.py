"""Segments: the runs of steps of a stage that are traced, and those that the host runs between them.

Most stages are one program. A stage with a `python_computation`, with strings, or with arrays whose size differs from
client to client cannot be: the host runs those steps client by client, and what lies between two of them is fused into
programs. Segments alternate; a step that a host step needs runs as early as it can, every other one as late, so that
what only a reduction reads is computed in the program that reduces it. Sequences stay lazy: each segment that reads one
repeats the steps that make it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import federated_language as fl
from federated_language import framework

from fedlens.compiler.normalize import Block, referenced_names
from fedlens.compiler.operations import EVALS, LOCAL_CALL, MAPS, ZIP
from fedlens.compiler.stages import ClientStage, ServerStage, Step
from fedlens.errors import UnsupportedError
from fedlens.language import HostComputation
from fedlens.language.local_computation import from_proto
from fedlens.language.types import holds_strings, is_static, member_of

Stage = TypeVar("Stage", ClientStage, ServerStage)


@dataclass(frozen=True, eq=False)
class Segment(Generic[Stage]):
    """A part of a stage, itself a stage that reads what earlier segments handed out.

    Attributes:
      stage: what to run.
      on_host: whether the host runs it, step by step; traced as one program otherwise.
    """

    stage: Stage
    on_host: bool


_segments: WeakKeyDictionary[Any, tuple[Segment[Any], ...]] = WeakKeyDictionary()


def segments(stage: Stage) -> tuple[Segment[Stage], ...]:
    """The segments of a stage, in order; none if the stage is one program. Found once for each stage.

    All reductions of a client stage are in the last segment, which is then traced.
    """
    found = _segments.get(stage)
    if found is None:
        at_clients = isinstance(stage, ClientStage)
        is_program = not any(_is_host_work(step, at_clients) for step in stage.body)
        found = _segments[stage] = () if is_program else _split(stage)
    return found


def check_host_work(stage: ClientStage | ServerStage) -> None:
    """Refuses what has no place in a client stage: reductions on the host, and results of another shape at each client.

    Raises:
      UnsupportedError: names the step, and the function or the type.
    """
    if not isinstance(stage, ClientStage):
        return
    for step in stage.reductions:
        blocks = [] if step.operand is None else [step.operand]
        for host in (host for block in blocks for host in _host_computations(block)):
            raise UnsupportedError(
                f"Expected functions of JAX operations in {step.name}, found the {host.kind} computation "
                f"{host.name!r}. Map it over the clients first, and reduce what it returns."
            )
        if any(holds_strings(type_) for block in blocks for type_ in _types_read(block)):
            raise UnsupportedError(f"Expected numbers to reduce in {step.name}, found strings.")
    for name, type_ in zip(stage.outputs, stage.output_types, strict=True):
        if not is_static(type_):
            raise UnsupportedError(
                f"Expected clients' results of known shape, found {type_} in {name}. "
                "Hand out what has a known shape, or use it at the clients alone."
            )


def _is_host_work(step: Step, at_clients: bool) -> bool:
    blocks = [block for block in (step.function, step.operand) if block is not None]
    types = [step.type, *(type_ for block in blocks for type_ in _types_read(block))]
    # At the server a program takes arrays of any size, as JAX compiles it anew; a loop over clients has one size.
    return (
        any(_host_computations(block) for block in blocks)
        or any(map(holds_strings, types))
        or (at_clients and not all(map(is_static, types)))
    )


def _split(stage: ClientStage | ServerStage) -> tuple[Segment[Any], ...]:
    at_clients = isinstance(stage, ClientStage)
    body = tuple(part for step in stage.body for part in (_parts(step) if _is_host_work(step, at_clients) else (step,)))
    reductions = stage.reductions if isinstance(stage, ClientStage) else ()
    named = {step.name: step for step in body}
    needs = {step.name: _names_read(step) & named.keys() for step in (*body, *reductions)}
    on_host: set[str] = set()
    for step in body:
        # Who reads a sequence runs what makes it.
        reads_host_work = any(named[name].is_lazy for name in needs[step.name] & on_host)
        if reads_host_work or _is_host_work(step, at_clients):
            on_host.add(step.name)
    phases, last = _phases(body, needs, on_host, bool(reductions))
    lazy_outputs = {name for name in stage.outputs if named[name].is_lazy}
    # Who hands out a sequence runs what makes it, too.
    hands_out = last + 1 if lazy_outputs & on_host and last % 2 == 0 else last

    parts: list[tuple[int, tuple[Step, ...], tuple[Step, ...]]] = []  # number, body, reductions
    for number in range(hands_out + 1):
        ends = reductions if number == last else ()
        own = {name for name, of_step in phases.items() if of_step == number}
        if number == hands_out:
            own |= lazy_outputs
        inside = _with_lazy(own.union(step.name for step in ends), needs, named)
        steps = tuple(step for step in body if step.name in inside)
        if steps or ends:
            parts.append((number, steps, ends))

    found: list[Segment[Any]] = []
    wanted = set(stage.outputs)
    for number, steps, ends in reversed(parts):
        lazy = lazy_outputs if number == hands_out else ()
        leaving = tuple(step.name for step in steps if step.name in (lazy if step.is_lazy else wanted))
        found.append(Segment(_part_of(stage, steps, ends, leaving, named), number % 2 == 1))
        wanted |= set[str]().union(*(needs[step.name] for step in (*steps, *ends)))
    return tuple(reversed(found))


def _phases(
    body: tuple[Step, ...], needs: dict[str, set[str]], on_host: set[str], reduces: bool
) -> tuple[dict[str, int], int]:
    """The number of the segment of each step that is no sequence, and the last number; the odd ones are the host's."""
    earliest: dict[str, int] = {}
    for step in body:
        after = max((earliest[name] for name in needs[step.name]), default=0)
        earliest[step.name] = after if step.is_lazy else after + (after % 2 != (step.name in on_host))
    last = max(earliest.values())
    if reduces or any(not step.is_lazy and step.name not in on_host for step in body):
        last += last % 2
    feeds_host: set[str] = set()
    for step in reversed(body):
        if step.name in feeds_host or (step.name in on_host and not step.is_lazy):
            feeds_host |= needs[step.name]
    phases = {
        step.name: earliest[step.name] if step.name in on_host | feeds_host else last
        for step in body
        if not step.is_lazy
    }
    return phases, last


def _with_lazy(names: set[str], needs: dict[str, set[str]], named: dict[str, Step]) -> set[str]:
    """`names` and the steps that make the sequences which they read."""
    found, waiting = set(names), list(names)
    while waiting:
        for name in needs[waiting.pop()] - found:
            if named[name].is_lazy:
                found.add(name)
                waiting.append(name)
    return found


def _part_of(
    stage: Any, body: tuple[Step, ...], reductions: tuple[Step, ...], leaving: tuple[str, ...], named: dict[str, Step]
) -> Any:
    inside = {step.name for step in body}
    used = set[str]().union(*(_names_read(step) for step in (*body, *reductions))) - inside
    if isinstance(stage, ServerStage):
        known = (*stage.inputs, *named)
        return ServerStage(body, tuple(name for name in known if name in used), leaving)
    types = dict(zip(stage.columns, stage.column_types, strict=True))
    types |= {name: member_of(step.type) for name, step in named.items()}
    columns = tuple(name for name in types if name in used)
    return replace(
        stage,
        columns=columns,
        column_types=tuple(types[name] for name in columns),
        shared=tuple(name for name in stage.shared if name in used),
        body=body,
        reductions=reductions,
        outputs=leaving,
        output_types=tuple(types[name] for name in leaving),
    )


def _parts(step: Step) -> Iterator[Step]:
    """A step that calls several computations in turn, inside of a lambda, as a step for each of them."""
    is_map = step.operation in MAPS
    is_eval = step.operation in EVALS
    function = step.part(0) if is_map else step.operand
    if not (is_map or is_eval) or not isinstance(function, framework.Lambda):
        yield step
        return
    if is_map and function.parameter_name is not None:
        # A zip is a step whose value is its operand's.
        yield Step(function.parameter_name, ZIP, step.part(1), function.parameter_type)
    result = function.result
    if isinstance(result, framework.Block):
        for name, call in result.locals:
            is_intrinsic = isinstance(call.function, framework.Intrinsic)
            operation = call.function.uri if is_intrinsic else LOCAL_CALL
            yield Step(name, operation, call.argument, call.type_signature, call.function)
        result = result.result
    yield Step(step.name, ZIP, result, step.type)


def _host_computations(block: Block) -> list[HostComputation]:
    if isinstance(block, framework.CompiledComputation):
        local = from_proto(block.to_proto())
        return [local] if isinstance(local, HostComputation) else []
    return [host for child in block.children() for host in _host_computations(child)]


def _types_read(block: Block) -> list[fl.Type]:
    """The types of the values that a building block refers to."""
    if isinstance(block, framework.Reference | framework.Literal):
        return [block.type_signature]
    return [type_ for child in block.children() for type_ in _types_read(child)]


def _names_read(step: Step) -> set[str]:
    blocks = [block for block in (step.function, step.operand) if block is not None]
    return set[str]().union(*map(referenced_names, blocks))
