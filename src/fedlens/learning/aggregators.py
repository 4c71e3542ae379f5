"""Aggregators: from what the clients send to one value at the server, written in the language.

An aggregator is a function of federated values. To add one, write such a function; to change what an aggregator does,
wrap it: `clip_by_norm(1.0, weighted_mean)` clips every client's update before the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from fedlens.errors import ConfigError
from fedlens.language import federated_map

# aggregator(update at the clients, weight at the clients) -> update at the server, within a federated computation
Aggregator = Callable[[fl.Value, fl.Value], fl.Value]


def weighted_mean(update: fl.Value, weight: fl.Value) -> fl.Value:
    """The mean of the clients' updates, each weighted by its number of examples (McMahan et al., AISTATS 2017)."""
    return fl.federated_mean(update, weight)


def mean(update: fl.Value, weight: fl.Value) -> fl.Value:
    """The mean of the updates of the clients that have examples, each counting the same."""
    return fl.federated_mean(update, federated_map(_has_examples, weight))


def clip_by_norm(max_norm: float, inner: Aggregator = weighted_mean) -> Aggregator:
    """Scales every client's update to an L2 norm of at most `max_norm`, then aggregates with `inner`.

    Raises:
      ConfigError: `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise ConfigError(f"Expected a norm above 0 to clip to, found {max_norm}.")

    def clip(update: Any) -> Any:
        # The norm is `largest` times that of `update / largest`: the squares of large updates overflow.
        largest = jnp.maximum(optax.tree.norm(update, ord=jnp.inf), np.finfo(np.float32).tiny)
        factor = max_norm / largest / optax.tree.norm(jax.tree.map(lambda leaf: leaf / largest, update))
        # NaN: the update is not finite, and stays as it is, for `on_nonfinite` to find the leaf.
        factor = jnp.where(jnp.isnan(factor), 1.0, jnp.minimum(factor, 1.0))
        return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), update)

    return lambda update, weight: inner(federated_map(clip, update), weight)


def _has_examples(weight: Array) -> Array:
    return (weight > 0).astype(jnp.float32)
