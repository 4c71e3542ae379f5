"""Every Python block of the README and of the pages in docs runs, page by page from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

import fedlens as fed

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def write_digits_ledger():
    """What docs/ledger-format.md reads: a run over the digits whose model has a leaf dense/kernel, 13 rounds of it."""
    data = fed.data.digits()
    model = fed.models.from_functions(
        init=lambda key: {"dense": {"kernel": jnp.zeros((64, 10))}},
        apply=lambda weights, x: x.reshape(-1, 64) @ weights["dense"]["kernel"],
        inputs=data.element_type,
        loss=fed.losses.cross_entropy,
    )
    process = fed.learning.build_weighted_fed_avg(model, optax.sgd(0.1))
    fed.run(process, data, rounds=13, ledger="runs/digits", progress=False)


def with_its_extra(page):
    return pytest.param(page, marks=[pytest.mark.tensorflow] if page.name == "tensorflow.md" else [])


@pytest.mark.parametrize(
    "page", [with_its_extra(page) for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name
)
def test_the_code_on_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.name == "ledger-format.md":
        write_digits_ledger()
    text = page.read_text()
    names = {"__name__": "page"}
    for found in BLOCK.finditer(text):
        line = text[: found.start(1)].count("\n")
        code = compile("\n" * line + found.group(1), str(page), "exec")  # errors show the page's own line
        exec(code, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
