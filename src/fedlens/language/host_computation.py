"""Host computations: Python functions with a type that run as they are, on NumPy arrays, and are never traced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import federated_language as fl
import jax
import numpy as np

from fedlens import trees
from fedlens.errors import StructureError
from fedlens.language.sequence import Sequence
from fedlens.language.types import contains_sequence, from_positional, matched_fields, to_positional
from fedlens.language.unequal_batches import UnequalBatches


class ResultError(StructureError):
    """A Python function returned a value that is not of the type it was declared with."""

    def at(self, place: str) -> ResultError:
        """The same error, saying where: "in client 'bob', client stage 0"."""
        return ResultError(f"{str(self).rstrip('.')}, {place}.")


@dataclass(frozen=True, eq=False)
class HostComputation:
    """A Python function that runs at one place.

    Attributes:
      name: the name of the function, for errors and plans.
      function: takes the argument in its containers (or nothing, without a parameter type), returns the result.
      type_signature: parameter (or None) and result, with containers.
      kind: what it is made of: Python, or TensorFlow.
    """

    name: str
    function: Callable[..., Any]
    type_signature: fl.FunctionType
    kind: str = "Python"

    def __call__(self, *positional: Any) -> Any:
        """Calls the function on a positional value, and returns a positional value of the declared result type.

        The function gets arrays of its own, which it may write into, and JAX as the user has set it up. What it returns
        is copied, so that it may return one buffer again and again.

        Raises:
          ResultError: the result is not of the declared type; nothing is cast, Python's own scalars excepted.
        """
        parameter = self.type_signature.parameter
        with jax.enable_x64(jax.enable_x64.get_global()):
            if parameter is None:
                result = self.function()
            else:
                result = self.function(from_positional(_in_numpy(positional[0]), parameter))
        return self._checked(result)

    def _checked(self, result: Any) -> Any:
        try:
            positional = _to_positional(result, self.type_signature.result)
        except StructureError as error:
            raise ResultError(
                f"{str(error).rstrip('.')}, in the result of the {self.kind} computation {self.name!r}, "
                f"declared as {self.type_signature.result}."
            ) from error
        return _copied(positional)


def _to_positional(value: Any, type_: fl.Type) -> Any:
    """`to_positional`, which lets the sequences that a TensorFlow computation made pass."""
    if isinstance(type_, fl.SequenceType) and isinstance(value, Sequence | UnequalBatches):
        return value
    if not contains_sequence(type_):
        return to_positional(value, type_)
    pairs = zip(matched_fields(value, type_, ""), type_.items(), strict=True)
    return tuple(_to_positional(child, field) for child, (_, field) in pairs)


def _in_numpy(value: Any) -> Any:
    """A positional value for a Python function: copies in NumPy, scalars as NumPy's, sequences that can be iterated."""
    if isinstance(value, tuple):
        return tuple(_in_numpy(field) for field in value)
    if isinstance(value, UnequalBatches):
        return replace(value, runs=tuple(_in_numpy(run) for run in value.runs))
    if isinstance(value, Sequence):
        on_host = replace(
            value,
            leaves=tuple(np.asarray(leaf) for leaf in value.leaves),
            start=int(value.start),
            num_rows=int(value.num_rows),
            order=None if value.order is None else np.asarray(value.order),
        )
        # What was mapped by a JAX computation comes out of it as JAX's arrays.
        return on_host.map(lambda batch: trees.map(_copied, batch)) if value.transforms else on_host
    return _copied(value)


def _copied(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_copied(field) for field in value)
    if isinstance(value, str | bytes | Sequence | UnequalBatches):
        return value
    return np.array(value)[()]
