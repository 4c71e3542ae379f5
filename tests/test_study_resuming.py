"""`fed.resume`: an interruption, a kill, a prune in between change no bit of a run."""

from __future__ import annotations

import json
import signal

import jax
import numpy as np
import optax
import pytest
from studies import ROUNDS, assert_same_bits, contents, kill_after, make_data, make_model, make_process, run

import fedlens as fed
from fedlens import trees
from fedlens.errors import LedgerError
from fedlens.learning import build_weighted_fed_avg
from fedlens.ledger import Ledger, LedgerWriter


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def averaging():
    """Plain averaging: the next global model is the weighted mean of the local ones."""
    return build_weighted_fed_avg(make_model(), optax.sgd(0.3), batch_size=4)


@pytest.fixture(scope="module")
def process():
    return make_process()


@pytest.fixture(scope="module")
def uninterrupted(process, data, tmp_path_factory):
    """A run of `process` from start to end, and its ledger."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return run(process, data, folder), folder


class Interruption(Exception):  # noqa: N818
    pass


def stop_after(number, kind):
    def on_round(report):
        if report.round == number:
            raise kind

    return on_round


@pytest.mark.parametrize(("number", "kind"), [(0, Interruption), (1, KeyboardInterrupt), (3, Interruption)])
def test_resuming_gives_the_bits_of_an_uninterrupted_run(process, data, uninterrupted, tmp_path, number, kind):
    finished, folder = uninterrupted
    path = tmp_path / "run"
    with pytest.raises(kind):
        run(process, data, path, stop_after(number, kind))
    assert Ledger(path).rounds == list(range(number + 1))
    seen = []
    resumed = fed.resume(process, data, ledger=path, test=data, progress=False, on_round=seen.append)
    assert [report.round for report in seen] == list(range(number + 1, ROUNDS))
    assert_same_bits(resumed.state, finished.state)
    assert resumed.history == finished.history
    assert contents(path) == contents(folder)
    assert jax.tree.structure(resumed.state.optimizer_state) == jax.tree.structure(finished.state.optimizer_state)


def test_resuming_in_other_processes_after_kills(process, data, uninterrupted, tmp_path):
    finished, folder = uninterrupted
    path = tmp_path / "run"
    for syncs in (13, 9):
        before = Ledger(path).rounds if path.exists() else []
        done = kill_after(path, syncs)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert len(before) < len(Ledger(path).rounds) < ROUNDS
        assert Ledger(path).verify() == []
    resumed = fed.resume(process, data, ledger=path, test=data, progress=False)
    assert_same_bits(resumed.state, finished.state)
    assert resumed.history == finished.history
    assert contents(path) == contents(folder)


@pytest.mark.soak
def test_resuming_after_a_kill_at_each_step_of_writing(process, data, uninterrupted, tmp_path):
    finished, folder = uninterrupted
    for syncs in range(1, 40):
        path = tmp_path / str(syncs)
        done = kill_after(path, syncs)
        again = kill_after(path, 7)
        resumed = fed.resume(process, data, ledger=path, test=data, progress=False)
        assert resumed.history == finished.history
        assert contents(path) == contents(folder)
        if done.returncode == again.returncode == 0:
            break
    assert done.returncode == 0, done.stderr


def test_a_pruned_run_resumes_to_the_same_model(process, data, uninterrupted, tmp_path):
    finished, folder = uninterrupted
    path = tmp_path / "run"
    with pytest.raises(Interruption):
        run(process, data, path, stop_after(2, Interruption))
    client = Ledger(path).round(0).ids[0]
    Ledger(path).prune(keep_every=2, drop_clients=[client])
    seen = []
    resumed = fed.resume(process, data, ledger=path, test=data, progress=False, on_round=seen.append)
    assert [report.round for report in seen] == [3]
    assert_same_bits(resumed.state, finished.state)
    assert resumed.history == [finished.history[number] for number in (0, 2, 3)]
    assert Ledger(path).rounds == [0, 2, 3]
    assert Ledger(path).state == "complete"
    for name in ("rounds/000003.parquet", "rounds/000003.safetensors", "checkpoints/000003.safetensors"):
        assert (path / name).read_bytes() == (folder / name).read_bytes()


def test_a_run_interrupted_before_its_first_round_starts_over(process, data, uninterrupted, tmp_path):
    finished, _ = uninterrupted
    config = json.loads((finished.ledger.path / "run.json").read_text())["config"]
    weights = trees.map(np.asarray, process.initialize(3).weights)
    LedgerWriter.create(tmp_path / "run", weights=weights, config=config, rounds=ROUNDS).close()
    resumed = fed.resume(process, data, ledger=tmp_path / "run", progress=False)
    assert_same_bits(resumed.state, finished.state)


def test_a_finished_run_is_returned_as_it_is(process, data, uninterrupted):
    finished, folder = uninterrupted
    before = contents(folder)
    resumed = fed.resume(process, data, ledger=folder, progress=False)
    assert_same_bits(resumed.state, finished.state)
    assert resumed.history == finished.history
    assert contents(folder) == before


def test_resuming_with_another_process_names_the_leaf(averaging, data, uninterrupted):
    _, folder = uninterrupted
    before = contents(folder)
    with pytest.raises(LedgerError, match=r"found another leaf 'optimizer_state/0/count'.*instead of none, in .*run"):
        fed.resume(averaging, data, ledger=folder, progress=False)
    assert contents(folder) == before


def test_a_ledger_that_no_run_started_cannot_be_resumed(process, data, tmp_path):
    weights = trees.map(np.asarray, process.initialize(0).weights)
    LedgerWriter.create(tmp_path / "own", weights=weights, config={"lr": 0.1}, rounds=2).close()
    with pytest.raises(LedgerError, match=r"that fed.run started, found one without 'study' in its config, in .*own"):
        fed.resume(process, data, ledger=tmp_path / "own", progress=False)


@pytest.mark.parametrize(
    "change",
    [{"rounds": 2.5}, {"rounds": "4"}, {"rounds": 0}, {"seed": 0.5}, {"clients_per_round": []}],
    ids=str,
)
def test_a_plan_of_another_kind_is_refused(process, data, tmp_path, change):
    weights = trees.map(np.asarray, process.initialize(0).weights)
    plan = {"rounds": 2, "seed": 0, "clients_per_round": None}
    LedgerWriter.create(tmp_path / "own", weights=weights, config={"study": plan}, rounds=2).close()
    run = json.loads((tmp_path / "own" / "run.json").read_text())
    run["config"]["study"] |= change
    del run["checksum"]
    (tmp_path / "own" / "run.json").write_text(json.dumps(run))
    with pytest.raises(LedgerError, match=r"Expected .* found .* In 'study' of the config, in .*own"):
        fed.resume(process, data, ledger=tmp_path / "own", progress=False)


def test_there_is_nothing_to_resume_in_an_empty_folder(process, data, tmp_path):
    with pytest.raises(LedgerError, match="Expected a ledger"):
        fed.resume(process, data, ledger=tmp_path, progress=False)
