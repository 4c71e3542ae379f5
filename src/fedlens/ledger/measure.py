"""What is recorded about each client's leaf: the norm of its update, and a checksum of its stored bytes.

Both are taken while the bytes pass on their way to the disk, tile by tile, so that a tile is read from memory once. A
client's numbers depend on its own leaf and the global one only, never on which clients are stored beside it.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped, UInt32

from fedlens.ledger.tensorfile import AnyArray

Clients = Shaped[np.ndarray, "clients *leaf"]  # one leaf of some clients
Squares = Float64[np.ndarray, "clients"]  # squared L2 norms
Checksums = UInt32[np.ndarray, "clients"]  # zlib.crc32

_TILE = 1 << 15  # scalars: as float64 256 KiB, which the L2 cache holds together with their sources


def squared_norms(local: Clients, reference: AnyArray) -> Squares:
    """The squared L2 norm of each client's leaf minus the global one, in float64.

    Integers are subtracted exactly before they are rounded to float64; a complex number counts by its modulus.

    Args:
      local: the leaf of some clients, [clients, *leaf].
      reference: the same leaf of the global model, [*leaf].

    Example:
      >>> squared_norms(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32), np.zeros(2, np.float32))
      array([25.,  0.])
    """
    size = reference.size
    rows_of = local.reshape(len(local), size)
    flat = reference.reshape(size)
    squares = np.zeros(len(local))
    step = max(1, _TILE // max(1, size))
    # Overflow and infinities belong in the record as they are; they are no reason for a warning from the writer.
    with np.errstate(all="ignore"):
        for column in range(0, size, _TILE):
            columns = slice(column, column + _TILE)
            for row in range(0, len(local), step):
                rows = slice(row, row + step)
                distance = _distance(rows_of[rows, columns], flat[columns])
                np.multiply(distance, distance, out=distance)
                squares[rows] += distance.sum(axis=1)
    return squares


def checksums(local: Clients) -> Checksums:
    """`zlib.crc32` of each client's leaf as it is stored; `local` is [clients, *leaf], row-major and little-endian."""
    if local.size == 0:
        return np.zeros(len(local), np.uint32)
    rows = local.reshape(len(local), -1).view(np.uint8)
    return np.fromiter((zlib.crc32(row) for row in rows), np.uint32, len(rows))


def difference(local: AnyArray, reference: AnyArray) -> AnyArray:
    """`local - reference` for a reader, in a dtype that loses nothing it need not.

    Floats of 16 or 8 bits give float32, booleans and unsigned integers the next wider signed integer (uint64 gives
    int64, modulo 2**64); every other dtype is kept.
    """
    wider: Any = {
        "bool": np.int8,
        "uint8": np.int16,
        "uint16": np.int32,
        "uint32": np.int64,
        "uint64": np.int64,
        "float16": np.float32,
        "bfloat16": np.float32,
        "float8_e4m3fn": np.float32,
        "float8_e5m2": np.float32,
    }.get(local.dtype.name, local.dtype)
    with np.errstate(all="ignore"):
        return np.asarray(np.subtract(local.astype(wider), reference.astype(wider)))


def _distance(local: AnyArray, reference: AnyArray) -> AnyArray:
    kind = local.dtype.kind
    if kind in "iub":
        wide: Any = np.uint64 if kind == "u" else np.int64
        a, b = local.astype(wide), reference.astype(wide)
        # The wrapped difference of larger and smaller, read as unsigned, is exact; float64 would round 2**60 + 1 first.
        return np.subtract(np.maximum(a, b), np.minimum(a, b)).view(np.uint64).astype(np.float64)
    if kind == "c":
        return np.abs(local.astype(np.complex128) - reference)
    result = local.astype(np.float64)
    result -= reference.astype(np.float64)
    return result
