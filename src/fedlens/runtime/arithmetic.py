"""Arithmetic on positional values, leaf by leaf, in exactly the dtypes that a type declares.

The language's generic operators, and the dtypes in which sums are kept. As in NumPy, integers wrap around; a quotient
of integers is taken in float64 and given back in the declared dtype, which the language leaves to the type.
"""

from __future__ import annotations

from typing import Any

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np

from fedlens.errors import LanguageError
from fedlens.language.types import tensor_types
from fedlens.runtime.columns import nest

_OPERATORS = {"generic_plus": jnp.add, "generic_multiply": jnp.multiply}


def accumulation_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """float32 for 16-bit floats, the dtype itself otherwise."""
    return np.dtype(np.float32) if dtype.itemsize == 2 and jnp.issubdtype(dtype, jnp.floating) else dtype


def zero_of(type_: fl.Type) -> Any:
    """Zeros in the structure of a type of known shapes; NumPy's, whose 64 bits depend on no mode."""
    return nest(type_, [np.zeros(tensor.shape, tensor.dtype) for tensor in tensor_types(type_)])


def apply(operator: str, first: Any, second: Any, type_: fl.Type) -> Any:
    """A generic operator on two positional values.

    Args:
      operator: `generic_plus`, `generic_multiply` or `generic_divide`.
      first: the left operand.
      second: the right operand, of the same structure.
      type_: the type of the result.

    Raises:
      LanguageError: a quotient that is declared to be an integer.
    """
    leaves = [
        _leaf(operator, jnp.asarray(left), jnp.asarray(right), tensor)
        for left, right, tensor in zip(
            jax.tree.leaves(first), jax.tree.leaves(second), tensor_types(type_), strict=True
        )
    ]
    return nest(type_, leaves)


def _leaf(operator: str, left: jax.Array, right: jax.Array, tensor: fl.TensorType) -> jax.Array:
    if operator != "generic_divide":
        return _OPERATORS[operator](left, right).astype(tensor.dtype)
    if not jnp.issubdtype(tensor.dtype, jnp.inexact):
        raise LanguageError(f"Expected a floating-point or complex quotient of generic_divide, found {tensor}.")
    wide = np.dtype(np.float64) if not jnp.issubdtype(left.dtype, jnp.inexact) else accumulation_dtype(left.dtype)
    return (left.astype(wide) / right.astype(wide)).astype(tensor.dtype)
