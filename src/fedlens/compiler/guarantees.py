"""When a mechanism gives its guarantee: what it is given, and whether anyone could take its noise off."""

from __future__ import annotations

from collections.abc import Mapping, Set

from fedlens.compiler.flow import Flow
from fedlens.compiler.levels import Level
from fedlens.compiler.mechanisms import GaussianNoise, LocalGaussian


def objection_to(
    mechanism: GaussianNoise | LocalGaussian,
    value: Flow,
    key: Flow,
    spoiled: Mapping[str, str],
    client_inputs: Set[str],
) -> str | None:
    """Why a mechanism gives no differential privacy where it stands; None if it does.

    Args:
      mechanism: what it is.
      value: what it is applied to.
      key: what its noise follows from.
      spoiled: origins of keys that hide nothing, and why.
      client_inputs: the parts of the argument that the clients hold.
    """
    if key.origin in spoiled and key.inputs:
        return f"its key {spoiled[key.origin]}"
    if isinstance(mechanism, LocalGaussian):
        if not key.inputs or not key.inputs <= client_inputs:
            return "its key is not the client's own, so that the server can take the noise off"
        return None
    if not key.inputs:
        return "its key is a constant, so that anyone can take the noise off"
    if key.level is not Level.PUBLIC:
        return "its key depends on the clients"
    if value.summed is None:
        return "its value is no sum of clients' values that each come out of a clip"
    if value.summed > mechanism.sensitivity:
        return f"one client moves its value by up to {value.summed:g}, which is more than the sensitivity"
    return None


def noise_multiplier(mechanism: GaussianNoise | LocalGaussian) -> float:
    """The noise in units of how far apart two values may be that it makes alike."""
    if isinstance(mechanism, LocalGaussian):
        return mechanism.standard_deviation / (2 * mechanism.norm)
    return mechanism.standard_deviation / mechanism.sensitivity
