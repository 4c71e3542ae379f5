"""`jax_computation`: wraps a function of JAX operations as a local computation of the language."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import federated_language as fl
from federated_language import framework

from fedlens.language.local_computation import make_local_computation, to_proto, with_one_argument
from fedlens.language.tracebacks import noting
from fedlens.language.type_summaries import summarize
from fedlens.language.types import type_of


def wrap(
    function: Callable[..., Any],
    parameter_type: fl.Type | None,
    unpack: bool | None,
    name: str | None = None,
    *,
    mechanism: str = "",
) -> framework.ConcreteComputation:
    """A function as a computation of one type; `mechanism` is what it does to privacy, see `LocalComputation`."""
    name = name_of(function, name)
    argument = "without an argument" if parameter_type is None else f"with an argument {summarize(parameter_type)}"
    with noting(f"in {name!r}, traced {argument} to find the type of its result; it is the same for all clients"):
        local = make_local_computation(
            name, with_one_argument(function, parameter_type, unpack), parameter_type, mechanism
        )
    return framework.ConcreteComputation(
        computation_proto=to_proto(local),
        context_stack=framework.get_context_stack(),
        annotated_type=local.type_signature,
    )


def name_of(function: Callable[..., Any], name: str | None = None) -> str:
    """What plans and errors call a function; one without a name of its own is found by its file and line."""
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = name or getattr(inner, "__name__", None) or type(inner).__name__
    code = getattr(inner, "__code__", None)
    if name != "<lambda>" or code is None:
        return name
    return f"lambda@{os.path.basename(code.co_filename)}:{code.co_firstlineno}"


jax_computation = framework.ComputationWrapper(wrap, infer_type_fn=type_of)
jax_computation.__doc__ = """Wraps a function of JAX operations as a computation that runs at one place.

Types may be given, or are inferred when the computation is called or mapped:

  >>> @fed.jax_computation
  ... def to_unit_norm(weights):
  ...     norm = optax.tree.norm(weights)
  ...     return jax.tree.map(lambda leaf: leaf / norm, weights)

  >>> @fed.jax_computation(fed.TensorType(np.float32, (3,)), np.float32)
  ... def scale(vector, factor):
  ...     return vector * factor

The function is traced: it sees arrays without values, in the containers of its type, and a `fed.Sequence` for each
sequence. Its result's shapes and dtypes come from `jax.eval_shape`. It is traced with 64-bit types when its parameter
has 64-bit leaves, and without them otherwise. A dimension that the type leaves undefined (None) has its true size in
every call, and a program is compiled for each size that comes; the shapes of the result must not depend on it.

Args:
  *args: a function, or types, or a function followed by types, as for `fed.federated_computation`.

Returns:
  A computation, or without types and with arguments a polymorphic one; with types alone, a decorator.

Raises:
  UnsupportedError: a parameter with an unknown number of dimensions, or of strings.
  LanguageError: the function returns None or no array, or its arguments do not fit the types.
"""
