"""A plain PyTorch loop that keeps every client's local model: the five lines marked "ledger" are all it takes.

    python examples/torch_loop_ledger.py            # needs torch
    python examples/torch_loop_ledger.py FOLDER     # where the ledger goes; default runs/torch

Federated averaging over handwritten digits, without fedlens's engines: the loop is PyTorch's own. Afterwards the ledger
answers which client is far from the others, and gives back any client's model of any round.
"""

from __future__ import annotations

import copy
import sys

import torch

import fedlens as fed

ROUNDS, EPOCHS, BATCH, LEARNING_RATE = 5, 1, 16, 0.1


def train(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """One client's training, in place; the mean loss over its batches."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    losses = []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def main(folder: str) -> None:
    """Trains, and says what was kept."""
    torch.manual_seed(0)
    data = fed.data.digits()
    examples = {client: data.client(client) for client in data.ids}
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))

    ledger = fed.Ledger.create(folder, weights=model.state_dict(), config={"lr": LEARNING_RATE})  # ledger 1
    with ledger:  # ledger 2
        for number in range(ROUNDS):
            local_models, sizes = [], []
            for client, columns in examples.items():
                local = copy.deepcopy(model)
                x, y = torch.from_numpy(columns["x"]), torch.from_numpy(columns["y"]).long()
                loss = train(local, x, y)
                ledger.record(number, client, local.state_dict(), num_examples=len(x), loss=loss)  # ledger 3
                local_models.append(local.state_dict())
                sizes.append(len(x))
            shares = torch.tensor(sizes) / sum(sizes)
            averaged = {
                name: sum(share * weights[name] for share, weights in zip(shares, local_models, strict=True))
                for name in model.state_dict()
            }
            model.load_state_dict(averaged)
            ledger.finish_round(number, global_weights=model.state_dict(), metrics={"clients": len(sizes)})  # ledger 4

    last = fed.Ledger(folder).round(ROUNDS - 1)  # ledger 5
    rows = sorted(last.table().to_pylist(), key=lambda row: row["cosine"])
    print(f"{len(last)} local models a round, {ROUNDS} rounds, in {folder}")
    print(f"most unlike the others: {rows[0]['client']}, cosine {rows[0]['cosine']:.2f} to the mean update")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/torch")
