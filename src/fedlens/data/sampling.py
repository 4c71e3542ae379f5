"""Seeded draws that depend on names alone: a round's cohort, a client's split.

Every draw has a generator of its own, keyed by the BLAKE2b digest of what it is for (Python's `hash` is salted, and one
generator shared by all clients would make each of them depend on those before it). Philox takes the digest as its key
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so different names give independent streams.
"""

from __future__ import annotations

import hashlib
import json
import operator

import numpy as np
from jaxtyping import Int

from fedlens.errors import DataError


def generator(purpose: str, seed: int, *names: str | int) -> np.random.Generator:
    """The generator of one draw; equal arguments give equal streams, in every process.

    Args:
      purpose: what is drawn, so that two kinds of draws with the same seed are independent.
      seed: any integer.
      names: whom the draw is for, such as a round or a client id.

    Raises:
      DataError: `seed` is not an integer.

    Example:
      >>> int(generator("split", 0, "alice").integers(1000)) == int(generator("split", 0, "alice").integers(1000))
      True
    """
    words = json.dumps([purpose, integer("seed", seed), *names])  # JSON: ("ab", "c") and ("a", "bc") stay apart
    digest = hashlib.blake2b(words.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def draw(generator: np.random.Generator, count: int, population: int, what: str) -> Int[np.ndarray, " count"]:
    """Draws `count` different positions out of `population`, uniformly, in the order drawn.

    Args:
      generator: the source of randomness.
      count: how many, from 1 to `population`.
      population: how many there are.
      what: the argument that `count` came from, for the error.

    Raises:
      DataError: `count` is not in that range.
    """
    if not 1 <= integer(what, count) <= population:
        raise DataError(f"Expected {what} from 1 to {population}, the clients of the data set, found {count}.")
    return generator.choice(population, size=count, replace=False)


def integer(what: str, value: object) -> int:
    """Returns `value` as an integer, NumPy's integers included.

    Raises:
      DataError: it is none; the message calls it `what`.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise DataError(f"Expected {what} to be an integer, found {value!r} of type {type(value).__name__}.") from None
