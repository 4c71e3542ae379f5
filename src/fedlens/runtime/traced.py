"""What JAX traced, as one flat list of operations on numbered values: calls inlined, equal operations once.

What JAX traces has calls in it (`jax.nn.sigmoid` is one) and says the same thing twice (each of two gradients joins the
gates anew). Numbers in place of JAX's variables make both easy to undo, and depend on no private name.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
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
class Traced:
    """A traced function.

    Attributes:
      types: for each value its shape and dtype; a value is its position here.
      known: the values that are written down in the program, or that it is traced within.
      arguments: what it is given.
      operations: what is computed, in order.
      results: what it gives.
    """

    types: Sequence[Any]
    known: Mapping[int, Any]
    arguments: tuple[int, ...]
    operations: tuple[Operation, ...]
    results: tuple[int, ...]


def flat(closed: Any) -> Traced:
    """A closed jaxpr as one flat list of operations, those that lead to its results."""
    reader = _Reader()
    arguments = [reader.new(variable.aval) for variable in closed.jaxpr.invars]
    results = reader.inline(closed, arguments)
    operations = needed(reader.operations, results)
    return Traced(reader.types, reader.known, tuple(arguments), tuple(operations), tuple(results))


def needed(operations: Sequence[Operation], values: Iterable[int], given: Container[int] = ()) -> list[Operation]:
    """Those of the operations that lead from given values to others, in order."""
    wanted, found = {value for value in values if value not in given}, []
    for operation in reversed(operations):
        if wanted.intersection(operation.results):
            wanted.update(operand for operand in operation.operands if operand not in given)
            found.append(operation)
    return found[::-1]


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
        is_array_of_keys = jnp.issubdtype(aval.dtype, jax.dtypes.extended)
        if isinstance(value, jax.core.Tracer) or is_array_of_keys or np.ndim(value):
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
