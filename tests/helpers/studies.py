"""A small study: data, model, process, the run of it, and processes that die in the middle of that run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedlens as fed
from fedlens import trees
from fedlens.data import FederatedData
from fedlens.learning import build_weighted_fed_avg

ROUNDS = 4


def make_data():
    rng = np.random.default_rng(0)
    columns = {}
    for number, count in enumerate([6, 3, 0, 9, 4]):
        x = rng.normal(size=(count, 3)).astype(np.float32)
        columns[f"form-{number}"] = {"x": x, "y": (x @ [1, -2, 0.5] > 0).astype(np.int32)}
    return FederatedData.from_clients(columns)


def make_model():
    return fed.models.from_functions(
        init=lambda key: {"w": 0.1 * jax.random.normal(key, (3, 2)), "b": jnp.zeros(2)},
        apply=lambda weights, x: x @ weights["w"] + weights["b"],
        inputs=make_data().element_type,
        loss=fed.losses.cross_entropy,
        metrics=[fed.metrics.accuracy],
    )


def make_process():
    """A process whose server keeps more than the model: Adam's moments and count."""
    return build_weighted_fed_avg(make_model(), optax.sgd(0.3), optax.adam(0.05), batch_size=4).with_local_models()


def run(process, data, ledger, on_round=None):
    """Three clients a round, evaluated on their training data."""
    return fed.run(
        process,
        data,
        rounds=ROUNDS,
        seed=3,
        clients_per_round=3,
        test=data,
        ledger=ledger,
        config={"of": "tests"},
        progress=False,
        on_round=on_round,
    )


def contents(folder):
    """Every file below a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_bits(a, b):
    found, expected = dict(trees.items(a)), dict(trees.items(b))
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path


def go_until_killed(path, syncs):
    """What a process of its own does: no exception, no closing, gone, in the middle of writing a round."""
    left, sync = [syncs], os.fsync

    def dying_sync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = dying_sync
    data = make_data()
    if os.path.exists(os.path.join(path, "run.json")):
        fed.resume(make_process(), data, ledger=path, test=data, progress=False)
    else:
        run(make_process(), data, path)


def kill_after(path, syncs):
    """Runs the study in a process of its own that dies at a later sync than so many."""
    script = f"import runpy; runpy.run_path({__file__!r})['go_until_killed']({str(path)!r}, {syncs})"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
