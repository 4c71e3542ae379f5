"""Plans: a normal form grouped into stages, each of which needs the cohort once.

Calls are placed at the server or at the clients. A reduction (sum, mean) turns what clients computed into a server
value and so ends a pass over the cohort; a broadcast starts one. Every call is put into the earliest pass that its
operands allow, which gives the fewest passes: server stage 0, client stage 0, server stage 1, client stage 1, ... A
client stage maps, fused, and reduces in one pass; clients-placed values that a later stage or the result needs are its
outputs, and become further columns of the cohort there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import federated_language as fl
from federated_language import framework

from fedlens.compiler.normalize import PARAMETER, Block, normalize, referenced_names
from fedlens.errors import UnsupportedError
from fedlens.language.types import tensor_types

AT_CLIENTS = {"federated_map", "federated_map_all_equal", "federated_eval_at_clients", "federated_zip_at_clients"}
SHARED = {
    "federated_broadcast",
    "federated_value_at_clients",
}  # clients-placed, equal at all: the server's value serves
AT_SERVER = {"federated_apply", "federated_eval_at_server", "federated_value_at_server", "federated_zip_at_server"}
REDUCTIONS = {"federated_sum", "federated_mean", "federated_weighted_mean"}
LOCAL_CALL = "local"


@dataclass(frozen=True)
class Input:
    """A part of the argument: one federated value, or a value without placement.

    Attributes:
      name: how steps refer to it, such as `arg[0]`.
      path: where it stands in the argument, position by position.
      type: its type, with containers when the computation knows them.
    """

    name: str
    path: tuple[int, ...]
    type: fl.Type

    @property
    def at_clients(self) -> bool:
        """Whether each client holds its own value, so that it is a column of the cohort."""
        return isinstance(self.type, fl.FederatedType) and self.type.placement is fl.CLIENTS and not self.type.all_equal


@dataclass(frozen=True)
class Step:
    """One call: what it is named, what it applies, and to what.

    Attributes:
      name: under which later steps refer to the result.
      operation: the URI of an intrinsic, or "local" for a local computation outside any placement.
      operand: the argument of the call, over the names of inputs and earlier steps; None if it takes none.
      function: the local computation of a "local" step.
      type: the type of the result.
    """

    name: str
    operation: str
    operand: Block | None
    type: fl.Type
    function: Block | None = None


@dataclass(frozen=True, eq=False)
class ServerStage:
    """Steps at the server (or at no place), and those of their results that are needed elsewhere."""

    body: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ClientStage:
    """One pass over the cohort.

    Attributes:
      index: which pass it is, from 0.
      columns: names of the clients-placed values it reads: inputs, or outputs of earlier stages.
      column_types: the member types of `columns`.
      shared: names of the values that are equal at all clients.
      body: the steps that run at each client.
      reductions: the steps that sum or average what `body` computed.
      outputs: names of the values of `body` that leave the stage client by client.
      output_types: the member types of `outputs`.
    """

    index: int
    columns: tuple[str, ...]
    column_types: tuple[fl.Type, ...]
    shared: tuple[str, ...]
    body: tuple[Step, ...]
    reductions: tuple[Step, ...]
    outputs: tuple[str, ...]
    output_types: tuple[fl.Type, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """What to run, in order, and how the result is put together.

    Attributes:
      inputs: the parts of the argument that are read, and all clients-placed ones, in the order of the argument.
      stages: server and client stages in the order of execution.
      result: a building block over the names of inputs and steps.
      placements: for each name, whether a value of it is per client ("clients"), or one ("server").
    """

    inputs: tuple[Input, ...]
    stages: tuple[ServerStage | ClientStage, ...]
    result: Block
    placements: dict[str, Literal["clients", "server"]]


def plan(computation: fl.Computation) -> Plan:
    """Plans a computation: `normalize`, then group its calls into stages.

    Args:
      computation: a computation with concrete types.

    Returns:
      The plan, whose client stages are as few as the data dependencies allow.

    Raises:
      UnsupportedError: an intrinsic that fedlens does not execute, named in the message.
    """
    return plan_normal_form(normalize(computation), computation.type_signature.parameter)


def plan_normal_form(normal_form: framework.Lambda, parameter_type: fl.Type | None = None) -> Plan:
    """Plans a computation that is in normal form; `parameter_type` adds the containers that a proto drops."""
    body = normal_form.result
    calls, result = (body.locals, body.result) if isinstance(body, framework.Block) else ([], body)
    inputs = _Inputs(parameter_type if parameter_type is not None else normal_form.parameter_type)
    steps = [_step(name, call, inputs) for name, call in calls]
    result = inputs.rename(result)
    inputs.take_cohorts()
    in_order = tuple(sorted(inputs.found.values(), key=lambda each: each.path))
    named: tuple[Input | Step, ...] = (*in_order, *steps)
    for each in named:
        if any(tensor.dtype.kind in "US" for tensor in tensor_types(each.type)):
            raise UnsupportedError(
                f"Expected values made of numbers, found strings in {each.name}, of type {each.type}."
            )
    return _group(steps, result, in_order)


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
        match block:
            case framework.Selection():
                return framework.Selection(self.rename(block.source), index=block.as_index())
            case framework.Struct():
                return framework.Struct([(name, self.rename(value)) for name, value in block.items()])
            case framework.Call():
                argument = None if block.argument is None else self.rename(block.argument)
                return framework.Call(self.rename(block.function), argument)
            case framework.Lambda():
                return framework.Lambda(block.parameter_name, block.parameter_type, self.rename(block.result))
            case framework.Block():
                return framework.Block(
                    [(name, self.rename(value)) for name, value in block.locals], self.rename(block.result)
                )
        return block


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
        _refuse_intrinsics_in(operand)
    if isinstance(call.function, framework.Intrinsic):
        operation = call.function.uri
        if operation not in AT_CLIENTS | SHARED | AT_SERVER | REDUCTIONS:
            raise _unsupported(operation)
        return Step(name, operation, operand, call.type_signature)
    return Step(name, LOCAL_CALL, operand, call.type_signature, call.function)


def _refuse_intrinsics_in(block: Block) -> None:
    """Refuses intrinsics inside of the functions that intrinsics take: those run at one place."""
    if isinstance(block, framework.Intrinsic):
        raise _unsupported(block.uri)
    for child in block.children():
        _refuse_intrinsics_in(child)


def _unsupported(uri: str) -> UnsupportedError:
    hint = " Use a fed.jax_computation, which gets a fed.Sequence." if uri.startswith("sequence_") else ""
    return UnsupportedError(f"Expected an intrinsic that fedlens executes, found {uri!r}.{hint}")


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
        placements[step.name] = "clients" if step.operation in AT_CLIENTS else "server"

    wanted_by_result = referenced_names(result) & depth.keys()
    stages: list[ServerStage | ClientStage] = []
    for level in range(max(depth.values(), default=0) + 1):
        at_server = [
            step
            for step in steps
            if depth[step.name] == level and placements[step.name] == "server" and step.operation not in REDUCTIONS
        ]
        at_clients = [step for step in steps if depth[step.name] == level and placements[step.name] == "clients"]
        reductions = [step for step in steps if depth[step.name] == level + 1 and step.operation in REDUCTIONS]
        for kind, body, ends in ((ServerStage, at_server, []), (ClientStage, at_clients, reductions)):
            inside = {step.name for step in (*body, *ends)}
            if not inside:
                continue
            used = set().union(*(needs[name] for name in inside)) - inside
            outside = [step for step in steps if step.name not in inside]
            wanted = wanted_by_result.union(*(needs[step.name] for step in outside))
            read = [
                name for name in depth if name in used
            ]  # in the order of inputs and steps: programs are cached by it
            leaving = tuple(step.name for step in body if step.name in wanted)
            if kind is ServerStage:
                stages.append(ServerStage(tuple(body), tuple(read), leaving))
                continue
            columns = tuple(name for name in read if placements[name] == "clients")
            stages.append(
                ClientStage(
                    index=sum(isinstance(stage, ClientStage) for stage in stages),
                    columns=columns,
                    column_types=tuple(_member(types[name]) for name in columns),
                    shared=tuple(name for name in read if placements[name] == "server"),
                    body=tuple(body),
                    reductions=tuple(ends),
                    outputs=leaving,
                    output_types=tuple(_member(types[name]) for name in leaving),
                )
            )
    return Plan(inputs, tuple(stages), result, placements)


def _needs(step: Step, known: dict[str, int]) -> set[str]:
    names = set() if step.operand is None else referenced_names(step.operand)
    if step.function is not None:
        names |= referenced_names(step.function)
    return {name for name in names if name in known}


def _member(type_: fl.Type) -> fl.Type:
    return type_.member if isinstance(type_, fl.FederatedType) else type_
