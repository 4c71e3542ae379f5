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
from fedlens.errors import UnsupportedError
from fedlens.language import LocalComputation
from fedlens.language.local_computation import from_proto

Call = Callable[..., Any]  # call(local_computation, *positional) -> positional: how a local computation is run


def run_step(step: Step, environment: Mapping[str, Any], call: Call) -> Any:
    """The value of one step, at one place.

    Args:
      step: a step that is no reduction.
      environment: the values of the names that it refers to.
      call: how to run a local computation: `inline` under a trace, `eager` outside of one.
    """
    match step.operation:
        case "federated_map" | "federated_map_all_equal" | "federated_apply":
            function, argument = evaluate(step.operand, environment, call)
            return function(argument)
        case "federated_eval_at_clients" | "federated_eval_at_server":
            return evaluate(step.operand, environment, call)()
        case "local":
            function = evaluate(step.function, environment, call)
            return function() if step.operand is None else function(evaluate(step.operand, environment, call))
    return evaluate(step.operand, environment, call)  # zip, value, broadcast: what is placed where does not change it


def evaluate_stage(stage: ServerStage, environment: Mapping[str, Any], call: Call) -> dict[str, Any]:
    """The values of a server stage's outputs."""
    values = dict(environment)
    for step in stage.body:
        values[step.name] = run_step(step, values, call)
    return {name: values[name] for name in stage.outputs}


def calls_local_computation(step: Step) -> bool:
    """Whether a step computes anything, rather than move or select values."""
    blocks = [block for block in (step.function, step.operand) if block is not None]
    while blocks:
        block = blocks.pop()
        if isinstance(block, framework.CompiledComputation):
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
            raise UnsupportedError(f"Expected an intrinsic that fedlens executes, found {block.uri!r}.")
    raise UnsupportedError(f"Expected a building block that fedlens executes, found {type(block).__name__}: {block}.")


def eager(local: LocalComputation, *argument: Any) -> Any:
    """Runs a local computation now, operation by operation: the user's prints and breakpoints see values.

    They are JAX arrays, as under a trace: NumPy's have other methods, and other rules of promotion.
    """
    return local(*jax.tree.map(_as_jax, argument))


def _as_jax(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf


def inline(local: LocalComputation, *argument: Any) -> Any:
    """Traces a local computation on its own, then splices it into the program that is being traced.

    On its own, because whether 64-bit types are enabled is decided for each local computation, not for the program.
    """
    leaves, structure = jax.tree.flatten(argument)
    result_structure: list[Any] = []

    def flat(*flat_leaves: Any) -> list[Any]:
        result = local(*jax.tree.unflatten(structure, flat_leaves))
        result_leaves, tree = jax.tree.flatten(result)
        result_structure.append(tree)
        return result_leaves

    with jax.enable_x64(local.wide):
        program = jax.make_jaxpr(flat)(*(jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype) for leaf in leaves))
    return jax.tree.unflatten(result_structure[-1], jaxpr_as_fun(program)(*leaves))
