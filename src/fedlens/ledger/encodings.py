"""How a client's leaf is stored: as it is, or as its distance from the global model in fewer bits.

| encoding | bytes of a float32 | what comes back |
| --- | --- | --- |
| `raw` | 4 | the same bits |
| `bf16-delta` | 2 | each element within 2**-8 of its update (0.4 %; 0.17 % in norm) |
| `int8-delta` | 1 | each element within 1/254 of the largest update in that leaf of that client |

To these errors comes one rounding to the leaf's own dtype. Deltas are of floats of 16, 32 and 64 bits; other leaves are
stored raw whatever the pattern says. Values that are not finite come back as such: `bf16-delta` keeps each infinity and
NaN in its place (where the global model is finite), and `int8-delta`, which has no room for them, gives a leaf that
holds one back as NaN altogether (its scale is NaN). A difference of finite values too large for float32 is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from fedlens.errors import LedgerError
from fedlens.ledger.tensorfile import AnyArray

Encoding = Literal["raw", "bf16-delta", "int8-delta"]
Scales = Float64[np.ndarray, " clients"]

RAW, BF16_DELTA, INT8_DELTA = ENCODINGS = ("raw", "bf16-delta", "int8-delta")

_STORED = {BF16_DELTA: "bfloat16", INT8_DELTA: "int8"}
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_LARGEST_BFLOAT16 = (2 - 2**-7) * 2.0**127
_LEVELS = 127  # of int8 on either side of zero; -128 is not used, so that a delta and its negative are stored alike


class EncodingError(LedgerError):
    """Values that an encoding cannot hold, in the given row, counted from 0."""

    def __init__(self, row: int) -> None:
        super().__init__("Expected an update that float32 can hold, found a larger one. Store the leaf raw.")
        self.row = row


def rules_of(encodings: str | Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """The rules in order, pattern of leaf names and encoding.

    Args:
      encodings: pattern -> encoding, of which the first that matches a leaf is its own; one encoding for all leaves;
        or None, which is raw.

    Raises:
      LedgerError: an encoding that is none.
    """
    if encodings is None:
        return ()
    rules = {"*": encodings} if isinstance(encodings, str) else dict(encodings)
    for pattern, encoding in rules.items():
        if not isinstance(pattern, str) or encoding not in ENCODINGS:
            raise LedgerError(
                f"Expected one of the encodings {', '.join(ENCODINGS)}, found {encoding!r}, for leaves {pattern!r}."
            )
    return tuple(rules.items())


def resolve(rules: Sequence[tuple[str, str]], leaf: str, dtype: str) -> str:
    """The encoding of one leaf: that of the first rule that matches, or raw; always raw if it is not of floats.

    Example:
      >>> resolve((("dense/*", "int8-delta"), ("*", "bf16-delta")), "dense/kernel", "float32")
      'int8-delta'
    """
    for pattern, encoding in rules:
        if fnmatchcase(leaf, pattern):
            return encoding if dtype in _FLOATS else RAW
    return RAW


def applies(encoding: str, dtype: str) -> bool:
    """Whether leaves of that dtype can be stored so."""
    return encoding == RAW or (encoding in _STORED and dtype in _FLOATS)


def stored_dtype(encoding: str, dtype: str) -> str:
    """The dtype in the file, for a leaf of `dtype`."""
    return _STORED.get(encoding, dtype)


def encode(local: AnyArray, reference: AnyArray, encoding: str) -> tuple[AnyArray, Scales | None]:
    """Encodes one leaf of some clients.

    Args:
      local: the leaf, [clients, *leaf].
      reference: the same leaf of the global model, [*leaf].
      encoding: one of `ENCODINGS`.

    Returns:
      What is stored, [clients, *leaf], and for `int8-delta` each client's scale.

    Raises:
      EncodingError: finite values are too far apart for float32.
    """
    if encoding == RAW:
        return local, None
    wide = np.float64 if reference.dtype.itemsize == 8 or encoding == INT8_DELTA else np.float32
    axes = tuple(range(1, local.ndim))
    with np.errstate(all="ignore"):
        delta = np.subtract(local.astype(wide), reference.astype(wide))
        if encoding == BF16_DELTA:
            return _as_bfloat16(local, delta), None
        largest = np.abs(delta).max(axis=axes, initial=0.0)
        scales = np.where(np.isfinite(largest), largest / _LEVELS, np.nan)
        divisors = np.where(scales > 0, scales, 1.0).reshape(-1, *[1] * len(axes))
        levels = np.nan_to_num(np.rint(delta / divisors), nan=0.0, posinf=0.0, neginf=0.0)
        # A scale too small for float64 rounds up or to zero: levels beyond int8's would wrap around.
        return np.clip(levels, -_LEVELS, _LEVELS).astype(np.int8), scales


def decode(stored: AnyArray, reference: AnyArray, encoding: str, scales: Any = None) -> AnyArray:
    """Decodes one leaf of some clients, or of one.

    Args:
      stored: what is in the file, [clients, *leaf] or [*leaf].
      reference: the same leaf of the global model, [*leaf].
      encoding: one of `ENCODINGS`.
      scales: for `int8-delta` the scale of each client, [clients], or of the one.

    Returns:
      The leaf in the dtype of `reference`, shaped like `stored`.

    Example:
      >>> decode(np.array([127, -127], np.int8), np.zeros(2, np.float32), "int8-delta", 0.5)
      array([ 63.5, -63.5], dtype=float32)
    """
    if encoding == RAW:
        return stored
    with np.errstate(all="ignore"):
        if encoding == BF16_DELTA:
            wide = np.float64 if reference.dtype.itemsize == 8 else np.float32
            return (reference.astype(wide) + stored.astype(np.float32)).astype(reference.dtype)
        each = np.asarray(scales, np.float64)
        steps = stored.astype(np.float64) * each.reshape(*each.shape, *[1] * (stored.ndim - each.ndim))
        steps += reference.astype(np.float64)
        return steps.astype(reference.dtype)


def _as_bfloat16(local: AnyArray, delta: AnyArray) -> AnyArray:
    import ml_dtypes  # only ledgers with this encoding pay for the import

    narrow = delta.astype(np.float32)
    infinite = np.isinf(narrow)
    if infinite.any():
        rows = np.flatnonzero((infinite & np.isfinite(local.astype(delta.dtype))).reshape(len(local), -1).any(axis=1))
        if len(rows):
            raise EncodingError(int(rows[0]))
    # Rounding would carry the last half step below float32's end to infinity.
    return np.where(infinite, narrow, np.clip(narrow, -_LARGEST_BFLOAT16, _LARGEST_BFLOAT16)).astype(ml_dtypes.bfloat16)
