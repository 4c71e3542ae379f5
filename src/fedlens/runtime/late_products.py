"""Gradients of dense kernels over few examples, computed where they are added to the weights and not before.

The gradient of a dense layer's kernel is a sum of outer products, one for each example of a batch. XLA:CPU has a
library multiply, and writes the gradient down for the optimizer to read. Over few examples it is faster as what it is:
a sum, in one pass over the weights with the optimizer's arithmetic. W2's step of training (ten examples) then takes
three quarters of the time, W4's round seven tenths. From sixteen examples on the library is as fast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Float, Shaped

from fedlens.runtime.lowering import is_lowered_for_cpu
from fedlens.runtime.traced import PRODUCT, Operation, Traced, flat

MAX_TERMS = 12  # examples of a batch
_TYPES = ("float32", "float64")  # the library adds products of 16-bit floats in 32 bits
_BARRIER = "optimization_barrier"
# What may stand between a product and the new weights: it is computed in the same pass.
_ON_THE_WAY = {"add", "add_any", "convert_element_type", "copy", "div", "mul", "neg", "reshape", "sub", "transpose"}


def products_last(step: Callable[..., Any]) -> Callable[..., Any]:
    """The same step of training; lowered for CPU, products of few terms come behind the step's optimization barrier.

    Those products move that lead to one result and to nothing else, by arithmetic that XLA fuses with them. A gradient
    that is read twice stays before the barrier (the optimizer keeps a momentum, or clips by a norm): fused, it would be
    computed twice.

    Example:
      >>> def step(kernel, x):
      ...     gradient = lax.optimization_barrier(jax.grad(lambda kernel: (x @ kernel).sum())(kernel))
      ...     return kernel - 0.1 * gradient
      >>> with lowered_for_cpu():
      ...     text = str(jax.make_jaxpr(products_last(step))(jnp.ones((8, 3)), jnp.ones((2, 8))))
      >>> "dot_general" in text  # two examples: the sum of two outer products
      False

    Args:
      step: pure, from arrays to arrays, with at most one `lax.optimization_barrier`: between the gradient and what
        reads it. Outside of `lowered_for_cpu`, as in the debug engine and in what is exported, it is called as it is.
    """

    def computed(*arguments: Any) -> Any:
        if not is_lowered_for_cpu():
            return step(*arguments)
        leaves = jax.tree.leaves(arguments)
        closed, shape = jax.make_jaxpr(step, return_shape=True)(*arguments)
        traced = flat(closed)
        late = set() if closed.effects else _late(traced)
        results = _in_two_steps(traced, late, leaves) if late else jaxpr_as_fun(closed)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return computed


def _in_two_steps(traced: Traced, late: set[int], arguments: list[Array]) -> list[Shaped[Array, "..."]]:
    """What a step of training gives, its late values computed after all others."""
    values = {**traced.known, **dict(zip(traced.arguments, arguments, strict=True))}
    # Behind the barrier with them, or XLA would fuse what makes the operands too, once for each element of a kernel.
    awaited = {operand for each in traced.operations if _is_late_product(each, late) for operand in each.operands}

    def compute(operation: Operation) -> None:
        operands = [values[operand] for operand in operation.operands]
        if _is_late_product(operation, late):
            results = [_sum_of_outer_products(operation, *operands)]
        else:
            results = operation(*operands)
        values.update(zip(operation.results, results, strict=True))

    for operation in traced.operations:
        if operation.name == _BARRIER:
            passed = [pair for pair in zip(operation.operands, operation.results, strict=True) if pair[1] not in late]
            through, also = lax.optimization_barrier(
                ([values[read] for read, _ in passed], {value: values[value] for value in sorted(awaited)})
            )
            values.update(zip((given for _, given in passed), through, strict=True))
            values.update(also)
        elif late.isdisjoint(operation.results):
            compute(operation)
    for operation in traced.operations:
        if operation.name == _BARRIER:
            passed = [pair for pair in zip(operation.operands, operation.results, strict=True) if pair[1] in late]
            values.update((given, values[read]) for read, given in passed)
        elif not late.isdisjoint(operation.results):
            compute(operation)
    return [values[result] for result in traced.results]


def _late(traced: Traced) -> set[int]:
    """The values to compute behind the barrier: products of few terms, and what leads from them to a result."""
    readers = Counter((*traced.results, *(operand for each in traced.operations for operand in each.operands)))
    # Read by one result, or by one operation that is on the way to one.
    movable = {value for value in traced.results if readers[value] == 1}
    for operation in reversed(traced.operations):
        movable.update(read for read, given in _ways(operation) if given in movable and readers[read] == 1)
    late: set[int] = set()
    barriers = 0
    for operation in traced.operations:
        barriers += operation.name == _BARRIER
        if not barriers and movable.issuperset(operation.results) and _has_few_terms(traced, operation):
            late.update(operation.results)
        late.update(given for read, given in _ways(operation) if given in movable and read in late)
    return late if barriers == 1 else set()


def _ways(operation: Operation) -> list[tuple[int, int]]:
    """What leads through an operation to what, if it may stand between a product and the new weights."""
    if operation.name == _BARRIER:
        return list(zip(operation.operands, operation.results, strict=True))
    return [(operand, operation.results[0]) for operand in operation.operands if operation.name in _ON_THE_WAY]


def _is_late_product(operation: Operation, late: set[int]) -> bool:
    return operation.name == PRODUCT and operation.results[0] in late


def _has_few_terms(traced: Traced, operation: Operation) -> bool:
    """Whether an operation is a product that is a sum of few outer products."""
    if operation.name != PRODUCT:
        return False
    (contracted, _), (batched, _) = operation.parameters["dimension_numbers"]
    left, right = (traced.types[operand] for operand in operation.operands)
    types = {str(each.dtype) for each in (left, right, traced.types[operation.results[0]])}
    if batched or len(contracted) != 1 or len(types) != 1 or not types.issubset(_TYPES):
        return False
    terms = left.shape[contracted[0]]
    return isinstance(terms, int) and 1 <= terms <= MAX_TERMS


def _sum_of_outer_products(
    operation: Operation, left: Float[Array, "..."], right: Float[Array, "..."]
) -> Float[Array, "..."]:
    """What a product of few terms gives, elementwise."""
    ((left_axis,), (right_axis,)), _ = operation.parameters["dimension_numbers"]
    new_axes = range(left.ndim - 1, left.ndim + right.ndim - 2)
    terms = (
        lax.expand_dims(lax.index_in_dim(left, term, left_axis, keepdims=False), new_axes)
        * lax.index_in_dim(right, term, right_axis, keepdims=False)
        for term in range(left.shape[left_axis])
    )
    total = next(terms)
    for term in terms:
        total = total + term
    return total
