"""The bare PyTorch loop: the same SGD steps and the weighted mean, no federated machinery at all.

    python benchmarks/torch_loop.py --workload W1

Needs PyTorch and NumPy, not fedlens. The best settings on two cores: two threads for W1, one for W2, whose products are
too small to share. Two threads slow down several-fold when anything else runs.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from workloads import WORKLOADS, Workload, cohort, data, measure, report

THREADS = {"W1": 2, "W2": 1}


def build_model(workload: Workload) -> nn.Sequential:
    """The workload's model, channels first as PyTorch has it."""
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
    model = nn.Sequential(*layers)
    found = sum(parameter.numel() for parameter in model.parameters())
    if found != workload.parameters():
        raise SystemExit(f"Expected {workload.parameters()} parameters, found {found}.")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(THREADS), required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: 2 for W1, 1 for W2")
    arguments = parser.parse_args()
    workload = WORKLOADS[arguments.workload]
    threads = arguments.threads or THREADS[workload.name]
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    features, labels = (torch.from_numpy(array) for array in data(workload.name))
    if workload.convolutions:
        features = features.permute(0, 1, 4, 2, 3).contiguous()
    labels = labels.long()
    model = build_model(workload).train()
    parameters = list(model.parameters())
    weights = [parameter.detach().clone() for parameter in parameters]

    def run_round(number: int) -> None:
        nonlocal weights
        total = [torch.zeros_like(weight) for weight in weights]
        examples = 0
        for client in cohort(workload.name, number):
            with torch.no_grad():
                torch._foreach_copy_(parameters, weights)
            optimizer = torch.optim.SGD(parameters, lr=workload.learning_rate)
            for batch in torch.randperm(workload.examples).split(workload.batch):
                optimizer.zero_grad()
                logits = model(features[client, batch])
                nn.functional.cross_entropy(logits, labels[client, batch]).backward()
                optimizer.step()
            with torch.no_grad():
                torch._foreach_add_(total, parameters, alpha=workload.examples)
            examples += workload.examples
        weights = [weight / examples for weight in total]

    seconds = measure(run_round, arguments.rounds)
    report(workload.name, "torch loop", seconds, capture=False, packages=["torch", "numpy"], threads=threads)


if __name__ == "__main__":
    main()
