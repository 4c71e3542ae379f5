"""`fed.run` and `fed.resume`: the loop, what it stores, and that an interruption changes no bit."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow.parquet
import pytest
import safetensors.numpy
from rich.console import Console

import fedlens as fed
from fedlens import trees
from fedlens.data import FederatedData
from fedlens.errors import ConfigError, DataError, LedgerError
from fedlens.learning import build_fed_eval, build_weighted_fed_avg
from fedlens.ledger import Ledger, LedgerWriter
from fedlens.report.progress import ProgressDisplay, RoundReport

ROUNDS = 4


def make_data():
    rng = np.random.default_rng(0)
    columns = {}
    for number, count in enumerate([6, 3, 0, 9, 4]):
        x = rng.normal(size=(count, 3)).astype(np.float32)
        columns[f"form-{number}"] = {"x": x, "y": (x @ [1, -2, 0.5] > 0).astype(np.int32)}
    return FederatedData.from_clients(columns)


def make_model():
    return fed.models.from_functions(
        init=lambda key: {"w": 0.1 * jax.random.normal(key, (3, 2)), "b": jnp.zeros(2)},
        apply=lambda weights, x: x @ weights["w"] + weights["b"],
        inputs=make_data().element_type,
        loss=fed.losses.cross_entropy,
        metrics=[fed.metrics.accuracy],
    )


def make_process():
    """A process whose server keeps more than the model: Adam's moments and count."""
    return build_weighted_fed_avg(make_model(), optax.sgd(0.3), optax.adam(0.05), batch_size=4).with_local_models()


def run(process, data, ledger, on_round=None):
    """Three clients a round, evaluated on their training data."""
    return fed.run(
        process,
        data,
        rounds=ROUNDS,
        seed=3,
        clients_per_round=3,
        test=data,
        ledger=ledger,
        config={"of": "tests"},
        progress=False,
        on_round=on_round,
    )


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def averaging(model):
    """Plain averaging: the next global model is the weighted mean of the local ones."""
    return build_weighted_fed_avg(model, optax.sgd(0.3), batch_size=4)


@pytest.fixture(scope="module")
def process():
    return make_process()


def contents(folder):
    """Every file below a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_bits(a, b):
    found, expected = dict(trees.items(a)), dict(trees.items(b))
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path


@pytest.fixture(scope="module")
def uninterrupted(process, data, tmp_path_factory):
    """A run of `process` from start to end, and its ledger."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return run(process, data, folder), folder


@pytest.fixture(scope="module")
def captured(averaging, data, tmp_path_factory):
    """A run of plain averaging with everybody, and its ledger."""
    folder = tmp_path_factory.mktemp("captured") / "run"
    return fed.run(averaging, data, rounds=ROUNDS, ledger=folder, progress=False), folder


def test_a_ledger_changes_no_bit(averaging, data, captured):
    plain = fed.run(averaging, data, rounds=ROUNDS, progress=False)
    finished, _ = captured
    assert plain.ledger is None
    assert_same_bits(plain.state, finished.state)
    assert plain.history == finished.history


def test_the_loop_is_process_next(averaging, data, captured):
    state, history = averaging.initialize(0), []
    for number in range(ROUNDS):
        state, metrics = averaging.next(state, data.cohort(number))
        history.append(metrics)
    finished, _ = captured
    assert_same_bits(finished.state, state)
    assert finished.history == history


def test_one_seed_gives_one_ledger_to_the_byte(process, data, uninterrupted, tmp_path):
    finished, folder = uninterrupted
    again = run(process, data, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    assert again.history == finished.history
    assert_same_bits(again.state, finished.state)


def test_the_next_global_model_is_the_weighted_mean_of_the_stored_local_models(captured):
    # Read with safetensors and pyarrow alone, as the format says.
    finished, folder = captured
    for number in range(ROUNDS):
        tensors = safetensors.numpy.load_file(folder / "rounds" / f"{number:06d}.safetensors")
        table = pyarrow.parquet.read_table(folder / "rounds" / f"{number:06d}.parquet").to_pydict()
        shares = np.zeros(5)
        shares[table["row"]] = table["num_examples"]
        for leaf in ("b", "w"):
            mean = np.average(tensors[f"local/{leaf}"].astype(np.float64), axis=0, weights=shares)
            if number + 1 < ROUNDS:
                file = folder / "rounds" / f"{number + 1:06d}.safetensors"
                following = safetensors.numpy.load_file(file)[f"global/{leaf}"]
            else:
                following = np.asarray(finished.state.weights[leaf])
            assert np.linalg.norm(following - mean) <= 1e-6 * np.linalg.norm(mean)


def test_the_table_says_who_learned_what(captured, data):
    _, folder = captured
    tensors = safetensors.numpy.load_file(folder / "rounds" / "000001.safetensors")
    for row in pyarrow.parquet.read_table(folder / "rounds" / "000001.parquet").to_pylist():
        assert row["client"] == data.ids[row["position"]]
        assert row["num_examples"] == len(data.client(row["client"])["y"])
        squares = [
            np.square((tensors[f"local/{leaf}"][row["row"]] - tensors[f"global/{leaf}"]).astype(np.float64)).sum()
            for leaf in ("b", "w")
        ]
        assert row["update_norm"] == pytest.approx(np.sqrt(sum(squares)), rel=1e-6)
        if row["num_examples"]:
            assert 0 <= row["accuracy"] <= 1
            assert row["loss"] > 0


def test_a_round_takes_the_clients_that_were_drawn_for_it(uninterrupted, data):
    finished, _ = uninterrupted
    for number in range(ROUNDS):
        cohort = data.cohort(number, clients_per_round=3, seed=3)
        assert finished.ledger.round(number).ids == cohort.ids
    assert len({frozenset(finished.ledger.round(number).ids) for number in range(ROUNDS)}) > 1


def test_held_out_metrics_are_those_of_the_model_after_the_round(uninterrupted, data, model):
    finished, _ = uninterrupted
    evaluate = build_fed_eval(model)
    for number in range(ROUNDS):
        after = finished.ledger.round(number + 1).global_weights if number + 1 < ROUNDS else finished.state.weights
        expected = evaluate(after, data.cohort(0)).metrics
        stored = finished.ledger.round(number).metrics
        for name in ("loss", "accuracy"):
            assert finished.history[number][f"test_{name}"] == stored[f"test_{name}"] == expected[name]
    assert "test_num_examples" not in finished.history[0]


def test_the_ledger_keeps_the_arguments_and_the_config(uninterrupted):
    _, folder = uninterrupted
    config = json.loads((folder / "run.json").read_text())["config"]
    assert config == {"study": {"rounds": ROUNDS, "seed": 3, "clients_per_round": 3}, "of": "tests"}


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


def go_until_killed(path, syncs):
    """What a process of its own does: no exception, no closing, gone, in the middle of writing a round."""
    left, sync = [syncs], os.fsync

    def dying_sync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = dying_sync
    data = make_data()
    if os.path.exists(os.path.join(path, "run.json")):
        fed.resume(make_process(), data, ledger=path, test=data, progress=False)
    else:
        run(make_process(), data, path)


def kill_after(path, syncs):
    script = f"import runpy; runpy.run_path({__file__!r})['go_until_killed']({str(path)!r}, {syncs})"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)


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


def test_there_is_nothing_to_resume_in_an_empty_folder(process, data, tmp_path):
    with pytest.raises(LedgerError, match="Expected a ledger"):
        fed.resume(process, data, ledger=tmp_path, progress=False)


def test_a_ledger_is_never_written_over(averaging, data, captured):
    _, folder = captured
    before = contents(folder)
    with pytest.raises(LedgerError, match="Expected no ledger yet, found one"):
        fed.run(averaging, data, rounds=1, ledger=folder, progress=False)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rounds": 2.0}, ConfigError, "Expected integers as rounds, .*found 2.0, 0 and None"),
        ({"rounds": 1, "seed": 2**64}, ConfigError, "Expected a seed"),
        ({"rounds": 0}, ConfigError, "at least 1 round, found 0"),
        ({"rounds": 1, "clients_per_round": 6}, DataError, "clients_per_round from 1 to 5.*found 6"),
        ({"rounds": 1, "config": {"study": {}}}, ConfigError, "without the key 'study'"),
    ],
)
def test_arguments_that_do_not_fit_leave_no_ledger_behind(averaging, data, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        fed.run(averaging, data, ledger=tmp_path / "run", progress=False, **arguments)
    assert not (tmp_path / "run").exists()


def test_a_line_a_round_where_there_is_no_terminal(averaging, data, capsys, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    fed.run(averaging, data, rounds=2)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2
    for number, line in enumerate(lines):
        assert re.fullmatch(rf"round {number + 1}/2  loss \d\.\d{{4}}  accuracy \d\.\d{{4}}  [\d,]+ clients/s", line)


def test_nothing_is_printed_when_progress_is_off(averaging, data, capsys):
    fed.run(averaging, data, rounds=1, progress=False)
    assert capsys.readouterr() == ("", "")


def test_on_round_is_told_of_every_round(averaging, data):
    seen = []
    finished = fed.run(averaging, data, rounds=2, progress=False, on_round=seen.append)
    assert [(report.round, report.rounds, report.clients) for report in seen] == [(0, 2, 5), (1, 2, 5)]
    assert [report.metrics for report in seen] == finished.history
    assert all(report.seconds > 0 for report in seen)


REPORT = RoundReport(round=4, rounds=20, clients=3000, seconds=2.0, metrics={"loss": 0.12345, "accuracy": 0.5})


def test_a_report_in_one_line():
    assert REPORT.clients_per_second == 1500
    assert REPORT.describe() == "loss 0.1235  accuracy 0.5000  1,500 clients/s"
    held_out = dataclasses.replace(REPORT, metrics={"loss": 1.0, "test_loss": 2.0, "clients_dropped": 2})
    assert held_out.describe() == "test loss 2.0000  2 clients dropped  1,500 clients/s"
    instant = dataclasses.replace(REPORT, seconds=0.0, metrics={"loss": float("nan"), "clients_dropped": 0})
    assert instant.describe().startswith("loss nan  ")


def test_a_bar_on_a_terminal():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    with ProgressDisplay(20, 4, console=console) as display:
        display.round_done(REPORT)
    assert re.search(r"round\s+5/20.*loss 0\.1235", stream.getvalue())
    assert "\n\n" not in stream.getvalue()


def test_data_that_the_model_does_not_read_is_refused_before_a_ledger_exists(tmp_path):
    model = fed.models.from_functions(
        init=lambda key: {"w": jnp.zeros(2)},
        apply=lambda weights, x: x @ weights["w"],
        inputs={"x": np.zeros(2, np.float32), "y": np.float32(0)},
        loss=fed.losses.squared_error,
    )
    process = fed.learning.build_weighted_fed_avg(model, optax.sgd(0.1))
    data = fed.data.FederatedData.from_clients(
        {"ann": {"x": np.zeros((3, 5), np.float32), "y": np.zeros(3, np.float32)}}
    )
    with pytest.raises(fed.CohortError, match=r"Expected examples with float32\[2\] in field 'x', found float32\[5\]"):
        fed.run(process, data, rounds=1, ledger=tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()
