"""`tff.backends`: where programs say what runs their computations, which is fedlens."""

from __future__ import annotations

from types import SimpleNamespace

from federated_language import framework

from fedlens.runtime import Context
from fedlens.runtime.context import engine_of


def set_sync_local_cpp_execution_context() -> None:
    """Makes fedlens's `local` engine run the computations that this thread calls, in place of any other context."""
    framework.set_default_context(Context(engine_of("local")))


native = SimpleNamespace(set_sync_local_cpp_execution_context=set_sync_local_cpp_execution_context)
