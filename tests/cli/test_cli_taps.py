"""`fedlens taps`: the table of tap points of a computation in a module."""

from __future__ import annotations

import json
import sys

import pytest

STUDY = """\
import jax.numpy as jnp
import numpy as np

import fedlens as fed

AT_CLIENTS = fed.FederatedType(np.float32, fed.CLIENTS)


@fed.federated_computation(AT_CLIENTS)
def study(values):
    def encode(value):
        return {"steps": jnp.int32(value * 8), "half": value / 2}

    encoded = fed.federated_map(encode, values)
    return fed.federated_secure_sum_bitwidth(encoded["steps"], 8), fed.federated_mean(values)


@fed.federated_computation(fed.FederatedType(np.float32, fed.SERVER))
def nothing(value):
    return value


number = 3
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A folder with the module tapped_study; the working directory."""
    (tmp_path / "tapped_study.py").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in ("tapped_study", "explained_tapped_study"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("target", ["tapped_study:study", "tapped_study.py:study"])
def test_the_table(fedlens, study, target):
    shown = fedlens("taps", target)
    assert (shown.exit_code, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert lines[0] == "5 taps"
    rows = {line[2:].split()[0]: line for line in lines[3:8]}
    assert list(rows) == ["aggregate.0.value", "aggregate.1.value", "map.0", "map.0.steps", "map.0.half"]
    assert rows["aggregate.0.value"].startswith("! aggregate.0.value  encode    int32")
    assert rows["aggregate.1.value"].startswith("x ")
    assert "raw data" in rows["aggregate.1.value"]
    assert "aggregate.0.value  1" in rows["map.0.steps"]
    assert [line[0] for line in lines[-2:]] == ["x", "!"]


def test_as_json(fedlens, study):
    found = {tap["name"]: tap for tap in json.loads(fedlens("taps", "tapped_study:study", "--json").stdout)}
    steps = found["map.0.steps"]
    assert {name: steps[name] for name in ("function", "type", "feeds", "calls", "level")} == {
        "function": "encode",
        "type": "int32",
        "feeds": ["aggregate.0.value"],
        "calls": 1,
        "level": "per-client",
    }
    assert len(steps["bypasses"]) == 1
    assert found["aggregate.1.value"]["level"] == "raw data"


def test_without_taps(fedlens, study):
    assert fedlens("taps", "tapped_study:nothing").stdout == "no taps: no client computes a value of its own\n"
    assert json.loads(fedlens("taps", "tapped_study:nothing", "--json").stdout) == []


def test_a_learning_process_is_tapped_by_its_round(fedlens, study):
    (study / "tapped_study.py").write_text(
        "import jax.numpy as jnp, optax\nimport fedlens as fed\n"
        "data = fed.data.digits()\n"
        "model = fed.models.from_functions(init=lambda key: {'w': jnp.zeros((64, 10))},\n"
        "    apply=lambda weights, x: x.reshape(-1, 64) @ weights['w'], inputs=data.element_type,\n"
        "    loss=fed.losses.cross_entropy)\n"
        "process = fed.learning.build_weighted_fed_avg(model, optax.sgd(0.1))\n"
    )
    lines = fedlens("taps", "tapped_study:process").stdout.splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["client_work", "client_work.weights", "client_work.update"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("study", "Expected MODULE:NAME or FILE.py:NAME, such as studies.rounds:average, found 'study'."),
        ("tapped_study:stduy", "found no 'stduy' there. Computations there: study"),
        ("tapped_study:number", "found int, at tapped_study:number. Computations there: "),
    ],
)
def test_what_is_no_computation(fedlens, study, target, message):
    failed = fedlens("taps", target)
    assert (failed.exit_code, failed.stdout) == (2, "")
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
