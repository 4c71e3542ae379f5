"""fedlens on the workloads: unmodified Flax models, weighted federated averaging, the local engine.

    python benchmarks/run.py --workload W1|W2|W4 [--capture]

A round's time is that of `fed.run`: it includes drawing and packing the cohort, metrics, and with --capture handing every
client's local model to the ledger's writer, which holds at most two rounds back.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import optax
from workloads import WORKLOADS, Workload, arguments, examples, report

import fedlens as fed


def model(workload: Workload, data: fed.data.FederatedData) -> fed.Model:
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
    return fed.models.from_flax(module, inputs=data.element_type, loss=fed.losses.cross_entropy)


def main() -> None:
    options = arguments(__doc__, list(WORKLOADS))
    workload = WORKLOADS[options.workload]
    x, y = examples(workload)
    columns = {"x": x.reshape(-1, *workload.shape), "y": y.reshape(-1)}
    offsets = np.arange(workload.pool + 1) * workload.examples
    data = fed.data.FederatedData(columns, offsets, tuple(f"client-{number:06d}" for number in range(workload.pool)))
    process = fed.learning.build_weighted_fed_avg(
        model(workload, data), optax.sgd(workload.learning_rate), batch_size=workload.batch
    )
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        fed.run(
            process,
            data,
            rounds=options.warmup + options.rounds,
            ledger=Path(folder) / "ledger" if options.capture else None,
            clients_per_round=None if workload.clients == workload.pool else workload.clients,
            progress=False,
            on_round=lambda finished: times.append(finished.seconds),
        )
        after_rounds = time.perf_counter() - started - sum(times)
    report(
        "local",
        workload,
        times[options.warmup :],
        capture=options.capture,
        packages=["fedlens", "jax", "numpy"],
        first_round_s=round(times[0], 3),
        outside_rounds_s=round(after_rounds, 3),
    )


if __name__ == "__main__":
    main()
