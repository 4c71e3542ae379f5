"""`fedlens explain`: finds a computation in a user's module and says what it does."""

from __future__ import annotations

import importlib
import json
import sys
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from types import ModuleType

import federated_language as fl

from fedlens.errors import ConfigError, LanguageError
from fedlens.learning.process import LearningProcess
from fedlens.report.plans import explanation_of


def explain(target: str, *, as_json: bool) -> None:
    """Prints what the computation at `target` does.

    Args:
      target: MODULE:NAME, as in `studies.rounds:average`, or FILE.py:NAME.
      as_json: whether to print JSON.

    Raises:
      ConfigError: there is no such module or name, importing it fails, or what it names is no computation.
      UnsupportedError: the computation has an intrinsic that fedlens does not execute.
    """
    module, name = _module_and_name(target)
    found = _load(module)
    try:
        computation = reduce(getattr, name.split("."), found)
    except AttributeError as error:
        raise ConfigError(f"Expected a name in {module}, found no {name!r} there.{_hint(found, name)}") from error
    try:
        explanation = explanation_of(computation)
    except LanguageError as error:
        raise ConfigError(f"{str(error).rstrip('.')}, at {target}.{_hint(found, name)}") from error
    if as_json:
        print(json.dumps(explanation.to_dict(), indent=1, ensure_ascii=False))  # noqa: T201
    else:
        print(explanation)  # noqa: T201


def _module_and_name(target: str) -> tuple[str, str]:
    module, colon, name = target.rpartition(":")
    if not (colon and module and name):
        raise ConfigError(f"Expected MODULE:NAME or FILE.py:NAME, such as studies.rounds:average, found {target!r}.")
    return module, name


def _load(module: str) -> ModuleType:
    """Imports a module, which Python also looks for in the working directory; or runs a file as one."""
    is_file = module.endswith(".py")
    if is_file and not Path(module).is_file():
        raise ConfigError(f"Expected a file with a computation, found none, at {module}.")
    folder = str(Path(module).resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return _run_file(Path(module)) if is_file else importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not is_file and error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"Expected a module that Python finds from {Path.cwd()}, found no {module!r}.") from error
        raise ConfigError(_failed(module, error)) from error
    except Exception as error:
        raise ConfigError(_failed(module, error)) from error


def _run_file(path: Path) -> ModuleType:
    found = ModuleType(f"explained_{path.stem}")  # a name that no other module has
    found.__file__ = str(path)
    sys.modules[found.__name__] = found  # where a dataclass that the file defines looks for it
    exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), vars(found))
    return found


def _failed(module: str, error: Exception) -> str:
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"Expected to import {module}, found {what}; run with --debug to see where."


def _hint(module: ModuleType, name: str) -> str:
    """What else the module has to explain, the nearest names first."""
    kinds = (fl.framework.ConcreteComputation, LearningProcess)
    known = [other for other, value in vars(module).items() if isinstance(value, kinds)]
    near = get_close_matches(name, known, n=5, cutoff=0.0)
    return f" Computations there: {', '.join(near)}." if near else " There is no computation with types."
