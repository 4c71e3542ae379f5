"""`tff.learning.templates`: what a learning process is, and what its `next` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fedlens.compat.tff.absent import refusing
from fedlens.compat.tff.learning.models import ModelWeights
from fedlens.compat.tff.templates import IterativeProcess

__getattr__ = refusing(__name__)


class LearningAlgorithmState(NamedTuple):
    """The server's state between rounds.

    Attributes:
      global_model_weights: the global model.
      distributor: nothing; the global model is broadcast as it is.
      client_work: the number of the next round, and the key data from which every client's keys follow.
      aggregator: nothing; no aggregator here keeps state.
      finalizer: the state of the server's optimizer.
    """

    global_model_weights: ModelWeights
    distributor: Any
    client_work: Any
    aggregator: Any
    finalizer: Any


class LearningProcessOutput(NamedTuple):
    """What `next` returns: the new state, and metrics under the names of the parts of the process."""

    state: Any
    metrics: Any


class LearningProcess(IterativeProcess):
    """An iterative process with a model: also `get_model_weights(state)` and `set_model_weights(state, weights)`.

    Example:
      >>> process = tff.learning.algorithms.build_weighted_fed_avg(model_fn, tff.learning.optimizers.build_sgdm(0.02))
      >>> state = process.initialize()
      >>> for round_number in range(10):
      ...     result = process.next(state, federated_train_data)
      ...     state, metrics = result.state, result.metrics

    Attributes:
      initialize: a computation, or a function, without arguments.
      next: takes the state and the clients' data, returns a `LearningProcessOutput`.
      get_model_weights: the `ModelWeights` of a state.
      set_model_weights: a state with other weights.
    """

    def __init__(
        self,
        initialize_fn: Callable[[], Any],
        next_fn: Callable[..., Any],
        get_model_weights: Callable[[Any], Any],
        set_model_weights: Callable[[Any, Any], Any],
    ):
        """Takes the four computations."""
        super().__init__(initialize_fn, next_fn)
        self.get_model_weights = get_model_weights
        self.set_model_weights = set_model_weights
