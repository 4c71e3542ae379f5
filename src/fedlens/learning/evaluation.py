"""Evaluation: a model's loss and metrics on held-out data, over all clients and by client."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np
from federated_language import framework
from jaxtyping import Array, Shaped

from fedlens.language import Sequence, batch_type, federated_map, jax_computation, type_of
from fedlens.learning.metrics import EXAMPLES, LOSS, finalize, zero_sums
from fedlens.learning.models import INPUT, TARGET, Model
from fedlens.runtime import ClientValues, Cohort, current_context


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
      metrics: loss, the model's metrics (means over all examples) and `num_examples`.
      by_client: the same for each client on its own examples; NaN for a client without any.
    """

    metrics: dict[str, float]
    by_client: dict[str, dict[str, float]]


@dataclass(frozen=True, eq=False)
class FederatedEvaluation:
    """Evaluates a model on the data of a cohort; made by `build_fed_eval`."""

    model: Model
    of_global_model: framework.ConcreteComputation
    of_local_models: framework.ConcreteComputation
    _on_examples: dict[tuple[str, str], framework.ConcreteComputation] = field(default_factory=dict, repr=False)

    def __call__(self, weights: Any, cohort: Cohort) -> Evaluation:
        """Evaluates weights on what each client holds.

        Args:
          weights: one model for all clients; or `ClientValues`, of which each client evaluates its own.
          cohort: the clients with their held-out data.
        """
        computation = self.of_local_models if isinstance(weights, ClientValues) else self.of_global_model
        totals, by_client = current_context().run(computation, (weights, cohort)).value
        return Evaluation(_numbers(totals), {client_id: _numbers(value) for client_id, value in by_client.items()})

    def on_examples(
        self, weights: ClientValues, x: Shaped[np.ndarray, "examples *x"], y: Shaped[np.ndarray, "examples *y"]
    ) -> dict[str, dict[str, float]]:
        """Evaluates each client's own model on the same examples; client id -> loss, metrics and `num_examples`."""
        examples_type = type_of({INPUT: x, TARGET: y})
        key = str(weights.type), str(examples_type)
        if key not in self._on_examples:
            self._on_examples[key] = _on_shared_examples(self.model, weights.type, examples_type)
        computation = self._on_examples[key]
        values = current_context().run(computation, (weights, {INPUT: x, TARGET: y})).value
        return {client_id: _numbers(value) for client_id, value in values.items()}


def build_fed_eval(model: Model, *, batch_size: int = 100) -> FederatedEvaluation:
    """Builds the evaluation of a model on federated data.

    Example:
      >>> evaluate = fed.learning.build_fed_eval(model)
      >>> evaluate(state.weights, held_out.cohort(0)).metrics["accuracy"]

    Args:
      model: what to evaluate; its weights are given at every call.
      batch_size: examples that are evaluated at once; it changes no result beyond rounding.
    """
    weights_type = _weights_type(model)
    data = fl.FederatedType(fl.SequenceType(batch_type(model.inputs, batch_size)), fl.CLIENTS)

    def measure(weights: Any, batches: Sequence) -> dict[str, Array]:
        def step(sums: dict[str, Array], batch: dict[str, Array]) -> dict[str, Array]:
            _, of_batch = model.measure(model.apply(weights, batch[INPUT], None), batch[TARGET], batch["mask"])
            return jax.tree.map(jnp.add, sums, of_batch)

        return batches.reduce(zero_sums(model.metrics), step)

    @fl.federated_computation(fl.FederatedType(weights_type, fl.SERVER), data)
    def of_global_model(weights: fl.Value, data: fl.Value) -> Any:
        sums = federated_map(measure, (fl.federated_broadcast(weights), data))
        return federated_map(_finalized, fl.federated_sum(sums)), federated_map(_finalized, sums)

    @fl.federated_computation(fl.FederatedType(weights_type, fl.CLIENTS), data)
    def of_local_models(weights: fl.Value, data: fl.Value) -> Any:
        sums = federated_map(measure, (weights, data))
        return federated_map(_finalized, fl.federated_sum(sums)), federated_map(_finalized, sums)

    return FederatedEvaluation(model, of_global_model, of_local_models)


def _on_shared_examples(model: Model, weights_type: fl.Type, examples_type: fl.Type) -> framework.ConcreteComputation:
    def measure(weights: Any, examples: dict[str, Array]) -> dict[str, Array]:
        everything = jnp.ones(examples[TARGET].shape[:1], jnp.bool_)
        _, sums = model.measure(model.apply(weights, examples[INPUT], None), examples[TARGET], everything)
        return _finalized(sums)

    @fl.federated_computation(fl.FederatedType(weights_type, fl.CLIENTS), fl.FederatedType(examples_type, fl.SERVER))
    def on_shared_examples(weights: fl.Value, examples: fl.Value) -> fl.Value:
        return federated_map(measure, (weights, fl.federated_broadcast(examples)))

    return on_shared_examples


def _weights_type(model: Model) -> fl.Type:
    @jax_computation
    def weights() -> Any:
        return model.init(jax.random.key(0))

    return weights.type_signature.result


def _finalized(sums: dict[str, Array]) -> dict[str, Array]:
    return {**finalize(sums), EXAMPLES: sums[EXAMPLES]}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    first = {LOSS: values[LOSS]}
    return {name: np.asarray(value).item() for name, value in (first | values).items()}
