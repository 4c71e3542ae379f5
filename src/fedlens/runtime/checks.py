"""What is looked at in the values that clients send: floats that are not finite, integers beyond a bound.

A secure sum declares what its clients may send, a select which keys they may ask for. The checks run where the values
are, in the pass over the cohort; each gives flags, and what was found, for one client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int64

from fedlens.compiler import ClientStage, Step
from fedlens.compiler.operations import SECURE_SUMS, SELECTS
from fedlens.errors import BoundError
from fedlens.language.types import leaf_paths, tensor_types
from fedlens.runtime.interpreter import Call, evaluate
from fedlens.runtime.reductions import flags_of, is_sum, leaves, member


def checked_leaves(steps: Sequence[Step]) -> list[str]:
    """The names of the floating-point leaves that enter reductions, weights too, in the order of `finite`'s flags."""
    names = []
    for step in steps:
        value_type = step.part(0).type_signature if step.operation == "federated_aggregate" else step.type
        operands = [(leaf_paths(value_type), tensor_types(value_type))]
        if step.operation == "federated_weighted_mean":
            operands.append((["weight"], tensor_types(step.part(1).type_signature)))
        names += [
            path or "value"
            for paths, tensors in operands
            for path, tensor in zip(paths, tensors, strict=True)
            if jnp.issubdtype(tensor.dtype, jnp.inexact)
        ]
    return names


def finite(operands: Sequence[Any]) -> jax.Array:
    """For each leaf of `checked_leaves` whether one client's operand is finite throughout: bool[leaves]."""
    inexact = [leaf for leaf in leaves(list(operands)) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return flags_of([jnp.isfinite(leaf).all() for leaf in inexact])


def all_finite(steps: Sequence[Step], accumulators: Mapping[str, Any]) -> jax.Array:
    """Whether sums are finite throughout; then so was every operand, as what is not finite stays so in a sum."""
    sums = [accumulators[step.name] for step in steps if is_sum(step)]
    flags = [jnp.isfinite(leaf).all() for leaf in leaves(sums) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack(flags).all() if flags else jnp.bool_(True)


@dataclass(frozen=True)
class Bounded:
    """A leaf of integers that a step bounds.

    Attributes:
      operation: the secure sum, or the select.
      leaf: the path of the leaf; "keys" for a select.
      dtype: its dtype.
    """

    operation: str
    leaf: str
    dtype: np.dtype[Any]


def bounded_leaves(stage: ClientStage) -> list[Bounded]:
    """The leaves that are bounded, in the order of `within`'s flags."""
    return [
        Bounded(step.operation, "keys" if step.operation in SELECTS else path or "value", tensor.dtype)
        for step in _bounding(stage)
        for path, tensor in zip(leaf_paths(_value_type(step)), tensor_types(_value_type(step)), strict=True)
    ]


def within(stage: ClientStage, environment: Mapping[str, Any], call: Call) -> tuple[jax.Array, jax.Array]:
    """Looks at the bounded leaves of one client.

    Args:
      stage: the stage.
      environment: the client's values of all names that its steps refer to.
      call: how to run a local computation.

    Returns:
      For each leaf of `bounded_leaves` whether all its numbers are within the bound, bool[leaves]; and the first
      number that is not (any one, if all are) with the bound as it was declared, int64[leaves, 2].
    """
    flags, found = [], []
    for step in _bounding(stage):
        values = leaves(evaluate(step.part(0), environment, call))
        bounds = leaves(evaluate(step.part(1), environment, call))
        bounds = bounds * len(values) if len(bounds) == 1 else bounds
        for value, bound in zip(values, bounds, strict=True):
            bound = bound.reshape(())
            highest, is_empty = _highest(step.operation, bound, value.dtype)
            numbers = value.reshape(-1) if value.size else jnp.zeros(1, value.dtype)
            beyond = ((numbers < 0) | (numbers > highest) | is_empty) & bool(value.size)
            flags.append(~beyond.any())
            found.append(jnp.stack([numbers[beyond.argmax()].astype(jnp.int64), bound.astype(jnp.int64)]))
    return flags_of(flags), jnp.stack(found) if found else jnp.zeros((0, 2), jnp.int64)


def refuse_beyond(
    stage: ClientStage,
    ids: Sequence[str],
    flags: Bool[np.ndarray, "clients leaves"],
    found: Int64[np.ndarray, "clients leaves 2"],
) -> None:
    """Raises for the first client with a number beyond its bound, if there is one.

    Args:
      stage: the stage.
      ids: the clients.
      flags: what `within` says of each.
      found: what `within` found at each.

    Raises:
      BoundError: names stage, client, leaf, number and bound.
    """
    rows = np.flatnonzero(~flags.all(axis=1))
    if not len(rows):
        return
    row = int(rows[0])
    column = int(np.argmin(flags[row]))
    bounded = bounded_leaves(stage)[column]
    number, bound = (int(each) for each in found[row, column])
    if bounded.dtype == np.uint64:  # it came as the int64 of the same bits
        number %= 1 << 64
    more = f" ({len(rows) - 1} more clients too)" if len(rows) > 1 else ""
    raise BoundError(
        f"Expected {_allowed(bounded.operation, bound)}, found {number} in client {ids[row]!r}, leaf {bounded.leaf!r}, "
        f"client stage {stage.index}{more}. {_ADVICE[bounded.operation]}"
    )


def refuse_unfit(stage: ClientStage, fits: Mapping[str, Bool[np.ndarray, " leaves"]]) -> None:
    """Raises if a secure sum does not fit its dtype: its bound says what a client may send, not how many there are.

    Args:
      stage: the stage.
      fits: for each secure sum what `reductions.fits` says of it.

    Raises:
      BoundError: names stage and leaf.
    """
    for step in stage.reductions:
        if step.name in fits and not fits[step.name].all():
            leaf = int(np.argmin(fits[step.name]))
            tensor = tensor_types(step.type)[leaf]
            raise BoundError(
                f"Expected a secure sum that fits {tensor.dtype.name}, found a larger one in leaf "
                f"{leaf_paths(member(step))[leaf] or 'value'!r}, client stage {stage.index}. Sum values of a wider "
                "dtype: what a client sends was within the bound, and the sum of all clients is not."
            )


_ADVICE = {
    "federated_secure_sum": "Clip what clients send, or raise max_input.",
    "federated_secure_sum_bitwidth": "Clip what clients send, or raise the bitwidth.",
    "federated_select": "Ask for existing keys, or raise max_key.",
    "federated_secure_select": "Ask for existing keys, or raise max_key, which is greater than any key here.",
}


def _allowed(operation: str, bound: int) -> str:
    match operation:
        case "federated_secure_sum_bitwidth":
            return f"integers from 0 to 2**{bound} - 1 in a secure sum"
        case "federated_secure_sum":
            return f"integers from 0 to {bound} in a secure sum"
        case "federated_secure_select":
            return f"keys from 0 to {bound - 1}"
    return f"keys from 0 to {bound}"


def _bounding(stage: ClientStage) -> list[Step]:
    selects = [step for step in stage.body if step.operation in SELECTS]
    return selects + [step for step in stage.reductions if step.operation in SECURE_SUMS]


def _value_type(step: Step) -> fl.Type:
    type_ = step.part(0).type_signature
    return type_.member if isinstance(type_, fl.FederatedType) else type_


def _highest(operation: str, bound: jax.Array, dtype: np.dtype[Any]) -> tuple[jax.Array, jax.Array]:
    """The highest number of a dtype that a bound allows, and whether it allows none at all."""
    if operation == "federated_secure_select":  # max_key is greater than any key; in federated_select it may be one
        return bound - 1, bound <= 0
    is_empty = bound < 0
    highest = jnp.where(is_empty, 0, bound).astype(jnp.uint64)
    if operation == "federated_secure_sum_bitwidth":
        one = jnp.uint64(1)
        highest = jnp.where(highest >= 64, ~jnp.uint64(0), (one << jnp.minimum(highest, 63)) - one)
    return jnp.minimum(highest, np.uint64(np.iinfo(dtype).max)).astype(dtype), is_empty
