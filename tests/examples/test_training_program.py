"""The training program: its ledger against `fed.run`'s and NumPy's mean; stopped, it goes on to the same bytes."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import fedlens as fed
from fedlens import trees
from fedlens.ledger import LedgerWriter

PATH = Path(__file__).parents[2] / "examples" / "training_program.py"
ROUNDS, CLIENTS, SEED = 4, 5, 11


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("training_program", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data():
    return fed.data.digits()


@pytest.fixture(scope="module")
def process(example, data):
    return example.build_process(data)


@pytest.fixture(scope="module")
def run(example, process, data):
    """The program, given a ledger's path and a release manager."""

    def run_program(path, metrics):
        return example.run(path, process, data, metrics, rounds=ROUNDS, clients_per_round=CLIENTS, seed=SEED)

    return run_program


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """The ledger, the released metrics and the final state of an uninterrupted program."""
    path = tmp_path_factory.mktemp("programs") / "whole"
    metrics = fed.program.MemoryReleaseManager()
    state = run(path, metrics)
    return path, metrics.values(), state


class Failing(fed.program.ReleaseManager):
    """Releases to nowhere, and fails in one round."""

    def __init__(self, number):
        self.number = number

    async def release(self, value, key):
        await fed.program.materialize_value(value)
        if key == self.number:
            raise ConnectionError("no route to the dashboard")


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_mean_of_a_rounds_local_models_is_the_next_global_model(finished):
    path, _, state = finished
    ledger = fed.Ledger(path)
    assert len(ledger.rounds) == ROUNDS
    after = [*(ledger.round(number).global_weights for number in range(1, ROUNDS)), state["weights"]]
    for number, expected in enumerate(after):
        stored = ledger.round(number)
        models = [stored[client_id] for client_id in stored]
        assert len(models) == CLIENTS
        for leaf, value in trees.items(expected):
            mean = np.average(
                [np.asarray(trees.get(model.weights, leaf), np.float64) for model in models],
                axis=0,
                weights=[model.num_examples for model in models],
            )
            assert np.linalg.norm(mean - value) <= 1e-6 * np.linalg.norm(value)


def test_it_is_the_training_of_fed_run_to_the_bit(process, data, finished, tmp_path):
    path, released, state = finished
    expected = fed.run(
        process, data, rounds=ROUNDS, clients_per_round=CLIENTS, seed=SEED, ledger=tmp_path / "run", progress=False
    )
    ledger = fed.Ledger(path)
    for number in range(ROUNDS):
        ours, theirs = ledger.round(number), expected.ledger.round(number)
        assert ours.ids == theirs.ids
        for client_id in ours:
            assert ours[client_id].num_examples == theirs[client_id].num_examples
            assert ours[client_id].metrics == theirs[client_id].metrics
            for leaf, value in trees.items(theirs[client_id].weights):
                assert trees.get(ours[client_id].weights, leaf).tobytes() == value.tobytes()
        history = expected.history[number]
        assert {name: float(value) for name, value in released[number].items()} == {
            name: history[name] for name in released[number]
        }
        assert ours.metrics["loss"] == history["loss"]
    for leaf, value in trees.items(expected.state.weights):
        assert trees.get(state["weights"], leaf).tobytes() == np.asarray(value).tobytes()
    assert int(state["round"]) == ROUNDS


@pytest.mark.parametrize("failed", [0, 2])
def test_a_program_that_stopped_goes_on_to_the_same_bytes(run, finished, tmp_path, failed):
    path, released, state = finished
    again = tmp_path / "stopped"
    with pytest.raises(ConnectionError, match="no route"):
        run(again, Failing(failed))
    assert len(fed.Ledger(again).rounds) == failed  # the round that was not saved is not in the ledger

    metrics = fed.program.MemoryReleaseManager()
    resumed = run(again, metrics)
    assert metrics.values() == {number: released[number] for number in range(failed, ROUNDS)}
    for leaf, value in trees.items(state):
        assert np.asarray(trees.get(resumed, leaf)).tobytes() == np.asarray(value).tobytes()
    assert files(again) == files(path)


def test_a_finished_program_has_nothing_to_do(run, finished):
    path, _, state = finished
    before, metrics = files(path), fed.program.MemoryReleaseManager()
    again = run(path, metrics)
    assert metrics.values() == {}
    assert files(path) == before
    np.testing.assert_array_equal(again["weights"]["kernel"], state["weights"]["kernel"])


def test_the_ledger_keeps_the_promises_of_a_state_manager(example, process, finished, tmp_path):
    path, _, _ = finished
    with LedgerWriter.open(path) as writer:
        states = example.LedgerStates(writer, process)
        assert asyncio.run(states.get_versions()) == [ROUNDS]
        with pytest.raises(fed.program.ProgramStateNotFoundError):
            asyncio.run(states.load(ROUNDS - 1, {}))
        with pytest.raises(fed.program.ProgramStateExistsError):
            asyncio.run(states.save({}, ROUNDS))
    weights = {"w": np.zeros(2, np.float32)}
    with LedgerWriter.create(tmp_path / "empty", weights=weights, config={}, rounds=1) as writer:
        states = example.LedgerStates(writer, process)
        assert asyncio.run(states.get_versions()) is None
        assert asyncio.run(states.load_latest({})) == (None, 0)


def test_program_logic_refuses_a_context_that_is_not_a_programs(example):
    with pytest.raises(ValueError, match="FederatedContext"):
        asyncio.run(example.train_federated(None, None, None, rounds=1, clients_per_round=1, metrics=None, states=None))


def test_the_script_prints_rounds_and_clients(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PATH), str(tmp_path / "run"), "--rounds", "2"])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["round 0", "round 1"]
    assert len([line for line in lines if line.startswith("form-")]) == 8
