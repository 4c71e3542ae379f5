"""`ls`, `show`, `export`, `configs`, help: what they print, how they fail, and that none of them loads JAX."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
import safetensors.numpy

import fedlens as fed

COMMANDS = ("run", "resume", "ls", "show", "export", "verify", "prune", "du", "explain", "configs")


def test_help_names_every_command(fedlens):
    shown = fedlens("--help")
    assert shown.exit_code == 0
    assert all(f"\n  {command}" in shown.stdout for command in COMMANDS)
    assert "..." not in shown.stdout.split("Commands:")[1]  # no description is cut
    for command in COMMANDS:
        assert fedlens(command, "--help").exit_code == 0
        assert fedlens(command, "-h").exit_code == 0


def test_version(fedlens):
    assert fedlens("--version").stdout == f"fedlens {fed.__version__}\n"


def test_configs_lists_and_prints_files_that_run_can_read(fedlens, tmp_path):
    listed = fedlens("configs").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["digits", "shakespeare"]
    printed = fedlens("configs", "digits").stdout
    (tmp_path / "mine.toml").write_text(printed)
    from fedlens.cli.config import load

    assert load(str(tmp_path / "mine.toml")) == load("digits")
    unknown = fedlens("configs", "digts")
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert "Did you mean 'digits'?" in unknown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "No such option: --bogus"),
        (["shw", "x"], "No such command 'shw'. Did you mean 'show'"),
        (["show"], "Missing argument 'LEDGER'"),
        (["show", "x", "--round", "many"], "Invalid value for '--round'"),
        (["show", "x", "--round", "-1"], "Invalid value for '--round'"),
        (["export", "x", "out", "--round", "1"], "Missing option '--client'"),
        (["run", "digits", "--rounds", "0"], "Invalid value for '--rounds'"),
    ],
)
def test_wrong_usage_exits_with_2(fedlens, arguments, message):
    failed = fedlens(*arguments)
    assert (failed.exit_code, failed.stdout) == (2, "")
    assert message in failed.stderr


def test_no_command_shows_help_and_is_wrong_usage(fedlens):
    assert fedlens().exit_code == 2


def test_ls(fedlens, finished, monkeypatch):
    monkeypatch.chdir(finished[1])
    shown = fedlens("ls")
    assert (shown.exit_code, shown.stderr) == (0, "")
    row = next(line for line in shown.stdout.splitlines() if line.startswith("tiny"))
    assert row.split()[:3] == ["tiny", "3/3", "14"]
    assert "complete" in row
    assert "test accuracy 0." in row
    (listed,) = json.loads(fedlens("ls", "--json").stdout)
    assert listed["name"] == "tiny"
    assert listed["size_bytes"] == sum(file.stat().st_size for file in (finished[1] / "runs").rglob("*.*"))
    assert listed["last_metrics"] == fed.Ledger("runs/tiny").round(2).metrics
    assert fedlens("ls", "runs/tiny", "--json").stdout.count('"name": "tiny"') == 1


def test_ls_where_there_is_nothing(fedlens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = fedlens("ls")
    assert (empty.exit_code, empty.stdout) == (0, "")
    assert "No ledgers in runs. Start one: fedlens run digits" in empty.stderr
    assert fedlens("ls", "--json").stdout == "[]\n"
    nowhere = fedlens("ls", "nowhere")
    assert nowhere.exit_code == 1
    assert nowhere.stderr == "Error: Expected a folder, found none, at nowhere.\n"


def test_ls_shows_a_damaged_ledger_beside_the_others(fedlens, ledger, tmp_path):
    shutil.copytree(ledger, tmp_path / "good")
    shutil.copytree(ledger, tmp_path / "bad")
    (tmp_path / "bad" / "run.json").write_text("{")
    shown = fedlens("ls", tmp_path).stdout
    assert "complete" in shown
    assert "damaged" in shown
    bad, good = json.loads(fedlens("ls", tmp_path, "--json").stdout)
    assert "run.json" in bad["error"]
    assert good["state"] == "complete"


def test_show_a_run(fedlens, ledger):
    found = json.loads(fedlens("show", ledger, "--json").stdout)
    stored = fed.Ledger(ledger)
    assert (found["state"], found["rounds"], found["clients"]) == ("complete", 3, 14)
    assert found["parameters"] == 64 * 6 + 6 + 6 * 10 + 10
    assert found["config"]["experiment"]["name"] == "tiny"
    assert [row["round"] for row in found["metrics"]] == [0, 1, 2]
    assert found["metrics"][2]["test_accuracy"] == stored.round(2).metrics["test_accuracy"]
    shown = fedlens("show", ledger).stdout
    assert "3 of 3" in shown
    assert "test accuracy" in shown
    assert "clients dropped" not in shown  # none was


def test_show_a_round(fedlens, ledger):
    found = json.loads(fedlens("show", ledger, "--round", 1, "--json").stdout)
    assert [row["client"] for row in found["clients"]] == list(fed.Ledger(ledger).round(1))
    assert found["clients"][3]["update_norm"] == fed.Ledger(ledger).round(1)["form-03"].update_norm
    shown = fedlens("show", ledger, "--round", 1).stdout
    assert all(f"form-{number:02}" in shown for number in range(14))


def test_show_a_client(fedlens, ledger):
    found = json.loads(fedlens("show", ledger, "--client", "form-03", "--json").stdout)
    for row in found["rounds"]:
        update = fed.Ledger(ledger).round(row["round"])["form-03"].update
        assert row["leaf_norms"]["Dense_0/kernel"] == pytest.approx(
            np.linalg.norm(update["Dense_0"]["kernel"]), rel=1e-6
        )
    shown = fedlens("show", ledger, "--client", "form-03").stdout
    assert "Dense_0/kernel" in shown.splitlines()[0]
    assert len(shown.splitlines()) == 2 + 3  # whole rows, however many columns there are


def test_show_a_local_model(fedlens, ledger):
    found = json.loads(fedlens("show", ledger, "--round", 2, "--client", "form-03", "--json").stdout)
    kernel = next(leaf for leaf in found["leaves"] if leaf["leaf"] == "Dense_1/kernel")
    weights = fed.Ledger(ledger).round(2)["form-03"].weights["Dense_1"]["kernel"]
    assert kernel["shape"] == [6, 10]
    assert kernel["norm"] == pytest.approx(np.linalg.norm(weights), rel=1e-6)
    assert kernel["checksum"] == f"{zlib.crc32(weights.tobytes()):08x}"
    shown = fedlens("show", ledger, "--round", 2, "--client", "form-03").stdout
    assert "6x10" in shown
    assert kernel["checksum"] in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--round", 7], "Expected a committed round, found rounds 0 to 2, for round 7, in "),
        (["--client", "form-3"], "Expected a client of this run, found 'form-3'"),
        (["--round", 1, "--client", "form-3"], "Expected a client of round 1, found 'form-3'"),
    ],
)
def test_what_a_ledger_does_not_hold(fedlens, ledger, options, message):
    failed = fedlens("show", ledger, *options)
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr.startswith(f"Error: {message}")
    assert failed.stderr.count("\n") == 1


def test_no_ledger(fedlens, tmp_path):
    failed = fedlens("show", tmp_path / "nowhere")
    assert failed.exit_code == 1
    assert "Expected a ledger, a folder with run.json, found: No such file or directory" in failed.stderr


def test_export_is_what_safetensors_loads(fedlens, ledger, tmp_path):
    out = tmp_path / "model.safetensors"
    done = fedlens("export", ledger, "--round", 2, "--client", "form-03", out)
    assert (done.exit_code, done.stdout) == (0, "")
    loaded = safetensors.numpy.load_file(out)
    stored = fed.Ledger(ledger).round(2)["form-03"].leaves
    assert loaded.keys() == stored.keys()
    assert all(np.array_equal(loaded[name], stored[name]) for name in stored)


def test_export_overwrites_nothing(fedlens, ledger, tmp_path):
    out = tmp_path / "model.safetensors"
    out.write_text("precious")
    failed = fedlens("export", ledger, "--round", 2, "--client", "form-03", out)
    assert failed.exit_code == 1
    assert f"Expected the name of a new file, found one that exists: {out}." in failed.stderr
    assert out.read_text() == "precious"


def test_export_into_a_folder_that_is_not_there(fedlens, ledger, tmp_path):
    failed = fedlens("export", ledger, "--round", 2, "--client", "form-03", tmp_path / "no" / "model.safetensors")
    assert failed.exit_code == 1
    assert "Expected to export client 'form-03' of round 2, found: No such file or directory" in failed.stderr


def test_debug_shows_where_an_error_comes_from(fedlens, tmp_path):
    for arguments in (["--debug", "show", tmp_path], ["show", tmp_path, "--debug"]):
        failed = fedlens(*arguments)
        assert isinstance(failed.exception, fed.LedgerError)
        assert failed.exit_code == 1
    assert "found: No such file or directory, in --debug." in fedlens("show", "--", "--debug").stderr


def test_an_error_that_nobody_foresaw_is_one_line_too(fedlens, ledger, monkeypatch):
    from fedlens.report import summaries

    def fail(*_):
        raise RuntimeError("the moon\nis full")

    monkeypatch.setattr(summaries, "summarize_run", fail)
    failed = fedlens("show", ledger)
    assert failed.exit_code == 1
    assert failed.stderr == "Error: Unexpected error: RuntimeError: the moon is full; run with --debug to see where.\n"


def test_an_error_of_the_operating_system_names_the_file(fedlens, ledger, monkeypatch):
    from fedlens.report import summaries

    def fail(*_):
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr(summaries, "summarize_run", fail)
    failed = fedlens("show", ledger)
    assert failed.exit_code == 1
    assert "found: Permission denied, in /some/file." in failed.stderr


HEAVY = ("jax", "federated_language", "flax", "optax", "matplotlib", "sklearn")
WITHOUT_JAX = """
import sys
from typer.testing import CliRunner
from fedlens.cli.app import app
for arguments in {calls!r}:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (arguments, result.output)
    print(arguments, [name for name in {heavy!r} if name in sys.modules])
"""


def test_nothing_that_only_reads_loads_jax(ledger, tmp_path):
    calls = [["--help"], *([command, "--help"] for command in COMMANDS)]
    calls += [["configs"], ["configs", "digits"], ["ls", str(ledger.parent)], ["show", str(ledger)]]
    calls += [["show", str(ledger), *options] for options in (["--round", "1"], ["--client", "form-03"])]
    calls += [["export", str(ledger), "--round", "1", "--client", "form-03", str(tmp_path / "out.safetensors")]]
    code = WITHOUT_JAX.format(calls=calls, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{call} []" for call in calls]
