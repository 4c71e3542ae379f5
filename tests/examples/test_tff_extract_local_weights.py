"""The programs written for TFF, against NumPy: each part of the example as it stands there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fedlens.compat.tff as tff

PATH = Path(__file__).parents[2] / "examples" / "tff_extract_local_weights.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("tff_extract_local_weights", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def client_weights(example):
    rng = np.random.default_rng(1)
    return [example.random_weights(rng) for _ in range(4)]


def flat(weights):
    return np.concatenate([np.ravel(weights["kernel"]), np.ravel(weights["bias"])])


def test_the_average_and_every_client_come_back(example, client_weights, capsys):
    result = example.average_with_extraction(client_weights)
    expected = np.mean([flat(weights) for weights in client_weights], axis=0)
    np.testing.assert_allclose(flat(result.global_weights), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(np.stack(list(map(flat, result.client_weights))), list(map(flat, client_weights)))
    example.print_client_weights(result)
    distances = [np.linalg.norm(weights["kernel"].ravel() - expected[:8]) for weights in client_weights]
    printed = [float(found) for found in re.findall(r"([0-9.]+) away", capsys.readouterr().out)]
    np.testing.assert_allclose(printed, distances, atol=6e-4)


def test_the_training_loop_learns_which_side_a_point_is_on(example):
    rng = np.random.default_rng(2)
    process = example.build_training_process()
    state = example.train(process, [example.random_dataset(rng, count) for count in (30, 12, 45)], num_rounds=30)
    kernel, bias = process.get_model_weights(state).trainable
    x = rng.normal(size=(200, 4))
    assert np.mean((x @ kernel + bias).argmax(axis=1) == (x.sum(axis=1) > 0)) > 0.95


def test_it_runs_from_the_command_line():
    done = subprocess.run([sys.executable, str(PATH)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert re.search(r"round +4, loss 0\.\d+, examples 87", done.stdout)
    assert len(re.findall(r"client \d learned the bias", done.stdout)) == 3


def test_nothing_but_the_import_is_not_tff_s():
    source = PATH.read_text()
    assert re.findall(r"^(?:import|from) .*fedlens.*$", source, re.MULTILINE) == [
        "import fedlens.compat.tff as tff  # it was: import tensorflow_federated as tff"
    ]


def in_numpy(weights):
    values = flat(weights).astype(np.float64)
    values = values * min(1.0, 5.0 / np.linalg.norm(values))
    return values / np.linalg.norm(values)


@pytest.mark.tensorflow
def test_each_client_is_clipped_and_normalised_in_tensorflow_before_the_mean(example, client_weights):
    client_weights[0]["kernel"] *= 100
    result = example.build_custom_aggregation()(client_weights)
    expected = [in_numpy(weights) for weights in client_weights]
    np.testing.assert_allclose(list(map(flat, result.client_weights)), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(flat(result.global_weights), np.mean(expected, axis=0), rtol=1e-5, atol=1e-7)


@pytest.mark.tensorflow
def test_the_training_loop_reads_tf_data(example):
    import tensorflow as tf

    rng = np.random.default_rng(2)
    lists = [example.random_dataset(rng, count) for count in (30, 12)]
    data_sets = [
        tf.data.Dataset.from_tensor_slices(
            {name: np.concatenate([batch[name] for batch in batches]) for name in ("x", "y")}
        ).batch(8)
        for batches in lists
    ]
    process = example.build_training_process()
    states = [example.train(process, data, num_rounds=2) for data in (lists, data_sets)]
    found, expected = (process.get_model_weights(state).trainable[0] for state in states)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.tensorflow
def test_types_are_written_with_tensorflow_s_dtypes_and_specifications():
    import tensorflow as tf

    assert tff.to_type(tf.float32) == tff.to_type(np.float32)
    assert tff.TensorType(tf.int32, tf.TensorShape([None, 3])) == tff.TensorType(np.int32, [None, 3])
    assert tff.TensorType(tf.string) == tff.TensorType(np.str_)
    spec = {"x": tf.TensorSpec([None, 4], tf.float32), "y": tf.TensorSpec([None], tf.int32)}
    assert str(tff.to_type(spec)) == "<x=float32[?,4],y=int32[?]>"
    batched = tf.data.Dataset.from_tensor_slices(np.zeros((5, 4), np.float32)).batch(2)
    assert tff.to_type(batched.element_spec) == tff.TensorType(np.float32, [None, 4])

    @tff.federated_computation(tff.type_at_clients(tf.float32))
    def mean(values):
        return tff.federated_mean(values)

    assert mean([tf.constant(1.0), 3.0]) == 2.0
