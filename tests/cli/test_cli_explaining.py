"""`fedlens explain`: finds a computation by module and name, or says in one sentence why not."""

from __future__ import annotations

import json
import sys

import pytest

STUDY = """\
import dataclasses

import numpy as np

import fedlens as fed

AT_CLIENTS = fed.FederatedType(np.float32, fed.CLIENTS)


@fed.jax_computation
def untyped(x):
    return x


@fed.federated_computation(AT_CLIENTS)
def average(values):
    return fed.federated_mean(values), values


@dataclasses.dataclass
class Holder:
    total = fed.federated_computation(lambda values: fed.federated_sum(values), AT_CLIENTS)


number = 3
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A folder with the modules a_study and a_broken_study; the working directory."""
    (tmp_path / "a_study.py").write_text(STUDY)
    (tmp_path / "a_broken_study.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "a_failing_study.py").write_text("raise ValueError('no\\ndata')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("explained_")]:
        del sys.modules[name]
    for name in ("a_study", "a_broken_study", "a_failing_study"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("target", ["a_study:average", "a_study.py:average"])
def test_a_computation_in_a_module_or_a_file(fedlens, study, target):
    shown = fedlens("explain", target)
    assert (shown.exit_code, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert lines[0] == "1 pass over the cohort, 1 value of each client handed out"
    assert "      mean of argument                 float32" in lines
    assert lines[-1].startswith("! one value for each client")


def test_a_file_elsewhere(fedlens, study, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert fedlens("explain", f"{study}/a_study.py:average").exit_code == 0


def test_a_name_within_a_name_as_json(fedlens, study):
    found = json.loads(fedlens("explain", "a_study:Holder.total", "--json").stdout)
    assert [value["source"] for value in found["result"]] == ["sum(argument)"]
    assert [stage["place"] for stage in found["stages"]] == ["clients"]


def test_a_learning_process_is_explained_by_its_round(fedlens, study):
    (study / "a_study.py").write_text(
        "import jax.numpy as jnp, optax\nimport fedlens as fed\n"
        "data = fed.data.digits()\n"
        "model = fed.models.from_functions(init=lambda key: {'w': jnp.zeros((64, 10))},\n"
        "    apply=lambda weights, x: x.reshape(-1, 64) @ weights['w'], inputs=data.element_type,\n"
        "    loss=fed.losses.cross_entropy)\n"
        "process = fed.learning.build_weighted_fed_avg(model, optax.sgd(0.1))\n"
    )
    assert "weighted mean of train.update" in fedlens("explain", "a_study:process").stdout


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("average", "Expected MODULE:NAME or FILE.py:NAME, such as studies.rounds:average, found 'average'."),
        ("no_study:average", "found no 'no_study'."),
        ("a_study.part:average", "found no 'a_study.part'."),
        ("no_study.py:average", "Expected a file with a computation, found none, at no_study.py."),
        ("a_study:averge", "Expected a name in a_study, found no 'averge' there. Computations there: average."),
        ("a_study:average.x.y", "found no 'average.x.y' there."),
        ("a_study:number", "found int, at a_study:number. Computations there: average."),
        ("a_study:untyped", "found one whose types depend on what it is called with."),
        ("a_broken_study:x", "found ModuleNotFoundError: No module named 'nothing_of_this_name'; run with --debug"),
        ("a_failing_study:x", "Expected to import a_failing_study, found ValueError: no data; run with --debug"),
        ("a_failing_study.py:x", "Expected to import a_failing_study.py, found ValueError: no data; run with --debug"),
    ],
)
def test_what_is_no_computation(fedlens, study, target, message):
    failed = fedlens("explain", target)
    assert (failed.exit_code, failed.stdout) == (2, "")
    assert failed.stderr.startswith("Error: Expected ")
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_examples_in_the_help_stand_on_lines_of_their_own(fedlens):
    shown = fedlens("explain", "--help").stdout
    assert "\n  fedlens explain studies.rounds:average\n" in shown
    assert "\\b" not in shown
