"""TensorFlow as fedlens uses it: an extra, imported by the first computation that needs it, and quietly."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

from fedlens.errors import UnsupportedError

_NOISE = re.compile(rb"^(I\d{4} |WARNING: All log messages before absl|To enable the following instructions)")


@cache
def tensorflow() -> Any:
    """The module `tensorflow`.

    Raises:
      UnsupportedError: TensorFlow is not installed.
    """
    with _without_information(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import tensorflow as tf
        except ModuleNotFoundError as error:
            if error.name != "tensorflow":
                raise
            raise UnsupportedError(
                "Expected the package tensorflow for a computation of TensorFlow operations, found none. "
                "Install it: pip install 'fedlens[tensorflow]'"
            ) from error
    return tf


@contextlib.contextmanager
def _without_information() -> Iterator[None]:
    """Drops what TensorFlow's libraries log as information while they load: before they read TF_CPP_MIN_LOG_LEVEL."""
    sys.stderr.flush()
    try:
        standard_error = os.dup(2)
    except OSError:  # a process without standard error
        yield
        return
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(standard_error, 2)
            os.close(standard_error)
            written.seek(0)
            kept = [line for line in written if line.strip() and not _NOISE.match(line)]
            os.write(2, b"".join(kept))


_thread = threading.local()


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """What tracing a function of TensorFlow 2 into a plain graph needs, in this thread.

    In a plain graph `x == 0` would be False, silently: TensorFlow compares tensors by identity there, and by value in
    eager code and in a `tf.function`. Here it is by value too. And AutoGraph's own dependency gives a warning on Python
    3.13 that a program which turns warnings into errors would fail with.
    """
    _let_tensors_be_compared()
    outer = getattr(_thread, "is_tracing", False)
    _thread.is_tracing = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*unexpected keyword argument '___pyct_anno'", DeprecationWarning)
            yield
    finally:
        _thread.is_tracing = outer


@cache
def _let_tensors_be_compared() -> None:
    """Makes `==` and `!=` of symbolic tensors what they are in TensorFlow 2, in threads that are tracing; once."""
    tf = tensorflow()
    by_identity, differs_by_identity = tf.Tensor.__eq__, tf.Tensor.__ne__

    def by_value(other: object) -> bool:
        if other is None or not getattr(_thread, "is_tracing", False) or tf.executing_eagerly():
            return False
        caller = sys._getframe(2).f_globals.get("__name__", "")
        return not str(caller).startswith("tensorflow.")  # its own code for plain graphs relies on identity

    def equal(self: Any, other: Any) -> Any:
        return tf.equal(self, other) if by_value(other) else by_identity(self, other)

    def not_equal(self: Any, other: Any) -> Any:
        return tf.not_equal(self, other) if by_value(other) else differs_by_identity(self, other)

    tf.Tensor.__eq__, tf.Tensor.__ne__ = equal, not_equal
