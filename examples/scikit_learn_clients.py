"""Clients that train with scikit-learn, in a federated computation that averages what they learned.

    python examples/scikit_learn_clients.py

Each client fits scikit-learn's logistic regression on its own handwritten digits: a `python_computation`, which runs
any Python and is never traced. The server averages the weights with `federated_mean`, a `jax_computation` scores them
on every client's held-out digits, and each client's own weights come back by client id.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

import fedlens as fed

PIXELS, DIGITS, BATCH = 64, 10, 32

MODEL_TYPE = fed.type_of({"coef": np.zeros((DIGITS, PIXELS), np.float32), "intercept": np.zeros(DIGITS, np.float32)})
DATA = fed.data.digits()
BATCHES_TYPE = fed.SequenceType(fed.batch_type(DATA.element_type, BATCH))


@fed.python_computation((MODEL_TYPE, BATCHES_TYPE), {"model": MODEL_TYPE, "num_examples": np.float32})
def fit(model: Any, batches: fed.Sequence) -> Any:
    """A few steps of L-BFGS on one client's digits, from the global model on."""
    # The last batch is filled up; its mask says which rows are digits.
    pairs = [(batch["x"][batch["mask"]], batch["y"][batch["mask"]]) for batch in batches]
    images, labels = (np.concatenate(part) for part in zip(*pairs, strict=True))
    classifier = LogisticRegression(warm_start=True, max_iter=3)
    classifier.classes_ = np.arange(DIGITS)
    classifier.coef_, classifier.intercept_ = model["coef"], model["intercept"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # three steps a round are not meant to converge
        classifier.fit(images.reshape(-1, PIXELS), labels)
    # scikit-learn may return float64, and nothing is cast: the type says float32.
    trained = {"coef": np.float32(classifier.coef_), "intercept": np.float32(classifier.intercept_)}
    return {"model": trained, "num_examples": float(len(labels))}


@fed.jax_computation
def score(model: Any, batches: fed.Sequence) -> Any:
    """How many digits of one client the model gets right, and how many there are."""

    def step(state: Any, batch: Any) -> Any:
        right, count = state
        logits = batch["x"].reshape(-1, PIXELS) @ model["coef"].T + model["intercept"]
        is_right = (logits.argmax(axis=1) == batch["y"]) & batch["mask"]
        return right + is_right.sum(), count + batch["mask"].sum()

    right, count = batches.reduce((jnp.int32(0), jnp.int32(0)), step)
    return {"right": right, "count": count}


@fed.federated_computation(fed.FederatedType(MODEL_TYPE, fed.SERVER), fed.FederatedType(BATCHES_TYPE, fed.CLIENTS))
def training_round(model: fed.Value, digits: fed.Value) -> Any:
    fitted = fed.federated_map(fit, (fed.federated_broadcast(model), digits))
    return {"model": fed.federated_mean(fitted.model, fitted.num_examples), "local_models": fitted.model}


@fed.federated_computation(fed.FederatedType(MODEL_TYPE, fed.SERVER), fed.FederatedType(BATCHES_TYPE, fed.CLIENTS))
def evaluation(model: fed.Value, digits: fed.Value) -> Any:
    return fed.federated_sum(fed.federated_map(score, (fed.federated_broadcast(model), digits)))


@fed.federated_computation(fed.FederatedType(MODEL_TYPE, fed.CLIENTS), fed.FederatedType(BATCHES_TYPE, fed.CLIENTS))
def own_evaluation(models: fed.Value, digits: fed.Value) -> Any:
    return fed.federated_map(score, (models, digits))


def accuracy(scores: Any) -> Any:
    return scores["right"] / scores["count"]


def train(rounds: int) -> list[dict[str, Any]]:
    """Trains for some rounds; for each the global model, the local ones, and their accuracies on held-out digits."""
    training, held_out = DATA.split(0.2, seed=0)
    model: Any = {"coef": np.zeros((DIGITS, PIXELS), np.float32), "intercept": np.zeros(DIGITS, np.float32)}
    history = []
    for number in range(rounds):
        result = training_round(model, training.cohort(number))
        model, test = result["model"], held_out.cohort(number)
        own = own_evaluation(result["local_models"], test)
        history.append(
            result
            | {
                "global_accuracy": float(accuracy(evaluation(model, test))),
                "local_accuracy": {client_id: float(accuracy(scores)) for client_id, scores in own.items()},
            }
        )
    return history


def main() -> None:
    print("round  global model  local models on their own digits (least, mean, most)")
    history = train(rounds=5)
    for number, result in enumerate(history):
        local = np.array(list(result["local_accuracy"].values()))
        shares = "  ".join(f"{share:6.1%}" for share in (local.min(), local.mean(), local.max()))
        print(f"{number:>5}  {result['global_accuracy']:12.1%}  {shares}")
    last = history[-1]
    least = min(last["local_accuracy"], key=last["local_accuracy"].get)
    distance = np.linalg.norm(last["local_models"][least]["coef"] - last["model"]["coef"])
    print(f"{least} does worst on its own; its weights are {distance:.2f} away from the global ones.")


if __name__ == "__main__":
    main()
