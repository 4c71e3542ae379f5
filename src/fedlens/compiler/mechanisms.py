"""Mechanisms: the local computations whose effect on privacy is known, as values that travel with them.

A function is opaque: whatever noise it adds, nobody can tell from outside. A mechanism says what it is. The value
stands in the payload of its local computation as text, so that it is found again in any process that has the
computation's proto. `fedlens.privacy` makes the computations themselves. A payload is believed: a computation that
calls itself a mechanism and is none cannot be told from one that is.

Bounds and deviations are those of the value as one vector, all leaves together, in the L2 norm.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TypeAlias

from federated_language import framework

from fedlens.compiler.functions import function_of
from fedlens.errors import ConfigError, UnsupportedError
from fedlens.language import LocalComputation


@dataclass(frozen=True)
class Clip:
    """Takes a value, returns it no longer than `norm`: scaled down if it is, zero if it is not finite.

    Attributes:
      norm: the longest that a result is.
    """

    norm: float

    def __post_init__(self) -> None:
        _check_positive(self)

    def __str__(self) -> str:
        return f"clip to {self.norm:g}"


@dataclass(frozen=True)
class GaussianNoise:
    """Takes a value and a key, returns the value with normal noise added to every number.

    Attributes:
      standard_deviation: of the noise.
      sensitivity: how far one client's coming or going may move the value, for the noise to hide it.
    """

    standard_deviation: float
    sensitivity: float

    def __post_init__(self) -> None:
        _check_positive(self)

    def __str__(self) -> str:
        return f"gaussian noise of {self.standard_deviation:g} for a sensitivity of {self.sensitivity:g}"


@dataclass(frozen=True)
class LocalGaussian:
    """Takes a client's value and a key of its own, clips the value to `norm` and adds normal noise to every number.

    Attributes:
      standard_deviation: of the noise.
      norm: the longest that a clipped value is; two clients' values are at most twice that apart.
    """

    standard_deviation: float
    norm: float

    def __post_init__(self) -> None:
        _check_positive(self)

    def __str__(self) -> str:
        return f"local gaussian noise of {self.standard_deviation:g} after a clip to {self.norm:g}"


Mechanism: TypeAlias = Clip | GaussianNoise | LocalGaussian

_KINDS: dict[str, type[Mechanism]] = {"clip": Clip, "gaussian-noise": GaussianNoise, "local-gaussian": LocalGaussian}


def to_text(mechanism: Mechanism) -> str:
    """A mechanism as the payload of its local computation holds it.

    Example:
      >>> to_text(Clip(1.0))
      '{"kind": "clip", "norm": 1.0}'
    """
    kind = next(kind for kind, found in _KINDS.items() if isinstance(mechanism, found))
    return json.dumps({"kind": kind, **dataclasses.asdict(mechanism)})


def from_text(text: str) -> Mechanism:
    """The mechanism that `to_text` wrote.

    Raises:
      UnsupportedError: it is none that this version knows.
    """
    try:
        values = json.loads(text)
        return _KINDS[values.pop("kind")](**values)
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise UnsupportedError(
            f"Expected one of the mechanisms {', '.join(_KINDS)} with positive numbers, found {text!r}. "
            "Update fedlens here, or make the computation with the fedlens that is here."
        ) from error


def mechanism_of(block: framework.ComputationBuildingBlock) -> Mechanism | None:
    """The mechanism that a building block is; None of all others.

    Raises:
      UnsupportedError: a mechanism that this version does not know.
    """
    local = function_of(block) if isinstance(block, framework.CompiledComputation) else None
    return from_text(local.mechanism) if isinstance(local, LocalComputation) and local.mechanism else None


def _check_positive(mechanism: Mechanism) -> None:
    for name, value in dataclasses.asdict(mechanism).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"Expected a positive, finite {name.replace('_', ' ')}, found {value!r}.")
        object.__setattr__(mechanism, name, float(value))  # 1 and 1.0 are one mechanism
