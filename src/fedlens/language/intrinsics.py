"""The two operators of the language that fedlens widens; all others are re-exported as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import federated_language as fl
from federated_language import framework

from fedlens.language.jax_computation import jax_computation


def federated_map(fn: Any, arg: Any) -> fl.Value:
    """Maps `fn` over the constituents of a federated value, at the place where the value is.

    The operator of `federated_language`, which also takes a plain Python callable here and wraps it in
    `jax_computation`.

    Args:
      fn: a computation of one argument, or a function of JAX operations.
      arg: a federated value, or a structure of values at one placement (which is zipped).

    Returns:
      The mapped value, at the placement of `arg`.
    """
    known = isinstance(
        fn, fl.Computation | fl.Value | framework.PolymorphicComputation | framework.ComputationBuildingBlock
    )
    if isinstance(fn, Callable) and not known:  # type: ignore[arg-type]
        fn = jax_computation(fn)
    return fl.federated_map(fn, arg)


def federated_zip(value: Any) -> fl.Value:
    """Turns a structure of federated values into one federated value of structures.

    The operator of `federated_language`, which also takes values at different placements here: such a structure is
    returned as it is, each member keeping its placement.

    Args:
      value: a structure (dict, tuple, NamedTuple, ...) of federated values.

    Returns:
      One federated value if all members have one placement, else the structure.
    """
    structure = fl.to_value(value, type_spec=None)
    if len(_placements(structure.type_signature)) > 1:
        return structure
    return fl.federated_zip(structure)


def _placements(type_: fl.Type) -> set[Any]:
    if isinstance(type_, fl.FederatedType):
        return {type_.placement}
    if isinstance(type_, fl.StructType):
        return {placement for _, field in type_.items() for placement in _placements(field)}
    return set()
