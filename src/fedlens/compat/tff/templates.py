"""`tff.templates`: the form of a process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedlens.compat.tff.absent import refusing

__getattr__ = refusing(__name__)


class IterativeProcess:
    """`initialize()` gives a state; `next(state, ...)` gives the next state, alone or first of what it returns.

    Attributes:
      initialize: a computation, or a function, without arguments.
      next: a computation, or a function, whose first argument is the state.
    """

    def __init__(self, initialize_fn: Callable[[], Any], next_fn: Callable[..., Any]):
        """Takes the two computations."""
        self.initialize = initialize_fn
        self.next = next_fn
