"""What a worker of Flower's simulation does for one client; data and model stay in the worker between clients."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from torch_models import build_model, loss, tensors
from workloads import TextWorkload, Workload


@cache
def resident(workload: Workload | TextWorkload, threads: int) -> tuple[list[Any], torch.nn.Module]:
    """The pool and a model of this process."""
    torch.set_num_threads(threads)
    return tensors(workload), build_model(workload).train()


def trained(workload: Workload | TextWorkload, threads: int, client: int, received: RecordDict) -> RecordDict:
    """The client's local model, and how many examples it has."""
    pool, model = resident(workload, threads)
    x, y = pool[client]
    model.load_state_dict(received["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.learning_rate)
    for batch in torch.randperm(len(y)).split(workload.batch):
        optimizer.zero_grad()
        loss(model, x[batch], y[batch]).backward()
        optimizer.step()
    return RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(y)})})
