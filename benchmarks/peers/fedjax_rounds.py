"""FedJAX (Ro, Suresh and Wu, 2021): its federated averaging with its own EMNIST models, whose sizes are W1's and W2's.

    python benchmarks/peers/fedjax_rounds.py --workload W1 --backend pmap
    python benchmarks/peers/fedjax_rounds.py --workload W2 --backend jit

FedJAX hides what a client learned. With `--capture` the round is rebuilt on `for_each_client`, which gives one client's
difference after the other, as FedJAX's own documentation advises.
"""

from __future__ import annotations

import os
from typing import Any

from common import arguments, chosen, clients, cohort, local_models, measure, report


def main() -> None:
    parser = arguments(__doc__, ["W1", "W2", "W4"])
    parser.add_argument("--backend", choices=("jit", "pmap"), default="jit")
    parser.add_argument("--devices", type=int, default=2, help="CPU devices of --backend pmap")
    options = parser.parse_args()
    if options.backend == "pmap":  # before JAX starts
        os.environ["JAX_PMAP_NO_RANK_REDUCTION"] = "0"  # or Haiku sees a leading axis of one
        flags = f"--xla_force_host_platform_device_count={options.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    workload = chosen(options)

    import fedjax
    import haiku as hk
    import jax
    import numpy as np
    from fedjax.algorithms import fed_avg
    from fedjax.core import tree_util
    from fedjax.models import emnist

    def logistic_regression() -> fedjax.Model:
        return fedjax.create_model_from_haiku(
            hk.transform(lambda batch: hk.Linear(workload.classes)(batch["x"])),
            sample_batch={"x": np.zeros((1, *workload.features), np.float32), "y": np.zeros(1, np.int32)},
            train_loss=lambda batch, logits: fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], logits),
        )

    models = {
        "W1": emnist.create_conv_model,
        "W2": lambda: emnist.create_dense_model(hidden_units=200),
        "W4": logistic_regression,
    }
    model = models[workload.name]()
    shape = workload.features if workload.name == "W4" else (28, 28, 1)
    pool = [fedjax.ClientDataset({"x": x.reshape(-1, *shape), "y": y}) for x, y in clients(workload)]
    batching = fedjax.ShuffleRepeatBatchHParams(batch_size=workload.batch, num_epochs=1, drop_remainder=False)
    gradient = fedjax.model_grad(model)
    at_clients, at_server = fedjax.optimizers.sgd(workload.learning_rate), fedjax.optimizers.sgd(1.0)
    with fedjax.for_each_client_backend(options.backend):
        algorithm = fed_avg.federated_averaging(gradient, at_clients, at_server, batching)
        train = fed_avg.create_train_for_each_client(gradient, at_clients)
    parameters = model.init(jax.random.PRNGKey(0))
    found = sum(leaf.size for leaf in jax.tree_util.tree_leaves(parameters))
    if found != workload.parameters():
        raise SystemExit(f"Expected {workload.parameters()} parameters, found {found}.")
    state = algorithm.init(parameters)

    with local_models(options.capture) as store:

        def captured(number: int, state: Any, members: Any) -> Any:
            sizes = {client: len(data) for client, data, _ in members}
            batched = [(client, data.shuffle_repeat_batch(batching), key) for client, data, key in members]
            total, examples = tree_util.tree_zeros_like(state.params), 0
            for client, difference in train(state.params, batched):
                total = tree_util.tree_add(total, tree_util.tree_weight(difference, sizes[client]))
                examples += sizes[client]
                local = jax.tree_util.tree_map(lambda w, d: np.asarray(w) - np.asarray(d), state.params, difference)
                leaves = {f"{layer}.{name}": leaf for layer, part in local.items() for name, leaf in part.items()}
                store.save(number, client, {name.replace("/", "."): leaf for name, leaf in leaves.items()})
            mean = tree_util.tree_inverse_weight(total, examples)
            return fed_avg.ServerState(*reversed(at_server.apply(mean, state.opt_state, state.params)))

        def run_round(number: int) -> None:
            nonlocal state
            drawn = cohort(workload, number)
            keys = jax.random.split(jax.random.fold_in(jax.random.PRNGKey(1), number), len(drawn))
            members = [(int(client), pool[client], key) for client, key in zip(drawn, keys, strict=True)]
            state = algorithm.apply(state, members)[0] if store is None else captured(number, state, members)
            jax.block_until_ready(state.params)

        seconds = measure(run_round, options.rounds, options.warmup)
    packages = ["fedjax", "jax", "numpy"]
    report(workload, "fedjax", seconds, capture=options.capture, packages=packages, backend=options.backend)


if __name__ == "__main__":
    main()
