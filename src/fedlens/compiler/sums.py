"""Whether the accumulation of a user-written aggregate is a sum, and so what it gives an aggregate."""

from __future__ import annotations

from typing import Any

import jax
from federated_language import framework

from fedlens.compiler.functions import function_of
from fedlens.compiler.normalize import Block
from fedlens.language import LocalComputation
from fedlens.language.local_computation import abstract_value
from fedlens.language.types import contains_sequence, is_static


def is_sum(function: Block) -> bool:
    """Whether a function of two values of one type adds them, leaf by leaf, and does nothing else.

    Shown of the language's own `generic_plus`, of a JAX computation that consists of one addition for each leaf, and of
    a computation that only calls such a one. What comes out of a portable computation cannot be looked into.
    """
    match function:
        case framework.Intrinsic():
            return bool(function.uri == "generic_plus")
        case framework.Lambda():
            call = _only_call(function.result)
            return call is not None and is_sum(call.function) and _is_both(call.argument, function.parameter_name)
        case framework.CompiledComputation():
            local = function_of(function)
            return isinstance(local, LocalComputation) and _adds(local)
    return False


def _only_call(block: Block) -> framework.Call | None:
    """The call whose result is all of a block's result."""
    if isinstance(block, framework.Block) and isinstance(block.result, framework.Reference):
        block = dict(block.locals).get(block.result.name)
    return block if isinstance(block, framework.Call) else None


def _is_both(block: Block | None, parameter: str | None) -> bool:
    """Whether an argument is a function's two arguments as they are."""
    if isinstance(block, framework.Reference):
        return bool(block.name == parameter)
    if not isinstance(block, framework.Struct) or len(block) != 2:
        return False
    return all(
        isinstance(part, framework.Selection)
        and isinstance(part.source, framework.Reference)
        and part.source.name == parameter
        and part.as_index() == index
        for index, (_, part) in enumerate(block.items())
    )


def _adds(local: LocalComputation) -> bool:
    parameter = local.type_signature.parameter
    if parameter is None or contains_sequence(parameter) or not is_static(parameter):
        return False
    with jax.enable_x64(local.wide):
        program = jax.make_jaxpr(local)(abstract_value(parameter)).jaxpr
    count = len(program.outvars)
    if len(program.invars) != 2 * count or len(program.eqns) != count:
        return False
    added: dict[Any, list[Any]] = {
        equation.outvars[0]: list(equation.invars) for equation in program.eqns if equation.primitive.name == "add"
    }
    pairs = zip(program.outvars, program.invars[:count], program.invars[count:], strict=True)
    return all(added.get(out) in ([first, second], [second, first]) for out, first, second in pairs)
