"""The state that a server keeps between rounds, and how its parts are found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import federated_language as fl
from jaxtyping import Array, Int, UInt32

WEIGHTS, KEY, ROUND = "weights", "key", "round"  # the fields of a state that a process looks for


@dataclass(frozen=True)
class ServerState:
    """What the server keeps between rounds.

    Attributes:
      weights: the global model.
      optimizer_state: the state of the server's optimizer.
      round: the number of the next round, from 0.
      key: the key data of the run, from which every client's key of every round follows.
    """

    weights: Any
    optimizer_state: Any
    round: Int[Array, ""]
    key: UInt32[Array, "2"]


def field_of(state: Any, name: str) -> Any:
    """A field of a state, which may be a mapping or have attributes."""
    return state[name] if isinstance(state, Mapping) else getattr(state, name)


def field_of_type(type_: fl.Type, name: str) -> fl.Type | None:
    """The type of a field; None if there is no such field."""
    return dict(type_.items()).get(name) if isinstance(type_, fl.StructType) else None
