"""State to which every step of a loop only adds, as the gradient of a kernel: what all steps add, without the steps.

The sum over steps of L(a b), with L linear and the same at every step, is L of one product that contracts time too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from fedlens.runtime.scan_body import Knowledge
from fedlens.runtime.traced import PRODUCT, Operation

_SUMS = ("add", "add_any")
# Linear, and blind to what the numbers are.
_STRUCTURAL = {
    *(
        "broadcast_in_dim",
        "concatenate",
        "copy",
        "expand_dims",
        "neg",
        "reduce_sum",
        "reshape",
        "rev",
        "slice",
        "split",
    ),
    *("squeeze", "transpose"),
}


@dataclass(frozen=True)
class Sum:
    """How a sum of values over all steps is made.

    Attributes:
      values: what is summed.
      parts: the values whose stacks are summed as they are.
      products: the products, by their results, that contract time too.
      leaves: the values that have to be stacked: the parts, and the factors of the products.
      chain: the products, and what is done to the sums of their results and of the parts, in order.
    """

    values: tuple[int, ...]
    parts: tuple[int, ...]
    products: frozenset[int]
    leaves: tuple[int, ...]
    chain: tuple[Operation, ...]


def added(outside: Knowledge, place: int) -> tuple[int, ...]:
    """The values that a step adds to a state of floats; none if anything else reads the state or a part of the sum."""
    state = outside.body.carried[place]
    pending, found = [outside.body.carried_on[place]], []
    while pending:
        value = pending.pop()
        maker = outside.maker.get(value)
        if maker is not None and maker.name in _SUMS and outside.readers[value] == 1:
            pending += maker.operands
        else:
            found.append(value)
    is_float = jnp.issubdtype(outside.body.types[state].dtype, jnp.floating)
    if not is_float or outside.readers[state] != 1 or state not in found:
        return ()
    return tuple(value for value in found if value != state)


def sum_of(outside: Knowledge, values: Sequence[int]) -> Sum | None:
    """The sum of values over all steps; None if there are none, or it is not made of what pays to be stacked."""
    if not values:
        return None
    pending, seen = list(values), set[int]()
    parts, products, leaves, made = list[int](), set[int](), dict[int, None](), set[int]()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        maker = outside.maker.get(value)
        varying = [] if maker is None else [each for each in maker.operands if each not in outside.constant]
        if value in outside.stacked:
            parts.append(value)
            leaves[value] = None
        elif maker is None or value in outside.constant:
            return None
        elif _pays(outside, maker):
            products.add(value)
            made.add(value)
            leaves.update(dict.fromkeys(varying))
        elif _is_linear(outside, maker, varying):
            made.add(value)
            pending += varying
        else:
            return None
    chain = tuple(each for each in outside.body.operations if made.intersection(each.results))
    return Sum(tuple(values), tuple(parts), frozenset(products), tuple(leaves), chain)


def _pays(outside: Knowledge, operation: Operation) -> bool:
    """Whether it is a product of two values that change from step to step, and few rows make it large.

    With many rows a step's product takes longer than adding it up; and loops over blocks, as fedlens's own convolutions
    are, keep a block in the cache.
    """
    factors = set(operation.operands)
    if operation.name != PRODUCT or factors & outside.constant:
        return False
    is_small = sum(map(outside.body.size, factors)) <= outside.body.size(operation.results[0])
    return is_small or bool(factors & outside.emitted and factors <= outside.stacked)


def _is_linear(outside: Knowledge, operation: Operation, varying: Sequence[int]) -> bool:
    """Whether the sum of its results over steps is its result for the sums of what varies."""
    if operation.name in _STRUCTURAL or operation.name in (*_SUMS, "sub"):
        return len(varying) == len(operation.operands)
    if operation.name == "mul":
        return len(varying) == 1
    if operation.name == "div":
        return varying == [operation.operands[0]]
    if operation.name == "pad":
        padding = outside.body.known.get(operation.operands[1])
        return padding is not None and not np.any(padding) and varying == [operation.operands[0]]
    if operation.name == "convert_element_type":
        (source,), (result,) = ((outside.body.types[v].dtype for v in vs) for vs in (varying, operation.results))
        return bool(jnp.promote_types(source, result) == result) and bool(jnp.issubdtype(source, jnp.floating))
    return False
