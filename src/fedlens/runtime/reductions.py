"""Reductions as accumulators: zero, accumulate one client, merge two partial results, finish.

A client stage reduces in the pass that computes: each device folds its clients into an accumulator, and partial results
are merged in the order of devices and chunks. 16-bit floats accumulate in float32. Weights accumulate in float64,
whatever their type: a sum of int32 would overflow. Secure sums accumulate in uint64 for the same reason, and remember
whether even that overflowed. What an aggregate does is the user's: functions over the names of the stage, so that every
operation here takes the values of these names and how to call a local computation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from fedlens.compiler import Step
from fedlens.compiler.normalize import referenced_names
from fedlens.compiler.operations import EXTREMES, MEANS, SECURE_SUMS
from fedlens.language.types import tensor_types
from fedlens.runtime.arithmetic import accumulation_dtype
from fedlens.runtime.columns import nest
from fedlens.runtime.interpreter import Call, evaluate

Accumulator = list[jax.Array]  # of one step, its parts; those of a stage are step name -> accumulator
Environment = Mapping[str, Any]  # name -> positional value

_AGGREGATE = "federated_aggregate"
_ZERO, _ACCUMULATE, _MERGE, _REPORT = 1, 2, 3, 4  # the parts of an aggregate's operand, after the value


def is_sum(step: Step) -> bool:
    """Whether what is not finite in a client's value stays so in the accumulator, as in sums and means."""
    return step.operation == "federated_sum" or step.operation in MEANS


def sent(step: Step, environment: Environment, call: Call) -> Any:
    """What one client sends into a reduction, positional: its value, or a value and its weight."""
    is_pair = step.operation in SECURE_SUMS or step.operation == _AGGREGATE
    return evaluate(step.part(0) if is_pair else step.operand, environment, call)


def sent_type(step: Step) -> fl.Type:
    """The type of what one client `sent`."""
    is_pair = step.operation in SECURE_SUMS or step.operation == _AGGREGATE
    block = step.part(0) if is_pair else step.operand
    return None if block is None else block.type_signature


def zeros(step: Step, environment: Environment, call: Call) -> Accumulator:
    """The accumulator of no client: sums of the leaves and the total weight of a mean; the identity of a minimum."""
    if step.operation == _AGGREGATE:
        types = tensor_types(step.part(_ZERO).type_signature)
        found = jax.tree.leaves(evaluate(step.part(_ZERO), environment, call))
        return [jnp.asarray(leaf, tensor.dtype) for leaf, tensor in zip(found, types, strict=True)]
    tensors = tensor_types(step.type)
    if step.operation in EXTREMES:
        return [jnp.full(tensor.shape, _identity(step.operation, tensor.dtype), tensor.dtype) for tensor in tensors]
    if step.operation in SECURE_SUMS:
        return [*(jnp.zeros(tensor.shape, jnp.uint64) for tensor in tensors), jnp.zeros(len(tensors), jnp.bool_)]
    sums = [jnp.zeros(tensor.shape, accumulation_dtype(tensor.dtype)) for tensor in tensors]
    return sums if step.operation == "federated_sum" else [*sums, jnp.zeros((), jnp.float64)]


def accumulate(
    step: Step, accumulator: Sequence[jax.Array], operand: Any, environment: Environment, call: Call
) -> Accumulator:
    """Adds one client's operand, as `sent` gives it."""
    if step.operation == _AGGREGATE:
        return _combine(step, _ACCUMULATE, (_structured(step, accumulator), operand), environment, call)
    if step.operation in EXTREMES:
        return [_extreme(step)(so_far, leaf) for so_far, leaf in zip(accumulator, leaves(operand), strict=True)]
    if step.operation in SECURE_SUMS:
        *totals, carried = accumulator
        added = [leaf.astype(jnp.uint64) for leaf in leaves(operand)]
        return _with_carries(totals, added, carried)
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
    step: Step,
    accumulator: Sequence[jax.Array],
    operands: Any,
    counted: Bool[Array, " group"],
    environment: Environment,
    call: Call,
) -> Accumulator:
    """Adds the operands of several clients, stacked along their first axis, of those that are `counted`."""
    if step.operation == _AGGREGATE or step.operation in SECURE_SUMS:
        return _one_by_one(step, accumulator, operands, counted, environment, call)
    if step.operation in EXTREMES:
        return [
            _extreme(step)(so_far, _extreme_of_group(step, leaf, counted))
            for so_far, leaf in zip(accumulator, leaves(operands), strict=True)
        ]
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


def merge(
    step: Step, first: Sequence[jax.Array], second: Sequence[jax.Array], environment: Environment, call: Call
) -> Accumulator:
    """Merges two accumulators; `first` is of earlier clients."""
    if step.operation == _AGGREGATE:
        return _combine(step, _MERGE, (_structured(step, first), _structured(step, second)), environment, call)
    if step.operation in SECURE_SUMS:
        return _with_carries(first[:-1], second[:-1], first[-1] | second[-1])
    operator = _extreme(step) if step.operation in EXTREMES else jnp.add
    return [operator(left, right) for left, right in zip(first, second, strict=True)]


def finish(step: Step, accumulator: Sequence[jax.Array], environment: Environment, call: Call) -> Any:
    """The positional result in its declared dtypes. A weighted mean of total weight zero is NaN, as in the language."""
    if step.operation == _AGGREGATE:
        return evaluate(step.part(_REPORT), environment, call)(_structured(step, accumulator))
    tensors = tensor_types(step.type)
    results = accumulator
    if step.operation in SECURE_SUMS:
        results = accumulator[:-1]
    elif step.operation in MEANS:
        *totals, weight = accumulator
        results = [total / weight.astype(total.real.dtype) for total in totals]
    return nest(member(step), [result.astype(tensor.dtype) for result, tensor in zip(results, tensors, strict=True)])


def fits(step: Step, accumulator: Sequence[jax.Array]) -> jax.Array:
    """For each leaf of a secure sum whether the sum fits the declared dtype: bool[leaves]."""
    *totals, carried = accumulator
    highest = [np.uint64(np.iinfo(tensor.dtype).max) for tensor in tensor_types(step.type)]
    return ~carried & flags_of([(total <= high).all() for total, high in zip(totals, highest, strict=True)])


def names_read(steps: Sequence[Step], shared: Sequence[str]) -> list[str]:
    """The shared values that the functions of aggregates read; merging and reporting take these and no others."""
    aggregates = [step for step in steps if step.operation == _AGGREGATE]
    names = {name for step in aggregates for part in (_MERGE, _REPORT) for name in referenced_names(step.part(part))}
    return [name for name in shared if name in names]


def member(step: Step) -> fl.Type:
    """The type of the value that a step makes, without its placement."""
    return step.type.member if isinstance(step.type, fl.FederatedType) else step.type


def leaves(value: Any) -> list[jax.Array]:
    """The leaves of a positional value."""
    return [jnp.asarray(leaf) for leaf in jax.tree.leaves(value)]


def flags_of(flags: Sequence[jax.Array]) -> jax.Array:
    """Flags as one array: bool[flags]."""
    return jnp.stack(flags) if flags else jnp.ones((0,), jnp.bool_)


def _structured(step: Step, accumulator: Sequence[jax.Array]) -> Any:
    """An aggregate's accumulator as its functions take it."""
    return nest(step.part(_ZERO).type_signature, accumulator)


def _combine(step: Step, part: int, operands: tuple[Any, Any], environment: Environment, call: Call) -> Accumulator:
    return leaves(evaluate(step.part(part), environment, call)(operands))


def _one_by_one(
    step: Step,
    accumulator: Sequence[jax.Array],
    operands: Any,
    counted: Bool[Array, " group"],
    environment: Environment,
    call: Call,
) -> Accumulator:
    def add(so_far: Accumulator, client: tuple[Any, jax.Array]) -> tuple[Accumulator, None]:
        operand, is_counted = client
        added = accumulate(step, so_far, operand, environment, call)
        return [jnp.where(is_counted, new, old) for new, old in zip(added, so_far, strict=True)], None

    return lax.scan(add, list(accumulator), (operands, counted))[0]


def _along(of_clients: jax.Array, leaf: jax.Array) -> jax.Array:
    """One number for each client, shaped to multiply the clients' leaves."""
    return of_clients.reshape(-1, *[1] * (leaf.ndim - 1))


def _extreme_of_group(step: Step, leaf: jax.Array, counted: jax.Array) -> jax.Array:
    others = jnp.where(_along(counted, leaf), leaf, _identity(step.operation, leaf.dtype))
    return others.min(axis=0) if step.operation == "federated_min" else others.max(axis=0)


def _extreme(step: Step) -> Any:
    return jnp.minimum if step.operation == "federated_min" else jnp.maximum  # NaN propagates, as in NumPy


def _identity(operation: str, dtype: np.dtype[Any]) -> Any:
    """What a minimum (maximum) starts from: the highest (lowest) number of a dtype."""
    if jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(np.inf if operation == "federated_min" else -np.inf, dtype)
    limits = np.iinfo(dtype)
    return np.asarray(limits.max if operation == "federated_min" else limits.min, dtype)


def _with_carries(first: Sequence[jax.Array], second: Sequence[jax.Array], carried: jax.Array) -> Accumulator:
    sums = [left + right for left, right in zip(first, second, strict=True)]
    overflowed = [(total < left).any() for total, left in zip(sums, first, strict=True)]
    return [*sums, carried | flags_of(overflowed)]
