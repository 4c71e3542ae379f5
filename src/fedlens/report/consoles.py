"""Where output goes: results to standard output, for people and pipes, messages to standard error."""

from __future__ import annotations

from rich.console import Console

_UNLIMITED = 100_000  # columns; a pipe has no width, and rich's guess of 80 would cut tables


def results() -> Console:
    """Standard output; tables are as wide as they need to be unless it is a terminal."""
    return _console(stderr=False)


def messages() -> Console:
    """Standard error."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=stderr)
    if not console.is_terminal:
        console.width = _UNLIMITED
    return console
