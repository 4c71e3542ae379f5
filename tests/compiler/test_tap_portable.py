"""A tapped computation is an ordinary one: the language's own building blocks, and its portable form travels."""

from __future__ import annotations

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
from federated_language import framework
from safetensors.numpy import load_file

import fedlens as fed

DATA = fed.FederatedType(fed.SequenceType(fed.TensorType(np.float32, (2,))), fed.CLIENTS)
SEQUENCES = [[[0.5, 2], [1, -3]], [[4, 0.25]]]
COHORT = {f"client {i}": [np.asarray(row, np.float32) for row in rows] for i, rows in enumerate(SEQUENCES)}

CHILD = """
import pathlib, sys
import numpy as np
from federated_language.proto import computation_pb2
from safetensors.numpy import save_file
import fedlens as fed

folder = pathlib.Path(sys.argv[1])
proto = computation_pb2.Computation.FromString((folder / "tapped.pb").read_bytes())
computation = fed.framework.ConcreteComputation.from_proto(proto)
cohort = {f"client {i}": [np.asarray(row, np.float32) for row in rows] for i, rows in enumerate(SEQUENCES)}
result, tapped = computation(np.float32(3), fed.Cohort(cohort))
save_file(
    {"result": np.asarray(result), **{name: np.asarray(values.stacked) for name, values in tapped.items()}},
    folder / "found.safetensors",
)
print([tap.name for tap in fed.taps(computation)])
"""


@fed.federated_computation(fed.FederatedType(np.float32, fed.SERVER), DATA)
def one_round(start, data):
    def train(start, batches):
        total = batches.reduce(start, lambda total, batch: total + batch.sum())
        return {"update": total - start, "weights": total, "count": batches.num_batches.astype(jnp.float32)}

    learned = fed.federated_map(train, (fed.federated_broadcast(start), data))
    return fed.federated_mean(learned["update"], learned["count"])


AT = ["client_work.weights", "aggregate.0.value"]


def blocks(block):
    yield block
    for child in block.children():
        yield from blocks(child)


def test_a_tapped_computation_is_made_of_the_languages_own_blocks():
    original, tapped = (computation.to_building_block() for computation in (one_round, fed.tap(one_round, AT)))
    payloads = [
        {block.to_proto().SerializeToString(deterministic=True) for block in blocks(each) if is_payload(block)}
        for each in (original, tapped)
    ]
    assert payloads[0] >= payloads[1]
    assert {block.uri for block in blocks(tapped) if isinstance(block, framework.Intrinsic)} == {
        "federated_broadcast",
        "federated_map",
        "federated_weighted_mean",
        "federated_zip_at_clients",
    }
    assert str(tapped.type_signature.result) == (
        "<float32@SERVER,<client_work.weights={float32}@CLIENTS,aggregate.0.value={float32}@CLIENTS>>"
    )


def is_payload(block):
    """A local payload: the language holds computations that are used in another in such blocks too, of any kind."""
    return isinstance(block, framework.CompiledComputation) and block.to_proto().WhichOneof("computation") == "xla"


def test_a_fresh_process_runs_the_portable_form_from_bytes_alone(tmp_path):
    tapped = fed.to_portable(fed.tap(one_round, AT), platforms=("cpu",))
    (tmp_path / "tapped.pb").write_bytes(tapped.to_proto().SerializeToString())
    child = subprocess.run(
        [sys.executable, "-c", f"SEQUENCES = {SEQUENCES}\n{CHILD}", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    found = load_file(tmp_path / "found.safetensors")
    assert found["client_work.weights"].tolist() == [3.5, 7.25]
    assert found["aggregate.0.value"].tolist() == [0.5, 4.25]
    assert float(found["result"]) == float(one_round(3.0, fed.Cohort(COHORT)))
    np.testing.assert_allclose(found["result"], (2 * 0.5 + 4.25) / 3, rtol=1e-6)
    assert "'client_work.weights'" in child.stdout  # it is read, and can be tapped, there too
