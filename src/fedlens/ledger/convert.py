"""Local models as other libraries have them: NumPy arrays by leaf, PyTorch tensors, an xarray data set."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from fedlens.errors import LedgerError
from fedlens.ledger import format
from fedlens.ledger.format import NotInLedgerError
from fedlens.ledger.stored import LedgerRound
from fedlens.ledger.tensorfile import AnyArray

# dtype -> NumPy's of the same size and PyTorch's name: NumPy's has no view of the former that PyTorch takes.
_BITS = {
    "bfloat16": (np.uint8, "bfloat16"),
    "float8_e4m3fn": (np.uint8, "float8_e4m3fn"),
    "float8_e5m2": (np.uint8, "float8_e5m2"),
}


def to_numpy(stored: LedgerRound, client: str | None, leaves: str | Sequence[str] | None) -> dict[str, AnyArray]:
    """One client's leaves, or all kept clients' stacked; see `Ledger.to_numpy`.

    Raises:
      NotInLedgerError: there is no such client or leaf, or its weights were not kept.
      LedgerError: the stored bytes are damaged.
    """
    names = None if leaves is None else _matching([leaf.name for leaf in stored.run.leaves], leaves, stored)
    if client is None:
        chosen = [leaf.name for leaf in stored.run.kept_leaves] if names is None else names
        return {name: stored.leaf(name, stored.kept_ids) for name in chosen}
    return stored.local_leaves(client, names)


def to_torch(stored: LedgerRound, client: str | None, leaves: str | Sequence[str] | None) -> dict[str, Any]:
    """Like `to_numpy`, as PyTorch tensors.

    Raises:
      NotInLedgerError: see `to_numpy`.
      LedgerError: the stored bytes are damaged, PyTorch is not installed, or has no such dtype.
    """
    try:
        import torch  # optional, and seconds to import
    except ImportError:
        raise LedgerError(
            "Expected the package torch, which makes tensors, found none. Run `pip install 'fedlens[torch]'`."
        ) from None
    tensors = {}
    for name, array in to_numpy(stored, client, leaves).items():
        bits, dtype = _BITS.get(array.dtype.name, (None, ""))
        try:
            if bits is None:
                tensors[name] = torch.from_numpy(array)
            else:
                flat = torch.from_numpy(array.reshape(-1).view(bits)).view(getattr(torch, dtype))
                tensors[name] = flat.reshape(array.shape)
        except (TypeError, AttributeError) as error:
            raise LedgerError(
                f"Expected a dtype that this PyTorch has, found {array.dtype}, in leaf {name!r}. Use to_numpy."
            ) from error
    return tensors


def _matching(names: Sequence[str], patterns: str | Sequence[str], stored: LedgerRound) -> list[str]:
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # A name itself is no pattern: `a[0]` means that leaf and not `a0`.
        found = [name for name in names if name == pattern] or [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            hint = format.nearest(pattern, names)
            raise NotInLedgerError(f"Expected a leaf or a pattern of some, found {pattern!r}. {hint}")
        chosen |= set(found)
    return [name for name in names if name in chosen]
