"""The example with scikit-learn: its rounds are scikit-learn's own fits, averaged by NumPy."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import fedlens as fed

PATH = Path(__file__).parents[2] / "examples" / "scikit_learn_clients.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("scikit_learn_clients", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_round_averages_what_scikit_learn_fits(example):
    training, _ = example.DATA.split(0.2, seed=0)
    training = training.select(training.ids[:3])
    start = {"coef": np.zeros((10, 64), np.float32), "intercept": np.zeros(10, np.float32)}
    result = example.training_round(start, training.cohort(0))
    fitted, sizes = [], []
    for client_id in training.ids:
        rows = training.client(client_id)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = LogisticRegression(max_iter=3).fit(rows["x"].reshape(-1, 64), rows["y"])
        found = result["local_models"][client_id]
        np.testing.assert_allclose(found["coef"], model.coef_, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["intercept"], model.intercept_, rtol=1e-4, atol=1e-5)
        fitted.append(found["coef"])
        sizes.append(len(rows["y"]))
    np.testing.assert_allclose(result["model"]["coef"], np.average(fitted, axis=0, weights=sizes), rtol=1e-5, atol=1e-6)


def test_the_score_counts_what_numpy_counts(example):
    _, held_out = example.DATA.split(0.2, seed=0)
    rng = np.random.default_rng(0)
    model = {
        "coef": rng.normal(size=(10, 64)).astype(np.float32),
        "intercept": rng.normal(size=10).astype(np.float32),
    }
    rows = held_out.columns
    logits = rows["x"].reshape(-1, 64) @ model["coef"].T + model["intercept"]
    found = example.evaluation(model, held_out.cohort(0))
    assert found["count"] == len(rows["y"])
    assert found["right"] == np.sum(logits.argmax(axis=1) == rows["y"])


def test_training_reads_digits(example):
    history = example.train(rounds=2)
    assert history[-1]["global_accuracy"] > 0.85  # chance is 0.1
    assert set(history[-1]["local_accuracy"]) == set(example.DATA.ids)
    assert isinstance(history[-1]["local_models"], fed.ClientValues)


def test_it_prints_a_table():
    run = subprocess.run([sys.executable, "-W", "error", PATH], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    header, *rows, last = run.stdout.splitlines()
    assert header.split()[:3] == ["round", "global", "model"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3", "4"]
    assert all(0 <= float(cell.rstrip("%")) <= 100 for row in rows for cell in row.split()[1:])
    assert "does worst on its own" in last
