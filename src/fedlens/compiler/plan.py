"""Plans: a normal form grouped into stages, each of which needs the cohort once.

Calls are placed at the server or at the clients. A reduction (sum, mean) turns what clients computed into a server
value and so ends a pass over the cohort; a broadcast starts one. Every call is put into the earliest pass that its
operands allow, which gives the fewest passes: server stage 0, client stage 0, server stage 1, client stage 1, ... A
client stage maps, fused, and reduces in one pass; clients-placed values that a later stage or the result needs are its
outputs, and become further columns of the cohort there. Sequences are lazy, and never leave a stage: what makes them is
repeated in each stage that reads them, which costs nothing until somebody folds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import federated_language as fl
from federated_language import framework

from fedlens.compiler.normalize import PARAMETER, Block, calls_and_result, normalize, referenced_names
from fedlens.compiler.operations import (
    AT_CLIENTS,
    AT_SERVER,
    ELEMENTS,
    LOCAL_CALL,
    REDUCTIONS,
    SELECTS,
    UNPLACED,
    check_reducible,
    unsupported,
)
from fedlens.compiler.operations import SHARED as SHARED
from fedlens.compiler.segments import check_host_work
from fedlens.compiler.stages import ClientStage as ClientStage
from fedlens.compiler.stages import Input as Input
from fedlens.compiler.stages import Plan as Plan
from fedlens.compiler.stages import ServerStage as ServerStage
from fedlens.compiler.stages import Step as Step
from fedlens.errors import UnsupportedError
from fedlens.language.types import member_of


def plan(computation: fl.Computation) -> Plan:
    """Plans a computation: `normalize`, then group its calls into stages.

    Args:
      computation: a computation with concrete types.

    Returns:
      The plan, whose client stages are as few as the data dependencies allow.

    Raises:
      UnsupportedError: an intrinsic that fedlens does not execute, named in the message.
      LanguageError: a reduction of a dtype that the language refuses there.
    """
    return plan_normal_form(normalize(computation), computation.type_signature.parameter)


def plan_normal_form(normal_form: framework.Lambda, parameter_type: fl.Type | None = None) -> Plan:
    """Plans a computation that is in normal form; `parameter_type` adds the containers that a proto drops."""
    calls, result = calls_and_result(normal_form)
    inputs = _Inputs(parameter_type if parameter_type is not None else normal_form.parameter_type)
    steps = _without_captured_sequences([_step(name, call, inputs) for name, call in calls])
    steps, result = _with_elements(steps, inputs.rename(result))
    inputs.take_cohorts()
    in_order = tuple(sorted(inputs.found.values(), key=lambda each: each.path))
    found = _group(steps, result, in_order)
    for stage in found.stages:
        check_host_work(stage)
    return found


class _Inputs:
    """Gives each part of the parameter that a plan reads a name of its own."""

    def __init__(self, parameter_type: fl.Type | None):
        self._parameter_type = parameter_type
        self.found: dict[str, Input] = {}

    def take_cohorts(self) -> None:
        """Adds the clients-placed parts that nothing refers to: they too say who takes part."""
        parts: list[tuple[tuple[int, ...], fl.Type]] = [((), self._parameter_type)]
        while parts:
            path, type_ = parts.pop()
            if isinstance(type_, fl.StructType):
                parts += [((*path, index), field) for index, (_, field) in enumerate(type_.items())]
            elif isinstance(type_, fl.FederatedType):
                unread = Input(_name_of(path), path, type_)
                if unread.at_clients:
                    self.found.setdefault(unread.name, unread)

    def rename(self, block: Block) -> Block:
        """`block` with references to federated (or unplaced) parts of the parameter under the names of `found`."""
        path = _parameter_path(block)
        if path is not None:
            type_: Any = self._parameter_type
            for index in path:
                type_ = type_[index]
            if not _holds_federated_fields(type_):
                name = _name_of(path)
                self.found[name] = Input(name, path, type_)
                return framework.Reference(name, block.type_signature)
            return framework.Struct(
                [
                    (name, self.rename(framework.Selection(block, index=index)))
                    for index, (name, _) in enumerate(type_.items())
                ]
            )
        return _rebuilt(block, self.rename)


def _name_of(path: tuple[int, ...]) -> str:
    return PARAMETER + "".join(f"[{index}]" for index in path)


def _parameter_path(block: Block) -> tuple[int, ...] | None:
    if isinstance(block, framework.Reference):
        return () if block.name == PARAMETER else None
    if isinstance(block, framework.Selection):
        source = _parameter_path(block.source)
        return None if source is None else (*source, block.as_index())
    return None


def _holds_federated_fields(type_: fl.Type) -> bool:
    return isinstance(type_, fl.StructType) and framework.type_contains(
        type_, lambda part: isinstance(part, fl.FederatedType)
    )


def _step(name: str, call: framework.Call, inputs: _Inputs) -> Step:
    operand = None if call.argument is None else inputs.rename(call.argument)
    if operand is not None:
        _check_functions_in(operand)
    if not isinstance(call.function, framework.Intrinsic):
        return Step(name, LOCAL_CALL, operand, call.type_signature, call.function)
    operation = call.function.uri
    if operation in UNPLACED:
        return Step(name, operation, operand, call.type_signature, call.function)
    if operation not in AT_CLIENTS | SHARED | AT_SERVER | REDUCTIONS:
        raise unsupported(operation)
    if operation in REDUCTIONS:
        parameter = call.function.type_signature.parameter
        reduced = parameter[1] if operation == "federated_aggregate" else call.type_signature.member
        check_reducible(operation, name, reduced)
        check_reducible("", name, call.type_signature.member)  # no sequences, even out of a report
    return Step(name, operation, operand, call.type_signature)


def _check_functions_in(block: Block) -> None:
    """Refuses federated intrinsics inside of the functions that intrinsics take: those run at one place."""
    if isinstance(block, framework.Intrinsic) and block.uri not in UNPLACED:
        raise unsupported(block.uri)
    for child in block.children():
        _check_functions_in(child)


def _with_elements(steps: list[Step], result: Block) -> tuple[list[Step], Block]:
    """Adds a step for each select that the result hands out: its elements, stacked, leave the clients."""
    named = {step.name: step for step in steps}
    handed_out: dict[str, Block] = {}
    for name in sorted(referenced_names(result) & named.keys()):
        step = named[name]
        if not step.is_lazy or step.operation not in AT_CLIENTS:
            continue
        if step.operation not in SELECTS:
            raise UnsupportedError(
                f"Expected a result made of tensors, found sequences at the clients in {name}, of type {step.type}. "
                "Fold them at the clients (fed.sequence_reduce, or a fed.jax_computation that gets a fed.Sequence)."
            )
        elements = f"{name}_{ELEMENTS}"
        handed_out[name] = framework.Reference(elements, step.type)
        count = step.part(0).type_signature.member.shape[0]
        type_ = fl.FederatedType(_stacked(step.type.member.element, count), fl.CLIENTS)
        operand = framework.Reference(name, step.type)
        steps = [*steps, Step(elements, ELEMENTS, operand, type_)]
    return steps, _replaced(result, handed_out)


def _stacked(type_: fl.Type, count: int) -> fl.Type:
    if isinstance(type_, fl.StructType):
        return fl.StructType([(name, _stacked(field, count)) for name, field in type_.items()])
    return fl.TensorType(type_.dtype, (count, *type_.shape))


def _without_captured_sequences(steps: list[Step]) -> list[Step]:
    """Puts the sequences that functions of an aggregate capture into these functions.

    They run beside the passes too, where results are merged and reported, and where no step makes a sequence.
    """
    made: dict[str, Block] = {}
    result = []
    for step in steps:
        if step.operation == "sequence_map":
            made[step.name] = framework.Call(step.function, _replaced(step.operand, made))
        elif step.operation == "federated_aggregate":
            step = replace(step, operand=_replaced(step.operand, made))
        result.append(step)
    return result


def _replaced(block: Block, blocks: dict[str, Block]) -> Block:
    """`block` with other blocks in place of references to some names."""
    if isinstance(block, framework.Reference):
        return blocks.get(block.name, block)
    return _rebuilt(block, lambda child: _replaced(child, blocks))


def _rebuilt(block: Block, of_child: Callable[[Block], Block]) -> Block:
    """`block` with `of_child` applied to each of its children."""
    match block:
        case framework.Selection():
            return framework.Selection(of_child(block.source), index=block.as_index())
        case framework.Struct():
            return framework.Struct([(name, of_child(value)) for name, value in block.items()])
        case framework.Call():
            return framework.Call(
                of_child(block.function), None if block.argument is None else of_child(block.argument)
            )
        case framework.Lambda():
            return framework.Lambda(block.parameter_name, block.parameter_type, of_child(block.result))
        case framework.Block():
            return framework.Block([(name, of_child(value)) for name, value in block.locals], of_child(block.result))
    return block


def _group(steps: list[Step], result: Block, inputs: tuple[Input, ...]) -> Plan:
    placements: dict[str, Literal["clients", "server"]] = {
        each.name: "clients" if each.at_clients else "server" for each in inputs
    }
    types = {each.name: each.type for each in inputs} | {step.name: step.type for step in steps}
    depth = {each.name: 0 for each in inputs}
    needs: dict[str, set[str]] = {}
    for step in steps:
        needs[step.name] = _needs(step, depth)
        depth[step.name] = max((depth[name] for name in needs[step.name]), default=0) + (step.operation in REDUCTIONS)
        placements[step.name] = "clients" if step.operation in {*AT_CLIENTS, ELEMENTS} else "server"

    named = {step.name: step for step in steps}

    def with_lazy(own: list[Step]) -> tuple[Step, ...]:
        """`own` with the steps before them that make their sequences, in order."""
        inside = {step.name for step in own}
        waiting = list(inside)
        while waiting:
            for name in needs[waiting.pop()] - inside:
                if name in named and named[name].is_lazy:
                    inside.add(name)
                    waiting.append(name)
        return tuple(step for step in steps if step.name in inside)

    def used_by(*body: Step) -> set[str]:
        return set[str]().union(*(needs[step.name] for step in body)) - {step.name for step in body}

    grouped: list[tuple[bool, tuple[Step, ...], tuple[Step, ...]]] = []  # (at clients, body, reductions)
    for level in range(max(depth.values(), default=0) + 1):
        for place in ("server", "clients"):
            own = [
                step
                for step in steps
                if depth[step.name] == level
                and placements[step.name] == place
                and step.operation not in REDUCTIONS
                and not step.is_lazy
            ]
            ends = [step for step in steps if depth[step.name] == level + 1 and step.operation in REDUCTIONS]
            ends = ends if place == "clients" else []
            if own or ends:
                body = tuple(step for step in with_lazy([*own, *ends]) if step.operation not in REDUCTIONS)
                grouped.append((place == "clients", body, tuple(ends)))

    wanted_by_result = referenced_names(result) & depth.keys()
    if lazy := [step for step in steps if step.name in wanted_by_result and step.is_lazy]:
        grouped.append((False, with_lazy(lazy), ()))
    used = [used_by(*body, *ends) for _, body, ends in grouped]
    wanted = wanted_by_result.union(*used)

    stages: list[ServerStage | ClientStage] = []
    for (at_clients, body, ends_here), outside in zip(grouped, used, strict=True):
        # In the order of inputs and steps: programs are cached by it.
        read = tuple(name for name in depth if name in outside)
        is_last = len(stages) == len(grouped) - 1
        leaving = tuple(step.name for step in body if step.name in wanted and (is_last or not step.is_lazy))
        if not at_clients:
            stages.append(ServerStage(body, read, leaving))
            continue
        columns = tuple(name for name in read if placements[name] == "clients")
        stages.append(
            ClientStage(
                index=sum(isinstance(stage, ClientStage) for stage in stages),
                columns=columns,
                column_types=tuple(member_of(types[name]) for name in columns),
                shared=tuple(name for name in read if placements[name] == "server"),
                body=body,
                reductions=ends_here,
                outputs=leaving,
                output_types=tuple(member_of(types[name]) for name in leaving),
            )
        )
    return Plan(inputs, tuple(stages), result, placements)


def _needs(step: Step, known: dict[str, int]) -> set[str]:
    names = set() if step.operand is None else referenced_names(step.operand)
    if step.function is not None:
        names |= referenced_names(step.function)
    return {name for name in names if name in known}
