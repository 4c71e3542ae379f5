"""Federated averaging, weighted by examples or not; McMahan et al., AISTATS 2017, arXiv:1602.05629.

The server optimizer makes it the generalised form of Reddi et al., "Adaptive Federated Optimization", ICLR 2021: the
mean update, negated, is the gradient that it is given. The default, SGD with learning rate 1, is plain averaging.
"""

from __future__ import annotations

import optax

from fedlens.learning.aggregators import Aggregator, mean, weighted_mean
from fedlens.learning.averaging import averaging, check_options
from fedlens.learning.client_work import local_training
from fedlens.learning.models import Model
from fedlens.learning.process import LearningProcess
from fedlens.runtime.engine import OnNonFinite


def build_weighted_fed_avg(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    batch_size: int = 20,
    epochs: int = 1,
    shuffle: bool = True,
    aggregator: Aggregator = weighted_mean,
    on_nonfinite: OnNonFinite = "raise",
) -> LearningProcess:
    """Federated averaging, each client weighted by its number of examples.

    Args:
      model: what to learn.
      client_optimizer: for local training, such as `optax.sgd(0.1)`; its state starts anew in every round.
      server_optimizer: applies the mean update; `optax.sgd(1.0)` by default, which is plain averaging.
      batch_size: examples in a batch; the last batch of a client is filled up and masked, nothing is dropped.
      epochs: how often a client goes over its data in a round.
      shuffle: whether it does so in a new random order each time.
      aggregator: how updates become one.
      on_nonfinite: what to do with a client whose update has infinities or NaNs: "raise" names client and leaf, "drop"
        leaves it out and counts it, "ignore" aggregates it.

    Returns:
      A learning process.

    Raises:
      ConfigError: `batch_size` or `epochs` is below 1, or `on_nonfinite` is none of the three.
    """
    check_options(batch_size, epochs, on_nonfinite)
    return averaging(
        model,
        local_training(model, client_optimizer, epochs=epochs, shuffle=shuffle),
        server_optimizer,
        batch_size=batch_size,
        aggregator=aggregator,
        on_nonfinite=on_nonfinite,
    )


def build_unweighted_fed_avg(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    batch_size: int = 20,
    epochs: int = 1,
    shuffle: bool = True,
    on_nonfinite: OnNonFinite = "raise",
) -> LearningProcess:
    """Federated averaging in which every client that has examples counts the same; see `build_weighted_fed_avg`."""
    return build_weighted_fed_avg(
        model,
        client_optimizer,
        server_optimizer,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=shuffle,
        aggregator=mean,
        on_nonfinite=on_nonfinite,
    )
