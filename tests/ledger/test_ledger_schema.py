"""The JSON schema of `run.json`: what fedlens writes fits it, and what does not fit it fedlens does not read."""

from __future__ import annotations

import copy
import importlib.resources
import json
import re
from pathlib import Path

import jsonschema
import ml_dtypes
import numpy as np
import pytest

from fedlens.errors import LedgerError
from fedlens.ledger import Keep, Ledger
from fedlens.ledger.tensorfile import _CODES

SCHEMA = json.loads((importlib.resources.files("fedlens.ledger") / "run.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
WEIGHTS = {
    "dense": {"kernel": np.zeros((4, 3), np.float32), "bias": np.zeros(3, ml_dtypes.bfloat16)},
    "layers": [np.zeros((), np.int32), {"x": np.zeros((2, 0), ml_dtypes.float8_e5m2)}, [], {}],
}


def create(path, weights=WEIGHTS, **options):
    Ledger.create(path, weights=weights, **options).close()
    return json.loads((path / "run.json").read_text())


def test_the_schema_is_one_and_knows_the_dtypes():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert set(SCHEMA["$defs"]["leaf"]["properties"]["dtype"]["enum"]) == set(_CODES)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": np.zeros(3)},
        {"rounds": 3, "config": {"lr": 0.1, "more": [None, {"checksum": "00000000"}]}},
        {"encodings": "int8-delta"},
        {"encodings": {"dense/*": "bf16-delta", "*": "raw"}, "keep": Keep(leaves=["dense/*"], clients="a*", every=2)},
        {"keep": Keep(clients=["a", "b"], statistics_only=True)},
    ],
    ids=str,
)
def test_what_is_written_fits(tmp_path, options):
    VALIDATOR.validate(create(tmp_path / "run", **options))


def test_version_1_fits(tmp_path):
    run = create(tmp_path / "run", rounds=2)
    old = {name: run[name] for name in run if name not in ("encodings", "keep", "checksum")}
    old["leaves"] = [{name: leaf[name] for name in ("name", "shape", "dtype")} for leaf in run["leaves"]]
    VALIDATOR.validate(old | {"format_version": 1, "encoding": "raw"})
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(old | {"format_version": 1, "encoding": "raw", "planned_rounds": None})


WRONG = {
    "format": ["other", None, 1],
    "format_version": [0, 3, "2", None],
    "planned_rounds": [0, -1, 1.5, "3", True, []],
    "encodings": [
        *(None, {}, [3], [{"leaves": "*"}]),
        *([{"leaves": "*", "encoding": "zip"}], [{"leaves": 1, "encoding": "raw"}]),
    ],
    "keep": [
        3,
        [],
        {},
        {"leaves": "*", "every": 0, "clients": None, "statistics_only": False},
        {"leaves": 1, "every": 1, "clients": None, "statistics_only": False},
        {"leaves": "*", "every": 1, "clients": [1], "statistics_only": False},
        {"leaves": "*", "every": 1, "clients": None, "statistics_only": 0},
    ],
    "config": [None, [], "x"],
    "skeleton": [3, "x", {}, {"fields": 3}, {"fields": [["a"]]}, {"fields": [[1, None]]}, [{"other": []}]],
    "leaves": [None, [], [3], [{}]],
    "versions": [None, [], 1],
}
WRONG_IN_A_LEAF = {
    "name": [None, 1, "", "__metadata__"],
    "shape": [None, 3, [-1], [1.5], ["1"], [None]],
    "dtype": [None, "float128", "F32", 1],
    "encoding": [None, "zip", 1],
}


@pytest.mark.parametrize("missing", [*sorted(set(WRONG)), "name", "shape", "dtype", "encoding"])
def test_what_lacks_a_member_neither_fits_nor_is_read(tmp_path, missing):
    run = create(tmp_path / "run")
    for fields in (run, run["leaves"][0]):
        fields.pop(missing, None)
    refuse(tmp_path / "run", run)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]], ids=str)
def test_what_has_a_wrong_member_neither_fits_nor_is_read(tmp_path, name, value):
    refuse(tmp_path / "run", create(tmp_path / "run") | {name: value})


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in WRONG_IN_A_LEAF for value in WRONG_IN_A_LEAF[name]], ids=str
)
def test_what_has_a_wrong_leaf_neither_fits_nor_is_read(tmp_path, name, value):
    run = create(tmp_path / "run")
    changed = copy.deepcopy(run)
    changed["leaves"][0][name] = value
    refuse(tmp_path / "run", changed)


def test_a_delta_of_whole_numbers_neither_fits_nor_is_read(tmp_path):
    run = create(tmp_path / "run")
    (whole,) = [leaf for leaf in run["leaves"] if leaf["dtype"] == "int32"]
    whole["encoding"] = "int8-delta"
    refuse(tmp_path / "run", run)


def refuse(path, run):
    assert not VALIDATOR.is_valid(run)
    (path / "run.json").write_text(json.dumps(run))
    with pytest.raises(LedgerError, match=r"run\.json"):
        Ledger(path)


def test_the_specification_names_the_schema_and_every_member():
    text = (Path(__file__).parents[2] / "docs" / "ledger-format.md").read_text()
    assert "run.schema.json" in text
    section = text[text.index("## run.json") : text.index("## Encodings")]
    named = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    versions = SCHEMA["else"]["properties"].keys() | SCHEMA["properties"].keys() | SCHEMA["then"]["properties"].keys()
    assert versions - {"encoding"} <= named
