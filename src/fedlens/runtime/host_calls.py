"""How the host runs a local computation: a Python function as it is, a JAX function as a program for this one call.

A host step may call JAX functions too: its clients' arrays differ in shape, or it maps a mixture over them. Each of
these functions is a program by itself then, which JAX compiles for every set of shapes that comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax

from fedlens.language import HostComputation, LocalComputation, Sequence
from fedlens.language.host_computation import ResultError
from fedlens.language.tracebacks import noting
from fedlens.runtime.interpreter import eager, inline
from fedlens.runtime.lowering import lowered_for_cpu
from fedlens.runtime.sequences import without_python_lengths


@contextmanager
def at_host(place: str) -> Iterator[None]:
    """Names where the host was in any error: in the message of one about a result's type, in a note of every other.

    Args:
      place: such as "in client 'bob', client stage 0, step 'federated_map_0', function 'fit'".
    """
    try:
        with noting(place):
            yield
    except ResultError as error:
        raise error.at(place) from error.__cause__


def call_on_host(local: LocalComputation | HostComputation, *argument: Any) -> Any:
    """Runs a local computation now, on positional values in host memory or on a device."""
    # Batches that are mapped first are computed one by one: a program could not be found again by their functions.
    if isinstance(local, HostComputation) or any(map(_is_mapped, jax.tree.leaves(argument, is_leaf=_is_sequence))):
        return eager(local, *argument)
    with lowered_for_cpu():
        return _program(local)(without_python_lengths(argument))


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence)


def _is_mapped(value: object) -> bool:
    return isinstance(value, Sequence) and bool(value.transforms)


@cache  # local computations live as long as the process: protos of them may come back
def _program(local: LocalComputation) -> Callable[..., Any]:
    return jax.jit(lambda argument: inline(local, *argument))
