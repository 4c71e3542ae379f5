"""A round's table of clients, one row a client in cohort order, as a Parquet file.

The table is what queries run on: who took part, where the client's weights lie, what it reports, how far each leaf
moved. What belongs to the round as a whole stands as JSON in the schema's metadata under the key "fedlens".
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Shaped

from fedlens.errors import LedgerError
from fedlens.ledger import jsontext, seal
from fedlens.ledger.format import Leaf
from fedlens.ledger.measure import PerRow
from fedlens.ledger.records import RESERVED, ClientPart, metric_dtype

PerLeaf = Shaped[np.ndarray, "clients leaves"]  # a number for each client and leaf
LEAF_ROW = pa.struct(
    [("leaf", pa.string()), ("norm", pa.float64()), ("checksum", pa.uint32()), ("scale", pa.float64())]
)
NOT_KEPT = -1  # as part and row of a client whose weights are not stored

_KEY = b"fedlens"
_FIXED = {
    "round": pa.int64(),
    "client": pa.string(),
    "position": pa.int64(),
    "part": pa.int64(),
    "row": pa.int64(),
    "num_examples": pa.int64(),
    "dropped": pa.bool_(),
    "update_norm": pa.float64(),
    "cosine": pa.float64(),
    "leaves": pa.list_(LEAF_ROW),
}
_LEAF_ROW_1 = pa.struct(list(LEAF_ROW)[:3])  # of version 1
_UNKNOWN_IN_1 = ("dropped", "cosine")  # columns that version 1 has not: null
_NOT_FINITE = {text: float(text) for text in ("nan", "inf", "-inf")}  # metrics that stand as text: JSON has none


@dataclass(frozen=True)
class ClientRows:
    """What a round's table says about the clients of one `ClientPart`.

    Attributes:
      part: the number of the weights file, of each client; `NOT_KEPT` without weights.
      row: each client's row in its tensors, likewise.
      squares: squared norms of the updates, [clients, leaves].
      checksums: of the stored bytes; the numbers of leaves that are not stored mean nothing.
      stored: which leaves of which clients are stored.
      scales: those of `int8-delta`; not a number where there is none and `scaled` is False.
      scaled: which leaves of which clients have a scale.
      cosine: of the update and the round's mean update; NaN where it is undefined.
    """

    of: ClientPart
    part: Shaped[np.ndarray, " clients"]
    row: Shaped[np.ndarray, " clients"]
    squares: PerLeaf
    checksums: PerLeaf
    stored: PerLeaf
    scales: PerLeaf
    scaled: PerLeaf
    cosine: PerRow


@dataclass(frozen=True)
class RoundSummary:
    """What a round's table says about the round as a whole.

    Attributes:
      round: its number.
      metrics: the server's metrics.
      global_checksums: leaf -> `zlib.crc32` of the global model's leaf.
      checkpoint_checksums: name -> `zlib.crc32` of the array in the checkpoint.
    """

    round: int
    metrics: Mapping[str, float]
    global_checksums: Mapping[str, int]
    checkpoint_checksums: Mapping[str, int]


def build_table(
    rows: Sequence[ClientRows], leaves: Sequence[Leaf], dropped: Collection[str], summary: RoundSummary
) -> pa.Table:
    """Builds a round's table, one row a client in the order of their positions."""
    parts = [each.of for each in rows]
    ids = [client for part in parts for client in part.ids]
    positions = _stack([part.positions for part in parts], np.dtype(np.int64))
    columns: dict[str, Any] = {
        "round": np.full(len(ids), summary.round),
        "client": ids,
        "position": positions,
        "part": _stack([each.part for each in rows], np.dtype(np.int64)),
        "row": _stack([each.row for each in rows], np.dtype(np.int64)),
        "num_examples": _stack([part.num_examples for part in parts], np.dtype(np.int64)),
        "dropped": [client in dropped for client in ids],
        "loss": pa.nulls(len(ids), pa.float64()),
    }
    for name, column in (parts[0].metrics if parts else {}).items():
        dtype = np.dtype(np.float64) if name == "loss" else metric_dtype(column)
        columns[name] = _stack([part.metrics[name] for part in parts], dtype)
    squares = np.concatenate([np.zeros((0, len(leaves))), *(each.squares for each in rows)])
    cosines = _stack([each.cosine for each in rows], np.dtype(np.float64))
    columns["update_norm"] = np.sqrt(squares.sum(axis=1))
    columns["cosine"] = pa.array(cosines, mask=np.isnan(cosines))
    columns["leaves"] = _leaf_rows(leaves, np.sqrt(squares), rows)
    arrays = [pa.array(column, _FIXED.get(name)) for name, column in columns.items()]
    fields = [(name, array.type) for name, array in zip(columns, arrays, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=pa.schema(fields, {_KEY: _to_json(summary)}))
    if np.all(positions[:-1] <= positions[1:]):
        return table
    return table.take(pa.array(np.argsort(positions, kind="stable")))


def to_parquet(table: pa.Table) -> memoryview:
    """The bytes of a Parquet file; its pages and the whole carry checksums, and no time or machine shows in it."""
    stream = pa.BufferOutputStream()
    # A dictionary pays where a column repeats itself; one for each column took a third of the time.
    repeated = ["round", "leaves.list.element.leaf"]
    pq.write_table(table, stream, compression="snappy", use_dictionary=repeated, write_page_checksum=True)
    return memoryview(seal.seal(stream.getvalue(), seal.END_OF_METADATA))


def read_table(path: Path, leaves: Sequence[Leaf]) -> pa.Table:
    """Reads a round's table and checks its columns; see `parse_table`.

    Raises:
      LedgerError: the file is missing, damaged, or not a table of clients with these leaves.
    """
    try:
        # From memory, not by name: pyarrow's own reader would take a folder of this name for a data set.
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise LedgerError(f"Expected a round's table of clients, found damage ({error}), in {path}.") from error
    return parse_table(content, leaves, path)


def parse_table(content: Any, leaves: Sequence[Leaf], path: object) -> pa.Table:
    """The table in the bytes of a Parquet file; one of format version 1 comes in the columns of version 2.

    Args:
      content: the bytes, or a buffer of them.
      leaves: the run's.
      path: what an error names.

    Raises:
      LedgerError: the bytes are damaged, or not a table of clients with these leaves.
    """
    try:
        source = pa.BufferReader(content)
        table = pq.ParquetFile(source, page_checksum_verification=True).read(use_threads=False)
        if "leaves" in table.column_names and table.column("leaves").type == pa.list_(_LEAF_ROW_1):
            table = _from_version_1(table)
            _check(table, leaves, unknown=_UNKNOWN_IN_1)
        else:
            _check(table, leaves)
        if seal.is_broken(content, seal.END_OF_METADATA):
            raise ValueError("other bytes than were written")
    except LedgerError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise LedgerError(f"Expected a round's table of clients, found damage ({error}), in {path}.") from error
    return table


def read_summary(table: pa.Table, path: object) -> RoundSummary:
    """Reads what a table says about its round.

    Raises:
      LedgerError: the metadata of the table, which was read from `path`, is missing or damaged.
    """
    try:
        fields = jsontext.parse(table.schema.metadata[_KEY])
        return RoundSummary(
            _whole(fields["round"], below=2**63),
            {name: _metric(value) for name, value in fields["metrics"].items()},
            {name: _whole(value, below=2**32) for name, value in fields["global_checksums"].items()},
            {name: _whole(value, below=2**32) for name, value in fields["checkpoint_checksums"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LedgerError(f"Expected a round's metadata, found damage ({error!r}), in {path}.") from error


def metric_names(table: pa.Table) -> list[str]:
    """The columns that are clients' metrics."""
    return [name for name in table.column_names if name not in RESERVED]


def _leaf_rows(leaves: Sequence[Leaf], norms: PerLeaf, rows: Sequence[ClientRows]) -> pa.ListArray:
    clients, width = norms.shape

    def column(name: str, type_: pa.DataType, known: str) -> pa.Array:
        values = _stack([getattr(each, name).ravel() for each in rows], type_.to_pandas_dtype())
        mask = ~_stack([getattr(each, known).ravel() for each in rows], np.dtype(bool))
        return pa.array(values, type_, mask=mask, from_pandas=False)

    names = pa.array([leaf.name for leaf in leaves], pa.string()).take(pa.array(np.tile(np.arange(width), clients)))
    columns = [column("checksums", pa.uint32(), "stored"), column("scales", pa.float64(), "scaled")]
    structs = pa.StructArray.from_arrays([names, pa.array(norms.ravel()), *columns], fields=list(LEAF_ROW))
    return pa.ListArray.from_arrays(pa.array(np.arange(clients + 1) * width, pa.int32()), structs)


def _from_version_1(table: pa.Table) -> pa.Table:
    """A table of version 1 in the columns of version 2; what version 1 did not say is null."""
    metadata = table.schema.metadata
    # Version 1 let a run call a metric of its own like a column that came after it.
    table = table.rename_columns(
        [f"own_{name}" if name.casefold() in _UNKNOWN_IN_1 else name for name in table.column_names]
    )
    lists = table.column("leaves").combine_chunks()
    structs = lists.flatten()
    columns = [structs.field(place) for place in range(3)]
    widened = pa.StructArray.from_arrays([*columns, pa.nulls(len(structs), pa.float64())], fields=list(LEAF_ROW))
    offsets = pc.subtract(lists.offsets, lists.offsets[0]) if len(lists) else pa.array([0], pa.int32())
    place = table.column_names.index("leaves")
    table = table.set_column(place, "leaves", pa.ListArray.from_arrays(offsets, widened))
    table = table.add_column(place, "cosine", pa.nulls(len(table), pa.float64()))
    table = table.add_column(place - 1, "dropped", pa.nulls(len(table), pa.bool_()))
    return table.replace_schema_metadata(metadata)


def _stack(columns: Sequence[Any], dtype: np.dtype[Any] | None) -> Any:
    return np.concatenate([np.asarray(column).astype(dtype) for column in columns]) if columns else np.zeros(0, dtype)


def _to_json(summary: RoundSummary) -> bytes:
    fields = {
        "round": summary.round,
        "metrics": {name: _number(value) for name, value in summary.metrics.items()},
        "global_checksums": summary.global_checksums,
        "checkpoint_checksums": summary.checkpoint_checksums,
        "checksum": seal.BLANK,
    }
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()


def _number(value: Any) -> bool | int | float | str:
    scalar = np.asarray(value)
    if scalar.dtype.kind in "biu":
        return scalar.item()
    number = float(scalar)
    return number if np.isfinite(number) else str(number)


def _whole(value: Any, below: int) -> int:
    if type(value) is not int or not 0 <= value < below:
        raise ValueError(f"{value!r} where a whole number below {below} should be")
    return value


def _metric(value: Any) -> float:
    if isinstance(value, str):
        return _NOT_FINITE[value]
    if type(value) in (bool, float) or (type(value) is int and -(2**63) <= value < 2**64):
        return value
    raise ValueError(f"{value!r} where a metric should be")


def _check(table: pa.Table, leaves: Sequence[Leaf], unknown: Collection[str] = ("cosine",)) -> None:
    for name, dtype in _FIXED.items():
        if name not in table.column_names or table.column(name).type != dtype:
            raise ValueError(f"no column {name!r} of type {dtype}")
        if name not in unknown and table.column(name).null_count:
            raise ValueError(f"nulls in column {name!r}")
    rows = table.column("leaves").combine_chunks()
    if not pc.all(pc.equal(pc.list_value_length(rows), len(leaves)), min_count=0).as_py():
        raise ValueError(f"clients without exactly {len(leaves)} leaves")
    names = pa.array([leaf.name for leaf in leaves], pa.string())
    # Compared by Arrow: as Python's texts they took a fifth of the time of reading a table.
    if not rows.flatten().field("leaf").equals(names.take(pa.array(np.tile(np.arange(len(leaves)), len(table))))):
        raise ValueError("leaves other than the run's")
    table.column("client").validate(full=True)  # Arrow takes a file's texts for UTF-8 without looking
    if len(pc.unique(table.column("client"))) != len(table):
        raise ValueError("a client twice")
