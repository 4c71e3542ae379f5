"""What a loop's body computes, for all steps at once: values stacked over time, and their sums.

`lax.scan` rewritten by a `scan_plan.Plan`: products before the loop, a loop with less to do, products after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from fedlens.runtime.scan_body import Body
from fedlens.runtime.scan_plan import Plan
from fedlens.runtime.scan_sums import Sum
from fedlens.runtime.traced import PRODUCT, Operation, needed


def rewritten(
    body: Body, plan: Plan, operands: Sequence[Array], *, length: int, reverse: bool, unroll: int
) -> list[Shaped[Array, "..."]]:
    """What a scan gives: the state after the last step, and the stacked outputs, `[length, ...]`.

    Args:
      body: of the scan.
      plan: for it.
      operands: the constants, the first state, and the arrays that the loop walks over, `[length, ...]`.
      length: how many steps.
      reverse: whether the last comes first.
      unroll: how many steps a turn of the loop takes.
    """
    inputs = dict(zip((*body.constants, *body.carried, *body.scanned), operands, strict=True))
    scanned = {value: inputs[value] for value in body.scanned}
    outside = _Outside(plan, {**{value: inputs[value] for value in body.constants}, **body.known}, scanned)
    results = [operation.results[0] for operation in plan.before]
    scanned.update(zip(results, outside.stacks(results), strict=True))

    states = [place for place in range(len(body.carried)) if place not in plan.sums]
    outputs = [value for place, value in enumerate(body.stacked) if place not in plan.after]
    outputs = list(dict.fromkeys((*outputs, *plan.emitted)))
    carried_on = [body.carried_on[place] for place in states]
    within = needed(body.operations, (*carried_on, *outputs), scanned)
    constants = outside.constants(_worth_having(body, plan, within))
    within = _turned(within, constants)
    read = {operand for operation in within for operand in operation.operands}.union(carried_on, outputs)
    walked = {value: stack for value, stack in scanned.items() if value in read}

    def step(state: list[Array], at: dict[int, Array]) -> tuple[list[Array], list[Array]]:
        values = constants | dict(zip((body.carried[place] for place in states), state, strict=True)) | at
        for operation in needed(within, (*carried_on, *outputs), values):
            computed = operation(*(values[operand] for operand in operation.operands))
            values.update(zip(operation.results, computed, strict=True))
        return [values[value] for value in carried_on], [values[value] for value in outputs]

    start = [inputs[body.carried[place]] for place in states]
    state, stacks = lax.scan(step, start, walked, length, reverse=reverse, unroll=unroll)

    outside = _Outside(plan, constants, scanned | dict(zip(outputs, stacks, strict=True)))
    last = dict(zip(states, state, strict=True))
    for place, added in plan.sums.items():
        first = inputs[body.carried[place]]
        last[place] = first + outside.total(added, first.dtype)
    stacked = [
        jnp.broadcast_to(stack, (length, *body.types[value].shape))  # a constant has no axis of time yet
        for value, stack in zip(body.stacked, outside.stacks(body.stacked), strict=True)
    ]
    return [*(last[place] for place in range(len(body.carried))), *stacked]


def _worth_having(body: Body, plan: Plan, within: Sequence[Operation]) -> list[int]:
    """The constants that are computed once, before the loop: all but those that are larger than what they come from."""
    found: list[int] = []
    for operation in within:
        sizes = [sum(map(body.size, values)) for values in (operation.operands, operation.results)]
        if plan.outside.constant.issuperset(operation.results) and sizes[0] >= sizes[1]:
            found += operation.results
    return found


def _turned(within: Sequence[Operation], constants: dict[int, Any]) -> list[Operation]:
    """The operations with each constant right factor in the order batch, contracted, free; adds it to `constants`.

    XLA:CPU reads another order across, and does so in every step.
    """
    found = []
    for operation in within:
        if operation.name == PRODUCT and operation.operands[1] in constants and operation.operands[0] not in constants:
            left, right = operation.operands
            ((of_left, contracted), (batch_left, batch)) = operation.parameters["dimension_numbers"]
            rank = jnp.ndim(constants[right])
            free = [axis for axis in range(rank) if axis not in (*contracted, *batch)]
            order = (*batch, *contracted, *free)
            if order != tuple(range(rank)):
                turned = -1 - operation.results[0]
                constants[turned] = lax.optimization_barrier(lax.transpose(constants[right], order))
                places = tuple(range(len(batch), len(batch) + len(contracted)))
                axes = (of_left, places), (batch_left, tuple(range(len(batch))))
                parameters = {**operation.parameters, "dimension_numbers": axes}
                operation = replace(operation, parameters=parameters, operands=(left, turned))
        found.append(operation)
    return found


class _Outside:
    """Computes values of a body for all steps."""

    def __init__(self, plan: Plan, constants: Mapping[int, Any], stacks: Mapping[int, Any]) -> None:
        self._known = plan.outside
        self._body = plan.outside.body
        self._values = {**constants, **stacks}  # those that are not constant have time as their first axis
        self._totals: dict[tuple[int, Any], Any] = {}

    def constants(self, values: Iterable[int]) -> dict[int, Any]:
        """What is given, and those values."""
        self._compute(values)
        return {value: found for value, found in self._values.items() if value in self._known.constant}

    def stacks(self, values: Sequence[int]) -> list[Any]:
        """The stacks of values, `[time, ...]`; of a constant just itself."""
        self._compute(values)
        return [self._values[value] for value in values]

    def total(self, of: Sum, dtype: Any) -> Any:
        """A sum over all steps, in a dtype at least as wide as that of what is summed."""
        for value in of.parts:
            if (value, dtype) not in self._totals:
                self._totals[value, dtype] = jnp.sum(self.stacks([value])[0], axis=0, dtype=dtype)
        for operation in of.chain:
            if (operation.results[0], dtype) not in self._totals:
                computed = self._total(operation, dtype)
                self._totals.update(
                    ((result, dtype), each) for result, each in zip(operation.results, computed, strict=True)
                )
        first, *others = (self._totals[value, dtype] for value in of.values)
        return sum(others, first)

    def _total(self, operation: Operation, dtype: Any) -> list[Any]:
        """The sums of an operation's results: the product over all steps, or the operation on the sums."""
        if operation.name == PRODUCT:
            (left, right), (left_batch, right_batch) = operation.parameters["dimension_numbers"]
            later = [tuple(axis + 1 for axis in axes) for axes in (left, right, left_batch, right_batch)]
            axes = (((0, *later[0]), (0, *later[1])), (later[2], later[3]))
            # XLA:CPU has no product of 16-bit floats that gives wider ones in every order of axes.
            first, second = (
                lax.convert_element_type(stack, jnp.promote_types(stack.dtype, dtype))
                for stack in self.stacks(operation.operands)
            )
            precision = operation.parameters["precision"]
            return [lax.dot_general(first, second, axes, precision=precision, preferred_element_type=dtype)]
        operands = [
            self._totals[value, dtype]
            if value not in self._known.constant
            else lax.convert_element_type(self.stacks([value])[0], dtype)
            for value in operation.operands
        ]
        return operands if operation.name == "convert_element_type" else operation(*operands)

    def _compute(self, values: Iterable[int]) -> None:
        for operation in needed(self._body.operations, values, self._values):
            axes = [None if operand in self._known.constant else 0 for operand in operation.operands]
            compute = operation if all(axis is None for axis in axes) else jax.vmap(operation, axes)
            results = compute(*(self._values[operand] for operand in operation.operands))
            self._values.update(zip(operation.results, results, strict=True))
