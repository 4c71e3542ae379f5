"""The package: importing it is cheap, and every public name is there."""

from __future__ import annotations

import subprocess
import sys

import federated_language as fl
import pytest

import fedlens as fed


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def test_importing_the_package_loads_neither_jax_nor_the_language():
    print_loaded = "print(sorted({'jax', 'jaxlib', 'federated_language', 'numpy'} & set(sys.modules)))"
    assert python(f"import sys, fedlens; fedlens.LedgerError, fedlens.__version__; {print_loaded}").strip() == "[]"


def test_reading_a_ledger_needs_no_jax():
    assert python("import sys, fedlens; fedlens.Ledger; print('jax' in sys.modules)").strip() == "False"


def test_the_first_computation_needs_no_set_up():
    code = (
        "import fedlens as fed, numpy as np\n"
        "@fed.federated_computation(fed.FederatedType(np.int32, fed.CLIENTS))\n"
        "def total(values):\n"
        "    return fed.federated_sum(values)\n"
        "print(int(total([1, 2, 3])))"
    )
    assert python(code).strip() == "6"


@pytest.mark.parametrize("name", [name for name in dir(fl) if not name.startswith("_")])
def test_every_public_name_of_the_language_is_available(name):
    assert hasattr(fed, name)
    if name not in {"federated_map", "federated_zip", "compiler"}:  # what fedlens widens, and its own compiler
        assert getattr(fed, name) is getattr(fl, name)


@pytest.mark.parametrize("name", dir(fed))
def test_every_public_name_resolves(name):
    assert getattr(fed, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="fedlens"):
        fed.federated_mode  # noqa: B018
    assert not hasattr(fed, "_computation")
