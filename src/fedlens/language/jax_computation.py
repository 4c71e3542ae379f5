"""`jax_computation`: wraps a function of JAX operations as a local computation of the language."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import federated_language as fl
from federated_language import framework

from fedlens import trees
from fedlens.errors import LanguageError
from fedlens.language.local_computation import make_local_computation, to_proto
from fedlens.language.types import type_of


def _wrap(
    function: Callable[..., Any], parameter_type: fl.Type | None, unpack: bool | None, name: str | None = None
) -> framework.ConcreteComputation:
    local = make_local_computation(
        name or "jax_computation", _with_one_argument(function, parameter_type, unpack), parameter_type
    )
    return framework.ConcreteComputation(
        computation_proto=to_proto(local),
        context_stack=framework.get_context_stack(),
        annotated_type=local.type_signature,
    )


def _with_one_argument(
    function: Callable[..., Any], parameter_type: fl.Type | None, unpack: bool | None
) -> Callable[..., Any]:
    """`function` as the language types it, with one argument: a struct of several is unpacked by name or position."""
    if parameter_type is None:
        return function
    expected = list(inspect.signature(function).parameters)
    if not unpack and len(expected) == 1:
        return function
    if not isinstance(parameter_type, fl.StructType) or len(parameter_type) != len(expected):
        raise LanguageError(
            f"Expected a parameter type with a field for each of the arguments {', '.join(expected) or 'none'}, "
            f"found {parameter_type}."
        )

    def with_one_argument(argument: Any) -> Any:
        fields = trees.fields_of(argument) or []
        names = [field_name for field_name, _ in parameter_type.items()]
        positional = [value for name, (_, value) in zip(names, fields, strict=True) if name is None]
        named = {name: value for name, (_, value) in zip(names, fields, strict=True) if name is not None}
        return function(*positional, **named)

    return with_one_argument


jax_computation = framework.ComputationWrapper(_wrap, infer_type_fn=type_of)
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
has 64-bit leaves, and without them otherwise.

Args:
  *args: a function, or types, or a function followed by types, as for `fed.federated_computation`.

Returns:
  A computation, or without types and with arguments a polymorphic one; with types alone, a decorator.

Raises:
  UnsupportedError: a parameter with an unknown dimension, or of strings.
  LanguageError: the function returns None or no array, or its arguments do not fit the types.
"""
