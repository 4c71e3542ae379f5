"""Checksums of what a ledger stores, one for each client and leaf: `zlib.crc32` of the stored bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Shaped, UInt8, UInt32

from fedlens.ledger.tensorfile import AnyArray, as_bytes

try:  # the same numbers four times as fast; where no such wheel is, zlib's own
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

Checksums = UInt32[np.ndarray, " clients"]

_PIECE = 1 << 18  # bytes; the next who reads a piece finds it in the cache


def of_array(array: AnyArray) -> int:
    """The checksum of an array as it is stored.

    Example:
      >>> of_array(np.zeros(2, np.float32))
      1696784233
    """
    return int(crc32(as_bytes(array)))


def of_rows(local: Shaped[np.ndarray, "clients *leaf"]) -> Checksums:
    """The checksum of each client's leaf; they are as they are stored."""
    checksums = np.zeros(len(local), np.uint32)
    if local.size:
        for _ in passed_on(as_bytes(local).reshape(len(local), -1), checksums):
            pass
    return checksums


def continued(rows: UInt8[np.ndarray, "clients bytes"], checksums: Checksums) -> None:
    """Takes some more bytes of each client's leaf into its checksum, which is 0 before the first.

    Example:
      >>> checksums = np.zeros(1, np.uint32)
      >>> content = np.zeros((1, 8), np.uint8)
      >>> continued(content[:, :3], checksums)
      >>> continued(content[:, 3:], checksums)
      >>> checksums
      array([1696784233], dtype=uint32)
    """
    checksums[:] = list(map(crc32, rows, checksums.tolist()))


def passed_on(rows: UInt8[np.ndarray, "clients bytes"], checksums: Checksums) -> Iterator[UInt8[np.ndarray, "bytes"]]:
    """Gives the bytes of some clients' leaf piece by piece, and takes their checksums on the way.

    Args:
      rows: each client's leaf as it is stored, one after the other in memory.
      checksums: gets the checksum of each client's leaf; complete at the end.
    """
    clients, size = rows.shape
    if size > _PIECE:
        for client, row in enumerate(rows):
            checksum = 0
            for start in range(0, size, _PIECE):
                piece = row[start : start + _PIECE]
                checksum = crc32(piece, checksum)
                yield piece
            checksums[client] = checksum
        return
    step = _PIECE // max(1, size)
    for first in range(0, clients, step):
        some = slice(first, first + step)
        checksums[some] = [crc32(row) for row in rows[some]]
        yield rows[some].reshape(-1)
