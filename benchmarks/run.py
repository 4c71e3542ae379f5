"""fedlens on the workloads: Flax models, weighted federated averaging, the local engine.

    python benchmarks/run.py --workload W1|W2|W3|W4|W5 [--capture]
    python benchmarks/run.py --workload W3 --recurrent flax           # Flax's own LSTM in place of fedlens's
    python benchmarks/run.py --workload W2 --devices 1                # one device in place of one a core
    python benchmarks/run.py --workload W4 --clients 1000000 --mapped # the data set is a file that is mapped
    python benchmarks/run.py --workload W1 --cache DIR                # keeps compiled programs in DIR, or finds them

A round's time is that of `fed.run`: it includes drawing and packing the cohort, metrics, and with --capture handing
every client's local model to the ledger's writer, which holds at most two rounds back.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
from measuring import arguments, chosen, report, watched_memory
from workloads import WORKLOADS, TextWorkload, Workload, cohort, data, fill, scratch, texts

import fedlens as fed

_KEPT = 3  # committed rounds of a ledger that stay on the disk: W5 writes 4.8 GB a round


def model(workload: Workload | TextWorkload, clients: fed.data.FederatedData, recurrent: str = "fedlens") -> fed.Model:
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

    class Text(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Embed(workload.vocabulary, workload.embedding)(x)
            for units in workload.widths()[1:]:
                x = fed.models.LSTM(units)(x) if recurrent == "fedlens" else nn.RNN(nn.OptimizedLSTMCell(units))(x)
            return nn.Dense(workload.vocabulary)(x)

    modules = {"W1": CNN, "W2": MLP, "W3": Text, "W4": lambda: nn.Dense(10), "W5": CNN}
    return fed.models.from_flax(modules[workload.name](), inputs=clients.element_type, loss=fed.losses.cross_entropy)


def federated(workload: Workload | TextWorkload, folder: Path | None) -> fed.data.FederatedData:
    """The pool as fedlens takes it, from memory or from files in `folder`; its cohorts are those of every script."""

    class Pool(fed.data.FederatedData):
        def cohort(self, round, *, clients_per_round=None, seed=0):  # noqa: A002
            if clients_per_round is None:
                return super().cohort(round)
            return self.cohort_of([self.ids[position] for position in cohort(workload, round).tolist()])

    if isinstance(workload, TextWorkload):
        x, y, offsets = texts()
    else:
        x, y = data(workload) if folder is None else mapped(workload, folder)
        x, y = x.reshape(-1, *workload.features), y.reshape(-1)
        offsets = np.arange(workload.pool + 1) * workload.examples
    return Pool({"x": x, "y": y}, offsets, tuple(f"client-{number:07d}" for number in range(workload.pool)))


def mapped(workload: Workload, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pool in two files of `folder`, mapped into memory for reading."""
    shapes = {"x": ((workload.examples, *workload.features), np.float32), "y": ((workload.examples,), np.int32)}
    files = [
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (workload.pool, *shape))
        for name, (shape, dtype) in shapes.items()
    ]
    fill(workload, *files)
    for file in files:
        file.flush()
    del files, file
    return np.load(folder / "x.npy", mmap_mode="r"), np.load(folder / "y.npy", mmap_mode="r")


def forget(ledger: Path, number: int) -> None:
    """Removes a round from a ledger that is thrown away anyway, so that a long run does not fill the disk."""
    for path in ledger.glob(f"*/{number:06d}.*"):
        path.unlink()


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, sorted(WORKLOADS), rounds=10)
    parser.add_argument("--devices", type=int, help="CPU devices to compute on (default: one for each core)")
    parser.add_argument("--clients-per-step", type=int, help="clients that a device computes side by side")
    parser.add_argument("--on-nonfinite", choices=("raise", "drop", "ignore"), default="raise")
    parser.add_argument("--recurrent", choices=("fedlens", "flax"), default="fedlens", help="the LSTM layer of W3")
    parser.add_argument("--clients", type=int, help="clients in a round, all of them in every round (not W3)")
    parser.add_argument("--mapped", action="store_true", help="map the data set from a file (not W3)")
    parser.add_argument("--cache", metavar="DIR", help="folder of JAX's persistent compilation cache")
    return parser.parse_args()


@contextmanager
def folders(options: argparse.Namespace) -> Iterator[tuple[Path | None, Path | None]]:
    """Where the ledger and the mapped data set go, if anywhere; removed at the end."""
    with (
        tempfile.TemporaryDirectory(prefix="ledger-") as ledger,
        # not the folder for temporary files, which may itself be memory
        tempfile.TemporaryDirectory(prefix="pool-", dir=scratch()) as pool,
    ):
        yield Path(ledger) / "ledger" if options.capture else None, Path(pool) if options.mapped else None


def main() -> None:
    options = parse()
    workload = chosen(options)
    if isinstance(workload, TextWorkload) and (options.clients or options.mapped):
        raise SystemExit("Expected --clients and --mapped for W1, W2, W4 or W5; W3's clients are Shakespeare's roles.")
    if options.clients:
        workload = replace(workload, clients=options.clients, pool=options.clients)
    configure(options)
    seconds: list[float] = []
    with folders(options) as (ledger, pool_folder), watched_memory() as memory:
        clients = federated(workload, pool_folder)
        process = fed.learning.build_weighted_fed_avg(
            model(workload, clients, options.recurrent),
            optax.sgd(workload.learning_rate),
            batch_size=workload.batch,
            on_nonfinite=options.on_nonfinite,
        )
        memory.clear()  # making the data set is not what is measured

        def on_round(finished: fed.report.RoundReport) -> None:
            seconds.append(finished.seconds)
            if ledger is not None:
                forget(ledger, finished.round - 2 - _KEPT)  # the writer holds two rounds back

        started = time.perf_counter()
        with fed.use(fed.runtime.Local(clients_per_step=options.clients_per_step)):
            fed.run(
                process,
                clients,
                rounds=options.warmup + options.rounds,
                ledger=ledger,
                clients_per_round=None if workload.clients == workload.pool else workload.clients,
                progress=False,
                on_round=on_round,
            )
        outside_rounds = time.perf_counter() - started - sum(seconds)
    more = {"recurrent": options.recurrent} if isinstance(workload, TextWorkload) else {}
    report(
        workload,
        "fedlens",
        seconds[options.warmup :],
        capture=options.capture,
        packages=["fedlens", "jax", "numpy"],
        first_round_s=round(seconds[0], 3),
        outside_rounds_s=round(outside_rounds, 3),
        peak_memory_mb=dict(memory),
        mapped=options.mapped,
        on_nonfinite=options.on_nonfinite,
        devices=jax.local_device_count(),
        **more,
    )


def configure(options: argparse.Namespace) -> None:
    """What JAX has to know before it starts."""
    if options.devices:
        jax.config.update("jax_num_cpu_devices", options.devices)
    if options.cache:
        jax.config.update("jax_compilation_cache_dir", options.cache)


if __name__ == "__main__":
    main()
