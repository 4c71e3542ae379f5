"""Gaussian noise at the server and at the client.

Cynthia Dwork, Aaron Roth: The Algorithmic Foundations of Differential Privacy, 2014, appendix A; the noise multiplier
(standard deviation over sensitivity) is what accountants turn into epsilon and delta. The guarantee is that of real
arithmetic; floating-point noise has known gaps (Ilya Mironov: On Significance of the Least Significant Bits for
Differential Privacy, CCS 2012), which nothing here closes.
"""

from __future__ import annotations

from typing import Any

import jax
from federated_language import framework

from fedlens import trees
from fedlens.compiler.mechanisms import GaussianNoise, LocalGaussian
from fedlens.privacy.clipping import clipped
from fedlens.privacy.making import float_leaves, mechanism_computation


def gaussian_noise(standard_deviation: float, sensitivity: float) -> framework.PolymorphicComputation:
    """A computation that adds normal noise to a sum at the server.

    `fed.disclosure` grants `central-dp` to its result if its value is a sum over the clients of values that each came
    out of a `clip` to at most `sensitivity`. Then the noise hides whether any one client took part, by a noise
    multiplier of `standard_deviation / sensitivity`.

    Example:
      >>> total = fed.federated_sum(fed.federated_map(fed.privacy.clip(1.0), updates))
      >>> noised = fed.federated_map(fed.privacy.gaussian_noise(1.2, sensitivity=1.0), (total, key))

    Args:
      standard_deviation: of the noise, positive and finite.
      sensitivity: how far one client's coming or going moves the value, in the L2 norm over all leaves.

    Returns:
      A computation of a value, a tensor or a struct of tensors of floating-point numbers, and a key of `jax.random`
      (`uint32[2]`); its result has the type of the value. The key is used up: it is new in every call, secret, and
      serves nothing else.

    Raises:
      ConfigError: a number is not positive and finite.
      LanguageError: where it is used, on leaves that are no floating-point numbers.
    """
    mechanism = GaussianNoise(standard_deviation, sensitivity)

    def gaussian_noise(value: Any, key: Any) -> Any:
        return noised(value, key, mechanism.standard_deviation)

    return mechanism_computation(gaussian_noise, mechanism)


def local_gaussian(standard_deviation: float, norm: float) -> framework.PolymorphicComputation:
    """A computation that clips a client's value and adds normal noise to it, before it leaves the client.

    `fed.disclosure` grants `local-dp` to its result if its key is the client's own. Any two clients' clipped values are
    at most `2 * norm` apart: the noise multiplier is `standard_deviation / (2 * norm)`.

    Example:
      >>> private = fed.federated_map(fed.privacy.local_gaussian(4.0, norm=1.0), (updates, keys))

    Args:
      standard_deviation: of the noise, positive and finite.
      norm: the L2 norm over all leaves that the value is clipped to first, see `clip`.

    Returns:
      A computation of a value and a key, as that of `gaussian_noise`. The key is one of the client's own, which the
      server does not know.

    Raises:
      ConfigError: a number is not positive and finite.
      LanguageError: where it is used, on leaves that are no floating-point numbers.
    """
    mechanism = LocalGaussian(standard_deviation, norm)

    def local_gaussian(value: Any, key: Any) -> Any:
        return noised(clipped(value, mechanism.norm), key, mechanism.standard_deviation)

    return mechanism_computation(local_gaussian, mechanism)


def noised(value: Any, key: Any, standard_deviation: float) -> Any:
    """A tree of arrays with independent normal noise added to every number."""
    leaves = float_leaves(value, "add noise to")
    keys = jax.random.split(key, len(leaves))
    noise = iter(
        leaf + standard_deviation * jax.random.normal(of_leaf, leaf.shape, leaf.dtype)
        for leaf, of_leaf in zip(leaves, keys, strict=True)
    )
    return trees.map(lambda leaf: next(noise).astype(leaf.dtype), value)
