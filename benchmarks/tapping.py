"""What a tap costs: rounds that hand out every client's local model in memory, and rounds that do not, in turn.

    python benchmarks/tapping.py [--workload W1|W2] [--rounds 40] [--leaf dense/kernel]

With `--leaf` a single leaf of the weights is tapped.
"""

from __future__ import annotations

import optax
from run import federated, model
from turns import arguments, in_turns, report
from workloads import WORKLOADS

import fedlens as fed
from fedlens.runtime import current_context


def main() -> None:
    parser = arguments(__doc__, rounds=40)
    parser.add_argument("--leaf", help="tap this leaf of the weights alone")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    clients = federated(workload, None)
    process = fed.learning.build_weighted_fed_avg(
        model(workload, clients), optax.sgd(workload.learning_rate), batch_size=workload.batch
    )
    tapped = process.with_local_models()
    if options.leaf:
        round_ = fed.tap(process.next_computation, f"client_work.weights/{options.leaf}")
    states = {"tapped": process.initialize(0), "untapped": process.initialize(0)}

    def cohort(number: int) -> fed.Cohort:
        return clients.cohort(number, clients_per_round=workload.clients)

    def with_local_models(number: int) -> object:
        states["tapped"], _, local_models = tapped.next(states["tapped"], cohort(number))
        return local_models

    def with_one_leaf(number: int) -> object:
        drawn, state = cohort(number), states["tapped"]
        keys = fed.learning.randomness.client_keys(state.key, int(state.round), drawn.ids)
        argument = (state, fed.runtime.values.of_array(drawn.ids, keys), drawn)
        (states["tapped"], _), leaf = current_context().run(round_, argument, on_nonfinite="raise").value
        return leaf

    def without(number: int) -> None:
        states["untapped"], _ = process.next(states["untapped"], cohort(number))

    seconds = in_turns(
        {"tapped": with_one_leaf if options.leaf else with_local_models, "untapped": without}, options.rounds
    )
    what = f"{options.leaf} tapped" if options.leaf else "all local models tapped"
    report(workload.name, f"time with {what} over that without", seconds, limit=1.10)


if __name__ == "__main__":
    main()
