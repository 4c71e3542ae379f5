"""Where a key stands in a TOML file: `tomllib` parses without line numbers, and an error should name the line.

The file has been parsed before, so that its lines can be trusted to be TOML; what remains is to follow its headers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_HEADER = re.compile(r"^\s*\[\[?\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")


def line_of(text: str, path: Sequence[str]) -> int | None:
    r"""The line, from 1, on which the key at `path` is set; else that of the section it is in, if there is one.

    Example:
      >>> line_of('rounds = 3\n[data]\nset = "digits"\n', ["data", "set"])
      3

    Args:
      text: a TOML file.
      path: section and key, `["data", "set"]`, or a top-level key alone.
    """
    wanted = list(path)
    enclosing: list[str] = []
    best: tuple[int, int] | None = None  # (how much of the path, the line)
    for number, line in enumerate(text.splitlines(), start=1):
        header, key = _HEADER.match(line), _KEY.match(line)
        if header:
            found = enclosing = _names(header[1])
        elif key:
            found = enclosing + _names(key[1])
        else:
            continue
        if found == wanted[: len(found)] and (best is None or len(found) > best[0]):
            best = (len(found), number)
    return None if best is None else best[1]


def _names(dotted: str) -> list[str]:
    return [name.strip().strip("\"'") for name in dotted.split(".")]
