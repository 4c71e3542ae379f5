"""The body of a `lax.scan` as one flat list of operations, and what of it is known outside of the loop."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlens.runtime.traced import PRODUCT, Operation, flat


@dataclass(frozen=True)
class Body:
    """One step of a loop over time.

    Attributes:
      types: for each value its shape and dtype; a value is its position here.
      known: the values that are written down in the program.
      constants: the values that are the same in all steps.
      carried: the state before the step.
      scanned: what the step reads of the arrays that the loop walks over.
      operations: what is computed, in order.
      carried_on: the state after the step.
      stacked: what the step adds to the loop's stacked outputs.
    """

    types: Sequence[Any]
    known: Mapping[int, Any]
    constants: tuple[int, ...]
    carried: tuple[int, ...]
    scanned: tuple[int, ...]
    operations: tuple[Operation, ...]
    carried_on: tuple[int, ...]
    stacked: tuple[int, ...]

    def size(self, value: int) -> int:
        """The bytes of a value, in one step."""
        held = self.types[value]
        return math.prod(held.shape) * int(held.dtype.itemsize)


class Knowledge:
    """What of a body's values is known outside of its loop.

    Attributes:
      body: the body.
      maker: the operation that gives a value.
      readers: how often a value is read.
      constant: the values that are the same in all steps and can be computed before the loop.
      stacked: the values whose stack over all steps there is.
      emitted: those of them that a rewritten loop stacks for what comes after it.
    """

    def __init__(self, body: Body) -> None:
        """Knows what the loop is given."""
        self.body = body
        self.maker = {result: operation for operation in body.operations for result in operation.results}
        read = (*body.carried_on, *body.stacked, *(value for each in body.operations for value in each.operands))
        self.readers = Counter(read)
        self.constant = {*body.constants, *body.known}
        for operation in body.operations:
            if operation.is_movable and self.constant.issuperset(operation.operands):
                self.constant.update(operation.results)
        self.stacked: set[int] = set()
        self.emitted: set[int] = set()
        self._known = set(self.constant)
        self.learn(body.scanned)

    def learn(self, stacked: Iterable[int]) -> None:
        """Values whose stack over all steps there is now."""
        self.stacked.update(set(stacked) - self.constant)
        self._known.update(self.stacked)
        for operation in self.body.operations:
            if operation.is_movable and operation.name != PRODUCT and self._known.issuperset(operation.operands):
                self._known.update(operation.results)

    def emit(self, values: Iterable[int]) -> None:
        """Values that the loop stacks in addition."""
        self.emitted.update(values)
        self.learn(values)

    @property
    def at_hand(self) -> set[int]:
        """The values that need not be computed outside any more."""
        return self.constant | self.stacked

    def knows(self, value: int) -> bool:
        """Whether the stack of a value over all steps follows from what there is, without another product."""
        return value in self._known


def read(parameters: Mapping[str, Any]) -> Body | None:
    """The body of a scan, by the parameters of `lax.scan_p`; None if they are not those that fedlens knows."""
    try:
        traced = flat(parameters["jaxpr"])
        num_constants, num_carried = _counts(parameters)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    first_scanned = num_constants + num_carried
    return Body(
        types=traced.types,
        known=traced.known,
        constants=traced.arguments[:num_constants],
        carried=traced.arguments[num_constants:first_scanned],
        scanned=traced.arguments[first_scanned:],
        operations=traced.operations,
        carried_on=traced.results[:num_carried],
        stacked=traced.results[num_carried:],
    )


def _counts(parameters: Mapping[str, Any]) -> tuple[int, int]:
    """How many constants and how much state a scan has; JAX 0.12 keeps them as trees."""
    if "num_consts" in parameters:
        return parameters["num_consts"], parameters["num_carry"]
    constants, carried, _ = parameters["ft_in"].unpack()
    return len(list(constants)), len(list(carried))
