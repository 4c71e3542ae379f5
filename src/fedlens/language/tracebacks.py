"""What an error says besides its own message: where in a computation it happened, and the user's own line.

A user's function fails deep inside of fedlens and JAX. The error stays what it is, so that `except ValueError` keeps
working; a note names the place, and the frames of JAX that follow the user's line are left out, as JAX's own filtering
of tracebacks does (JAX_TRACEBACK_FILTERING=off keeps them).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import jax

_HAPPENED = "This happened"
_LIBRARIES = ("jax", "flax", "optax")  # what users call inside of their functions, and seldom want to read


@contextmanager
def noting(place: str, *, unless_noted: bool = False) -> Iterator[None]:
    """Adds where it happened to any error, and ends its traceback at the user's own line; the error stays the same.

    Example:
      >>> with noting("in client 'bob', client stage 0, step 'federated_map_0', function 'train'"):
      ...     raise ValueError("negative")  # its note: This happened in client 'bob', client stage 0, ...

    Args:
      place: what follows "This happened".
      unless_noted: whether to say nothing if an inner place was noted already.
    """
    try:
        yield
    except Exception as error:
        if not (unless_noted and any(note.startswith(_HAPPENED) for note in getattr(error, "__notes__", ()))):
            error.add_note(f"{_HAPPENED} {place}.")
        end_at_users_line(error)
        raise


def end_at_users_line(error: BaseException) -> None:
    """Cuts the frames of JAX, Flax and Optax off the end of an error's traceback, if a user's frame comes before them.

    Frames of any other library stay: it may be the user's own.
    """
    if jax.config.jax_traceback_filtering == "off":
        return
    last: TracebackType | None = None
    frame = error.__traceback__
    while frame is not None:
        if not _is_in(frame, _LIBRARIES):
            last = frame
        frame = frame.tb_next
    # What fedlens itself asks of JAX stays whole: there is no line of the user's to end at.
    if last is not None and not _is_in(last, ("fedlens",)):
        last.tb_next = None


def _is_in(frame: TracebackType, packages: tuple[str, ...]) -> bool:
    path = frame.tb_frame.f_code.co_filename
    return any(path.startswith(folder) for package in packages for folder in _folders(package))


def _folders(package: str) -> list[str]:
    return [os.path.join(folder, "") for folder in getattr(sys.modules.get(package), "__path__", ())]
