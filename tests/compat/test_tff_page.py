"""The page that maps TFF's names: what it says exists does, and what exists is on it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fedlens as fed
import fedlens.compat.tff as tff

PAGE = (Path(__file__).parents[2] / "docs" / "tff.md").read_text()
SECTION = re.compile(r"^### (`tff.*)\n((?:(?!^### ).*\n)*)", re.MULTILINE)
ROW = re.compile(r"^\| (`.*?) \| (.*) \|$", re.MULTILINE)


def rows():
    """Each table row: the section's module, the names in its first column, and what its second says."""
    for section, text in SECTION.findall(PAGE):
        module = re.match(r"`(tff[\w.]*)`", section).group(1)
        for names, here in ROW.findall(text):
            yield module, re.findall(r"`([\w.]+)`", names), here


def resolved(name):
    value = {"tff": tff, "fed": fed}[name.split(".")[0]]
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    return value


THE_SAME = sorted(
    name if name.startswith("tff.") else f"{module}.{name}"
    for module, names, here in rows()
    if here.startswith("the same")
    for name in names
)
ELSEWHERE = sorted({name for _, _, here in rows() for name in re.findall(r"`((?:tff|fed)\.[\w.]+)", here)})


def test_the_page_has_what_tff_has():
    assert len(THE_SAME) > 150
    assert {"tff.federated_average", "tff.learning.algorithms.build_weighted_fed_avg"} <= set(THE_SAME)
    names = {f"{module}.{name}" for module, names, _ in rows() for name in names}
    # Some of every part of TFF 0.87, among them names that have no counterpart.
    assert names >= {"tff.simulation.datasets.ClientData", "tff.framework.to_call_dominant", "tff.types.TypeRelation"}


def missing(names):
    found = []
    for name in names:
        try:
            resolved(name)
        except AttributeError:
            found.append(name)
    return found


def test_every_name_that_is_the_same_exists():
    assert missing(THE_SAME) == []


def test_everything_that_the_page_sends_to_exists():
    assert len(ELSEWHERE) > 15
    assert missing(ELSEWHERE) == []
    assert missing(["tff.federated_collect", "fed.no_such_name"]) == ["tff.federated_collect", "fed.no_such_name"]


# What a program meets but does not write down.
OURS = {
    "tff.learning.models.SplitModel",
    "tff.learning.models.as_model",
    "tff.learning.optimizers.as_optax",
}


def test_every_name_of_the_learning_modules_is_on_the_page():
    learning = tff.learning
    defined = {
        f"tff{module.__name__.removeprefix('fedlens.compat.tff')}.{name}"
        for module in (learning.algorithms, learning.models, learning.optimizers, learning.templates, tff.aggregators)
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    assert len(defined) > 20
    assert defined - OURS <= set(THE_SAME)


def test_every_name_of_the_package_is_on_the_page():
    names = {f"tff.{name}" for name in vars(tff) if not name.startswith("_")}
    internal = {"tff.absent", "tff.client_data", "tff.computations", "tff.values"}
    assert names - internal <= set(THE_SAME)


def test_a_name_without_a_counterpart_leads_to_the_page():
    for module, name in (
        (tff, "analytics"),
        (tff.learning, "robust_aggregator"),
        (tff.learning.models, "from_keras_model"),
        (tff.learning.algorithms, "build_fed_kmeans"),
        (tff.aggregators, "SecureSumFactory"),
    ):
        path = module.__name__.removeprefix("fedlens.compat.")
        with pytest.raises(AttributeError, match=rf"found {path}.{name}\. The page docs/tff.md"):
            getattr(module, name)
        assert not hasattr(module, name)
