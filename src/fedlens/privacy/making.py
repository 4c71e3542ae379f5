"""How the computation of a mechanism is made: an ordinary JAX computation whose payload says what it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from federated_language import framework

from fedlens import trees
from fedlens.compiler.mechanisms import Mechanism, to_text
from fedlens.errors import LanguageError
from fedlens.language.jax_computation import wrap
from fedlens.language.types import type_of


def mechanism_computation(function: Callable[..., Any], mechanism: Mechanism) -> framework.PolymorphicComputation:
    """`function` as a computation whose types come from where it is used, and that says what it is.

    Args:
      function: a function of JAX operations; its name is that of the computation.
      mechanism: what it does.
    """
    wrapper = framework.ComputationWrapper(functools.partial(wrap, mechanism=to_text(mechanism)), infer_type_fn=type_of)
    computation: framework.PolymorphicComputation = wrapper(function)
    return computation


def float_leaves(value: Any, what: str) -> list[jax.Array]:
    """The leaves of a value in one dtype, of at least single precision.

    Raises:
      LanguageError: a leaf is no array of floating-point numbers.
    """
    dtype = jnp.dtype(jnp.float32)
    for path, leaf in trees.items(value):
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
            found = f"{leaf.dtype} numbers" if hasattr(leaf, "dtype") else type(leaf).__name__
            raise LanguageError(
                f"Expected floating-point numbers to {what}, found {found} in leaf {path or 'value'!r}. "
                "Take out what is none, or convert it before."
            )
        dtype = jnp.promote_types(dtype, leaf.dtype)
    return [leaf.astype(dtype) for leaf in trees.leaves(value)]
