"""Hypothesis strategies for damaged ledgers: each draws file name -> its bytes, or None for a file that is gone.

`flips` and `cuts` are accidents, which checksums give away. The others are lies: their checksums are gone, or right.
"""

from __future__ import annotations

import io
import json
import math
import struct

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from fedlens.ledger.seal import BLANK, END_OF_METADATA, seal


@st.composite
def flips(draw, files):
    """A file with some bits flipped."""
    name = draw(st.sampled_from(sorted(files)))
    data = bytearray(files[name])
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return {name: bytes(data)}


@st.composite
def cuts(draw, files):
    """A file cut short, with something in its middle left out or put in, or gone."""
    name = draw(st.sampled_from(sorted(files)))
    data = files[name]
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, len(data)))
    put_in = draw(st.binary(max_size=20))
    return {name: draw(st.sampled_from([data[:start], data[:start] + put_in + data[end:], None]))}


TEXTS = ["..", "../../x", "a\0b", "/etc/passwd", "\ud800", "int8-delta", "float8_e4m3fn", "raw", "*"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([*TEXTS, 2**70, 10**400, -1, math.inf]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def places_in(value, above=()):
    """The paths of all members of a JSON value."""
    for key, member in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*above, key)
        if isinstance(member, dict | list):
            yield from places_in(member, (*above, key))


def changed(draw, value):
    """A JSON value with some members replaced, renamed or left out."""
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places_in(value))
        if not paths:
            break
        *above, last = draw(st.sampled_from(paths))
        parent = value
        for key in above:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "remove", "rename"]))
        if what == "replace" or isinstance(parent, list):
            parent[last] = draw(JSON)
        elif what == "remove":
            del parent[last]
        else:
            parent[draw(st.sampled_from(["..", "a\0b", "\ud800", "local/..", "global/zero", "x"]))] = parent.pop(last)
    return value


@st.composite
def descriptions(draw, files):
    """Another `run.json`, with its checksum gone."""
    run = json.loads(files["run.json"])
    del run["checksum"]
    return {"run.json": json.dumps(changed(draw, run)).encode()}


@st.composite
def headers(draw, files):
    """A file of weights, or the checkpoint, whose header lies."""
    name = draw(st.sampled_from([name for name in sorted(files) if name.endswith(".safetensors")]))
    (length,) = struct.unpack("<Q", files[name][:8])
    text = json.dumps(changed(draw, json.loads(files[name][8 : 8 + length]))).encode()
    length_ = draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    return {name: struct.pack("<Q", length_) + text + files[name][8 + length :]}


COLUMNS = {
    "int64": (pa.int64(), st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 9)),
    "string": (pa.string(), st.text(max_size=5) | st.sampled_from(["..", "a\0b"])),
    "double": (pa.float64(), st.floats()),
    "binary": (pa.binary(), st.binary(max_size=4)),
    "no text": (pa.string(), st.binary(max_size=4)),
    "bool": (pa.bool_(), st.booleans()),
    "list": (pa.list_(pa.int8()), st.lists(st.integers(0, 3), max_size=2)),
    "date": (pa.date32(), st.integers(0, 9)),
    "decimal": (pa.decimal128(5, 2), st.none()),
    "null": (pa.null(), st.none()),
    "struct": (pa.struct([("a", pa.int8())]), st.none()),
    "dictionary": (pa.dictionary(pa.int8(), pa.string()), st.sampled_from(["a", "b"])),
}


@st.composite
def tables(draw, files):
    """A round's table with foreign columns, other values, other metadata or other rows; its checksum is gone."""
    name = draw(st.sampled_from([name for name in sorted(files) if name.endswith(".parquet")]))
    table = pq.read_table(io.BytesIO(files[name]))
    metadata = json.loads(table.schema.metadata[b"fedlens"])
    del metadata["checksum"]
    for _ in range(draw(st.integers(1, 3))):
        what = draw(st.sampled_from(["column", "drop", "rows", "metadata", "leaves", "none"]))
        if what == "column":
            dtype, values = COLUMNS[draw(st.sampled_from(sorted(COLUMNS)))]
            rows = draw(st.lists(values | st.none(), min_size=len(table), max_size=len(table)))
            is_bytes = any(isinstance(row, bytes) for row in rows)
            column = pa.array(rows, pa.binary() if is_bytes else dtype).view(dtype)
            label = draw(st.sampled_from([*table.column_names, "..", "a\0b", "Loss", "foreign", ""]))
            if label in table.column_names:
                table = table.set_column(table.column_names.index(label), label, column)
            else:
                table = table.append_column(label, column)
        elif what == "drop" and table.num_columns > 1:
            table = table.drop_columns([draw(st.sampled_from(table.column_names))])
        elif what == "rows":
            rows = draw(st.lists(st.integers(0, max(0, len(table) - 1)), max_size=9)) if len(table) else []
            table = table.take(pa.array(rows, pa.int64()))
        elif what == "metadata":
            metadata = changed(draw, metadata)
        elif what == "leaves" and "leaves" in table.column_names and table.column("leaves").type.num_fields == 1:
            rows = table.column("leaves").to_pylist()
            if rows and rows[0] and isinstance(rows[0][0], dict) and "leaf" in rows[0][0]:
                rows[0][0] |= draw(
                    st.fixed_dictionaries(
                        {},
                        optional={
                            "leaf": st.text(max_size=3),
                            "checksum": st.none() | st.integers(0, 2**32 - 1),
                            "scale": st.none() | st.floats(),
                            "norm": st.none() | st.floats(),
                        },
                    )
                )
                table = table.set_column(
                    table.column_names.index("leaves"), "leaves", pa.array(rows, table.column("leaves").type)
                )
    text = draw(st.just(json.dumps(metadata)) | st.sampled_from(["", "[]", "{", "\0"]))
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"fedlens": text}), sink)
    return {name: sink.getvalue().to_pybytes()}


@st.composite
def removals(draw, files):
    """A list of removals that nobody made, with checksums or without."""
    fields = st.fixed_dictionaries(
        {"kind": st.sampled_from(["rounds", "clients", "..", 3])},
        optional={
            "rounds": st.lists(st.integers(-1, 3), max_size=3) | JSON,
            "clients": st.lists(st.text("0f", min_size=64, max_size=64), max_size=2) | JSON,
        },
    )
    lines = [json.dumps(each | {"checksum": BLANK}).encode() for each in draw(st.lists(fields, max_size=3))]
    return {
        "removals.jsonl": b"\n".join(seal(line, END_OF_METADATA) if draw(st.booleans()) else line for line in lines)
    }
