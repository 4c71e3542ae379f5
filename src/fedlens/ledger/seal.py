"""A file's checksum within the file: eight hexadecimal digits that are counted as zeros.

Weights have their checksums in the table of clients. `run.json`, and the table itself, carry their own: the last
member of a JSON object, `"checksum": "89abcdef"`. It is the CRC-32 of the whole file with `00000000` there, so it
covers what no library checks, such as the names of columns and where their pages lie. A file without is not checked.
"""

from __future__ import annotations

import zlib
from typing import Any

BLANK = "00000000"
END_OF_RUN, END_OF_METADATA = b'"\n}\n', b'"}'  # what follows the digits in run.json, and in a table's metadata

_MARK = b'"checksum": "'


def seal(content: Any, end: bytes) -> bytes:
    """Puts the checksum of a file into it; without a place for it the content is returned as it is.

    Example:
      >>> seal(b'{"x": 1, "checksum": "00000000"}', END_OF_METADATA)
      b'{"x": 1, "checksum": "724dd2d3"}'

    Args:
      content: the file, with `BLANK` as its checksum or the one that it had before.
      end: what follows the digits.
    """
    plain = bytes(content)
    place = _place(plain, end)
    return plain if place is None else plain[:place] + _checksum(plain, place) + plain[place + len(BLANK) :]


def is_broken(content: Any, end: bytes) -> bool:
    """Whether a file has a checksum, and other bytes than those it is of."""
    plain = bytes(content)
    place = _place(plain, end)
    return place is not None and plain[place : place + len(BLANK)] != _checksum(plain, place)


def _checksum(content: bytes, place: int) -> bytes:
    memory = memoryview(content)
    before = zlib.crc32(BLANK.encode(), zlib.crc32(memory[:place]))
    return f"{zlib.crc32(memory[place + len(BLANK) :], before):08x}".encode()


def _place(content: bytes, end: bytes) -> int | None:
    """Where the digits stand: at the end of run.json, or in the last such member of a table's metadata."""
    last = len(content) - len(end) - len(BLANK) - len(_MARK) if end == END_OF_RUN else content.rfind(_MARK)
    if last < 0 or not content.startswith(_MARK, last):
        return None
    place = last + len(_MARK)
    return place if content.startswith(end, place + len(BLANK)) else None
