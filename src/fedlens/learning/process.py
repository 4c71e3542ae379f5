"""`LearningProcess`: rounds of federated learning, as computations of the language with a Python face.

A round is one federated computation of the server's state, a PRNG key for each client, and the clients' batches. `next`
derives the keys, so that what a client computes depends on its id, its data, the round and the state, and on nothing
else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from federated_language import framework

from fedlens.compiler import tap
from fedlens.learning.capture import Capture, capture_of
from fedlens.learning.local_models import LocalModels
from fedlens.learning.metrics import EXAMPLES, LOSS
from fedlens.learning.models import Model
from fedlens.learning.randomness import client_keys, run_key
from fedlens.learning.state import KEY, ROUND, WEIGHTS, field_of, field_of_type
from fedlens.runtime import Cohort, current_context
from fedlens.runtime.arguments import as_cohort, column_of
from fedlens.runtime.engine import OnNonFinite
from fedlens.runtime.values import of_array

Metrics = dict[str, float]


@dataclass(frozen=True, eq=False)
class LearningProcess:
    """A federated learning algorithm: `initialize`, then `next` once a round.

    Example:
      >>> process = fed.learning.build_weighted_fed_avg(model, client_optimizer=optax.sgd(0.1)).with_local_models()
      >>> state = process.initialize(seed=0)
      >>> state, metrics, local_models = process.next(state, data.cohort(0))

    Attributes:
      model: what is learned; None if it is known to the computations alone, as in `from_computations`.
      initialize_computation: key data at the server, or nothing -> state at the server.
      next_computation: (state, keys, batches) or (state, batches) -> (state, metrics); of a process with local models,
        that with what `capture` names tapped.
      on_nonfinite: what to do with a client whose update is not finite: "raise", "drop" or "ignore".
      capture: what is tapped, after `with_local_models()`.
    """

    model: Model | None
    initialize_computation: framework.ConcreteComputation
    next_computation: framework.ConcreteComputation
    on_nonfinite: OnNonFinite = "raise"
    capture: Capture | None = None
    # Made once, so that a second run compiles nothing: whether a bypass was allowed -> the process.
    _tapped: dict[bool, LearningProcess] = field(default_factory=dict, init=False, repr=False)

    @property
    def hands_out_local_models(self) -> bool:
        """Whether `next` returns the local models too."""
        return self.capture is not None

    def initialize(self, seed: int = 0) -> Any:
        """The state before the first round; everything random in the run follows from `seed`."""
        takes_key = self.initialize_computation.type_signature.parameter is not None
        return current_context().run(self.initialize_computation, run_key(seed) if takes_key else None).value

    def next(self, state: Any, cohort: Cohort, *, sink: Callable[[LocalModels], None] | None = None) -> Any:
        """Runs one round.

        Args:
          state: what `initialize` or the last round returned.
          cohort: who takes part.
          sink: takes the local models of a process that hands them out chunk by chunk, in cohort order, while the next
            chunk computes, instead of holding them all in memory.

        Returns:
          The new state and the metrics of the round; and, after `with_local_models()`, the `LocalModels`. Metrics are
          what the round reports; in `fed.learning` loss and the model's metrics as means over all examples,
          `num_examples` and `num_clients` (who took part with examples). `clients_dropped` and, where the round says
          who took part, `clients_without_examples` are added. With a sink the ids of the clients that were dropped
          stand in place of the local models.

        Raises:
          CohortError: the clients' data are not what the model reads.
          NonFiniteError: a client's update has infinities or NaNs, and `on_nonfinite` is "raise".
        """
        cohort = as_cohort(cohort, "cohort")
        argument: tuple[Any, ...] = (state, cohort)
        if len(self.next_computation.type_signature.parameter) == 3:
            key, round_number = (field_of(state, name) for name in (KEY, ROUND))
            keys = client_keys(np.asarray(key), int(round_number), cohort.ids)
            argument = (state, of_array(cohort.ids, keys), cohort)
        capture, weights = self.capture, self.get_model_weights(state)
        forward = None if capture is None or sink is None else capture.passed_on(sink, weights)
        outcome = current_context().run(self.next_computation, argument, on_nonfinite=self.on_nonfinite, sink=forward)
        result, tapped = (outcome.value, {}) if capture is None else outcome.value
        new_state, measured = result
        metrics = self._metrics(measured)
        if "num_clients" in metrics:
            metrics["clients_without_examples"] = len(cohort) - len(outcome.dropped) - metrics["num_clients"]
        metrics["clients_dropped"] = len(outcome.dropped)
        if capture is None:
            return new_state, metrics
        return new_state, metrics, outcome.dropped if sink is not None else capture.local_models(tapped, weights)

    def check(self, cohort: Cohort) -> None:
        """Checks, without computing anything, that the clients hold what the model reads.

        Raises:
          CohortError: they do not; field or client and leaf are named.
        """
        *_, data_type = self.next_computation.type_signature.parameter
        column_of(as_cohort(cohort, "cohort"), data_type.member)

    def with_local_models(self, *, allow_bypass: bool = False) -> LearningProcess:
        """The same process, whose `next` returns `(state, metrics, local_models)`; states and metrics stay the same.

        It is a tap (`fed.tap`) of the weights, the number of examples and the measurements of the round's client work.

        Args:
          allow_bypass: whether local models may be handed out that a secure sum or differential privacy protects.

        Raises:
          ConfigError: the round has no client work, or one whose result has no model in it; see `capture_of`.
          DisclosureError: the local models are protected, and `allow_bypass` is False.
        """
        if self.capture is not None:
            return self
        if allow_bypass not in self._tapped:
            state_type = self.next_computation.type_signature.parameter[0].member
            capture = capture_of(self.next_computation, field_of_type(state_type, WEIGHTS))
            tapped = tap(self.next_computation, capture.names, allow_bypass=allow_bypass)
            self._tapped[allow_bypass] = replace(self, next_computation=tapped, capture=capture)
        return self._tapped[allow_bypass]

    def get_model_weights(self, state: Any) -> Any:
        """The global model of a state."""
        return field_of(state, WEIGHTS)

    def _metrics(self, measured: Any) -> Metrics:
        names = list(measured)
        if self.model is not None:  # in the order of the model; JAX sorted them
            first = [LOSS, *(metric.name for metric in self.model.metrics), EXAMPLES, "num_clients"]
            names = [name for name in first if name in measured] + [name for name in names if name not in first]
        return {name: np.asarray(measured[name]).item() for name in names}
