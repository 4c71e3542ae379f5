"""The starting example, against NumPy: the same numbers, by client, in order, stacked, in any structure."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import fedlens as fed
from fedlens import trees

PATH = Path(__file__).parents[2] / "examples" / "extract_local_weights.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("extract_local_weights", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def weights(example):
    rng = np.random.default_rng(1)
    return {f"client-{number}": example.random_weights(rng) for number in range(5)}


def flat(tree):
    """All leaves as one vector, sorted by path: the fields of a dict have no order that a mean could depend on."""
    return np.concatenate([np.ravel(leaf) for _, leaf in sorted(trees.items(tree), key=lambda item: item[0])])


def test_average_and_client_weights_come_back_in_one_call(example, weights):
    result = example.average_with_extraction(fed.Cohort(weights))
    assert set(result) == {"global_weights", "client_weights"}
    expected = np.mean([flat(each) for each in weights.values()], axis=0)
    np.testing.assert_allclose(flat(result["global_weights"]), expected, rtol=1e-6)  # five float32 terms


def test_client_weights_are_the_bits_that_each_client_sent(example, weights):
    local = example.average_with_extraction(fed.Cohort(weights))["client_weights"]
    assert len(local) == 5
    assert local.ids == tuple(weights)
    for (client_id, found), (sent_id, sent) in zip(local.items(), weights.items(), strict=True):
        assert client_id == sent_id
        assert [path for path, _ in trees.items(found)] == ["dense/kernel", "dense/bias"]
        for path, original in trees.items(sent):
            assert trees.get(found, path).shape == original.shape
            assert trees.get(found, path).tobytes() == original.tobytes()
    for found, sent in zip(local, weights.values(), strict=True):
        assert flat(found).tobytes() == flat(sent).tobytes()
    assert local.stacked["dense"]["kernel"].shape == (5, 4, 2)
    np.testing.assert_array_equal(local.stacked["dense"]["bias"][3], weights["client-3"]["dense"]["bias"])


class Layer(NamedTuple):
    kernel: np.ndarray
    bias: np.ndarray


@pytest.mark.parametrize(
    "structure",
    [
        lambda rng: rng.normal(size=(2, 3)).astype(np.float32),
        lambda rng: [rng.normal(size=3).astype(np.float32), {"z": np.float32(rng.normal()), "a": np.float32(1)}],
        lambda rng: {"layers": [Layer(rng.normal(size=(2, 2)).astype(np.float32), np.zeros(2, np.float32))] * 3},
    ],
    ids=["array", "list", "named tuples"],
)
def test_any_structure_comes_back_as_it_went_in(structure):
    rng = np.random.default_rng(2)
    weights = {f"client-{number}": structure(rng) for number in range(3)}

    @fed.federated_computation(fed.FederatedType(fed.type_of(weights["client-0"]), fed.CLIENTS))
    def average_with_extraction(model_weights):
        return {
            "global_weights": fed.federated_mean(model_weights),
            "client_weights": fed.federated_map(lambda weights: weights, model_weights),
        }

    result = average_with_extraction(fed.Cohort(weights))
    for client_id, sent in weights.items():
        found = result["client_weights"][client_id]
        assert fed.type_of(found) == fed.type_of(sent)
        assert flat(found).tobytes() == flat(sent).tobytes()
    expected = np.mean([flat(each) for each in weights.values()], axis=0)
    np.testing.assert_allclose(flat(result["global_weights"]), expected, rtol=1e-6)


def test_processed_weights_are_clipped_normalised_and_average_to_the_returned_mean(example, weights):
    result = example.average_of_processed(fed.Cohort(weights))
    for client_id, sent in weights.items():
        vector = flat(sent).astype(np.float64)
        clipped = vector * min(1.0, 5.0 / np.linalg.norm(vector))
        expected = clipped / np.linalg.norm(clipped)
        found = result["client_weights"][client_id]
        np.testing.assert_allclose(flat(found), expected, rtol=2e-6)
    mean = {path: leaf.mean(axis=0) for path, leaf in trees.items(result["client_weights"].stacked)}
    for path, leaf in trees.items(result["global_weights"]):
        np.testing.assert_allclose(leaf, mean[path], rtol=1e-6, atol=1e-7)


def test_training_round_equals_a_loop_in_numpy(example):
    rng = np.random.default_rng(3)
    model = example.random_weights(rng)
    data = {name: example.random_batches(rng, count) for name, count in (("alice", 3), ("bob", 1), ("carol", 6))}
    result = example.training_round(model, fed.Cohort(data))

    local, sizes = {}, {}
    for client_id, batches in data.items():
        kernel, bias = (model["dense"][name].astype(np.float64) for name in ("kernel", "bias"))
        for batch in batches:
            error = batch["x"] @ kernel + bias - batch["y"]
            kernel = kernel - 0.1 * 2 * batch["x"].T @ error / error.size
            bias = bias - 0.1 * 2 * error.sum(axis=0) / error.size
        local[client_id], sizes[client_id] = {"kernel": kernel, "bias": bias}, 5 * len(batches)
    for client_id, expected in local.items():
        found = result["local_models"][client_id]["dense"]
        for name, leaf in expected.items():
            np.testing.assert_allclose(found[name], leaf, rtol=1e-5, atol=1e-6)  # up to six float32 SGD steps
    for name in ("kernel", "bias"):
        expected = sum(sizes[client_id] * local[client_id][name] for client_id in data) / sum(sizes.values())
        np.testing.assert_allclose(result["model"]["dense"][name], expected, rtol=1e-5, atol=1e-6)


def test_the_script_runs_and_prints_each_client():
    done = subprocess.run([sys.executable, PATH], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for client_id in ("alice", "bob", "carol"):
        assert client_id in done.stdout
