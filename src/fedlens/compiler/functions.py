"""The names of the user's functions that a step of a plan calls: what plans, errors and logs call a step by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from federated_language import framework

from fedlens.compiler.normalize import Block
from fedlens.errors import UnsupportedError
from fedlens.language import HostComputation, LocalComputation
from fedlens.language.local_computation import from_proto

if TYPE_CHECKING:
    from fedlens.compiler.stages import Step


def function_of(block: framework.CompiledComputation) -> LocalComputation | HostComputation | None:
    """The local computation that a building block names; None if it is of another process or runtime."""
    try:
        return from_proto(block.to_proto())
    except UnsupportedError:  # it cannot run here, and may still be explained
        return None


def function_name(block: framework.CompiledComputation) -> str:
    """The name of the Python function that a local computation was made from."""
    local = function_of(block)
    return "(a function of another process)" if local is None else local.name


def function_names(step: Step) -> tuple[str, ...]:
    """The names of the functions that a step calls, in the order in which they stand; none if it only moves values."""
    blocks = [block for block in (step.function, step.operand) if block is not None]
    return tuple(dict.fromkeys(name for block in blocks for name in function_names_in(block)))


def function_names_in(block: Block) -> Iterator[str]:
    """The names of the functions in a building block, in the order in which they stand."""
    if isinstance(block, framework.CompiledComputation):
        yield function_name(block)
    for child in block.children():
        yield from function_names_in(child)


def describe_step(step: Step) -> str:
    """A step as errors name it: `step 'federated_map_0', function 'train'`."""
    names = function_names(step)
    return f"step {step.name!r}" + (
        f", function{'s' * (len(names) > 1)} {', '.join(map(repr, names))}" if names else ""
    )


def describe_tracing(place: str, *steps: Step) -> str:
    """Where an error happened when a stage was traced, and how to see more: what follows "This happened".

    Args:
      place: what is traced, such as "client stage 0".
      *steps: the step of it, or those of which it was one.
    """
    calling = [step for step in steps if function_names(step)] or steps
    inside = f", in {' or '.join(map(describe_step, calling))}" if calling else ""
    return (
        f"while {place} was traced{inside}; it is the same for all clients. "
        'Run it inside of fed.use("debug"): the traceback then ends at your own line, and a note names the client'
    )
