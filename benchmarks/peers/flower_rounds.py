"""Flower (Beutel et al., 2020): its FedAvg strategy and simulation on Ray, PyTorch models.

    python benchmarks/peers/flower_rounds.py --workload W1 --cpus-per-client 2 --threads 2
    python benchmarks/peers/flower_rounds.py --workload W2

With `--capture` a strategy saves every client's local model from its reply before it aggregates them. Who takes part is
drawn by Flower; its clients are as large as the others', and in W3 about as large.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, chosen, local_models, report
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch_models import build_model


def main() -> None:
    parser = arguments(__doc__, ["W1", "W2", "W3", "W4"])
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--cpus-per-client", type=float, default=1, help="2 runs one worker on two cores")
    options = parser.parse_args()
    workload = chosen(options)
    # The workers of Ray find the modules beside this one.
    folder = Path(__file__).resolve().parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(folder.parent)])
    threads = options.threads
    client, server, ends = ClientApp(), ServerApp(), []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        # A worker gets this function by value: what it keeps between clients is in a module.
        import flower_worker

        of_client = flower_worker.trained(workload, threads, context.node_config["partition-id"], message.content)
        return Message(content=of_client, reply_to=message)

    with local_models(options.capture) as store:

        class Saving(FedAvg):
            def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
                replies = list(replies)
                for reply in replies:
                    if not reply.has_error():
                        leaves = {name: leaf.numpy() for name, leaf in reply.content["arrays"].items()}
                        store.save(server_round, str(reply.metadata.src_node_id), leaves)
                return super().aggregate_train(server_round, replies)

        @server.main()
        def serve(grid: Grid, context: Context) -> None:
            strategy = (FedAvg if store is None else Saving)(
                fraction_train=workload.clients / workload.pool,
                fraction_evaluate=0.0,
                min_available_nodes=workload.pool,
            )
            strategy.start(
                grid=grid,
                initial_arrays=ArrayRecord(build_model(workload).state_dict()),
                num_rounds=options.rounds + options.warmup,
                evaluate_fn=lambda number, arrays: ends.append(time.perf_counter()),
            )

        logging.getLogger("flwr").setLevel(logging.ERROR)
        run_simulation(
            server_app=server,
            client_app=client,
            num_supernodes=workload.pool,
            backend_config={
                "client_resources": {"num_cpus": options.cpus_per_client, "num_gpus": 0.0},
                "init_args": {"num_cpus": 2, "logging_level": "error", "log_to_driver": False},
            },
        )
    report(
        workload,
        "flower",
        np.diff(ends).tolist()[options.warmup :],
        capture=options.capture,
        packages=["flwr", "ray", "torch", "numpy"],
        threads=threads,
        cpus_per_client=options.cpus_per_client,
    )


if __name__ == "__main__":
    main()
