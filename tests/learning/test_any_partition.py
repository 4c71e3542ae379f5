"""One full-batch local step and the weighted mean are one centralized gradient step, however examples are dealt out.

McMahan et al., AISTATS 2017, section 2: FedSGD, FedAvg with B infinite and E = 1.
"""

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedlens as fed
from fedlens import Cohort
from fedlens.learning import build_weighted_fed_avg
from fedlens.runtime import Local

EXAMPLES, RATE = 12, 0.7


@pytest.fixture(scope="module")
def examples(make):
    return make({"all": EXAMPLES}, seed=8).client("all")


@pytest.fixture(scope="module")
def process(logistic):
    return build_weighted_fed_avg(logistic, optax.sgd(RATE), batch_size=EXAMPLES, shuffle=False)


@pytest.fixture(scope="module")
def engine_of_one_device():
    return Local(jax.local_devices()[:1])  # one program for each number of clients, whatever they hold


@settings(max_examples=30)
@given(owners=st.lists(st.integers(0, 4), min_size=EXAMPLES, max_size=EXAMPLES))
def test_any_partition_gives_the_centralized_step(process, examples, engine_of_one_device, vector, owners):
    state = process.initialize(0)
    x, y = examples["x"].astype(np.float64), examples["y"]
    w, b = (np.asarray(state.weights[name], np.float64) for name in ("w", "b"))
    scores = np.exp(x @ w + b)
    error = (scores / scores.sum(axis=1, keepdims=True) - np.eye(3)[y]) / EXAMPLES
    centralized = {"w": w - RATE * x.T @ error, "b": b - RATE * error.sum(axis=0)}

    def batch(client):
        """All that a client holds, filled up to one size."""
        mine = np.flatnonzero(np.array(owners) == client)
        rows = np.resize(mine, EXAMPLES)
        return {"x": examples["x"][rows], "y": examples["y"][rows], "mask": np.arange(EXAMPLES) < len(mine)}

    cohort = Cohort({f"client {client}": [batch(client)] for client in sorted(set(owners))})
    with fed.use(engine_of_one_device):
        after, metrics = process.next(state, cohort)
    assert metrics["num_examples"] == EXAMPLES
    change = vector(centralized) - vector(state.weights)
    assert np.linalg.norm(vector(after.weights) - vector(centralized)) <= 2e-6 * np.linalg.norm(change)
