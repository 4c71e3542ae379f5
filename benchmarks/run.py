"""fedlens on the workloads: unmodified Flax models, weighted federated averaging, the local engine.

    python benchmarks/run.py --workload W1|W2|W4 [--capture]

A round's time is that of `fed.run`: it includes drawing and packing the cohort, metrics, and with --capture handing
every client's local model to the ledger's writer, which holds at most two rounds back.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import optax
from workloads import WORKLOADS, Workload, data, report

import fedlens as fed


def model(workload: Workload, clients: fed.data.FederatedData) -> fed.Model:
    from flax import linen as nn

    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Conv(32, (3, 3), padding="VALID")(x))
            x = nn.relu(nn.Conv(64, (3, 3), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
            x = nn.Dropout(0.25, deterministic=not train)(x)
            x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
            return nn.Dense(62)(nn.Dropout(0.5, deterministic=not train)(x))

    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(62)(nn.relu(nn.Dense(200)(nn.relu(nn.Dense(200)(x)))))

    module = {"W1": CNN(), "W2": MLP(), "W4": nn.Dense(10)}[workload.name]
    return fed.models.from_flax(module, inputs=clients.element_type, loss=fed.losses.cross_entropy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--capture", action="store_true", help="write every client's local model to a ledger")
    parser.add_argument("--rounds", type=int, default=10, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    x, y = data(workload.name)
    columns = {"x": x.reshape(-1, *workload.features), "y": y.reshape(-1)}
    offsets = np.arange(workload.pool + 1) * workload.examples
    clients = fed.data.FederatedData(columns, offsets, tuple(f"client-{number:06d}" for number in range(workload.pool)))
    process = fed.learning.build_weighted_fed_avg(
        model(workload, clients), optax.sgd(workload.learning_rate), batch_size=workload.batch
    )
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        fed.run(
            process,
            clients,
            rounds=options.warmup + options.rounds,
            ledger=Path(folder) / "ledger" if options.capture else None,
            clients_per_round=None if workload.clients == workload.pool else workload.clients,
            progress=False,
            on_round=lambda finished: seconds.append(finished.seconds),
        )
        outside_rounds = time.perf_counter() - started - sum(seconds)
    report(
        workload.name,
        "local",
        seconds[options.warmup :],
        capture=options.capture,
        packages=["fedlens", "jax", "numpy"],
        first_round_s=round(seconds[0], 3),
        outside_rounds_s=round(outside_rounds, 3),
    )


if __name__ == "__main__":
    main()
