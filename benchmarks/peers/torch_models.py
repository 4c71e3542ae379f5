"""The workloads' models in PyTorch, for the bare loop, pfl and Flower."""

from __future__ import annotations

import torch
from common import Client, clients
from torch import nn
from workloads import TextWorkload, Workload


class Text(nn.Module):
    """Embedding, stacked LSTM layers, a dense layer over the symbols."""

    def __init__(self, workload: TextWorkload):
        super().__init__()
        self.embedding = nn.Embedding(workload.vocabulary, workload.embedding)
        self.recurrent = nn.LSTM(workload.embedding, workload.units, workload.layers, batch_first=True)
        self.dense = nn.Linear(workload.units, workload.vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.recurrent(self.embedding(x))[0])


def build_model(workload: Workload | TextWorkload) -> nn.Module:
    """The workload's model, channels first as PyTorch has it."""
    if isinstance(workload, TextWorkload):
        model: nn.Module = Text(workload)
        expected = workload.parameters() + 4 * workload.units * workload.layers  # two biases for each gate
    else:
        model = _feed_forward(workload)
        expected = workload.parameters()
    found = sum(parameter.numel() for parameter in model.parameters())
    if found != expected:
        raise SystemExit(f"Expected {expected} parameters, found {found}.")
    return model


def _feed_forward(workload: Workload) -> nn.Sequential:
    layers: list[nn.Module] = []
    for name, shape in workload.layers().items():
        if name.startswith("conv"):
            layers += [nn.Conv2d(shape[2], shape[3], 3), nn.ReLU()]
            continue
        if name == "dense0":
            if workload.convolutions:
                layers += [nn.MaxPool2d(2), nn.Dropout(workload.dropout[0]), nn.Flatten()]
        else:
            layers.append(nn.ReLU())
            if workload.dropout[1]:
                layers.append(nn.Dropout(workload.dropout[1]))
        layers.append(nn.Linear(*shape))
    return nn.Sequential(*layers)


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of a batch; over the steps of a sequence the mean."""
    return nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())


def tensors(workload: Workload | TextWorkload) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every client's features, channels first, and labels."""

    def of_client(client: Client) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (torch.from_numpy(array) for array in client)
        return (x.movedim(-1, 1).contiguous() if x.ndim == 4 else x), y.long()

    return [of_client(client) for client in clients(workload)]
