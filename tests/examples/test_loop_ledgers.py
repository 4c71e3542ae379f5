"""The examples that record a plain loop: what they stored is what the loop averaged."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fedlens as fed

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, folder], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_each_global_model_is_the_mean_of_the_local_ones(ledger: fed.Ledger) -> None:
    for number in ledger.rounds[:-1]:
        round_, following = ledger.round(number), ledger.round(number + 1)
        sizes = round_.table().column("num_examples").to_numpy()
        for name in ledger.leaf_names:
            mean = np.average(round_.leaf(name).astype(np.float64), axis=0, weights=sizes)
            np.testing.assert_allclose(following.global_leaf(name), mean, rtol=1e-4, atol=1e-6)


def test_numpy_loop(tmp_path):
    printed = run("numpy_loop_ledger.py", tmp_path / "run")
    ledger = fed.Ledger(tmp_path / "run")
    assert sorted(ledger.clients) == sorted(fed.data.digits().ids)
    assert ledger.rounds == list(range(5))
    assert_each_global_model_is_the_mean_of_the_local_ones(ledger)
    losses = [float(loss) for loss in re.search(r"by round: (.*)", printed)[1].split()]
    assert losses[-1] < losses[0] / 2


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torch_loop(tmp_path):
    printed = run("torch_loop_ledger.py", tmp_path / "run")
    ledger = fed.Ledger(tmp_path / "run")
    assert ledger.rounds == list(range(5))
    assert ledger.leaf_names == ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert_each_global_model_is_the_mean_of_the_local_ones(ledger)
    assert "most unlike the others: form-" in printed


def test_five_lines_are_five_lines():
    text = (EXAMPLES / "torch_loop_ledger.py").read_text()
    marked = [line for line in text.splitlines() if re.search(r"# ledger \d$", line)]
    assert [line[-1] for line in marked] == list("12345")
    rest = [line for line in text.split('"""', 4)[-1].splitlines() if "ledger" in line and line not in marked]
    assert all("sys.argv" in line for line in rest), rest
