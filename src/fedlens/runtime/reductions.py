"""Reductions as accumulators: zero, accumulate one client, merge two partial results, finish.

A client stage reduces in the pass that computes: each device folds its clients into an accumulator, and partial results
are merged in the order of devices and chunks. 16-bit floats accumulate in float32. Weights accumulate in float64,
whatever their type: a sum of int32 would overflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from fedlens.compiler import Step
from fedlens.language.types import leaf_paths, tensor_types
from fedlens.runtime.columns import nest

Accumulator = dict[str, list[jax.Array]]  # step name -> its parts


def zeros(step: Step) -> list[jax.Array]:
    """The accumulator of no client: the sums of the leaves, and the total weight of a mean."""
    sums = [jnp.zeros(tensor.shape, accumulation_dtype(tensor.dtype)) for tensor in tensor_types(step.type)]
    return sums if step.operation == "federated_sum" else [*sums, jnp.zeros((), jnp.float64)]


def accumulate(step: Step, accumulator: Sequence[jax.Array], operand: Any) -> list[jax.Array]:
    """Adds one client's operand: a value, or a value and its weight."""
    if step.operation == "federated_sum":
        return [total + leaf.astype(total.dtype) for total, leaf in zip(accumulator, leaves(operand), strict=True)]
    *totals, total_weight = accumulator
    value, weight = operand if step.operation == "federated_weighted_mean" else (operand, None)
    if weight is None:
        sums = [total + leaf.astype(total.dtype) for total, leaf in zip(totals, leaves(value), strict=True)]
        return [*sums, total_weight + 1.0]
    weighted = [
        total + leaf.astype(total.dtype) * weight.astype(total.dtype)
        for total, leaf in zip(totals, leaves(value), strict=True)
    ]
    return [*weighted, total_weight + weight.astype(jnp.float64)]


def accumulate_group(
    step: Step, accumulator: Sequence[jax.Array], operands: Any, counted: Bool[Array, " group"]
) -> list[jax.Array]:
    """Adds the operands of several clients, stacked along their first axis, of those that are `counted`."""
    value, weight = operands if step.operation == "federated_weighted_mean" else (operands, None)
    added = []
    for total, leaf in zip(accumulator, leaves(value), strict=False):
        of_each = leaf.astype(total.dtype)
        if weight is not None:
            of_each = of_each * _along(weight.astype(total.dtype), of_each)
        added.append(total + jnp.where(_along(counted, of_each), of_each, 0).sum(axis=0, dtype=total.dtype))
    if step.operation == "federated_sum":
        return added
    weights = jnp.ones(counted.shape, jnp.float64) if weight is None else weight.astype(jnp.float64)
    return [*added, accumulator[-1] + jnp.where(counted, weights, 0).sum()]


def _along(of_clients: jax.Array, leaf: jax.Array) -> jax.Array:
    """One number for each client, shaped to multiply the clients' leaves."""
    return of_clients.reshape(-1, *[1] * (leaf.ndim - 1))


def merge(first: Any, second: Any) -> Any:
    """Merges two accumulators of the same step; `first` is of earlier clients."""
    return jax.tree.map(jnp.add, first, second)


def finish(step: Step, accumulator: Sequence[jax.Array]) -> Any:
    """The positional result in its declared dtypes. A weighted mean of total weight zero is NaN, as in the language."""
    tensors = tensor_types(step.type)
    if step.operation == "federated_sum":
        sums = accumulator
    else:
        *totals, weight = accumulator
        sums = [total / weight.astype(total.real.dtype) for total in totals]
    return nest(member(step), [total.astype(tensor.dtype) for total, tensor in zip(sums, tensors, strict=True)])


def accumulation_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """float32 for 16-bit floats, the dtype itself otherwise."""
    return np.dtype(np.float32) if dtype.itemsize == 2 and jnp.issubdtype(dtype, jnp.floating) else dtype


def member(step: Step) -> fl.Type:
    """The type of the value that a step makes, without its placement."""
    return step.type.member if isinstance(step.type, fl.FederatedType) else step.type


def leaves(value: Any) -> list[jax.Array]:
    """The leaves of a positional value."""
    return [jnp.asarray(leaf) for leaf in jax.tree.leaves(value)]


def checked_leaves(steps: Sequence[Step]) -> list[str]:
    """The names of the floating-point leaves that enter reductions, weights too, in the order of `finite`'s flags."""
    names = []
    for step in steps:
        operands = [(leaf_paths(step.type), tensor_types(step.type))]
        if step.operation == "federated_weighted_mean" and step.operand is not None:
            operands.append((["weight"], tensor_types(step.operand.type_signature[1])))
        names += [
            path or "value"
            for paths, tensors in operands
            for path, tensor in zip(paths, tensors, strict=True)
            if jnp.issubdtype(tensor.dtype, jnp.inexact)
        ]
    return names


def finite(steps: Sequence[Step], operands: Sequence[Any]) -> jax.Array:
    """For each leaf of `checked_leaves` whether one client's operand is finite throughout: bool[leaves]."""
    inexact = [leaf for leaf in leaves(list(operands)) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    flags = [jnp.isfinite(leaf).all() for leaf in inexact]
    return jnp.stack(flags) if flags else jnp.ones((0,), jnp.bool_)


def all_finite(accumulators: Any) -> jax.Array:
    """Whether sums are finite throughout; then so was every operand, as what is not finite stays so in a sum."""
    flags = [jnp.isfinite(leaf).all() for leaf in leaves(accumulators) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack(flags).all() if flags else jnp.bool_(True)
