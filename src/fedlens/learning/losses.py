"""Losses: one number for each example of a batch, so that the examples that only fill up a batch can be masked."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from fedlens.errors import StructureError

Loss = Callable[[Array, Array], Float[Array, " batch"]]  # loss(outputs, targets) -> one loss for each example


def cross_entropy(
    logits: Float[Array, "batch *steps classes"], labels: Int[Array, "batch *steps"]
) -> Float[Array, " batch"]:
    """Softmax cross-entropy with integer labels, in nats; over the steps of a sequence the mean.

    The loss of a label that is no class, from 0 to classes - 1, is NaN.

    Raises:
      StructureError: the labels are no integers.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise StructureError(f"Expected integer labels, found {labels.dtype}. Use labels.astype(np.int32).")
    classes = np.int32(logits.shape[-1])
    # The largest logit is taken off, so that nothing overflows; its derivative is zero.
    largest = lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    shifted = logits - jnp.where(jnp.isfinite(largest), largest, 0)
    # A comparison picks the label's logit: the derivative of an index is a scatter, which a CPU does row by row.
    is_label = np.arange(classes, dtype=np.int32) == labels[..., None]
    picked = jnp.where(is_label, shifted, 0).sum(axis=-1)
    losses = jnp.log(jnp.exp(shifted).sum(axis=-1)) - picked
    return _mean_over_steps(jnp.where((labels >= 0) & (labels < classes), losses, jnp.nan))


def squared_error(
    outputs: Float[Array, "batch *shape"], targets: Float[Array, "batch *shape"]
) -> Float[Array, " batch"]:
    """Half of the squared difference, averaged over an example's outputs."""
    return _mean_over_steps(optax.l2_loss(outputs, targets))


def _mean_over_steps(values: Float[Array, "batch *steps"]) -> Float[Array, " batch"]:
    return values.reshape(values.shape[0], -1).mean(axis=1) if values.ndim > 1 else jnp.asarray(values)
