"""The bare PyTorch loop: the same SGD steps and the weighted mean, no federated machinery at all.

    python benchmarks/peers/torch_loop.py --workload W1 --threads 2
    python benchmarks/peers/torch_loop.py --workload W2 --threads 1

Needs PyTorch and NumPy, not fedlens. The best settings on two cores: two threads for W1, one for the others, whose
products are too small to share. Two threads slow down several-fold when anything else runs.
"""

from __future__ import annotations

import torch
from common import arguments, chosen, cohort, local_models, measure, report
from torch_models import build_model, loss, tensors


def main() -> None:
    parser = arguments(__doc__, ["W1", "W2", "W3", "W4"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    workload = chosen(options)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pool = tensors(workload)
    model = build_model(workload).train()
    parameters = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    weights = [parameter.detach().clone() for parameter in parameters]

    with local_models(options.capture) as store:

        def run_round(number: int) -> None:
            nonlocal weights
            total = [torch.zeros_like(weight) for weight in weights]
            examples = 0
            for client in cohort(workload, number):
                x, y = pool[client]
                with torch.no_grad():
                    torch._foreach_copy_(parameters, weights)
                optimizer = torch.optim.SGD(parameters, lr=workload.learning_rate)
                for batch in torch.randperm(len(y)).split(workload.batch):
                    optimizer.zero_grad()
                    loss(model, x[batch], y[batch]).backward()
                    optimizer.step()
                with torch.no_grad():
                    torch._foreach_add_(total, parameters, alpha=len(y))
                examples += len(y)
                if store is not None:
                    local = [parameter.detach() for parameter in parameters]
                    store.save(number, client, dict(zip(names, local, strict=True)))
            weights = [weight / examples for weight in total]

        seconds = measure(run_round, options.rounds, options.warmup)
    packages = ["torch", "numpy"]
    report(workload, "torch loop", seconds, capture=options.capture, packages=packages, threads=options.threads)


if __name__ == "__main__":
    main()
