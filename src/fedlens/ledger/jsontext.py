"""JSON as the format has it: UTF-8, finite numbers, texts that UTF-8 can hold."""

from __future__ import annotations

import json
from typing import Any


def parse(content: bytes | bytearray) -> Any:
    """The value in some bytes.

    Python's own reader takes more: other encodings, for which it imports their codecs, and infinities and lone
    surrogates, which could then not be written again.

    Example:
      >>> parse(b'{"rounds": [1, 2]}')
      {'rounds': [1, 2]}

    Raises:
      ValueError: it is no such JSON.
      RecursionError: it is nested too deeply.
    """
    value = json.loads(content.decode())
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # refuses what could not be written
    return value
