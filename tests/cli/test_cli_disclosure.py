"""`fedlens disclosure`: what outputs tell, and a limit that a pipeline can hold."""

from __future__ import annotations

import json
import sys

import pytest

STUDY = """\
import numpy as np

import fedlens as fed

AT_CLIENTS = fed.FederatedType(np.float32, fed.CLIENTS)
KEYS = fed.FederatedType(fed.TensorType(np.uint32, (2,)), fed.CLIENTS)
KEY = fed.FederatedType(fed.TensorType(np.uint32, (2,)), fed.SERVER)


@fed.jax_computation(np.float32)
def train(value):
    return 2 * value


@fed.federated_computation(AT_CLIENTS)
def mean(values):
    return fed.federated_mean(fed.federated_map(train, values))


@fed.federated_computation(AT_CLIENTS)
def both(values):
    trained = fed.federated_map(train, values)
    return {"mean": fed.federated_mean(trained), "each": trained}


@fed.federated_computation(AT_CLIENTS, KEYS)
def local(values, keys):
    private = fed.federated_map(fed.privacy.local_gaussian(4.0, norm=1.0), (values, keys))
    return {"private": private, "mean": fed.federated_mean(private)}


@fed.federated_computation(AT_CLIENTS, KEY)
def central(values, key):
    total = fed.federated_sum(fed.federated_map(fed.privacy.clip(1.0), values))
    return fed.federated_map(fed.privacy.gaussian_noise(1.0, 1.0), (total, key))


number = 3
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    (tmp_path / "disclosed_study.py").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield "disclosed_study"
    for name in ("disclosed_study", "explained_disclosed_study"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("suffix", ["", ".py"])
def test_it_prints_levels_and_paths(fedlens, study, suffix):
    shown = fedlens("disclosure", f"{study}{suffix}:both")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout.startswith("2 outputs, per-client in all\n")
    assert "argument -> train -> mean -> mean" in shown.stdout


def test_json_is_all_of_it(fedlens, study):
    shown = fedlens("disclosure", f"{study}:both", "--json")
    found = json.loads(shown.stdout)
    assert found["level"] == "per-client"
    assert [output["level"] for output in found["outputs"]] == ["aggregate", "per-client"]
    assert found["outputs"][1]["path"] == ["argument", "train", "each"]


@pytest.mark.parametrize(
    ("name", "limit", "code"),
    [
        ("mean", "aggregate", 0),
        ("mean", "central-dp", 1),
        ("both", "aggregate", 1),
        ("both", "per-client", 0),
        ("both", "raw", 0),
        ("both", "raw data", 0),
        ("central", "aggregate", 0),
        ("central", "central-dp", 0),
        ("central", "public", 1),
        ("local", "local-dp", 0),
        ("local", "aggregate", 1),
    ],
)
def test_the_exit_code_says_whether_the_limit_holds(fedlens, study, name, limit, code):
    shown = fedlens("disclosure", f"{study}:{name}", "--max", limit)
    assert shown.exit_code == code
    assert "in all" in shown.stdout
    assert bool(shown.stderr) == bool(code)


def test_what_exceeds_the_limit_is_named(fedlens, study):
    shown = fedlens("disclosure", f"{study}:both", "--max", "aggregate")
    assert "Expected outputs of aggregate at most, found 'each' of per-client." in shown.stderr


def test_levels_that_do_not_compare_are_said_not_to(fedlens, study):
    shown = fedlens("disclosure", f"{study}:local", "--max", "aggregate")
    assert "found 'private' of local-dp. Of local-dp and aggregate neither tells less than the other." in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["disclosed_study:both", "--max", "secret"], "Expected one of the levels public, central-dp"),
        (["disclosed_study:nothing"], "found no 'nothing' there"),
        (["disclosed_study:number"], "found int"),
        (["disclosed_study"], "Expected MODULE:NAME"),
        (["no_such_module:both"], "found no 'no_such_module'"),
        (["disclosed_study:both", "--most", "aggregate"], "No such option"),
    ],
)
def test_wrong_usage_exits_with_2(fedlens, study, arguments, message):
    shown = fedlens("disclosure", *arguments)
    assert shown.exit_code == 2
    assert message in shown.stderr
