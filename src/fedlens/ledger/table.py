"""A round's table of clients, one row a client in cohort order, as a Parquet file.

The table is what queries run on: who took part, where the client's weights lie, what it reports, how far each leaf
moved. What belongs to the round as a whole stands as JSON in the schema's metadata under the key "fedlens".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Shaped

from fedlens.errors import LedgerError
from fedlens.ledger.format import Leaf
from fedlens.ledger.records import RESERVED, RoundRecord, metric_dtype

PerLeaf = Shaped[np.ndarray, "clients leaves"]  # a number for each client and leaf
LEAF_ROW = pa.struct([("leaf", pa.string()), ("norm", pa.float64()), ("checksum", pa.uint32())])

_KEY = b"fedlens"
_FIXED = {
    "round": pa.int64(),
    "client": pa.string(),
    "position": pa.int64(),
    "part": pa.int64(),
    "row": pa.int64(),
    "num_examples": pa.int64(),
    "update_norm": pa.float64(),
    "leaves": pa.list_(LEAF_ROW),
}


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
    record: RoundRecord,
    leaves: Sequence[Leaf],
    squares: PerLeaf,
    checksums: PerLeaf,
    summary: RoundSummary,
) -> pa.Table:
    """Builds a round's table; clients in `squares` (squared norms) and `checksums` are in the order of the parts."""
    ids = [client for part in record.parts for client in part.ids]
    positions = _stack([part.positions for part in record.parts], np.dtype(np.int64))
    order = np.argsort(positions, kind="stable")
    columns: dict[str, Any] = {
        "round": np.full(len(ids), record.round),
        "client": pa.array(ids, pa.string()),
        "position": positions,
        "part": np.zeros(len(ids), np.int64),
        "row": np.arange(len(ids)),
        "num_examples": _stack([part.num_examples for part in record.parts], np.dtype(np.int64)),
        "loss": pa.nulls(len(ids), pa.float64()),
    }
    for name, column in (record.parts[0].metrics if record.parts else {}).items():
        dtype = np.dtype(np.float64) if name == "loss" else metric_dtype(column)
        columns[name] = _stack([part.metrics[name] for part in record.parts], dtype)
    columns["update_norm"] = np.sqrt(squares.sum(axis=1))
    columns["leaves"] = _leaf_rows(leaves, np.sqrt(squares), checksums)
    table = pa.table(columns).cast(pa.schema([(name, _FIXED.get(name, _type(columns[name]))) for name in columns]))
    return table.take(pa.array(order)).replace_schema_metadata({_KEY: _to_json(summary)})


def to_parquet(table: pa.Table) -> memoryview:
    """The bytes of a Parquet file; its pages carry checksums, and nothing in it depends on time or machine."""
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
    return memoryview(stream.getvalue())


def read_table(path: Path, leaves: Sequence[Leaf]) -> pa.Table:
    """Reads a round's table and checks its columns.

    Raises:
      LedgerError: the file is missing, damaged, or not a table of clients with these leaves.
    """
    try:
        # From memory, not by name: pyarrow's own reader would take a folder of this name for a data set.
        source = pa.BufferReader(path.read_bytes())
        table = pq.ParquetFile(source, page_checksum_verification=True).read(use_threads=False)
        _check(table, leaves)
    except LedgerError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise LedgerError(f"Expected a round's table of clients, found damage ({error}), in {path}.") from error
    return table


def read_summary(table: pa.Table, path: Path) -> RoundSummary:
    """Reads what a table says about its round.

    Raises:
      LedgerError: the metadata of the table, which was read from `path`, is missing or damaged.
    """
    try:
        fields = json.loads(table.schema.metadata[_KEY])
        return RoundSummary(
            int(fields["round"]),
            {name: float(value) if isinstance(value, str) else value for name, value in fields["metrics"].items()},
            {name: int(value) for name, value in fields["global_checksums"].items()},
            {name: int(value) for name, value in fields["checkpoint_checksums"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LedgerError(f"Expected a round's metadata, found damage ({error!r}), in {path}.") from error


def metric_names(table: pa.Table) -> list[str]:
    """The columns that are clients' metrics."""
    return [name for name in table.column_names if name not in RESERVED]


def _leaf_rows(
    leaves: Sequence[Leaf],
    norms: PerLeaf,
    checksums: PerLeaf,
) -> pa.ListArray:
    clients, width = norms.shape
    names = pa.array([leaf.name for leaf in leaves], pa.string()).take(pa.array(np.tile(np.arange(width), clients)))
    rows = pa.StructArray.from_arrays(
        [names, pa.array(norms.ravel()), pa.array(checksums.ravel())], fields=list(LEAF_ROW)
    )
    return pa.ListArray.from_arrays(pa.array(np.arange(clients + 1) * width, pa.int32()), rows)


def _stack(columns: Sequence[Any], dtype: np.dtype[Any] | None) -> Any:
    return np.concatenate([np.asarray(column).astype(dtype) for column in columns]) if columns else np.zeros(0, dtype)


def _type(column: Any) -> pa.DataType:
    return column.type if isinstance(column, pa.Array) else pa.from_numpy_dtype(column.dtype)


def _to_json(summary: RoundSummary) -> bytes:
    fields = {
        "round": summary.round,
        "metrics": {name: _number(value) for name, value in summary.metrics.items()},
        "global_checksums": summary.global_checksums,
        "checkpoint_checksums": summary.checkpoint_checksums,
    }
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()


def _number(value: Any) -> bool | int | float | str:
    scalar = np.asarray(value)
    if scalar.dtype.kind in "biu":
        return scalar.item()
    number = float(scalar)
    return number if np.isfinite(number) else str(number)  # JSON has no NaN: "nan", "inf" and "-inf" stand as text


def _check(table: pa.Table, leaves: Sequence[Leaf]) -> None:
    for name, dtype in _FIXED.items():
        if name not in table.column_names or table.column(name).type != dtype:
            raise ValueError(f"no column {name!r} of type {dtype}")
        if table.column(name).null_count:
            raise ValueError(f"nulls in column {name!r}")
    rows = table.column("leaves").combine_chunks()
    if not pc.all(pc.equal(pc.list_value_length(rows), len(leaves)), min_count=0).as_py():
        raise ValueError(f"clients without exactly {len(leaves)} leaves")
    names = rows.flatten().field("leaf").to_numpy(zero_copy_only=False).reshape(len(table), len(leaves))
    if not np.all(names == np.array([leaf.name for leaf in leaves], object)):
        raise ValueError("leaves other than the run's")
    if len(pc.unique(table.column("client"))) != len(table):
        raise ValueError("a client twice")
