"""Results for a program: JSON on standard output."""

from __future__ import annotations

import json
from typing import Any

from fedlens.report import summaries


def print_json(value: Any) -> None:
    """Prints a value as JSON, which has no NaN: null stands for it."""
    print(json.dumps(summaries.finite(value), indent=1, ensure_ascii=False, allow_nan=False))  # noqa: T201
