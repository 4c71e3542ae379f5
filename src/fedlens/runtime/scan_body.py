"""The body of a `lax.scan` as one flat list of operations on numbered values, calls inlined, equal operations once.

What JAX traces has calls in it (`jax.nn.sigmoid` is one) and says the same thing twice (each of two gradients joins the
gates anew). Numbers in place of JAX's variables make both easy to undo, and depend on no private name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

# Calls whose meaning is that of their body once nothing is differentiated any more, and the parameter that holds it. A
# remat stays a call: its body must not be merged with what it repeats.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}

PRODUCT = "dot_general"

# What may be computed in another place, or once in place of twice: pure, and cheap beside a product.
_ARITHMETIC = {
    *("abs", "add", "add_any", "ceil", "clamp", "cos", "div", "exp", "exp2", "expm1", "floor", "integer_pow", "log"),
    *("log1p", "logistic", "max", "min", "mul", "neg", "one_minus_square", "pow", "round", "rsqrt", "sign", "sin"),
    *("sqrt", "square", "sub", "tan", "tanh"),
}
_COMPARISONS = {"and", "eq", "ge", "gt", "is_finite", "le", "lt", "ne", "not", "or", "select_n", "xor"}
_ARRANGING = {
    *("broadcast_in_dim", "concatenate", "convert_element_type", "copy", "expand_dims", "iota", "pad", "reduce_max"),
    *("reduce_min", "reduce_sum", "reshape", "rev", "slice", "split", "squeeze", "stop_gradient", "transpose"),
}
MOVABLE = frozenset({PRODUCT} | _ARITHMETIC | _COMPARISONS | _ARRANGING)


@dataclass(frozen=True)
class Operation:
    """One primitive applied to values.

    Attributes:
      primitive: JAX's primitive.
      parameters: its parameters.
      operands: the numbers of the values that it reads.
      results: the numbers of those that it gives.
      context: the settings under which JAX traced it.
    """

    primitive: Any
    parameters: Mapping[str, Any]
    operands: tuple[int, ...]
    results: tuple[int, ...]
    context: Any

    @property
    def name(self) -> str:
        """The primitive's name."""
        return str(self.primitive.name)

    @property
    def is_movable(self) -> bool:
        """Whether it may be computed in another place."""
        return self.name in MOVABLE

    def __call__(self, *values: Any) -> list[Any]:
        """Computes it."""
        found = self.primitive.get_bind_params(dict(self.parameters))
        functions, parameters = found if isinstance(found, tuple) else ((), found)  # without functions since JAX 0.10
        with self.context.manager:
            results = self.primitive.bind(*functions, *values, **parameters)
        return list(results) if self.primitive.multiple_results else [results]


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
        closed = parameters["jaxpr"]
        num_constants, num_carried = _counts(parameters)
        reader = _Reader()
        arguments = [reader.new(variable.aval) for variable in closed.jaxpr.invars]
        results = reader.inline(closed, arguments)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    first_scanned = num_constants + num_carried
    return Body(
        types=reader.types,
        known=reader.known,
        constants=tuple(arguments[:num_constants]),
        carried=tuple(arguments[num_constants:first_scanned]),
        scanned=tuple(arguments[first_scanned:]),
        operations=tuple(needed(reader.operations, results)),
        carried_on=tuple(results[:num_carried]),
        stacked=tuple(results[num_carried:]),
    )


def needed(operations: Sequence[Operation], values: Iterable[int], given: Container[int] = ()) -> list[Operation]:
    """Those of the operations that lead from given values to others, in order."""
    wanted, found = {value for value in values if value not in given}, []
    for operation in reversed(operations):
        if wanted.intersection(operation.results):
            wanted.update(operand for operand in operation.operands if operand not in given)
            found.append(operation)
    return found[::-1]


def _counts(parameters: Mapping[str, Any]) -> tuple[int, int]:
    """How many constants and how much state a scan has; JAX 0.12 keeps them as trees."""
    if "num_consts" in parameters:
        return parameters["num_consts"], parameters["num_carry"]
    constants, carried, _ = parameters["ft_in"].unpack()
    return len(list(constants)), len(list(carried))


class _Reader:
    """Collects values and operations while it walks through a jaxpr and those that it calls."""

    def __init__(self) -> None:
        self.types: list[Any] = []
        self.known: dict[int, Any] = {}
        self.operations: list[Operation] = []
        self._seen: dict[Any, tuple[int, ...]] = {}

    def new(self, aval: Any) -> int:
        self.types.append(aval)
        return len(self.types) - 1

    def inline(self, closed: Any, arguments: Sequence[int]) -> list[int]:
        """Adds the operations of a closed jaxpr, and returns the numbers of its results."""
        jaxpr = closed.jaxpr
        numbers: dict[Any, int] = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable, value in zip(jaxpr.constvars, closed.consts, strict=True):
            numbers[variable] = self._write_down(variable.aval, value)

        def number(atom: Any) -> int:
            return self._write_down(atom.aval, atom.val) if hasattr(atom, "val") else numbers[atom]

        for equation in jaxpr.eqns:
            operands = tuple(number(atom) for atom in equation.invars)
            called = _called(equation)
            results = self.inline(called, operands) if called is not None else self._apply(equation, operands)
            numbers.update(zip(equation.outvars, results, strict=True))
        return [number(atom) for atom in jaxpr.outvars]

    def _write_down(self, aval: Any, value: Any) -> int:
        if np.ndim(value):
            return self._hold(aval, value)
        scalar = np.asarray(value, aval.dtype)
        key = ("known", scalar.dtype.name, scalar.tobytes())
        if key not in self._seen:
            self._seen[key] = (self._hold(aval, scalar),)
        return self._seen[key][0]

    def _hold(self, aval: Any, value: Any) -> int:
        held = self.new(aval)
        self.known[held] = value
        return held

    def _apply(self, equation: Any, operands: tuple[int, ...]) -> tuple[int, ...]:
        key: Any = None
        if equation.primitive.name in MOVABLE:
            key = (equation.primitive.name, operands, tuple(sorted(equation.params.items())), equation.ctx)
            try:
                if key in self._seen:
                    return self._seen[key]
            except TypeError:  # a parameter that has no hash
                key = None
        results = tuple(self.new(variable.aval) for variable in equation.outvars)
        self.operations.append(Operation(equation.primitive, equation.params, operands, results, equation.ctx))
        if key is not None:
            self._seen[key] = results
        return results


def _called(equation: Any) -> Any:
    """The closed jaxpr that an equation calls, if it may be written out in its place."""
    called = equation.params.get(_CALLS.get(equation.primitive.name, ""))
    shardings = (*equation.params.get("in_shardings", ()), *equation.params.get("out_shardings", ()))
    if any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings) or not hasattr(called, "consts"):
        return None
    return called
