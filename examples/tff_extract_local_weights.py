"""Programs written for TensorFlow Federated, with nothing but the import changed, and every client's weights at hand.

    python examples/tff_extract_local_weights.py

1. A federated computation returns the average and every client's weights.
2. Walking over the clients that came back.
3. An aggregation that clips and normalises each client's weights in a `tf_computation` before averaging them. It runs
   where TensorFlow is installed: pip install 'fedlens[tensorflow]'.
4. TFF's usual training loop of federated averaging; and, which TFF does not have, what every client learned in it.
"""

from __future__ import annotations

import collections
import importlib.util
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

import fedlens.compat.tff as tff  # it was: import tensorflow_federated as tff

MODEL_TYPE = tff.StructType([("kernel", tff.TensorType(np.float32, [4, 2])), ("bias", tff.TensorType(np.float32, [2]))])

# 1. The average and the individual weights ----------------------------------------------------------------------------


@tff.federated_computation(tff.FederatedType(MODEL_TYPE, tff.CLIENTS))
def average_with_extraction(client_weights: Any) -> Any:
    return collections.OrderedDict(
        global_weights=tff.federated_average(client_weights),
        client_weights=client_weights,
    )


# 2. Walking over the clients that came back ---------------------------------------------------------------------------


def print_client_weights(result: Any) -> None:
    for number, weights in enumerate(result.client_weights):
        distance = np.linalg.norm(weights.kernel - result.global_weights.kernel)
        print(f"client {number}: kernel {weights.kernel.shape}, {distance:.3f} away from the average")


# 3. Each client's weights are processed before they are averaged ------------------------------------------------------


def build_custom_aggregation() -> Any:
    import tensorflow as tf

    @tff.tf_computation(MODEL_TYPE)
    def clip_and_normalize(weights):  # type: ignore[no-untyped-def]
        clipped, _ = tf.clip_by_global_norm([weights["kernel"], weights["bias"]], 5.0)
        norm = tf.linalg.global_norm(clipped)
        return collections.OrderedDict(kernel=clipped[0] / norm, bias=clipped[1] / norm)

    @tff.federated_computation(tff.FederatedType(MODEL_TYPE, tff.CLIENTS))
    def custom_aggregation(client_weights: Any) -> Any:
        processed = tff.federated_map(clip_and_normalize, client_weights)
        return collections.OrderedDict(
            global_weights=tff.federated_mean(processed),
            client_weights=processed,
        )

    return custom_aggregation


# 4. The usual training loop -------------------------------------------------------------------------------------------


def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
    kernel, bias = model_weights[0]
    return x @ kernel + bias


def loss_fn(output: Any, label: Any, sample_weight: Any = None) -> Any:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(output, label))


def model_fn() -> Any:
    return tff.learning.models.FunctionalModel(
        initial_weights=((np.zeros((4, 2), np.float32), np.zeros(2, np.float32)), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=loss_fn,
        input_spec=collections.OrderedDict(
            x=tff.TensorType(np.float32, [None, 4]),
            y=tff.TensorType(np.int32, [None]),
        ),
    )


def build_training_process() -> Any:
    return tff.learning.algorithms.build_weighted_fed_avg(
        model_fn,
        client_optimizer_fn=tff.learning.optimizers.build_sgdm(learning_rate=0.1),
        server_optimizer_fn=tff.learning.optimizers.build_sgdm(learning_rate=1.0),
    )


def train(training_process: Any, federated_train_data: Any, num_rounds: int) -> Any:
    train_state = training_process.initialize()
    for round_number in range(num_rounds):
        result = training_process.next(train_state, federated_train_data)
        train_state = result.state
        train_metrics = result.metrics["client_work"]["train"]
        print(f"round {round_number:2d}, loss {train_metrics['loss']:.4f}, examples {train_metrics['num_examples']}")
    return train_state


# What the programs above are given ------------------------------------------------------------------------------------


def random_weights(rng: np.random.Generator) -> Any:
    return collections.OrderedDict(
        kernel=rng.normal(size=(4, 2)).astype(np.float32), bias=rng.normal(size=2).astype(np.float32)
    )


def random_dataset(rng: np.random.Generator, num_examples: int, batch_size: int = 8) -> list[Any]:
    """The batches of one client; its last one is smaller."""
    x = rng.normal(size=(num_examples, 4)).astype(np.float32)
    y = (x.sum(axis=1) > 0).astype(np.int32)
    starts = range(0, num_examples, batch_size)
    return [collections.OrderedDict(x=x[at : at + batch_size], y=y[at : at + batch_size]) for at in starts]


def main() -> None:
    rng = np.random.default_rng(0)
    client_weights = [random_weights(rng) for _ in range(3)]

    result = average_with_extraction(client_weights)
    print("average bias:", result.global_weights.bias)
    print_client_weights(result)

    if importlib.util.find_spec("tensorflow"):
        print("processed in TensorFlow:")
        print_client_weights(build_custom_aggregation()(client_weights))
    else:
        print("without TensorFlow, part 3 is left out: pip install 'fedlens[tensorflow]'")

    training_process = build_training_process()
    federated_train_data = [random_dataset(rng, num_examples) for num_examples in (30, 12, 45)]
    train_state = train(training_process, federated_train_data, num_rounds=5)
    model_weights = training_process.get_model_weights(train_state)
    print("trained bias:", model_weights.trainable[1])

    output = training_process.with_local_models().next(train_state, federated_train_data)
    for client_id, local_model in output.local_models.items():
        print(f"client {client_id} learned the bias {local_model.weights[1]} from {local_model.num_examples} examples")


if __name__ == "__main__":
    main()
