"""Client work: what a client does with its data in a round, as one local computation.

Local training is SGD (or any optax optimizer) from the global weights over the client's batches; McMahan et al.,
"Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int, UInt32

from fedlens.language import Sequence
from fedlens.learning.metrics import EXAMPLES, zero_sums
from fedlens.learning.models import INPUT, TARGET, Model
from fedlens.learning.randomness import as_key
from fedlens.runtime.late_products import products_last


class ClientResult(NamedTuple):
    """What a client's work gives.

    Attributes:
      weights: the local model.
      update: the local model minus the global one.
      num_examples: how many examples the client has.
      sums: metric name -> sum over all examples that were trained on, each as often as it was.
    """

    weights: Any
    update: Any
    num_examples: Int[Array, ""]
    sums: dict[str, Array]


ClientWork = Callable[[Any, UInt32[Array, "2"], Sequence], ClientResult]  # (global weights, key data, batches)


def local_training(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    epochs: int,
    shuffle: bool,
    proximal_strength: float = 0.0,
) -> ClientWork:
    """Training over a client's batches.

    Args:
      model: what to train.
      optimizer: its state starts anew in every round.
      epochs: how often to go over the data, at least 1.
      shuffle: whether to visit the examples in a new random order in every epoch.
      proximal_strength: mu of FedProx, which adds `mu / 2 * ||weights - global weights||^2` to what is minimised; the
        loss that is measured stays that of the examples.

    Returns:
      A client work. A client without examples returns the global weights.
    """

    def train(global_weights: Any, key_data: UInt32[Array, "2"], batches: Sequence) -> ClientResult:
        shuffle_key, noise_key = jax.random.split(as_key(key_data))

        def step(state: Any, batch: dict[str, Array]) -> Any:
            weights, optimizer_state, sums, number = state

            def objective(weights: Any) -> tuple[Array, dict[str, Array]]:
                outputs = model.apply(weights, batch[INPUT], jax.random.fold_in(noise_key, number))
                return model.measure(outputs, batch[TARGET], batch["mask"])

            gradient, of_batch = jax.grad(objective, has_aux=True)(weights)
            if proximal_strength:
                gradient = jax.tree.map(
                    lambda slope, here, start: slope + proximal_strength * (here - start),
                    gradient,
                    weights,
                    global_weights,
                )
            # All of the gradient before any update: XLA then writes new weights over old ones, which it copies in every
            # step where it cannot tell whether they will be read again (4 % of W2).
            gradient = lax.optimization_barrier(gradient)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, weights)
            weights = optax.apply_updates(weights, updates)
            return weights, optimizer_state, jax.tree.map(jnp.add, sums, of_batch), number + 1

        def epoch(number: Int[Array, ""] | int, state: Any) -> Any:
            shuffled = batches.shuffle(jax.random.fold_in(shuffle_key, number)) if shuffle else batches
            return shuffled.reduce(state, products_last(step))

        state = (global_weights, optimizer.init(global_weights), zero_sums(model.metrics), jnp.int32(0))
        state = epoch(0, state) if epochs == 1 else lax.fori_loop(0, epochs, epoch, state)
        weights, _, sums, _ = state
        update = jax.tree.map(jnp.subtract, weights, global_weights)
        return ClientResult(weights, update, sums[EXAMPLES] // epochs, sums)

    return train
