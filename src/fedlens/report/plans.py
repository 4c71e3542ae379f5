"""`fed.explain`: what a computation does, printed, or displayed where a notebook can show a table."""

from __future__ import annotations

import importlib
import sys

import federated_language as fl

from fedlens import compiler
from fedlens.compiler import Explanation
from fedlens.learning.process import LearningProcess


def explain(computation: fl.Computation | LearningProcess) -> None:
    """Prints what a computation does: its stages, what runs where, what is reduced, what leaves a client.

    Example:
      >>> fed.explain(average_with_extraction)
      >>> fed.explain(process.with_local_models())

    Args:
      computation: a computation with types; or a learning process, whose round is explained.

    Raises:
      LanguageError: `computation` is no computation, or has no types yet.
      UnsupportedError: it has an intrinsic that fedlens does not execute.
    """
    explanation = explanation_of(computation)
    if _in_notebook():
        importlib.import_module("IPython.display").display(explanation)
    else:
        print(explanation)  # noqa: T201


def explanation_of(computation: object) -> Explanation:
    """The explanation of a computation, or of the round of a learning process; see `explain`."""
    if isinstance(computation, LearningProcess):
        computation = computation.next_computation
    return compiler.explain(computation)


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, so that what is displayed is shown as HTML."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")
