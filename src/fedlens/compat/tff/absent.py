"""What a program gets that uses a name of TFF which has no counterpart here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def refusing(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for one of the modules here, whose error says where to read on.

    Args:
      module: the module's `__name__`.
    """
    path = module.removeprefix("fedlens.compat.")

    def refuse(name: str) -> Any:
        raise AttributeError(
            f"Expected a name of TFF that fedlens has a counterpart for, found {path}.{name}. "
            "The page docs/tff.md says for every name of TFF what to use here.",
            name=name,
        )

    return refuse
