"""`fed.run` and `fed.resume`: the loop, what it stores, and that an interruption changes no bit."""

import dataclasses
import fcntl
import io
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow.parquet
import pytest
import safetensors.numpy
from rich.console import Console
from studies import ROUNDS, assert_same_bits, contents, make_data, make_model, make_process, run

import fedlens as fed
from fedlens.errors import ConfigError, DataError, LedgerError
from fedlens.learning import build_fed_eval, build_weighted_fed_avg
from fedlens.report.progress import ProgressDisplay, RoundReport


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


def test_a_second_run_with_a_ledger_compiles_nothing(averaging, data, captured, tmp_path, compilations):
    with compilations() as found:
        fed.run(averaging, data, rounds=ROUNDS, ledger=tmp_path / "again", progress=False)
    assert found == []


def test_large_local_models_go_to_the_disk_from_where_the_devices_wrote_them(data, tmp_path, monkeypatch):
    model = fed.models.from_functions(
        init=lambda key: {"w": jnp.zeros((3, 2)), "large": jnp.ones((700, 512))},
        apply=lambda weights, x: x @ weights["w"] * weights["large"].mean(),
        inputs=data.element_type,
        loss=fed.losses.cross_entropy,
    )
    sizes = []  # of what went past the cache

    def write(descriptor, memory, *, write=os.write):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            sizes.append(len(memory))
        return write(descriptor, memory)

    monkeypatch.setattr(os, "write", write)
    process = build_weighted_fed_avg(model, optax.sgd(0.3), batch_size=4)
    fed.run(process, data, rounds=2, ledger=tmp_path / "run", progress=False)
    devices = len(jax.local_devices())
    of_device = [len(part) * 700 * 512 * 4 for part in np.array_split(np.arange(len(data.ids)), devices)]
    if not sizes:
        pytest.skip("this file system has no direct files")
    # All rows of a device in one go, but for what is no whole block at their ends.
    large = sorted(size for size in sizes if size > min(of_device) - 8192)
    np.testing.assert_allclose(large, sorted(2 * of_device), rtol=0, atol=8192)
    state = process.initialize(0)
    for number in range(2):
        state, _, local_models = process.with_local_models().next(state, data.cohort(number))
        stored = fed.Ledger(tmp_path / "run").round(number)
        for client, local_model in local_models.items():
            np.testing.assert_array_equal(stored[client].weights["large"], local_model.weights["large"])


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
