"""What capturing every local model costs, in one process, everything side by side.

    python benchmarks/ledger.py                    # all three, one line of JSON each
    python benchmarks/ledger.py --only run         # seconds of a W1 round, with a ledger and without
    python benchmarks/ledger.py --only processor   # processor time on W2, and of numpy.tofile + fsync of the same bytes
    python benchmarks/ledger.py --only bandwidth   # the writer alone, and raw sequential writing of as many bytes

Each figure is the median over repetitions in which all sides take turns, so a busy machine is busy for all. For the
processor's figure `tofile` and fsync write the same bytes twice: alone, which is what the bound is about, and as a loop
of one's own would save them beside W2's training, which tells what of the cost any writer has there. Files go to the
folder for temporary files (`TMPDIR`), which should lie on the disk that matters.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax
from measuring import cores, machine, watched_cores
from run import federated, model
from workloads import WORKLOADS, Workload

import fedlens as fed
from fedlens.ledger import ClientPart, LedgerWriter, RoundRecord
from fedlens.memory import BEYOND_PAGE, PAGE

BOUNDS = {"run": 1.05, "processor": 1.5, "bandwidth": 0.8}

Clock = Callable[[], float]
Taken = list[list[float]]  # by work and turn


class Runs(NamedTuple):
    """Rounds of a workload: without a ledger, with one, and with local models saved by `numpy.tofile` and fsync."""

    plain: Callable[[], None]
    captured: Callable[[], None]
    saved: Callable[[], None]
    clean: Callable[[], None]  # throws the ledger away again


def runs(name: str, rounds: int, folder: Path) -> Runs:
    """Those of one workload, whose files go to a folder."""
    workload = WORKLOADS[name]
    assert isinstance(workload, Workload)
    clients = federated(workload, None)
    plain = fed.learning.build_weighted_fed_avg(
        model(workload, clients), optax.sgd(workload.learning_rate), batch_size=workload.batch
    )
    capturing = plain.with_local_models()

    def go(process: fed.learning.LearningProcess, ledger: Path | None) -> None:
        fed.run(process, clients, rounds=rounds, ledger=ledger, clients_per_round=workload.clients, progress=False)

    def save(local_models: fed.learning.LocalModels) -> None:
        write_plainly(folder / "saved", (leaf for part in local_models.weights.parts for leaf in part.leaves))

    def saved() -> None:
        state = capturing.initialize(0)
        with ThreadPoolExecutor(1) as beside:
            for number in range(rounds):
                cohort = clients.cohort(number, clients_per_round=workload.clients)
                state, *_ = capturing.next(state, cohort, sink=partial(beside.submit, save))

    ledger = folder / name
    return Runs(lambda: go(plain, None), lambda: go(capturing, ledger), saved, lambda: shutil.rmtree(ledger))


def taking_turns(works: Sequence[Callable[[], None]], clean: Callable[[], None], repeats: int, clock: Clock) -> Taken:
    """What each of `works` takes by `clock`, in turns, after a turn that does not count."""
    taken: Taken = [[] for _ in works]
    for repeat in range(repeats + 1):
        for times, work in zip(taken, works, strict=True):
            start = clock()
            work()
            if repeat:
                times.append(clock() - start)
        clean()
    return taken


def cost_of_a_run(repeats: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of W1's rounds, until the last is on the disk."""
    of_w1 = runs("W1", rounds, folder)
    plain, captured = taking_turns([of_w1.plain, of_w1.captured], of_w1.clean, repeats, time.perf_counter)
    ratio = statistics.median(b / a for a, b in zip(plain, captured, strict=True))
    return {
        "workload": "W1",
        "ratio": round(ratio, 3),
        "s_per_round": round(statistics.median(plain) / rounds, 4),
        "s_per_round_with_capture": round(statistics.median(captured) / rounds, 4),
    }


def processor_time(repeats: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Processor seconds that W2's rounds take more with a ledger, over those of writing the same bytes."""
    *works, clean = runs("W2", rounds, folder)
    plain, captured, saved = taking_turns(works, clean, repeats, time.process_time)
    more = statistics.median(b - a for a, b in zip(plain, captured, strict=True)) / rounds
    saving = statistics.median(b - a for a, b in zip(plain, saved, strict=True)) / rounds
    record = whole_round("W2", WORKLOADS["W2"].clients)
    written = [leaf for part in record.parts for leaf in part.weights]

    def to_files() -> None:
        for _ in range(rounds):
            write_plainly(folder / "plain", written)

    def to_ledger() -> None:
        write(folder / "alone", record, rounds)

    files, alone = taking_turns(
        [to_files, to_ledger], lambda: shutil.rmtree(folder / "alone"), 3 * repeats, time.process_time
    )
    base = statistics.median(files) / rounds
    return {
        "workload": "W2",
        "ratio": round(more / base, 2),
        "ratio_to_saving_in_the_run": round(more / saving, 2),
        "ratio_of_the_writer_alone": round(statistics.median(alone) / rounds / base, 2),
        "processor_ms_per_round": round(1e3 * more, 1),
        "tofile_and_fsync_ms_per_round": round(1e3 * base, 1),
        "saving_in_the_run_ms_per_round": round(1e3 * saving, 1),
        "mb_per_round": round(sum(array.nbytes for array in written) / 1e6, 1),
    }


def bandwidth(repeats: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Bytes a second of the writer, over those of writing one block again and again with fsync at the end."""
    record = whole_round("W5", 50)
    size = sum(leaf.nbytes for part in record.parts for leaf in part.weights)
    block = np.random.default_rng(1).bytes(8 << 20)

    def raw() -> None:
        for _ in range(rounds):
            descriptor = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                for start in range(0, size, len(block)):
                    os.write(descriptor, block[: size - start])
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    ledger = folder / "large"
    plain, written = taking_turns(
        [raw, lambda: write(ledger, record, rounds)], lambda: shutil.rmtree(ledger), repeats, time.perf_counter
    )
    ratio = statistics.median(a / b for a, b in zip(plain, written, strict=True))
    return {
        "workload": "W5's model, 50 clients",
        "ratio": round(ratio, 3),
        "raw_mb_per_s": round(size * rounds / 1e6 / statistics.median(plain)),
        "ledger_mb_per_s": round(size * rounds / 1e6 / statistics.median(written)),
    }


def whole_round(name: str, clients: int) -> RoundRecord:
    """A round of a workload's model, in two parts as two devices hand it over, and where they have it in memory."""
    rng = np.random.default_rng(0)
    workload = WORKLOADS[name]
    assert isinstance(workload, Workload)
    shapes = [shape for kernel in workload.layers().values() for shape in (kernel, kernel[-1:])]
    reference = [rng.standard_normal(shape, np.float32) for shape in shapes]
    parts = [
        ClientPart(
            tuple(f"client-{place:07d}" for place in places),
            places,
            [
                as_devices_have(leaf + np.float32(0.01) * rng.standard_normal((len(places), *leaf.shape), np.float32))
                for leaf in reference
            ],
            np.full(len(places), workload.examples),
            {"loss": rng.random(len(places))},
        )
        for places in np.array_split(np.arange(clients), 2)
    ]
    return RoundRecord(0, reference, parts, {"loss": 1.0}, {"weights": reference[0]})


def as_devices_have(array: np.ndarray) -> np.ndarray:
    """The same array where it lies in memory as an array of XLA's does."""
    memory = np.empty(array.nbytes + 2 * PAGE, np.uint8)
    start = (BEYOND_PAGE - memory.ctypes.data) % PAGE
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def write_plainly(path: Path, arrays: Iterable[np.ndarray]) -> None:
    """One file of all arrays, on the disk when it returns."""
    with path.open("wb") as file:
        for array in arrays:
            array.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def write(path: Path, record: RoundRecord, rounds: int) -> None:
    """A ledger of as many equal rounds."""
    weights = record.global_weights
    with LedgerWriter.create(path, weights=weights, config={}, rounds=rounds) as writer:
        for number in range(rounds):
            writer.record(RoundRecord(number, weights, record.parts, record.metrics, record.checkpoint))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(BOUNDS), help="one figure (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in a turn (default: 5)")
    options = parser.parse_args()
    figures = {"run": cost_of_a_run, "processor": processor_time, "bandwidth": bandwidth}
    for name, figure in figures.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory(prefix="ledger-") as folder, watched_cores() as busy:
                found = figure(options.repeats, options.rounds, Path(folder))
            wanted = {("at_least" if name == "bandwidth" else "at_most"): BOUNDS[name]}
            print(
                json.dumps({"figure": name, **found, **wanted, "cores": cores(), "busy": busy, **machine()}), flush=True
            )


if __name__ == "__main__":
    main()
