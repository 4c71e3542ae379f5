"""Columns: what the examples of a data set are made of. A column is an array of numbers with one row an example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from jaxtyping import Shaped
from numpy.typing import ArrayLike, DTypeLike

from fedlens.errors import DataError

Columns: TypeAlias = dict[str, Shaped[np.ndarray, " examples *feature"]]


def check_columns(columns: Mapping[str, ArrayLike]) -> Columns:
    """Returns `columns` as arrays; what is a NumPy array of native byte order already is not copied.

    Args:
      columns: name -> array or nested lists, one row an example.

    Raises:
      DataError: there is no column; a name is no string; a column is ragged, has no rows axis, holds anything but
        numbers and booleans, or has another number of rows than the first.

    Example:
      >>> check_columns({"y": [1, 2]})
      {'y': array([1, 2])}
    """
    if not columns:
        raise DataError("Expected at least one column, found none.")
    checked: Columns = {}
    for name, values in columns.items():
        if not isinstance(name, str) or not name:
            raise DataError(f"Expected column names to be non-empty strings, found {name!r}. Rename the column.")
        column = _as_array(name, values)
        if column.ndim == 0:
            raise DataError(f"Expected one row an example in column {name!r}, found the single value {column!r}.")
        checked[name] = column
    first, *rest = checked
    for name in rest:
        if len(checked[name]) != len(checked[first]):
            raise DataError(
                f"Expected columns of equal length, found {len(checked[first])} rows in column {first!r} "
                f"and {len(checked[name])} in column {name!r}."
            )
    return checked


def rows_of(columns: Columns) -> int:
    """How many rows the columns have."""
    return len(next(iter(columns.values())))


def check_same_type(expected: Columns, found: Columns, client_id: str) -> None:
    """Checks that two clients' columns can be joined.

    Raises:
      DataError: names, shapes or dtypes of the columns differ; nothing is cast, as that may lose digits.
    """
    if set(found) != set(expected):
        raise DataError(f"Expected the columns {sorted(expected)}, found {sorted(found)}, in client {client_id!r}.")
    for name, column in expected.items():
        other = found[name]
        if (other.shape[1:], other.dtype) != (column.shape[1:], column.dtype):
            raise DataError(
                f"Expected rows of {column.dtype}{list(column.shape[1:])} in column {name!r} as in the first client, "
                f"found {other.dtype}{list(other.shape[1:])}, in client {client_id!r}."
            )


def is_numeric(dtype: DTypeLike) -> bool:
    """Whether `dtype` is one that arrays of examples may have: booleans, numbers, and JAX's bfloat16 and relatives."""
    found = np.dtype(dtype)
    return found.kind in "biufc" or found.isbuiltin == 2  # 2: registered by a library, as ml_dtypes does for bfloat16


def _as_array(name: str, values: ArrayLike) -> Shaped[np.ndarray, " rows *feature"]:
    try:
        column = np.asarray(values)
    except ValueError as error:
        raise DataError(f"Expected rows of one shape in column {name!r}, found ragged rows: {error}") from error
    if not is_numeric(column.dtype):
        raise DataError(
            f"Expected numbers in column {name!r}, found dtype {column.dtype}. "
            "Encode it as integers, or leave the column out."
        )
    return column.astype(column.dtype.newbyteorder("="), copy=False)  # JAX refuses arrays of foreign byte order
