"""pfl (Granqvist et al., "pfl-research", NeurIPS 2024): its FederatedAveraging and SimulatedBackend, PyTorch models.

    python benchmarks/peers/pfl_rounds.py --workload W1 --threads 2
    torchrun --standalone --nproc_per_node=2 benchmarks/peers/pfl_rounds.py --workload W2 --threads 1

With `--capture` every client's local model is saved by a postprocessor, pfl's hook for what a user sends: it stands
first and sees the model's difference before it is weighted and summed.
"""

from __future__ import annotations

import os
import time
from itertools import cycle
from typing import Any

import numpy as np
import torch
from common import LocalModels, arguments, chosen, cohort, local_models, report
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.postprocessor.base import Postprocessor
from torch_models import build_model, loss, tensors
from workloads import TextWorkload, Workload


class Trained(torch.nn.Module):
    """The workload's model with the methods that pfl asks a PyTorch model for."""

    def __init__(self, workload: Workload | TextWorkload):
        super().__init__()
        self.model = build_model(workload)

    def loss(self, x: torch.Tensor, y: torch.Tensor, is_eval: bool = False) -> torch.Tensor:
        self.train(not is_eval)
        return loss(self.model, x, y)

    @torch.no_grad()
    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Weighted]:
        return {"loss": Weighted(len(y) * loss(self.model, x, y).item(), len(y))}


class Clock(TrainingProcessCallback):
    """When each round ended."""

    def on_train_begin(self, *, model: Any) -> Metrics:
        self.seconds: list[float] = []
        self._last = time.perf_counter()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        return False, Metrics()


class Capture(Postprocessor):
    """Saves every client's local model: the weights it started from plus its difference."""

    def __init__(self, algorithm: FederatedAveraging, store: LocalModels):
        self._algorithm, self._store = algorithm, store

    def postprocess_one_user(self, *, stats: Any, user_context: Any) -> Any:
        started_from = self._algorithm._initial_model_state
        local = {name: started_from[name] + difference for name, difference in stats.items()}
        self._store.save(self._algorithm._current_central_iteration, user_context.user_id, local)
        return stats, Metrics()


def main() -> None:
    parser = arguments(__doc__, ["W1", "W2", "W3", "W4"])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    options = parser.parse_args()
    workload = chosen(options)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pool = tensors(workload)
    rounds = options.warmup + options.rounds
    drawn = cycle(np.concatenate([cohort(workload, number) for number in range(rounds)]).tolist())

    def user(client: int) -> Dataset:
        x, y = pool[client]
        order = torch.randperm(len(y))  # pfl goes through a data set in its own order
        return Dataset((x[order], y[order]), user_id=str(client))

    trained = Trained(workload)
    model = PyTorchModel(trained, torch.optim.SGD, torch.optim.SGD(trained.parameters(), 1.0))
    algorithm, clock = FederatedAveraging(), Clock()
    with local_models(options.capture) as store:
        sizes = {client: len(y) for client, (_, y) in enumerate(pool)}
        users = FederatedDataset(user, lambda: next(drawn), sizes)  # the sizes even out what the processes have to do
        capture = [Capture(algorithm, store)] if store is not None else []
        backend = SimulatedBackend(users, users, postprocessors=[*capture, WeightByDatapoints()])
        algorithm.run(
            NNAlgorithmParams(
                central_num_iterations=rounds,
                evaluation_frequency=10**9,
                train_cohort_size=workload.clients,
                val_cohort_size=0,
            ),
            backend,
            model,
            NNTrainHyperParams(
                local_num_epochs=1, local_learning_rate=workload.learning_rate, local_batch_size=workload.batch
            ),
            NNEvalHyperParams(local_batch_size=100),
            callbacks=[clock],
            send_metrics_to_platform=False,
        )
    if int(os.environ.get("RANK", 0)) == 0:
        report(
            workload,
            "pfl",
            clock.seconds[options.warmup :],
            capture=options.capture,
            packages=["pfl", "torch", "numpy"],
            threads=options.threads,
            processes=int(os.environ.get("WORLD_SIZE", 1)),
        )


if __name__ == "__main__":
    main()
