"""Get the clients' local models out of a federated computation, in four steps.

    python examples/extract_local_weights.py

1. One computation returns the average and every client's weights.
2. What comes back: by client id, in order, or stacked.
3. Clip and normalise each client's weights before averaging; return both.
4. The same for training: a round written by hand returns the new global model and all local models.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedlens as fed

WEIGHTS = {"dense": {"kernel": np.zeros((4, 2), np.float32), "bias": np.zeros(2, np.float32)}}
MODEL_TYPE = fed.type_of(WEIGHTS)

# 1. The average and the individual weights, in one invocation ---------------------------------------------------------


@fed.federated_computation(fed.FederatedType(MODEL_TYPE, fed.CLIENTS))
def average_with_extraction(model_weights: fed.Value) -> Any:
    return {
        "global_weights": fed.federated_mean(model_weights),
        "client_weights": fed.federated_map(lambda weights: weights, model_weights),
    }


# 3. Per-client processing before averaging ----------------------------------------------------------------------------


@fed.jax_computation
def clip_and_normalize(weights: Any) -> Any:
    """Clips to an L2 norm of 5, then scales to a norm of 1."""
    norm = optax.tree.norm(weights)
    clipped = jax.tree.map(lambda leaf: leaf * jnp.minimum(1.0, 5.0 / norm), weights)
    return jax.tree.map(lambda leaf: leaf / optax.tree.norm(clipped), clipped)


@fed.federated_computation(fed.FederatedType(MODEL_TYPE, fed.CLIENTS))
def average_of_processed(model_weights: fed.Value) -> Any:
    processed = fed.federated_map(clip_and_normalize, model_weights)
    return {"global_weights": fed.federated_mean(processed), "client_weights": processed}


# 4. A round of training, written by hand ------------------------------------------------------------------------------

BATCH_TYPE = fed.type_of({"x": np.zeros((5, 4), np.float32), "y": np.zeros((5, 2), np.float32)})


def squared_error(weights: Any, batch: Any) -> jax.Array:
    prediction = batch["x"] @ weights["dense"]["kernel"] + weights["dense"]["bias"]
    return jnp.mean((prediction - batch["y"]) ** 2)


@fed.jax_computation
def local_update(weights: Any, batches: fed.Sequence) -> Any:
    """SGD over the client's batches; differentiate inside the step of the fold."""

    def step(state: Any, batch: Any) -> Any:
        weights, num_examples = state
        gradient = jax.grad(squared_error)(weights, batch)
        weights = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, weights, gradient)
        return weights, num_examples + batch["x"].shape[0]

    weights, num_examples = batches.reduce((weights, jnp.float32(0)), step)
    return {"weights": weights, "num_examples": num_examples}


@fed.federated_computation(
    fed.FederatedType(MODEL_TYPE, fed.SERVER),
    fed.FederatedType(fed.SequenceType(BATCH_TYPE), fed.CLIENTS),
)
def training_round(model: fed.Value, data: fed.Value) -> Any:
    trained = fed.federated_map(local_update, (fed.federated_broadcast(model), data))
    new_model = fed.federated_mean(trained.weights, trained.num_examples)
    return {"model": new_model, "local_models": trained.weights}


def random_weights(rng: np.random.Generator) -> Any:
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), WEIGHTS)


def random_batches(rng: np.random.Generator, count: int) -> list[dict[str, np.ndarray]]:
    return [
        {"x": rng.normal(size=(5, 4)).astype(np.float32), "y": rng.normal(size=(5, 2)).astype(np.float32)}
        for _ in range(count)
    ]


def main() -> None:
    rng = np.random.default_rng(0)
    clients = fed.Cohort({name: random_weights(rng) for name in ("alice", "bob", "carol")})

    result = average_with_extraction(clients)

    # 2. Handling what comes back --------------------------------------------------------------------------------------
    local = result["client_weights"]
    print(local)
    print("alice's bias:", local["alice"]["dense"]["bias"])
    for client_id, weights in local.items():
        print(f"{client_id:>6}: kernel {weights['dense']['kernel'].shape}")
    print("stacked kernel:", local.stacked["dense"]["kernel"].shape)

    processed = average_of_processed(clients)
    mean_of_returned = processed["client_weights"].stacked["dense"]["bias"].mean(axis=0)
    print("mean of the returned biases:", mean_of_returned)
    print("returned mean of the biases:", processed["global_weights"]["dense"]["bias"])

    data = fed.Cohort({name: random_batches(rng, count) for name, count in (("alice", 3), ("bob", 1), ("carol", 6))})
    trained = training_round(WEIGHTS, data)
    for client_id, weights in trained["local_models"].items():
        drift = float(optax.tree.norm(jax.tree.map(jnp.subtract, weights, trained["model"])))
        print(f"{client_id:>6} is {drift:.3f} away from the new global model")


if __name__ == "__main__":
    main()
