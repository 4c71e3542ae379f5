"""Interleaves arrays: how an array is put together whose every n-th element is computed alike.

The elements whose index leaves the same rest when divided by a step are a *phase*. Computing phase by phase needs no
zeros in between, and no scattering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax import lax
from jaxtyping import Array, Shaped


def interleaved(
    phases: Mapping[tuple[int, ...], Shaped[Array, "..."]], steps: Sequence[int], absent: Shaped[Array, "..."]
) -> Shaped[Array, "..."]:
    """The array whose element `i` is element `i // step` of phase `i % step`, along every axis.

    Args:
      phases: by the rest along every axis, arrays of one shape.
      steps: the number of phases along every axis.
      absent: stands for every phase that is not there.

    Returns:
      An array `steps` times the shape of one phase.

    Example:
      >>> interleaved({(0,): jnp.array([1, 2]), (1,): jnp.array([3, 4])}, [2], jnp.zeros(2, int)).tolist()
      [1, 3, 2, 4]
    """

    def complete(phase: tuple[int, ...]) -> Array:
        """The elements whose phase begins like this; the axes that follow are complete."""
        axis = len(phase)
        if axis == len(steps):
            return phases.get(phase, absent)
        parts = [lax.expand_dims(complete((*phase, rest)), (axis + 1,)) for rest in range(steps[axis])]
        if len(parts) == 1:
            return lax.squeeze(parts[0], (axis + 1,))
        whole = lax.concatenate(parts, axis + 1)
        return whole.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 2 :])

    return complete(())
