"""Rounds of averaging: every client works from the global model, and the server applies the mean of the updates.

The server optimizer makes it the generalised form of Reddi et al., "Adaptive Federated Optimization", ICLR 2021: the
mean update, negated, is the gradient that it is given. SGD with learning rate 1 is plain averaging.
"""

from __future__ import annotations

from typing import Any

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, UInt32

from fedlens.errors import ConfigError
from fedlens.language import batch_type, federated_map, jax_computation
from fedlens.learning.aggregators import Aggregator
from fedlens.learning.client_work import ClientResult, ClientWork
from fedlens.learning.metrics import finalize
from fedlens.learning.models import Model
from fedlens.learning.process import LearningProcess
from fedlens.learning.randomness import as_key
from fedlens.learning.state import ServerState
from fedlens.runtime.engine import OnNonFinite, check_on_nonfinite

_KEY = fl.TensorType(np.uint32, (2,))


def check_options(batch_size: int, epochs: int, on_nonfinite: str) -> None:
    """Checks what all averaging processes are told.

    Raises:
      ConfigError: `batch_size` or `epochs` is below 1, or `on_nonfinite` is none of the three.
    """
    if batch_size < 1 or epochs < 1:
        raise ConfigError(
            f"Expected a batch size and a number of epochs of at least 1, found {batch_size} and {epochs}."
        )
    check_on_nonfinite(on_nonfinite)


def averaging(
    model: Model,
    work: ClientWork,
    server_optimizer: optax.GradientTransformation | None,
    *,
    batch_size: int,
    aggregator: Aggregator,
    on_nonfinite: OnNonFinite,
) -> LearningProcess:
    """The learning process whose clients do `work`; see `build_weighted_fed_avg` for the other arguments."""
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer

    @jax_computation(_KEY)
    def initial_state(key_data: UInt32[Array, "2"]) -> ServerState:
        weights = model.init(as_key(key_data))
        return ServerState(weights, server_optimizer.init(weights), jnp.int32(0), key_data)

    @fl.federated_computation(fl.FederatedType(_KEY, fl.SERVER))
    def initialize(key_data: fl.Value) -> fl.Value:
        return federated_map(initial_state, key_data)

    def server_update(state: ServerState, mean_update: Any, num_examples: Array) -> ServerState:
        pseudo_gradient = jax.tree.map(jnp.negative, mean_update)
        updates, optimizer_state = server_optimizer.update(pseudo_gradient, state.optimizer_state, state.weights)
        new = optax.apply_updates(state.weights, updates), optimizer_state
        # Without any example the mean is 0/0: the model and the optimizer stay as they are.
        weights, optimizer_state = jax.tree.map(
            lambda changed, old: jnp.where(num_examples > 0, changed, old), new, (state.weights, state.optimizer_state)
        )
        return ServerState(weights, optimizer_state, state.round + 1, state.key)

    state_type = fl.FederatedType(initialize.type_signature.result.member, fl.SERVER)
    keys_type = fl.FederatedType(_KEY, fl.CLIENTS)
    data_type = fl.FederatedType(fl.SequenceType(batch_type(model.inputs, batch_size)), fl.CLIENTS)

    @fl.federated_computation(state_type, keys_type, data_type)
    def next_round(state: fl.Value, keys: fl.Value, data: fl.Value) -> Any:
        weights = fl.federated_broadcast(state.weights)
        results = federated_map(work, (weights, keys, data))
        mean_update = aggregator(results.update, results.num_examples)
        totals = fl.federated_sum(federated_map(_contribution, results))
        new_state = federated_map(server_update, (state, mean_update, totals.num_examples))
        return new_state, federated_map(_round_metrics, totals)

    return LearningProcess(model, initialize, next_round, on_nonfinite)


def _contribution(result: ClientResult) -> dict[str, Any]:
    """What a client adds to the totals of a round."""
    took_part = (result.num_examples > 0).astype(jnp.int32)
    return {"sums": result.sums, "num_examples": result.num_examples, "num_clients": took_part}


def _round_metrics(totals: dict[str, Any]) -> dict[str, Array]:
    counts = {name: totals[name] for name in ("num_examples", "num_clients")}
    return {**finalize(totals["sums"]), **counts}
