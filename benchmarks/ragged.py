"""Does a round cost what its clients hold? Cohorts of clients with 1 to 100 batches each, log-normal, W2's model.

    python benchmarks/ragged.py [--repeats 5]

All cohorts run in turn in one process. Were a round's time proportional to the sum of its clients' batches, each cohort
would take the same time a batch; printed is how far each is from the line that fits all best. To reach: within 15 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass

import numpy as np
import optax
from measuring import machine
from run import model
from workloads import WORKLOADS, Workload

import fedlens as fed

LIMIT = 0.15
_CLIENTS = (50, 100, 200)
_SEEDS = (0, 1, 2)
_ROWS = 20_000  # of the pool; clients overlap, which nobody notices


@dataclass(frozen=True)
class Measured:
    """One cohort: how many clients with how many batches together, and the median seconds of its rounds."""

    clients: int
    batches: int
    seconds: float


def sizes(clients: int, seed: int) -> np.ndarray:
    """Batches of each client, log-normal around 8, from 1 to 100; in every cohort the longest has 100."""
    drawn = np.random.default_rng(seed).lognormal(np.log(8), 1.0, clients)
    batches = np.clip(np.round(drawn), 1, 100).astype(np.int64)
    batches[0] = 100
    return batches


def deviations(measured: list[Measured]) -> list[float]:
    """How far each cohort's time is from proportional, relative to it: the line through zero whose worst is least.

    That line goes through the middle between the least and the greatest time a batch.
    """
    per_batch = [one.seconds / one.batches for one in measured]
    middle = (min(per_batch) + max(per_batch)) / 2
    return [each / middle - 1 for each in per_batch]


def cohorts(workload: Workload) -> tuple[fed.data.FederatedData, list[tuple[np.ndarray, fed.Cohort]]]:
    """The pool, and the sizes in batches and the cohort of each case."""
    generator = np.random.default_rng(0)
    columns = {
        "x": generator.standard_normal((_ROWS, *workload.features), np.float32),
        "y": generator.integers(0, workload.classes, _ROWS).astype(np.int32),
    }
    pool = fed.data.FederatedData(columns, np.array([0, _ROWS]), ("pool",))
    cases = []
    for clients in _CLIENTS:
        for seed in _SEEDS:
            batches = sizes(clients, seed)
            lengths = batches * workload.batch
            starts = np.random.default_rng(seed).integers(0, _ROWS - lengths)
            examples = fed.runtime.Examples(pool.columns, starts, lengths, in_place=True)
            ids = [f"client-{number}" for number in range(clients)]
            cases.append((batches, fed.Cohort.from_examples(ids, examples)))
    return pool, cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each cohort (default: 5)")
    options = parser.parse_args()
    workload = WORKLOADS["W2"]
    pool, cases = cohorts(workload)
    process = fed.learning.build_weighted_fed_avg(model(workload, pool), optax.sgd(0.001), batch_size=workload.batch)
    state = process.initialize(0)
    seconds: list[list[float]] = [[] for _ in cases]
    for repeat in range(1 + options.repeats):  # the first compiles
        for of_case, (_, cohort) in zip(seconds, cases, strict=True):
            start = time.perf_counter()
            state, _ = process.next(state, cohort)
            if repeat:
                of_case.append(time.perf_counter() - start)
    measured = [
        Measured(len(batches), int(batches.sum()), statistics.median(of_case))
        for (batches, _), of_case in zip(cases, seconds, strict=True)
    ]
    off = deviations(measured)
    print("clients  batches  s a round  us a batch  off by")
    for one, deviation in zip(measured, off, strict=True):
        per_batch = 1e6 * one.seconds / one.batches
        print(f"{one.clients:7}  {one.batches:7}  {one.seconds:9.4f}  {per_batch:10.1f}  {deviation:+6.1%}")
    worst = max(map(abs, off))
    print(f"at most {worst:.1%} off, to reach: {LIMIT:.0%}: {'met' if worst <= LIMIT else 'NOT MET'}")
    print(json.dumps({"worst_deviation": worst, "limit": LIMIT, "met": worst <= LIMIT, "machine": machine()}))


if __name__ == "__main__":
    main()
