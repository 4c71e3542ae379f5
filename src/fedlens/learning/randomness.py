"""PRNG keys as values: one for each client and round, which depends on the run, the round and the client's id alone."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from functools import lru_cache

import jax
import numpy as np
from jaxtyping import Int, PRNGKeyArray, UInt32

from fedlens.errors import ConfigError
from fedlens.runtime.columns import bucket

IMPLEMENTATION = "threefry2x32"  # said everywhere: the default of JAX is the user's to change, results are not

KeyData = UInt32[np.ndarray, "2"]  # what a key is in the language, which has no type for keys


def run_key(seed: int) -> KeyData:
    """The key of a run; every seed has another one.

    Raises:
      ConfigError: `seed` is not an integer of 64 bits.
    """
    try:
        number = np.int64(operator.index(seed))
    except (TypeError, OverflowError):
        raise ConfigError(f"Expected a seed from -2**63 to 2**63 - 1, found {seed!r}.") from None
    with jax.enable_x64(True):  # 32 bits would make one key of the seeds 0 and 2**32
        return np.asarray(jax.random.key_data(jax.random.key(number, impl=IMPLEMENTATION)))


def as_key(data: UInt32[jax.Array, "2"]) -> PRNGKeyArray:
    """The key that key data stand for."""
    return jax.random.wrap_key_data(data, impl=IMPLEMENTATION)


def client_keys(key: KeyData, round_number: int, ids: Sequence[str]) -> UInt32[np.ndarray, "clients 2"]:
    """The clients' keys of one round: `fold_in` of the run's key, the round, and both halves of a hash of the id.

    The hash is a 64-bit BLAKE2b, as Python's own `hash` of a string differs from process to process.
    """
    halves = _id_halves(tuple(ids))
    capacity = bucket(len(ids))  # so that cohorts of new sizes rarely compile anew
    padded = np.zeros((capacity, 2), np.uint32)
    padded[: len(ids)] = halves
    return np.asarray(_fold(np.asarray(key, np.uint32), np.uint32(round_number), padded))[: len(ids)]


@lru_cache(maxsize=4)  # a cohort of everybody comes again and again
def _id_halves(ids: tuple[str, ...]) -> UInt32[np.ndarray, "clients 2"]:
    """The lower and the upper half of each id's hash."""
    hashes = np.fromiter(map(_id_hash, ids), np.uint64, len(ids))
    return np.stack([hashes & np.uint64(0xFFFFFFFF), hashes >> np.uint64(32)], axis=1).astype(np.uint32)


@lru_cache(maxsize=1 << 16)  # 13 MB; hashing takes a microsecond, remembering 200 bytes
def _id_hash(client_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(client_id.encode(), digest_size=8).digest(), "little")


@jax.jit
def _fold(
    key: UInt32[jax.Array, "2"], round_number: Int[jax.Array, ""], halves: UInt32[jax.Array, "clients 2"]
) -> UInt32[jax.Array, "clients 2"]:
    of_round = jax.random.fold_in(as_key(key), round_number)

    def of_client(two: UInt32[jax.Array, "2"]) -> UInt32[jax.Array, "2"]:
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(of_round, two[0]), two[1]))

    return jax.vmap(of_client)(halves)
