"""What is measured of each client's leaf: the norm of its update, and its part in the mean.

A leaf is walked over tile by tile, some columns of all clients of a delivery at a time, so that a tile is read from
memory once: norms, checksums, the clients' weighted sum, and each client's inner product with that sum are taken of it
while it is in the cache. Where the delivery is all of the round, that sum points where the mean update does, and the
products are all that the cosine needs; otherwise `projections` goes over the clients once more when the mean is known.

Updates of float32 leaves are taken in float32, in which a difference of near numbers loses nothing, and summed over
4,096 elements at most before float64 takes over: relative errors stay below 1e-6. A tile whose squares could be too
small or too large for that is done again in float64, as are all leaves of other dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped

from fedlens.ledger.checksums import Checksums, continued
from fedlens.ledger.tensorfile import AnyArray, as_bytes
from fedlens.memory import reused

Clients = Shaped[np.ndarray, "clients *leaf"]  # one leaf of some clients
PerRow = Float64[np.ndarray, " clients"]  # a number for each client

TOGETHER = 1024  # clients of a tile at most: more, and its columns get too few to be read in a row

_COLUMNS = 4096  # that are summed in float32
_ROWS = 64  # that are summed in float32
_TILE = 1 << 20  # numbers: less, and reading so few of a row in a row costs more than a nearer cache saves
_NARROWEST = 128  # columns of a tile
_SMALLEST, _LARGEST = 1e-25, 1e35  # squares of a tile's rows that float32 holds to full precision


def width(reference: AnyArray) -> int:
    """How many real numbers the updates of a leaf have: a complex number counts as two."""
    return reference.size * (2 if reference.dtype.kind == "c" else 1)


class Total:
    """The weighted sum of a leaf's updates, in the dtype in which it is exact enough: float32 until float64 is added.

    Attributes:
      sum: [width(reference)].
    """

    def __init__(self, reference: AnyArray) -> None:
        """Starts at zero."""
        dtype = np.dtype(np.float32 if reference.dtype == np.float32 else np.float64)
        self.sum = reused((width(reference),), dtype)  # fresh memory costs a page fault every 4 KiB
        self.sum[:] = 0

    def add(self, columns: slice, direction: AnyArray) -> None:
        """Adds to some columns."""
        if direction.dtype.itemsize > self.sum.dtype.itemsize:
            self.sum = self.sum.astype(direction.dtype)
        self.sum[columns] += direction

    def squared_norm(self) -> float:
        """The squared L2 norm of the sum."""
        with np.errstate(all="ignore"):
            squared = _inner(self.sum[None], self.sum)
            if self.sum.dtype == np.float32 and not _are_sure(self.sum[None], squared):
                wide = self.sum.astype(np.float64)
                squared = _inner(wide[None], wide)
        return float(squared[0])


def measure(
    parts: Sequence[Clients],
    reference: AnyArray,
    shares: PerRow,
    squares: PerRow,
    total: Total,
    products: PerRow | None = None,
    checksums: Checksums | None = None,
) -> None:
    """Adds what is measured of one leaf of some clients to the arrays given, in one pass.

    Args:
      parts: the leaf, stacks of [clients, *leaf]; together at most `TOGETHER` clients.
      reference: the same leaf of the global model, [*leaf].
      shares: the weight of each client in the sum, from 0 to 1, so that float32 has no less room; [clients], those of
        all parts one after the other.
      squares: float64, [clients]; gets the squared norm of each client's update, its leaf minus the global one.
        Integers are subtracted exactly before they are rounded; a complex number counts by its modulus.
      total: gets the weighted sum of the updates.
      products: float64, [clients]; gets the inner product of each client's update with that sum. Means nothing if a
        client is not finite.
      checksums: uint32, [clients], zeros; gets the checksum of each client's leaf as it is.

    Example:
      >>> reference, squares, products = np.zeros(2, np.float32), np.zeros(2), np.zeros(2)
      >>> total = Total(reference)
      >>> local = np.array([[3.0, 4.0], [0.0, 1.0]], np.float32)
      >>> measure([local], reference, np.array([0.5, 1.0]), squares, total, products)
      >>> squares, total.sum, products
      (array([25.,  1.]), array([1.5, 3. ], dtype=float32), array([16.5,  3. ]))
    """
    stored: list[tuple[Any, Checksums]] = []
    if checksums is not None:
        contents = [as_bytes(part).reshape(len(part), reference.nbytes) for part in parts]
        stored += zip(contents, np.split(checksums, np.cumsum([len(part) for part in parts])[:-1]), strict=True)
    of_column = reference.nbytes // max(1, width(reference))  # bytes
    has_weight, narrow_shares = bool(shares.any()), shares.astype(np.float32)
    # Overflow and infinities belong in the record as they are; they are no reason for a warning from the writer.
    with np.errstate(all="ignore"):
        for columns, update, again in _updates(parts, reference):
            for content, of_clients in stored:  # now, while the tile is in the cache
                continued(content[:, of_column * columns.start : of_column * columns.stop], of_clients)
            lengths = _inner(update, update)
            if update.dtype == np.float32 and not _are_sure(update, lengths):
                update = again()
                lengths = _inner(update, update)
            squares += lengths
            if has_weight:
                direction = _weighted_sum(narrow_shares if update.dtype == np.float32 else shares, update)
                total.add(columns, direction)
                if products is not None:
                    if update.dtype == np.float32 and not _are_sure(
                        direction[None], _inner(direction[None], direction)
                    ):
                        update = again()
                    products += _inner(update, direction.astype(update.dtype, copy=False))


def projections(local: Clients, reference: AnyArray, direction: AnyArray) -> PerRow:
    """The inner product of each client's update with one vector, in float64; of complex numbers the real part.

    Args:
      local: the leaf of some clients, [clients, *leaf].
      reference: the same leaf of the global model, [*leaf].
      direction: float64, [width(reference)], finite.
    """
    products = np.zeros(len(local))
    largest = float(np.abs(direction).max(initial=0.0))
    if largest == 0:
        return products
    narrow = (direction / largest).astype(np.float32)
    with np.errstate(all="ignore"):
        for first in range(0, len(local), TOGETHER):
            rows = slice(first, first + TOGETHER)
            for columns, update, again in _updates([local[rows]], reference):
                if update.dtype == np.float32:
                    of_tile = _inner(update, narrow[columns])
                    if np.isfinite(of_tile).all():
                        products[rows] += of_tile
                        continue
                products[rows] += _inner(again(), direction[columns] / largest)
        return products * largest


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


def _updates(
    parts: Sequence[Clients], reference: AnyArray
) -> Iterator[tuple[slice, Shaped[np.ndarray, "rows columns"], Callable[[], Shaped[np.ndarray, "rows columns"]]]]:
    """The updates of all parts tile by tile: which of `width` columns, the updates, and what gives them in float64.

    A tile of float32 is overwritten by the next.
    """
    flat = reference.reshape(-1)
    stacks = [part.reshape(len(part), reference.size) for part in parts]
    ends = np.cumsum([len(stack) for stack in stacks]).tolist()
    clients = ends[-1] if ends else 0
    if not clients or not reference.size:
        return
    wide = _TILE // clients
    wide = wide // _COLUMNS * _COLUMNS if wide >= _COLUMNS else max(_NARROWEST, 1 << wide.bit_length() - 1)
    wide = min(wide, reference.size)
    buffer = None
    if reference.dtype == np.float32:
        buffer = reused((_TILE,), reference.dtype)[: clients * wide].reshape(clients, wide)
    double = reference.dtype.kind == "c"
    for start in range(0, reference.size, wide):
        columns = slice(start, min(start + wide, reference.size))

        def in_float64(columns: slice = columns) -> AnyArray:
            return np.concatenate([_difference(stack[:, columns], flat[columns]) for stack in stacks])

        if buffer is None:
            update = in_float64()
        else:
            update = buffer[:, : columns.stop - start]
            for stack, end in zip(stacks, ends, strict=True):
                np.subtract(stack[:, columns], flat[columns], out=update[end - len(stack) : end])
        yield slice(2 * columns.start, 2 * columns.stop) if double else columns, update, in_float64


def _are_sure(rows: AnyArray, squares: Any) -> bool:
    """Whether float32 holds the squared norm of each row to full precision; one of zeros it does."""
    if squares.min() > _SMALLEST and squares.max() < _LARGEST:
        return True
    unsure = ~((squares > _SMALLEST) & (squares < _LARGEST))
    return not rows[unsure].any()


def _weighted_sum(shares: AnyArray, updates: AnyArray) -> AnyArray:
    """The sum of rows times shares: in their own dtype over 64 rows, in float64 over more."""
    total = np.einsum("i,ij->j", shares[:_ROWS], updates[:_ROWS])
    for first in range(_ROWS, len(updates), _ROWS):
        rows = slice(first, first + _ROWS)
        total = total.astype(np.float64, copy=False)
        total += np.einsum("i,ij->j", shares[rows], updates[rows])
    return total


def _inner(updates: AnyArray, others: AnyArray) -> PerRow:
    """Inner products of rows: in their own dtype over 4,096 columns, in float64 over more."""
    if updates.shape[1] <= _COLUMNS:
        return np.asarray(np.vecdot(updates, others), np.float64)
    whole = updates.shape[1] // _COLUMNS * _COLUMNS
    pieces = (-1, whole // _COLUMNS, _COLUMNS)
    of_pieces = np.vecdot(updates[:, :whole].reshape(pieces), others[..., :whole].reshape(pieces))
    return of_pieces.sum(axis=1, dtype=np.float64) + np.vecdot(updates[:, whole:], others[..., whole:])


def _difference(local: AnyArray, reference: AnyArray) -> AnyArray:
    """The difference as float64, complex numbers as pairs of them."""
    kind = local.dtype.kind
    if kind in "iub":
        wide: Any = np.uint64 if kind == "u" else np.int64
        a, b = local.astype(wide), reference.astype(wide)
        # The wrapped difference of larger and smaller, read as unsigned, is exact; float64 would round 2**60 + 1 first.
        distance = np.subtract(np.maximum(a, b), np.minimum(a, b)).view(np.uint64).astype(np.float64)
        return np.where(a < b, -distance, distance)
    if kind == "c":
        return (local.astype(np.complex128) - reference).view(np.float64)
    result = local.astype(np.float64)
    result -= reference.astype(np.float64)
    return result
