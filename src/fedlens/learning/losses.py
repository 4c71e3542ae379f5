"""Losses: one number for each example of a batch, so that the examples that only fill up a batch can be masked."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Loss = Callable[[Array, Array], Float[Array, " batch"]]  # loss(outputs, targets) -> one loss for each example


def cross_entropy(
    logits: Float[Array, "batch *steps classes"], labels: Int[Array, "batch *steps"]
) -> Float[Array, " batch"]:
    """Softmax cross-entropy with integer labels, in nats; over the steps of a sequence the mean."""
    return _mean_over_steps(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def squared_error(
    outputs: Float[Array, "batch *shape"], targets: Float[Array, "batch *shape"]
) -> Float[Array, " batch"]:
    """Half of the squared difference, averaged over an example's outputs."""
    return _mean_over_steps(optax.l2_loss(outputs, targets))


def _mean_over_steps(values: Float[Array, "batch *steps"]) -> Float[Array, " batch"]:
    return values.reshape(values.shape[0], -1).mean(axis=1) if values.ndim > 1 else jnp.asarray(values)
