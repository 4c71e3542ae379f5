"""What reading a ledger costs: one client out of a large round, one leaf of all clients, a query over the catalogue.

    python benchmarks/ledger_reading.py              # a line of JSON for each
    python benchmarks/ledger_reading.py --only client

A round of W1's model with 50 clients has 241 MB of local models; the catalogue has 40,000 rows, 2,000 clients in each
of 20 rounds. Each figure is the median of 21 repetitions, the operating system's cache warm: of a client and of a leaf
from a new `fed.Ledger` each time, of a query from one that has the tables, and from a new one. Files go to the folder
for temporary files (`TMPDIR`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measuring import machine

from fedlens.ledger import ClientPart, Keep, Ledger, LedgerWriter

LEAVES = {  # of W1
    "conv1/kernel": (3, 3, 1, 32),
    "conv1/bias": (32,),
    "conv2/kernel": (3, 3, 32, 64),
    "conv2/bias": (64,),
    "dense1/kernel": (9216, 128),
    "dense1/bias": (128,),
    "dense2/kernel": (128, 62),
    "dense2/bias": (62,),
}
BOUNDS = {"client": 30.0, "query": 100.0}  # milliseconds


def write_large_round(path: Path, clients: int = 50) -> None:
    """One round; the rows of its file are not in cohort order, as from several devices."""
    rng = np.random.default_rng(0)
    start = {name: np.zeros(shape, np.float32) for name, shape in LEAVES.items()}
    with LedgerWriter.create(path, weights=start, config={}, rounds=1) as writer:
        writer.begin(0, list(start.values()))
        order = rng.permutation(clients)
        local = [rng.standard_normal((clients, *shape), np.float32) for shape in LEAVES.values()]
        writer.add([ClientPart(tuple(f"client {place}" for place in order), order, local, np.ones(clients, int), {})])
        writer.commit({}, {})


def write_large_catalogue(path: Path, rounds: int = 20, clients: int = 2000) -> None:
    rng = np.random.default_rng(0)
    start = {f"layer{place}": np.zeros(2, np.float32) for place in range(4)}
    ids = tuple(f"client {place}" for place in range(clients))
    with LedgerWriter.create(path, weights=start, config={}, rounds=rounds, keep=Keep(statistics_only=True)) as writer:
        for number in range(rounds):
            writer.begin(number, list(start.values()))
            local = [rng.standard_normal((clients, 2), np.float32) for _ in start]
            metrics = {"loss": rng.random(clients), "accuracy": rng.random(clients)}
            writer.add([ClientPart(ids, np.arange(clients), local, np.full(clients, 20), metrics)])
            writer.commit({}, {})


def median_milliseconds(work: Callable[[], object], repeats: int = 21) -> float:
    """The median after three turns that do not count."""
    taken = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["client", "leaf", "query"])
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory(prefix="fedlens-ledger-") as folder:
        large, catalogue = Path(folder) / "large", Path(folder) / "catalogue"
        write_large_round(large)
        write_large_catalogue(catalogue)
        opened = Ledger(catalogue)
        by_client = "select client, avg(update_norm) as norm from clients where round > 10 group by 1"
        by_leaf = "select client, avg(norm) as norm from local_models where round > 10 group by 1"
        work: dict[str, dict[str, Callable[[], object]]] = {
            "client": {"one_model_ms": lambda: Ledger(large).round(0)["client 7"].weights},
            "leaf": {
                "dense2_kernel_of_all_ms": lambda: Ledger(large).round(0).leaf("dense2/kernel"),
                "dense1_kernel_of_all_ms": lambda: Ledger(large).round(0).leaf("dense1/kernel"),
            },
            "query": {
                "40000_rows_ms": lambda: opened.sql(by_client).arrow(),
                "160000_leaf_rows_ms": lambda: opened.sql(by_leaf).arrow(),
                "40000_rows_new_ledger_ms": lambda: Ledger(catalogue).sql(by_client).arrow(),
            },
        }
        for name, figures in work.items():
            if only in (None, name):
                found = {figure: round(median_milliseconds(each), 2) for figure, each in figures.items()}
                print(json.dumps({"figure": name, **found, "bound_ms": BOUNDS.get(name), **machine()}))


if __name__ == "__main__":
    main()
