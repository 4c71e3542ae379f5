"""Evaluates the building blocks of a plan's steps over positional values, traced or eagerly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from federated_language import framework
from jax.extend.core import jaxpr_as_fun

from fedlens.compiler import ServerStage, Step
from fedlens.compiler.functions import describe_tracing
from fedlens.compiler.operations import ELEMENTS, GENERIC, SELECTS, unsupported
from fedlens.errors import UnsupportedError
from fedlens.language import HostComputation, LocalComputation
from fedlens.language.local_computation import from_proto
from fedlens.language.strings import literal
from fedlens.language.tracebacks import noting
from fedlens.language.types import holds_strings, tensor_types
from fedlens.runtime import arithmetic, sequences

Call = Callable[..., Any]  # call(local_computation, *positional) -> positional: how a local computation is run


def run_step(step: Step, environment: Mapping[str, Any], call: Call) -> Any:
    """The value of one step, at one place.

    Args:
      step: a step that is no reduction.
      environment: the values of the names that it refers to.
      call: how to run a local computation: `inline` under a trace, `eager` outside of one.
    """
    if step.function is not None:
        function = evaluate(step.function, environment, call)
        return function() if step.operand is None else function(evaluate(step.operand, environment, call))
    match step.operation:
        case "federated_map" | "federated_map_all_equal" | "federated_apply":
            function, argument = evaluate(step.operand, environment, call)
            return function(argument)
        case "federated_eval_at_clients" | "federated_eval_at_server":
            return evaluate(step.operand, environment, call)()
        case operation if operation in SELECTS:
            keys, _, server_value, function = evaluate(step.operand, environment, call)
            return sequences.selected(jnp.asarray(keys), server_value, function)
        case operation if operation == ELEMENTS and step.operand is not None:
            element_type, count = step.operand.type_signature.member.element, tensor_types(step.type)[0].shape[0]
            return sequences.stacked(evaluate(step.operand, environment, call), element_type, count)
    return evaluate(step.operand, environment, call)  # zip, value, broadcast: what is placed where does not change it


def evaluate_stage(stage: ServerStage, environment: Mapping[str, Any], call: Call) -> dict[str, Any]:
    """The values of a server stage's outputs."""
    values = dict(environment)
    for step in stage.body:
        with noting(describe_tracing("a server stage", step)):
            values[step.name] = run_step(step, values, call)
    return {name: values[name] for name in stage.outputs}


def calls_local_computation(step: Step) -> bool:
    """Whether a step computes anything, rather than move or select values."""
    blocks = [block for block in (step.function, step.operand) if block is not None]
    while blocks:
        block = blocks.pop()
        if isinstance(block, framework.CompiledComputation | framework.Intrinsic):
            return True
        blocks += block.children()
    return False


def evaluate(block: Any, environment: Mapping[str, Any], call: Call) -> Any:
    """The positional value of a building block; a function becomes a callable of positional values."""
    match block:
        case framework.Reference():
            return environment[block.name]
        case framework.Selection():
            return evaluate(block.source, environment, call)[block.as_index()]
        case framework.Struct():
            return tuple(evaluate(value, environment, call) for _, value in block.items())
        case framework.Literal():
            if holds_strings(block.type_signature):
                return literal(block.value)
            return np.asarray(block.value, block.type_signature.dtype)
        case framework.CompiledComputation():
            local = from_proto(block.to_proto())
            return lambda *argument: call(local, *argument)
        case framework.Lambda():
            return lambda *argument: evaluate(
                block.result, {**environment, **dict(zip([block.parameter_name], argument, strict=False))}, call
            )
        case framework.Call():
            function = evaluate(block.function, environment, call)
            return function() if block.argument is None else function(evaluate(block.argument, environment, call))
        case framework.Block():
            inner = dict(environment)
            for name, value in block.locals:
                inner[name] = evaluate(value, inner, call)
            return evaluate(block.result, inner, call)
        case framework.Intrinsic():
            return _intrinsic(block)
    raise UnsupportedError(f"Expected a building block that fedlens executes, found {type(block).__name__}: {block}.")


def _intrinsic(intrinsic: framework.Intrinsic) -> Any:
    """What runs wherever its operands are: a callable of one positional value, or the value of a generic zero."""
    uri, type_ = intrinsic.uri, intrinsic.type_signature
    match uri:
        case "generic_zero":
            return arithmetic.zero_of(type_)
        case "sequence_map":
            element_type = type_.parameter[1].element
            return lambda argument: sequences.mapped(argument[1], argument[0], element_type)
        case "sequence_reduce":
            element_type = type_.parameter[0].element
            return lambda argument: sequences.reduced(argument[0], argument[1], argument[2], element_type)
        case "sequence_sum":
            element_type = type_.parameter.element
            return lambda sequence: sequences.summed(sequence, element_type, tensor_types(element_type))
    if uri in GENERIC:
        return lambda argument: arithmetic.apply(uri, argument[0], argument[1], type_.result)
    raise unsupported(uri)


def eager(local: LocalComputation | HostComputation, *argument: Any) -> Any:
    """Runs a local computation now, operation by operation: the user's prints and breakpoints see values.

    They are JAX arrays, as under a trace: NumPy's have other methods, and other rules of promotion. A Python
    computation gets NumPy's.
    """
    if isinstance(local, HostComputation):
        return local(*_for(local, argument))
    return local(*jax.tree.map(_as_jax, _for(local, argument)))


def _for(local: LocalComputation | HostComputation, argument: tuple[Any, ...]) -> tuple[Any, ...]:
    parameter = local.type_signature.parameter
    return argument if parameter is None else (sequences.in_containers_of(argument[0], parameter),)


def _as_jax(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf


def inline(local: LocalComputation, *argument: Any) -> Any:
    """Traces a local computation on its own, then splices it into the program that is being traced.

    On its own, because whether 64-bit types are enabled is decided for each local computation, not for the program. The
    computation decides it for itself; its arguments keep their bits, as the rows under a mapped sequence may be wider
    than the batches that it sees.
    """
    leaves, structure = jax.tree.flatten(_for(local, argument))
    result_structure: list[Any] = []

    def flat(*flat_leaves: Any) -> list[Any]:
        result = local(*jax.tree.unflatten(structure, flat_leaves))
        result_leaves, tree = jax.tree.flatten(result)
        result_structure.append(tree)
        return result_leaves

    with jax.enable_x64(True):
        program = jax.make_jaxpr(flat)(*(jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype) for leaf in leaves))
    return jax.tree.unflatten(result_structure[-1], jaxpr_as_fun(program)(*leaves))
