"""Which devices compute: one for each core, unless the user decided otherwise. In processes of their own."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from fedlens.runtime.devices import available_cores
from fedlens.runtime.lowering import cpu_options

ROUND = """
import jax, numpy as np, fedlens as fed
@fed.federated_computation(fed.FederatedType(np.float32, fed.CLIENTS))
def both(values):
    return fed.federated_map(lambda x: x * x, values), fed.federated_mean(values)
squares, mean = both(fed.Cohort([float(i) for i in range(5)]))
print(list(map(float, squares)), float(mean), len(jax.devices()))
"""
RESULT = "[0.0, 1.0, 4.0, 9.0, 16.0] 2.0"


def python(code, warnings="error", **environment):
    """What a fresh interpreter prints, and what it warns of."""
    clean = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", code],
        env={**clean, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_one_device_for_each_core():
    assert python(ROUND)[0] == f"{RESULT} {available_cores()}"


@pytest.mark.parametrize(
    "setting", [{"JAX_NUM_CPU_DEVICES": "3"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}], ids=str
)
def test_a_setting_of_the_user_is_respected(setting):
    assert python(ROUND, **setting)[0] == f"{RESULT} 3"


def test_a_setting_in_the_users_code_is_respected():
    code = "import jax\njax.config.update('jax_num_cpu_devices', 3)\n" + ROUND
    assert python(code)[0] == f"{RESULT} 3"


def test_one_device_that_the_user_asked_for_is_no_reason_to_warn():
    assert python(ROUND, JAX_NUM_CPU_DEVICES="1")[0] == f"{RESULT} 1"


def test_jax_that_has_started_already_is_used_as_it_is():
    code = "import jax\njax.numpy.ones(3).block_until_ready()\n" + ROUND
    out, err = python(code, warnings="default")
    assert out == f"{RESULT} 1"
    if available_cores() > 1:
        assert "PerformanceWarning: Expected one CPU device for each of" in err
        assert f"JAX_NUM_CPU_DEVICES={available_cores()}" in err


def test_more_devices_than_clients():
    assert python(ROUND, JAX_NUM_CPU_DEVICES="8")[0] == f"{RESULT} 8"


VECTORS, DISABLED = "xla_cpu_prefer_vector_width", "xla_disable_hlo_passes"


@pytest.mark.parametrize(
    ("flags", "left"),
    [("", {VECTORS, DISABLED}), (f"--{VECTORS}=256", {DISABLED}), (f"--{DISABLED}=algsimp", {VECTORS})],
)
def test_what_the_user_says_about_compiling_stays(monkeypatch, flags, left):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert cpu_options().keys() == left


def test_a_device_computes_on_one_core():
    weights = jnp.ones((784, 200))
    divided, whole = (
        jax.jit(lambda weights: 2 * weights - jnp.sin(weights), compiler_options=options).lower(weights).compile()
        for options in (None, cpu_options())
    )
    assert "partitions" not in whole.as_text()
    if available_cores() > 1:
        assert "partitions" in divided.as_text()  # if not, the option has lost its meaning
