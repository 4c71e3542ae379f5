"""Clipping: a bound on how much one client can move a sum."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from federated_language import framework

from fedlens import trees
from fedlens.compiler.mechanisms import Clip
from fedlens.privacy.making import float_leaves, mechanism_computation


def clip(norm: float) -> framework.PolymorphicComputation:
    """A computation that returns a value with an L2 norm, over all of its leaves together, of at most `norm`.

    A longer value is scaled down, direction kept. A value with an infinity or a NaN in it becomes zero: a mechanism
    that let one through would show that its client took part. The bound holds up to the rounding of the leaves' dtype.

    Example:
      >>> clipped = fed.federated_map(fed.privacy.clip(1.0), updates)

    Args:
      norm: the bound, positive and finite.

    Returns:
      A computation of one argument, a tensor or a struct of tensors of floating-point numbers; its result has the same
      type. Its types come from where it is used.

    Raises:
      ConfigError: `norm` is not positive and finite.
      LanguageError: where it is used, on leaves that are no floating-point numbers.
    """
    mechanism = Clip(norm)

    def clip(value: Any) -> Any:
        return clipped(value, mechanism.norm)

    return mechanism_computation(clip, mechanism)


def clipped(value: Any, norm: float) -> Any:
    """A tree of arrays, scaled down to an L2 norm of `norm`; zero if it is not finite."""
    leaves = float_leaves(value, "clip")
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves]))
    is_finite = jnp.isfinite(largest)
    # In units of the largest number: the squares of float32 overflow beyond 1.8e19, and vanish below 1e-23. A
    # sixteenth of it, as XLA multiplies by the reciprocal, and flushes one below the smallest normal number to zero.
    unit = jnp.where(is_finite, jnp.maximum(largest / 16, np.finfo(largest.dtype).tiny), 1)
    length = jnp.sqrt(jnp.sum(jnp.stack([jnp.sum(jnp.square(leaf / unit)) for leaf in leaves])))
    is_short = unit * length <= norm
    results = iter(
        jnp.where(is_finite, jnp.where(is_short, leaf, leaf / unit * (norm / jnp.maximum(length, 1))), 0)
        for leaf in leaves
    )
    return trees.map(lambda leaf: next(results).astype(leaf.dtype), value)
