"""Tables as columns: reads `pandas.DataFrame` and `pyarrow.Table` without importing either.

A cell is a number, or a list of numbers of the same shape in every row, nested to any depth. Nothing is guessed: a
null, a list of another length or a string is an error that names the column and the row.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from fedlens.data.columns import Columns, is_numeric
from fedlens.errors import DataError


def read(table: Any, client: str, columns: Sequence[str] | None) -> tuple[Columns, Shaped[np.ndarray, " rows"]]:
    """Reads the columns of a table, and its column of client ids.

    Args:
      table: a `pandas.DataFrame` or a `pyarrow.Table`.
      client: the column of client ids.
      columns: the columns to read; None reads all but `client`.

    Returns:
      `(columns, clients)`, in the order of the table's rows.

    Raises:
      DataError: `table` is neither, a column is missing or occurs twice, or a column cannot become an array.
    """
    if hasattr(table, "iloc") and hasattr(table, "columns"):
        names, column_of = list(table.columns), _read_pandas
    elif hasattr(table, "column_names") and hasattr(table, "itercolumns"):
        names, column_of = list(table.column_names), _read_arrow
    else:
        raise DataError(f"Expected a pandas.DataFrame or a pyarrow.Table, found {type(table).__name__}.")
    if columns is None:
        chosen = [name for name in names if name != client]
    else:
        chosen = [columns] if isinstance(columns, str) else list(columns)
    for name in [client, *chosen]:
        _check_name(name, names)
    return {name: _numbers(column_of(table, name), name) for name in chosen}, column_of(table, client)


def _check_name(name: object, names: list[Any]) -> None:
    if not isinstance(name, str):
        raise DataError(f"Expected column names to be strings, found {name!r}. Rename the column.")
    if name not in names:
        close = difflib.get_close_matches(name, map(str, names)) or map(str, names)
        raise DataError(f"Expected a column {name!r} in the table, found none. Nearest names: {', '.join(close)}.")
    if names.count(name) > 1:
        raise DataError(f"Expected each column name once, found {name!r} {names.count(name)} times.")


def _read_pandas(table: Any, name: str) -> Shaped[np.ndarray, " rows *feature"]:
    series = table[name]
    missing = np.flatnonzero(series.isna().to_numpy())
    if len(missing):
        raise _null(name, int(missing[0]))
    # Nullable and Arrow-backed columns would come back as Python objects unless asked for their own dtype.
    return np.asarray(series.to_numpy(dtype=getattr(series.dtype, "numpy_dtype", None)))


def _read_arrow(table: Any, name: str) -> Shaped[np.ndarray, " rows *feature"]:
    parts: list[Shaped[np.ndarray, " rows *feature"]] = []
    rows = 0
    for chunk in table.column(name).chunks:
        if len(chunk) == 0:
            continue
        part = _dense(chunk, name, rows)
        if parts and part.shape[1:] != parts[0].shape[1:]:
            raise _ragged(name, rows, list(part.shape[1:]), list(parts[0].shape[1:]))
        parts.append(part)
        rows += len(chunk)
    return np.concatenate(parts) if parts else np.empty(0)


def _dense(chunk: Any, name: str, first_row: int) -> Shaped[np.ndarray, " rows *feature"]:
    """An Arrow array as a NumPy array: lists are unpacked level by level, so that no Python list is ever built."""
    shape = [len(chunk)]
    _check_no_null(chunk, name, first_row, 1)
    while hasattr(chunk, "flatten") and hasattr(chunk.type, "value_type"):
        cells_per_row = int(np.prod(shape[1:]))
        lengths = _list_lengths(chunk)
        other = np.flatnonzero(lengths != lengths[:1])
        if len(other):
            raise _ragged(name, first_row + int(other[0]) // cells_per_row, int(lengths[other[0]]), int(lengths[0]))
        shape.append(int(lengths[0]) if len(lengths) else 0)  # none within empty lists
        chunk = chunk.flatten()
        _check_no_null(chunk, name, first_row, int(np.prod(shape[1:])))
    if hasattr(chunk, "to_numpy_ndarray"):  # a column of fixed-shape tensors
        return np.asarray(chunk.to_numpy_ndarray())
    return np.asarray(chunk.to_numpy(zero_copy_only=False)).reshape(shape)


def _list_lengths(chunk: Any) -> Shaped[np.ndarray, " cells"]:
    if hasattr(chunk, "value_lengths"):
        return np.asarray(chunk.value_lengths().to_numpy(zero_copy_only=False))
    return np.full(len(chunk), chunk.type.list_size)


def _check_no_null(chunk: Any, name: str, first_row: int, cells_per_row: int) -> None:
    if chunk.null_count:
        cell = int(np.argmax(chunk.is_null().to_numpy(zero_copy_only=False)))
        raise _null(name, first_row + cell // cells_per_row)


def _numbers(column: Shaped[np.ndarray, " rows *feature"], name: str) -> Shaped[np.ndarray, " rows *feature"]:
    """Makes one array of a column of Python objects; other columns are as they should be."""
    if column.dtype != object:
        return column
    cells = [_cell(value, name, row) for row, value in enumerate(column)]
    for row, cell in enumerate(cells):
        if cell.shape != cells[0].shape:
            raise _ragged(name, row, list(cell.shape), list(cells[0].shape))
    return np.stack(cells) if cells else np.empty(0)


def _cell(value: Any, name: str, row: int) -> Shaped[np.ndarray, "*feature"]:
    """One cell as an array. Lists are handed to NumPy whole; what it cannot read is then looked at part by part."""
    try:
        cell = np.asarray(value)
        if cell.dtype == object and cell.ndim:
            cell = np.stack([_cell(part, name, row) for part in cell])
    except DataError:
        raise
    except ValueError as error:
        raise DataError(
            f"Expected lists of one shape in column {name!r}, found a ragged one in row {row}. Pad it."
        ) from error
    if value is None:
        raise _null(name, row)
    if not is_numeric(cell.dtype):
        raise DataError(
            f"Expected numbers in column {name!r}, found {reprlib.repr(value)} in row {row}. "
            "Encode it as integers, or leave the column out with `columns=`."
        )
    return cell


def _null(name: str, row: int) -> DataError:
    return DataError(f"Expected a value in every row of column {name!r}, found null in row {row}. Fill or drop it.")


def _ragged(name: str, row: int, found: object, expected: object) -> DataError:
    return DataError(
        f"Expected lists of one shape in column {name!r}, found {found} in row {row} where the first row has "
        f"{expected}. Pad them."
    )
