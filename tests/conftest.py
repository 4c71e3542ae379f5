"""What all tests share: two CPU devices whatever the machine has, deterministic properties, and the engines."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # read when JAX starts, which no test module has done yet

hypothesis.settings.register_profile("fedlens", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fedlens")


def _engines():
    import jax

    from fedlens.runtime import Debug, Local

    return {
        "debug": Debug,
        "local, 1 device": lambda: Local(jax.local_devices()[:1]),
        "local, 2 devices": lambda: Local(jax.local_devices()[:2]),
        "local, 16 side by side": lambda: Local(jax.local_devices()[:2], clients_per_step=16),
    }


@pytest.fixture(scope="session", params=["debug", "local, 1 device", "local, 2 devices", "local, 16 side by side"])
def engine(request: pytest.FixtureRequest):
    """Every engine in turn; one for the whole session, as it holds the compiled programs."""
    return _engines()[request.param]()


@pytest.fixture(scope="session")
def two_devices():
    """The local engine on two devices."""
    return _engines()["local, 2 devices"]()


@pytest.fixture(autouse=True)
def _jax_stays_in_its_32_bit_mode() -> Iterator[None]:
    yield
    import sys

    if "jax" in sys.modules:
        assert not sys.modules["jax"].config.jax_enable_x64
