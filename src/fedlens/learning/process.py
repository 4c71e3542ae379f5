"""`LearningProcess`: rounds of federated learning, as computations of the language with a Python face.

A round is one federated computation of three arguments: the server's state, a PRNG key for each client, and the
clients' batches. `next` derives the keys, so that what a client computes depends on its id, its data, the round and the
state, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from federated_language import framework
from jaxtyping import Array, Int, UInt32

from fedlens.learning.local_models import LocalModels
from fedlens.learning.metrics import EXAMPLES, LOSS
from fedlens.learning.models import Model
from fedlens.learning.randomness import client_keys, run_key
from fedlens.runtime import Cohort, current_context
from fedlens.runtime.arguments import as_cohort, column_of
from fedlens.runtime.engine import OnNonFinite
from fedlens.runtime.values import of_array


@dataclass(frozen=True)
class ServerState:
    """What the server keeps between rounds.

    Attributes:
      weights: the global model.
      optimizer_state: the state of the server's optimizer.
      round: the number of the next round, from 0.
      key: the key data of the run, from which every client's key of every round follows.
    """

    weights: Any
    optimizer_state: Any
    round: Int[Array, ""]
    key: UInt32[Array, "2"]


Metrics = dict[str, float]


@dataclass(frozen=True, eq=False)
class LearningProcess:
    """A federated learning algorithm: `initialize`, then `next` once a round.

    Example:
      >>> process = fed.learning.build_weighted_fed_avg(model, client_optimizer=optax.sgd(0.1)).with_local_models()
      >>> state = process.initialize(seed=0)
      >>> state, metrics, local_models = process.next(state, data.cohort(0))

    Attributes:
      model: what is learned.
      initialize_computation: key data at the server -> state at the server.
      next_computation: (state, keys, batches) -> (state, metrics sums), or with the local models as a third.
      on_nonfinite: what to do with a client whose update is not finite: "raise", "drop" or "ignore".
      hands_out_local_models: whether `next` returns the local models too.
    """

    model: Model
    initialize_computation: framework.ConcreteComputation
    build_next: Callable[[bool], framework.ConcreteComputation]
    next_computation: framework.ConcreteComputation
    on_nonfinite: OnNonFinite = "raise"
    hands_out_local_models: bool = False

    def initialize(self, seed: int = 0) -> ServerState:
        """The state before the first round; everything random in the run follows from `seed`."""
        state: ServerState = current_context().run(self.initialize_computation, run_key(seed)).value
        return state

    def next(self, state: ServerState, cohort: Cohort) -> Any:
        """Runs one round.

        Args:
          state: what `initialize` or the last round returned.
          cohort: who takes part.

        Returns:
          The new state and the metrics of the round; and, after `with_local_models()`, the `LocalModels`. Metrics are
          loss and the model's metrics as means over all examples, `num_examples`, `num_clients` (who took part with
          examples), `clients_without_examples`, `clients_dropped`.

        Raises:
          CohortError: the clients' data are not what the model reads.
          NonFiniteError: a client's update has infinities or NaNs, and `on_nonfinite` is "raise".
        """
        cohort = as_cohort(cohort, "cohort")
        keys = client_keys(np.asarray(state.key), int(state.round), cohort.ids)
        argument = (state, of_array(cohort.ids, keys), cohort)
        outcome = current_context().run(self.next_computation, argument, on_nonfinite=self.on_nonfinite)
        new_state, measured, *local = outcome.value
        names = [LOSS, *(metric.name for metric in self.model.metrics), EXAMPLES, "num_clients"]  # JAX sorted them
        metrics = {name: measured[name].item() for name in names}
        metrics["clients_without_examples"] = len(cohort) - len(outcome.dropped) - metrics["num_clients"]
        metrics["clients_dropped"] = len(outcome.dropped)
        if not local:
            return new_state, metrics
        return new_state, metrics, LocalModels(local[0], state.weights)

    def check(self, cohort: Cohort) -> None:
        """Checks, without computing anything, that the clients hold what the model reads.

        Raises:
          CohortError: they do not; field or client and leaf are named.
        """
        data_type = self.next_computation.type_signature.parameter[2]
        column_of(as_cohort(cohort, "cohort"), data_type.member)

    def with_local_models(self) -> LearningProcess:
        """The same process, whose `next` returns `(state, metrics, local_models)`; states and metrics stay the same."""
        if self.hands_out_local_models:
            return self  # and keep what is compiled
        return replace(self, next_computation=self.build_next(True), hands_out_local_models=True)

    def get_model_weights(self, state: ServerState) -> Any:
        """The global model of a state."""
        return state.weights
