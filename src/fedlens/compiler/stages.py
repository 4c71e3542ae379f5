"""What a plan consists of: inputs, steps, stages.

A step is one call. A stage is a run of steps at one place: at the server, or at the clients, where it is one pass over
the cohort and may end in reductions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import federated_language as fl
from federated_language import framework

from fedlens.compiler.normalize import Block
from fedlens.compiler.operations import ELEMENTS, EVAL, MAP
from fedlens.compiler.origins import moves
from fedlens.language.types import contains_sequence, is_at_clients, num_bytes


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
        return is_at_clients(self.type)


@dataclass(frozen=True)
class Step:
    """One call: what it is named, what it applies, and to what.

    Attributes:
      name: under which later steps refer to the result.
      operation: the URI of an intrinsic; "local" for a local computation outside any placement; "elements" for the
        elements of a select, stacked.
      operand: the argument of the call, over the names of inputs and earlier steps; None if it takes none.
      function: what is called outside any placement: a local computation, or an intrinsic over sequences or numbers.
      type: the type of the result.
    """

    name: str
    operation: str
    operand: Block | None
    type: fl.Type
    function: Block | None = None

    def part(self, index: int) -> Block:
        """One of the arguments of an intrinsic that takes several."""
        if isinstance(self.operand, framework.Struct):
            return list(self.operand.items())[index][1]
        return framework.Selection(self.operand, index=index)

    @cached_property
    def is_lazy(self) -> bool:
        """Whether it makes a sequence, which is computed when and where it is folded."""
        return contains_sequence(self.type)


@dataclass(frozen=True, eq=False)
class ServerStage:
    """Steps at the server (or at no place), and those of their results that are needed elsewhere.

    Outputs are sequences in the last stage alone, where the result is one.
    """

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
      reductions: the steps that sum, average or otherwise aggregate what `body` computed.
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

    @cached_property
    def computed_bytes(self) -> int:
        """The bytes that a client computes, whether they leave it or not; those that are moved are counted once."""
        computing = [
            step
            for step in self.body
            if step.operation in (ELEMENTS, EVAL)
            or (step.operation == MAP and not moves(step.part(0)) and not step.is_lazy)
        ]
        return sum(num_bytes(step.type) for step in computing)


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


def result_parts(block: Block, type_: fl.Type, path: str = "") -> Iterator[tuple[str, Block, fl.Type]]:
    """The parts of a result, each at one placement: path, building block, type."""
    federated = framework.type_contains(type_, lambda part: isinstance(part, fl.FederatedType))
    if isinstance(type_, fl.StructType) and isinstance(block, framework.Struct) and federated:
        for position, ((name, field), (_, child)) in enumerate(zip(type_.items(), block.items(), strict=True)):
            yield from result_parts(child, field, f"{path}/{position if name is None else name}".lstrip("/"))
    else:
        yield path, block, type_
