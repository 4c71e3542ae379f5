"""The plans of computations, each made once."""

from __future__ import annotations

import threading
import weakref

from federated_language import framework

from fedlens.compiler import Plan, plan

_plans: dict[int, Plan] = {}
_lock = threading.Lock()


def plan_of(computation: framework.ConcreteComputation) -> Plan:
    """The plan of a computation, made once for each object (a computation's own hash serialises it)."""
    key = id(computation)
    with _lock:  # two plans of one computation would be compiled twice
        if key not in _plans:
            _plans[key] = plan(computation)
            weakref.finalize(computation, _plans.pop, key, None)
        return _plans[key]
