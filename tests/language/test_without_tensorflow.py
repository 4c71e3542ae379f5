"""Without TensorFlow: nothing imports it, errors say how to install it, and payloads may still be looked at."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from federated_language.proto import computation_pb2

import fedlens as fed
from fedlens.compiler import plan
from fedlens.errors import UnsupportedError
from fedlens.language.tensorflow_library import tensorflow


@pytest.fixture
def no_tensorflow(monkeypatch):
    """A process in which TensorFlow cannot be imported, whether it is installed or not."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    tensorflow.cache_clear()
    yield
    tensorflow.cache_clear()


def payload_of(result="train/result:0"):
    """A computation from elsewhere, whose graph nobody has looked at."""
    payload = computation_pb2.TensorFlow(
        parameter={"tensor": {"tensor_name": "train/argument:0"}}, result={"tensor": {"tensor_name": result}}
    )
    payload.graph_def.type_url = "type.googleapis.com/tensorflow.GraphDef"
    type_ = fed.FunctionType(np.float32, np.float32)
    proto = computation_pb2.Computation(type=type_.to_proto(), tensorflow=payload)
    return fed.framework.ConcreteComputation.from_proto(proto)


def test_computing_with_jax_imports_no_tensorflow():
    code = (
        "import sys, fedlens as fed, numpy as np\n"
        "fed.tensorflow_computation\n"
        "assert fed.jax_computation(lambda x: 2 * x, np.float32)(np.float32(2)) == 4\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('tensorflow', 'keras')])"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]"


def test_tracing_says_how_to_install_it(no_tensorflow):
    with pytest.raises(UnsupportedError, match=r"Install it: pip install 'fedlens\[tensorflow\]'"):
        fed.tensorflow_computation(lambda x: x, np.float32)


def test_running_a_payload_says_how_to_install_it(no_tensorflow):
    with pytest.raises(UnsupportedError, match=r"Install it: pip install 'fedlens\[tensorflow\]'"):
        payload_of()(np.float32(1))


@pytest.mark.parametrize(("result", "name"), [("train/result:0", "train"), ("Identity:0", "tensorflow")])
def test_a_payload_can_be_planned_and_explained(no_tensorflow, result, name, capsys):
    trained = payload_of(result)

    @fed.federated_computation(fed.FederatedType(np.float32, fed.CLIENTS))
    def program(values):
        return fed.federated_mean(fed.federated_map(trained, values))

    (stage, *_) = plan(program).stages
    assert [step.operation for step in stage.reductions] == ["federated_mean"]
    fed.explain(program)
    assert f"{name}(argument)" in capsys.readouterr().out
