"""Tensors in a file: the safetensors layout, laid out before writing and checked before reading.

A safetensors file is eight bytes with the length of a JSON header, the header, then every tensor's bytes one after the
other. Knowing all shapes first, the header can be written before any tensor is at hand, so a round streams to the disk
without being assembled in memory; knowing every offset, one client's row can be read without touching the others. The
library `safetensors` does neither, and reads what is written here.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

from fedlens.errors import LedgerError
from fedlens.ledger import direct, jsontext
from fedlens.ledger.storage import LocalStore, Store
from fedlens.memory import BEYOND_PAGE

AnyArray = Shaped[np.ndarray, "..."]  # an array of any shape and of one of the dtypes below
Bytes = UInt8[np.ndarray, "bytes"]  # the memory of an array

_CODES = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
_NAMES = {code: name for name, code in _CODES.items()}
_EXTENDED = ("bfloat16", "float8_e4m3fn", "float8_e5m2")  # dtypes of ml_dtypes, unknown to NumPy
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class Slot:
    """One tensor of a file: its dtype's name, its shape, and the offset in the file at which its bytes start."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """The number of bytes."""
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize


def dtype_of(name: str) -> np.dtype[Any]:
    """The little-endian dtype called `name`.

    Raises:
      LedgerError: a ledger cannot hold this dtype.
    """
    if name not in _CODES:
        raise LedgerError(f"Expected a dtype among {', '.join(_CODES)}, found {name!r}. Convert the leaf.")
    if name in _EXTENDED:
        import ml_dtypes  # only models in these dtypes pay for the import

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name).newbyteorder("<")


@functools.cache
def name_of(dtype: Any) -> str:
    """The name of a dtype, which NumPy takes some microseconds to make up; of other libraries' what they print."""
    return str(getattr(dtype, "name", dtype))


def as_bytes(array: AnyArray) -> Bytes:
    """The memory of `array` in row-major, little-endian order: a view, unless the array lies otherwise in memory."""
    plain = np.ascontiguousarray(array, dtype=_in_files(array.dtype))
    return plain.reshape(-1).view(np.uint8)


@functools.cache
def _in_files(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype_of(name_of(dtype))


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, list[str]]:
    """Lays out a file for tensors given as name -> (dtype, shape).

    Wide dtypes come first, as the safetensors library has it, so that every tensor is aligned to its item size. Among
    those of one width large tensors come first, the largest before the others, and the first large one begins as far
    beyond a block of the disk as XLA's large arrays begin beyond a page: what lies in memory as it does in the file is
    written without a copy (`direct.py`).

    Returns:
      What the file starts with, and the names in the order in which their bytes follow.

    Example:
      >>> start, order = layout({"a": ("uint8", (3,)), "b": ("float32", (2,))})
      >>> order, len(start) % 8
      (['b', 'a'], 0)
    """
    widths = {name: dtype_of(dtype).itemsize for name, (dtype, _) in tensors.items()}
    sizes = {name: math.prod(shape) * widths[name] for name, (_, shape) in tensors.items()}
    large = {name: size for name, size in sizes.items() if size >= direct.IN_PLACE}
    order = sorted(tensors, key=lambda name: (-widths[name], -large.get(name, 0)))
    header: dict[str, Any] = {}
    end, first_large = 0, None
    for name in order:
        dtype, shape = tensors[name]
        if name in large and first_large is None:
            first_large = end
        begin, end = end, end + sizes[name]
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if first_large is not None:
        text += b" " * ((BEYOND_PAGE - 8 - len(text) - first_large) % direct.BLOCK // 8 * 8)
    return struct.pack("<Q", len(text)) + text, order


def whole_file(tensors: Mapping[str, AnyArray]) -> list[bytes | Bytes]:
    """The pieces of a file that holds `tensors`, in order."""
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    start, order = layout({name: (name_of(array.dtype), array.shape) for name, array in arrays.items()})
    return [start, *(as_bytes(arrays[name]) for name in order)]


def read_slots(path: Path) -> dict[str, Slot]:
    """Reads which tensors a file of this machine holds; see `slots_in`."""
    return slots_in(LocalStore(path.parent), path.name)


def slots_in(store: Store, name: str) -> dict[str, Slot]:
    """Reads which tensors a file holds, and checks that they fill it exactly.

    Raises:
      LedgerError: the file cannot be opened, is cut short, or has a header that does not describe it.
    """
    where = store.where(name)
    total = store.size(name)
    prefix = bytearray(8)
    if total >= 8:
        store.fill([(name, 0, memoryview(prefix))])
    length = int.from_bytes(prefix, "little") if total >= 8 else -1
    if not 0 < length <= min(total - 8, _LONGEST_HEADER):
        raise _broken(where, f"a header of {length} bytes in a file of {total}")
    text = bytearray(length)
    store.fill([(name, 8, memoryview(text))])
    try:
        header = jsontext.parse(text)
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
        end = 0
        slots = {}
        for tensor, entry in entries:
            slot = Slot(_NAMES[entry["dtype"]], tuple(entry["shape"]), 8 + length + end)
            if not all(type(extent) is int and extent >= 0 for extent in slot.shape):
                raise _broken(where, f"shape {entry['shape']} for {tensor!r}")
            if entry["data_offsets"] != [end, end + slot.size]:
                raise _broken(
                    where, f"bytes {entry['data_offsets']} for {tensor!r}, which has {slot.size} from {end} on"
                )
            end += slot.size
            slots[tensor] = slot
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(where, f"a header that cannot be read ({type(error).__name__}: {error})") from error
    if 8 + length + end != total:
        raise _broken(where, f"{total} bytes where the header describes {8 + length + end}")
    return slots


def read_slot(path: Path, slot: Slot, rows: slice | None = None) -> AnyArray:
    """Reads one tensor, or with `rows` a stretch of its leading axis, touching only those bytes.

    Raises:
      LedgerError: the file cannot be opened, or ends before the tensor does.
    """
    shape, start = slot.shape, slot.start
    if rows is not None:
        first, last, _ = rows.indices(shape[0])
        start += first * math.prod(shape[1:]) * dtype_of(slot.dtype).itemsize
        shape = (last - first, *shape[1:])
    array = np.empty(shape, dtype_of(slot.dtype))
    LocalStore(path.parent).fill([(path.name, start, memory_of(array))])
    return array


def memory_of(array: AnyArray) -> memoryview:
    """The memory of a row-major array, to be filled."""
    return memoryview(array.reshape(-1).view(np.uint8))


def read_all(path: Path) -> dict[str, AnyArray]:
    """Reads every tensor of a file, by name.

    Raises:
      LedgerError: see `read_slots`.
    """
    return {name: read_slot(path, slot) for name, slot in read_slots(path).items()}


def _broken(path: str, found: str) -> LedgerError:
    return LedgerError(
        f"Expected a whole safetensors file, found {found}, in {path}. "
        "The file was cut or changed: restore it from a copy."
    )
