"""Types in a few words, for errors and plans: the type of a model with hundreds of leaves fills a screen."""

from __future__ import annotations

import federated_language as fl

from fedlens.errors import StructureError
from fedlens.language.types import num_bytes, tensor_types

_SHORT = 56  # characters, of a type that is written out


def summarize(type_: fl.Type) -> str:
    """A type as it is written if that is short, else how many leaves and bytes a value of it has.

    Example:
      >>> summarize(fl.StructType([("w", fl.TensorType(np.float32, (2, 3))), ("b", np.float32)]))
      '<w=float32[2,3],b=float32>'
      >>> summarize(fl.StructType([(f"layer_{i}", fl.TensorType(np.float32, (200, 200))) for i in range(3)]))
      '3 leaves, 480.0 kB'

    Args:
      type_: any type; a federated one counts as its member.
    """
    if isinstance(type_, fl.FederatedType):
        return summarize(type_.member)
    if len(str(type_)) <= _SHORT:
        return str(type_)
    if isinstance(type_, fl.SequenceType):
        return f"batches of {summarize(type_.element)}"
    try:
        count = len(tensor_types(type_))
    except StructureError:  # functions and placements have no leaves
        return f"{str(type_)[: _SHORT - 3]}..."
    size = size_of(type_)
    return f"{count:,} leaves" + ("" if size is None else f", {_bytes(size)}")


def size_of(type_: fl.Type) -> int | None:
    """The bytes of a value of a type; None if a part's size is unknown: sequences, open dimensions, strings."""
    if isinstance(type_, fl.FederatedType):
        return size_of(type_.member)
    if isinstance(type_, fl.StructType):
        sizes = [size_of(field) for _, field in type_.items()]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None
    if not isinstance(type_, fl.TensorType) or type_.dtype.kind in "USO":
        return None
    return None if type_.shape is None or None in type_.shape else num_bytes(type_)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
