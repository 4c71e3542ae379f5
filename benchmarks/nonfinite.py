"""What the check for infinities costs: rounds with and without it, in turn, in one process.

python benchmarks/nonfinite.py [--workload W1|W2] [--rounds 40]
"""

from __future__ import annotations

import optax
from run import federated, model
from turns import arguments, in_turns, report
from workloads import WORKLOADS

import fedlens as fed


def main() -> None:
    options = arguments(__doc__, rounds=40).parse_args()
    workload = WORKLOADS[options.workload]
    clients = federated(workload, None)
    network = model(workload, clients)
    processes = {
        check: fed.learning.build_weighted_fed_avg(
            network, optax.sgd(workload.learning_rate), batch_size=workload.batch, on_nonfinite=check
        )
        for check in ("raise", "ignore")
    }
    states = {check: process.initialize(0) for check, process in processes.items()}

    def side(check: str):
        def run_round(number: int) -> None:
            cohort = clients.cohort(number, clients_per_round=workload.clients)
            states[check], _ = processes[check].next(states[check], cohort)

        return run_round

    seconds = in_turns({check: side(check) for check in processes}, options.rounds)
    report(workload.name, "time with the check over that without", seconds, limit=1.02)


if __name__ == "__main__":
    main()
