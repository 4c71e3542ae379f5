"""Any training loop can keep its clients' local models: here one in NumPy, whose clients train in four threads.

    python examples/numpy_loop_ledger.py            # the ledger goes to runs/numpy
    python examples/numpy_loop_ledger.py FOLDER

Softmax regression on handwritten digits, federated averaging. `record` copies what it is given and may be called from
any thread; a round is committed whole when `finish_round` has been called.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import fedlens as fed

ROUNDS, STEPS, LEARNING_RATE = 5, 10, 0.5

Weights = dict[str, np.ndarray]


def train(weights: Weights, x: np.ndarray, y: np.ndarray) -> tuple[Weights, float]:
    """Some steps of gradient descent on one client's digits; its weights, and its loss before the last step."""
    kernel, bias = weights["kernel"].copy(), weights["bias"].copy()
    for _ in range(STEPS):
        scores = x @ kernel + bias
        scores -= scores.max(axis=1, keepdims=True)
        probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        loss = -np.log(probabilities[np.arange(len(y)), y]).mean()
        probabilities[np.arange(len(y)), y] -= 1
        kernel -= LEARNING_RATE * x.T @ probabilities / len(y)
        bias -= LEARNING_RATE * probabilities.mean(axis=0)
    return {"kernel": kernel, "bias": bias}, float(loss)


def main(folder: str) -> None:
    """Trains, and says what was kept."""
    data = fed.data.digits()
    model = {"kernel": np.zeros((64, 10), np.float32), "bias": np.zeros(10, np.float32)}
    with (
        fed.Ledger.create(folder, weights=model, config={"lr": LEARNING_RATE}) as ledger,
        ThreadPoolExecutor(4) as workers,
    ):
        for number in range(ROUNDS):

            def one_client(client: str, number: int = number, start: Weights = model) -> tuple[Weights, int]:
                columns = data.client(client)
                weights, loss = train(start, columns["x"].reshape(-1, 64), columns["y"])
                ledger.record(number, client, weights, num_examples=len(columns["y"]), loss=loss)
                return weights, len(columns["y"])

            local = list(workers.map(one_client, data.ids))
            sizes = [size for _, size in local]
            model = {name: np.average([each[name] for each, _ in local], axis=0, weights=sizes) for name in model}
            model = {name: leaf.astype(np.float32) for name, leaf in model.items()}
            ledger.finish_round(number, global_weights=model, metrics={"clients": len(local)})

    stored = fed.Ledger(folder)
    losses = [np.mean(stored.round(number).table().column("loss").to_numpy()) for number in stored.rounds]
    print(f"{len(stored.clients)} clients, {len(stored.rounds)} rounds, in {folder}")
    print("mean loss by round: " + " ".join(f"{loss:.3f}" for loss in losses))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/numpy")
