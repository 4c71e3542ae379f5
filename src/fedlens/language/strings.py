"""Strings as values: `str` and `bytes`, alone or in arrays. They stay on the host, where NumPy's objects hold them.

The language has one dtype for both, and so has fedlens; a value stays what it was. Arrays become arrays of objects:
NumPy's own arrays of `str` or `bytes` cut off trailing null characters, and two of them differ in dtype when their
longest strings do. A literal of the language (`fed.federated_value("abc", fed.SERVER)`) is bytes once it is used: the
language stores it so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Shaped


def is_string_array(value: object) -> bool:
    """Whether a NumPy array or scalar is of strings: of `str`, of `bytes`, or of objects that are all either."""
    if not isinstance(value, np.ndarray | np.generic):
        return False
    if value.dtype.kind == "O":
        return all(isinstance(item, str | bytes) for item in np.asarray(value).flat)
    return value.dtype.kind in "US"


def without_numpy_dtype(value: Any) -> str | bytes | Shaped[np.ndarray, "..."]:
    """A string as Python's own, an array of strings as an array of objects that are.

    Example:
      >>> without_numpy_dtype(np.array(["a", "bc"]))
      array(['a', 'bc'], dtype=object)
      >>> without_numpy_dtype(np.str_("abc"))
      'abc'

    Args:
      value: a `str` or `bytes`, or an array for which `is_string_array` holds.
    """
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        return bytes(value)
    objects = np.array(value, np.object_)
    return objects if objects.ndim else without_numpy_dtype(objects.item())


def literal(value: str | bytes | Shaped[np.ndarray, "..."]) -> str | bytes | Shaped[np.ndarray, "..."]:
    """The value of a literal of strings as the language holds it: bytes, as in a literal that was read from a proto."""
    if isinstance(value, str | bytes):
        return value.encode() if isinstance(value, str) else bytes(value)
    items = [literal(item) for item in np.asarray(value, np.object_).flat]
    filled = np.empty(len(items), np.object_)
    filled[:] = items
    return filled.reshape(np.shape(value))
