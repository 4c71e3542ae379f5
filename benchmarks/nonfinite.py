"""What the check for infinities costs: rounds with and without it, in turn, in one process.

    python benchmarks/nonfinite.py [--workload W1|W2] [--rounds 40]

Both sides run the same rounds with programs of their own, and swap who goes first. The figure is the median over rounds
of one side's time over the other's, so that what else the machine does meanwhile hits both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import optax
from measuring import machine
from run import federated, model
from workloads import WORKLOADS

import fedlens as fed

LIMIT = 1.02
_WARMUP = 3  # rounds that do not count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=("W1", "W2"), default="W2")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of each side that count (default: 40)")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    clients = federated(workload, None)
    network = model(workload, clients)
    sides = {
        check: fed.learning.build_weighted_fed_avg(
            network, optax.sgd(workload.learning_rate), batch_size=workload.batch, on_nonfinite=check
        )
        for check in ("raise", "ignore")
    }
    states = {check: process.initialize(0) for check, process in sides.items()}
    seconds: dict[str, list[float]] = {check: [] for check in sides}
    for number in range(_WARMUP + options.rounds):
        cohort = clients.cohort(number, clients_per_round=workload.clients)
        for check in sorted(sides, reverse=bool(number % 2)):
            start = time.perf_counter()
            states[check], _ = sides[check].next(states[check], cohort)
            if number >= _WARMUP:
                seconds[check].append(time.perf_counter() - start)
    ratio = statistics.median(on / off for on, off in zip(seconds["raise"], seconds["ignore"], strict=True))
    for check, of_rounds in seconds.items():
        print(f"{check:8}{statistics.median(of_rounds):.4f} s a round")
    verdict = "met" if ratio <= LIMIT else "NOT MET"
    print(f"time with the check over that without: {ratio:.3f}, to reach: {LIMIT}: {verdict}")
    print(json.dumps({"workload": workload.name, "ratio": ratio, "limit": LIMIT, "machine": machine()}))


if __name__ == "__main__":
    main()
