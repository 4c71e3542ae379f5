"""A federated program: train, release metrics, save state, resume; every client's local model goes to a ledger.

    python examples/training_program.py runs/program --rounds 5

Stop it and start it again: it continues after the last round that the ledger committed, to the same bits.

1. Program logic, written against `federated_language.program` alone: it would run on any platform.
2. The ledger as the program's state manager: a round's local models and the state after it are committed together.
3. The program: fedlens as the platform, federated averaging over handwritten digits as the computations.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedlens as fed
from fedlens import trees
from fedlens.learning.randomness import client_keys, run_key
from fedlens.ledger import ClientPart, LedgerWriter, RoundRecord

# 1. Program logic -----------------------------------------------------------------------------------------------------


async def train_federated(
    initialize: Callable[[], Any],
    train: Callable[[Any, int, Any], tuple[Any, Any]],
    source: fed.program.FederatedDataSource,
    *,
    rounds: int,
    clients_per_round: int,
    metrics: fed.program.ReleaseManager,
    states: fed.program.ProgramStateManager,
) -> Any:
    """Trains from the last saved state on; what it passes around are references, not values."""
    fed.program.check_in_federated_context()
    state = {"server": initialize(), "cohorts": source.iterator()}
    saved, first = await states.load_latest(state)
    state = state if saved is None else saved
    for number in range(first, rounds):
        cohort = state["cohorts"].select(clients_per_round)
        state["server"], measured = train(state["server"], number, cohort)
        await metrics.release(measured, number)
        await states.save(state, number + 1)
    return await fed.program.materialize_value(state["server"])


# 2. The ledger as state manager ---------------------------------------------------------------------------------------


class LedgerStates(fed.program.ProgramStateManager):
    """Saves version n of a program's state with round n - 1 of a ledger: the checkpoint that the round is stored with.

    `keep` is the sink of the program's context: it holds the round that was computed until its state is saved.
    """

    def __init__(self, writer: LedgerWriter, process: fed.learning.LearningProcess):
        self._writer = writer
        self._process = process
        self._computed: dict[int, fed.ProgramCall] = {}

    def keep(self, call: fed.ProgramCall) -> None:
        before, _, _ = call.arguments
        self._computed[int(before["round"])] = call

    async def get_versions(self) -> list[int] | None:
        return None if self._writer.last_round is None else [self._writer.last_round + 1]

    async def load(self, version: int, structure: Any) -> Any:
        if [version] != await self.get_versions():
            raise fed.program.ProgramStateNotFoundError(version)
        stored = self._writer.checkpoint()
        names = iter([name for name, _ in trees.items(structure)])
        return trees.map(lambda like: _from_array(stored[next(names)], like), structure)

    async def save(self, program_state: Any, version: int) -> None:
        if version <= ((await self.get_versions()) or [0])[-1]:
            raise fed.program.ProgramStateExistsError(version=version, path=str(self._writer.path))
        values = await fed.program.materialize_value(program_state)
        checkpoint = {name: _as_array(value) for name, value in trees.items(values)}
        record = round_record(self._process, self._computed.pop(version - 1), checkpoint)
        await asyncio.to_thread(self._writer.record, record)  # waits while two earlier rounds are not on disk yet


def round_record(
    process: fed.learning.LearningProcess, call: fed.ProgramCall, checkpoint: dict[str, np.ndarray]
) -> RoundRecord:
    """A call of `next_computation` as the ledger takes it."""
    before, _, _ = call.arguments
    (_, metrics), tapped = call.result
    local_models = process.capture.local_models(tapped, before["weights"])
    stacked = local_models.values.stacked
    part = ClientPart(
        ids=local_models.ids,
        positions=np.arange(len(local_models)),
        weights=trees.leaves(stacked["weights"]),
        num_examples=stacked["num_examples"],
        metrics=stacked["metrics"],
    )
    return RoundRecord(
        round=int(before["round"]),
        global_weights=[np.asarray(leaf) for leaf in trees.leaves(before["weights"])],
        parts=[part],
        metrics={name: float(value) for name, value in metrics.items()},
        checkpoint=checkpoint,
    )


def _as_array(value: Any) -> np.ndarray:
    return np.frombuffer(value.to_bytes(), np.uint8) if hasattr(value, "from_bytes") else np.asarray(value)


def _from_array(array: np.ndarray, like: Any) -> Any:
    return type(like).from_bytes(array.tobytes()) if hasattr(like, "from_bytes") else array


# 3. The program -------------------------------------------------------------------------------------------------------


def build_process(data: fed.data.FederatedData) -> fed.learning.LearningProcess:
    """Federated averaging of a softmax regression, which hands out local models."""
    model = fed.models.from_functions(
        init=lambda key: {"kernel": 0.01 * jax.random.normal(key, (64, 10)), "bias": jnp.zeros(10)},
        apply=lambda weights, x: x.reshape(x.shape[0], 64) @ weights["kernel"] + weights["bias"],
        inputs=data.element_type,
        loss=fed.losses.cross_entropy,
        metrics=[fed.metrics.accuracy],
    )
    return fed.learning.build_weighted_fed_avg(model, optax.sgd(0.2), batch_size=20).with_local_models()


def run(
    path: Path,
    process: fed.learning.LearningProcess,
    data: fed.data.FederatedData,
    metrics: fed.program.ReleaseManager,
    *,
    rounds: int,
    clients_per_round: int,
    seed: int = 0,
) -> Any:
    """Runs the program on fedlens, from where the ledger at `path` ends, if there is one; returns the final state."""
    key = run_key(seed)

    def train(state: Any, number: int, cohort: fed.Cohort) -> tuple[Any, Any]:
        keys = client_keys(key, number, cohort.ids)
        # In place of the local models the program gets None: they go to the context's sink.
        (state, measured), _ = process.next_computation(
            state, fed.Cohort(dict(zip(cohort.ids, keys, strict=True))), cohort
        )
        return state, measured

    with open_or_create(path, process, rounds, seed) as writer:
        states = LedgerStates(writer, process)
        program = train_federated(
            lambda: process.initialize_computation(key),
            train,
            fed.CohortSource(data, batch_size=20, seed=seed),
            rounds=rounds,
            clients_per_round=clients_per_round,
            metrics=metrics,
            states=states,
        )
        with fed.use(fed.program_context(sink=states.keep, on_nonfinite=process.on_nonfinite)):
            return asyncio.run(program)


def open_or_create(path: Path, process: fed.learning.LearningProcess, rounds: int, seed: int) -> LedgerWriter:
    if (path / "run.json").exists():
        return LedgerWriter.open(path)
    weights = trees.map(np.asarray, process.initialize(seed).weights)
    return LedgerWriter.create(path, weights=weights, config={"program": "train_federated"}, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledger", type=Path, nargs="?", default=Path("runs/program"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    metrics = fed.program.MemoryReleaseManager()
    data = fed.data.digits()
    run(arguments.ledger, build_process(data), data, metrics, rounds=arguments.rounds, clients_per_round=8)
    for number, measured in metrics.values().items():
        print(f"round {number}: loss {measured['loss']:.3f}, accuracy {measured['accuracy']:.3f}")
    last = fed.Ledger(arguments.ledger).round(arguments.rounds - 1)
    for client_id in last:
        print(
            f"{client_id}: {last[client_id].num_examples} examples, {last[client_id].update_norm:.3f} from the global"
        )


if __name__ == "__main__":
    main()
