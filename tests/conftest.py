"""What all tests share: two CPU devices whatever the machine has, deterministic properties, and the engines."""

from __future__ import annotations

import contextlib
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


@pytest.fixture(scope="session")
def tf():
    """TensorFlow, for tests marked `tensorflow`; its test modules are collected without it."""
    from fedlens.language.tensorflow_library import tensorflow

    return tensorflow()


@pytest.fixture(scope="session")
def compilations():
    """`with compilations() as found:` lists the seconds of everything that XLA compiles inside."""
    import jax

    @contextlib.contextmanager
    def counting() -> Iterator[list[float]]:
        found: list[float] = []

        def listen(event: str, duration: float, **_: object) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                found.append(duration)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield found
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return counting


@pytest.fixture(autouse=True)
def _jax_stays_in_its_32_bit_mode() -> Iterator[None]:
    yield
    import sys

    if "jax" in sys.modules:
        assert not sys.modules["jax"].config.jax_enable_x64
