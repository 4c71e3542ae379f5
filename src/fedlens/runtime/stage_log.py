"""One line for each stage on the logger "fedlens": what it ran on, and where its seconds went.

`FEDLENS_LOG=debug` in the environment writes the lines to standard error; a program that configures Python's logging
gets them by setting the level of the logger "fedlens". Phases are of the wall clock, seen from the thread that runs the
stage: packing (arguments into arrays that devices read), writing (in the sink that takes clients' values), compiling
(in XLA), and computing, which is all the rest: tracing, starting programs, and waiting for their results. A chunk is
packed and written while another computes, so packing and writing are what they add, not what they would take alone.
JAX starts a program and returns before it has run: while a stage is timed its results are awaited before the next one.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal

import jax

from fedlens.compiler.functions import function_names
from fedlens.compiler.stages import ClientStage, ServerStage
from fedlens.runtime.engine import StageCohort

Phase = Literal["packing", "computing", "writing"]

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
VARIABLE = "FEDLENS_LOG"

_logger = logging.getLogger("fedlens")
_clock: ContextVar[_Clock | None] = ContextVar("fedlens_stage_clock", default=None)
_untimed: AbstractContextManager[None] = nullcontext()
_COMPILED = "/jax/core/compile/backend_compile_duration"  # the event with which JAX reports seconds of XLA's compiler


class _Clock:
    """Seconds by phase: one phase at a time, each second counted once."""

    def __init__(self) -> None:
        self.start = self._since = time.perf_counter()
        self.seconds = {"packing": 0.0, "computing": 0.0, "writing": 0.0}
        self.compiling = 0.0
        self._phase: Phase = "computing"

    def switch(self, phase: Phase) -> Phase:
        """Goes on in another phase; returns the one that was on."""
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        self._since = now
        previous, self._phase = self._phase, phase
        return previous


def phase(name: Phase) -> AbstractContextManager[None]:
    """Counts the time inside as `name`, if the stage that runs in this thread is timed; else costs nothing to speak of.

    Example:
      >>> with phase("packing"):
      ...     packed = pack(chunk)
    """
    clock = _clock.get()
    return _untimed if clock is None else _in_phase(clock, name)


@contextmanager
def _in_phase(clock: _Clock, name: Phase) -> Iterator[None]:
    previous = clock.switch(name)
    try:
        yield
    finally:
        clock.switch(previous)


def timed(kind: str, facts: Callable[[], Mapping[str, object]]) -> AbstractContextManager[None]:
    """Times what is inside, and logs it as one line when it ends well.

    Args:
      kind: what it is: "arguments", "server", "clients" or "ledger".
      facts: what else the line says, in order; called at the end, and only if there is a line.
    """
    return _timed(kind, facts) if _logger.isEnabledFor(logging.DEBUG) else _untimed


def timed_stage(
    stage: ClientStage | ServerStage,
    stages: Sequence[ClientStage | ServerStage],
    engine: object,
    cohort_of: Callable[[ClientStage], StageCohort],
) -> AbstractContextManager[None]:
    """Times a stage; see `timed`.

    Args:
      stage: which one.
      stages: all of its plan.
      engine: what runs it.
      cohort_of: the cohort that a client stage runs over.
    """

    def facts() -> dict[str, object]:
        same = [other for other in stages if type(other) is type(stage)]
        found: dict[str, object] = {"index": same.index(stage), "engine": type(engine).__name__.lower()}
        if isinstance(stage, ClientStage):
            cohort = cohort_of(stage)
            found |= {"clients": len(cohort.ids), "chunks": len(cohort.chunks(stage))}
        steps = (*stage.body, *(stage.reductions if isinstance(stage, ClientStage) else ()))
        names = dict.fromkeys(name for step in steps for name in function_names(step))
        return found | {"functions": ",".join(names)}

    return timed("clients" if isinstance(stage, ClientStage) else "server", facts)


@contextmanager
def _timed(kind: str, facts: Callable[[], Mapping[str, object]]) -> Iterator[None]:
    _listen_to_the_compiler()
    clock = _Clock()
    token = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(token)
    clock.switch("computing")
    _logger.debug("%s", _line(kind, facts(), clock))


@cache
def _listen_to_the_compiler() -> None:
    jax.monitoring.register_event_duration_secs_listener(_count_compilation)


def _count_compilation(event: str, duration_secs: float, **_: str | int) -> None:
    clock = _clock.get()
    if event == _COMPILED and clock is not None:
        clock.compiling += duration_secs


def _line(kind: str, facts: Mapping[str, object], clock: _Clock) -> str:
    total = sum(clock.seconds.values())
    compiling = min(clock.compiling, clock.seconds["computing"])
    seconds = clock.seconds | {"computing": clock.seconds["computing"] - compiling, "compiling": compiling}
    parts = {"stage": kind, **facts, "seconds": f"{total:.6f}"}
    parts |= {name: f"{value:.6f}" for name, value in seconds.items()}
    parts |= {f"{name}_share": f"{value / total if total else 0.0:.3f}" for name, value in seconds.items()}
    return " ".join(f"{name}={_word(value)}" for name, value in parts.items())


def _word(value: object) -> str:
    return "".join(str(value).split()) or "-"


def is_on() -> bool:
    """Whether a stage is timed just now."""
    return _clock.get() is not None


def wait(results: Any) -> None:
    """Waits for the arrays that a timed stage computes, so that their time is counted as its own."""
    if _clock.get() is not None:
        jax.block_until_ready(results)


class _ToStandardError(logging.Handler):
    """Writes to what standard error is at the time: a progress bar puts itself in its place, and stays whole."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


def configure(variables: Mapping[str, str] | None = None) -> None:
    """Sets the logger "fedlens" up as FEDLENS_LOG says: its level, and standard error as its end.

    Args:
      variables: the environment; that of the process by default.

    Warns:
      UserWarning: the variable's value is no level.
    """
    wanted = (os.environ if variables is None else variables).get(VARIABLE, "").strip().lower()
    if not wanted:
        return
    if wanted not in LEVELS:
        warnings.warn(f"Expected {VARIABLE} to be one of {', '.join(LEVELS)}, found {wanted!r}.", stacklevel=2)
        return
    _logger.setLevel(LEVELS[wanted])
    if not any(isinstance(handler, _ToStandardError) for handler in _logger.handlers):
        handler = _ToStandardError()
        handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))
        _logger.addHandler(handler)
    _logger.propagate = False  # or a program with a root logger of its own would write every line twice
