"""FedProx: federated averaging whose clients are held near the global model.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv:1812.06127. A client minimises its mean
loss plus `mu / 2 * ||weights - global weights||^2`, so that unequal clients drift less far apart in a round.
"""

from __future__ import annotations

import math

import optax

from fedlens.errors import ConfigError
from fedlens.learning.aggregators import Aggregator, mean, weighted_mean
from fedlens.learning.averaging import averaging, check_options
from fedlens.learning.client_work import local_training
from fedlens.learning.models import Model
from fedlens.learning.process import LearningProcess
from fedlens.runtime.engine import OnNonFinite


def build_weighted_fed_prox(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    proximal_strength: float,
    batch_size: int = 20,
    epochs: int = 1,
    shuffle: bool = True,
    aggregator: Aggregator = weighted_mean,
    on_nonfinite: OnNonFinite = "raise",
) -> LearningProcess:
    """FedProx, each client weighted by its number of examples.

    Example:
      >>> process = fed.learning.build_weighted_fed_prox(model, optax.sgd(0.1), proximal_strength=0.01)

    Args:
      model: what to learn.
      client_optimizer: for local training; it is given the gradient of the loss plus the proximal term.
      server_optimizer: as in `build_weighted_fed_avg`, like the arguments that follow but the next.
      proximal_strength: mu, at least 0; with 0 this is federated averaging, bit for bit.
      batch_size: examples in a batch.
      epochs: how often a client goes over its data in a round.
      shuffle: whether it does so in a new random order each time.
      aggregator: how updates become one.
      on_nonfinite: what to do with a client whose update has infinities or NaNs.

    Raises:
      ConfigError: `proximal_strength` is negative or not finite, or as for `build_weighted_fed_avg`.
    """
    check_options(batch_size, epochs, on_nonfinite)
    if not (proximal_strength >= 0 and math.isfinite(proximal_strength)):
        raise ConfigError(f"Expected a proximal strength of at least 0, found {proximal_strength}.")
    return averaging(
        model,
        local_training(model, client_optimizer, epochs=epochs, shuffle=shuffle, proximal_strength=proximal_strength),
        server_optimizer,
        batch_size=batch_size,
        aggregator=aggregator,
        on_nonfinite=on_nonfinite,
    )


def build_unweighted_fed_prox(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    proximal_strength: float,
    batch_size: int = 20,
    epochs: int = 1,
    shuffle: bool = True,
    on_nonfinite: OnNonFinite = "raise",
) -> LearningProcess:
    """FedProx in which every client that has examples counts the same; see `build_weighted_fed_prox`."""
    return build_weighted_fed_prox(
        model,
        client_optimizer,
        server_optimizer,
        proximal_strength=proximal_strength,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=shuffle,
        aggregator=mean,
        on_nonfinite=on_nonfinite,
    )
