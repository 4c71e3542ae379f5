"""TFF's decorators: computations of the language whose calls take and return values in TFF's form.

What they make is an ordinary `ConcreteComputation`, so that plans, taps, disclosure and portable forms know it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import federated_language as fl
from federated_language import framework

import fedlens.language
from fedlens.compat.tff.types import to_type
from fedlens.compat.tff.values import from_tff_form, in_tff_form
from fedlens.language.types import type_of

Declare = Callable[..., Any]  # a decorator of the language's kind: a function, types, or a function and then types


class TffComputation(framework.ConcreteComputation):
    """A computation that is called with TFF's values, and hands them out."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the computation; within another computation, calls it there."""
        return _called(super().__call__, args, kwargs)


class TffPolymorphicComputation(framework.PolymorphicComputation):
    """A computation without types, which are inferred in each call; called as a `TffComputation` is."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the computation for the types of these arguments; within another computation, calls it there."""
        return _called(super().__call__, args, kwargs)


def federated_computation(*args: Any) -> Any:
    """`tff.federated_computation`: wraps a function of federated values.

    Example:
      >>> @tff.federated_computation(tff.FederatedType(np.float32, tff.CLIENTS))
      ... def average(temperatures):
      ...     return {"mean": tff.federated_mean(temperatures), "all": temperatures}
      >>> result = average([20.0, 22.0])
      >>> float(result.mean), list(result.all)

    Args:
      *args: a function, types, or a function followed by types; types may be written with TensorFlow's dtypes.

    Returns:
      A computation, or without a function a decorator.
    """
    return _declared(fl.federated_computation, args)


def jax_computation(*args: Any) -> Any:
    """`tff.jax_computation`, `tff.jax.computation`: wraps a function of JAX operations; see `fed.jax_computation`."""
    return _declared(fedlens.language.jax_computation, args)


def tf_computation(*args: Any) -> Any:
    """`tff.tf_computation`, `tff.tensorflow.computation`: wraps a function of TensorFlow operations.

    Raises:
      UnsupportedError: TensorFlow is not installed; `pip install 'fedlens[tensorflow]'`.
    """
    from fedlens.language.tensorflow_computation import tensorflow_computation

    return _declared(tensorflow_computation, args)


def _declared(declare: Declare, args: tuple[Any, ...]) -> Any:
    functions = [each for each in args[:1] if callable(each) and not isinstance(each, type)]
    types = [to_type(each) for each in args[len(functions) :] if each is not None]
    if functions:
        return _in_tff_form(declare(functions[0], *types))
    return lambda function: _in_tff_form(declare(function, *types))


def _in_tff_form(computation: Any) -> Any:
    if isinstance(computation, framework.PolymorphicComputation):
        return TffPolymorphicComputation(
            lambda type_, unpack: _in_tff_form(computation.fn_for_argument_type(type_, unpack)), type_of
        )
    return TffComputation(
        computation_proto=computation.to_proto(),
        context_stack=computation.context_stack,
        annotated_type=computation.type_signature,
    )


def _called(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = call(*map(from_tff_form, args), **{name: from_tff_form(value) for name, value in kwargs.items()})
    # In the body of another computation the call is recorded, in an asynchronous context it is under way.
    if isinstance(result, fl.Value | Awaitable | fl.program.MaterializableValueReference):
        return result
    return in_tff_form(result)
