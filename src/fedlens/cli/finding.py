"""Finding what a command is to look at: MODULE:NAME, or FILE.py:NAME, of a computation or a learning process."""

from __future__ import annotations

import importlib
import sys
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import federated_language as fl

from fedlens.errors import ConfigError
from fedlens.learning.process import LearningProcess


def find(target: str) -> tuple[Any, ModuleType, str]:
    """What stands at `target`, of whatever kind, with the module that it is in and its name there.

    Args:
      target: MODULE:NAME, as in `studies.rounds:average`, or FILE.py:NAME. The module is imported, which runs it.

    Raises:
      ConfigError: there is no such module or name, or importing the module fails.
    """
    module, name = module_and_name(target)
    found = load(module)
    try:
        return reduce(getattr, name.split("."), found), found, name
    except AttributeError as error:
        raise ConfigError(f"Expected a name in {module}, found no {name!r} there.{hint(found, name)}") from error


def find_computation(target: str) -> fl.framework.ConcreteComputation:
    """The computation at `target`, or the round of the learning process there.

    Raises:
      ConfigError: there is none; the message names those that the module has.
    """
    found, module, name = find(target)
    if isinstance(found, LearningProcess):
        return found.next_computation
    if isinstance(found, fl.framework.ConcreteComputation):
        return found
    if isinstance(found, fl.framework.PolymorphicComputation):
        found_is = "one whose types depend on what it is called with"
    else:
        found_is = type(found).__name__
    raise ConfigError(
        f"Expected a computation with types, or a learning process, found {found_is}, at {target}.{hint(module, name)}"
    )


def module_and_name(target: str) -> tuple[str, str]:
    """The two parts of MODULE:NAME.

    Raises:
      ConfigError: `target` is not of that form.
    """
    module, colon, name = target.rpartition(":")
    if not (colon and module and name):
        raise ConfigError(f"Expected MODULE:NAME or FILE.py:NAME, such as studies.rounds:average, found {target!r}.")
    return module, name


def load(module: str) -> ModuleType:
    """Imports a module, which Python also looks for in the working directory; or runs a file as one.

    Raises:
      ConfigError: there is no such module or file, or it fails when it runs.
    """
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


def hint(module: ModuleType, name: str) -> str:
    """What else the module has that a command can look at, the nearest names first; a sentence to end an error with."""
    kinds = (fl.framework.ConcreteComputation, LearningProcess)
    known = [other for other, value in vars(module).items() if isinstance(value, kinds)]
    near = get_close_matches(name, known, n=5, cutoff=0.0)
    return f" Computations there: {', '.join(near)}." if near else " There is no computation with types."


def _run_file(path: Path) -> ModuleType:
    found = ModuleType(f"explained_{path.stem}")  # a name that no other module has
    found.__file__ = str(path)
    sys.modules[found.__name__] = found  # where a dataclass that the file defines looks for it
    exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), vars(found))
    return found


def _failed(module: str, error: Exception) -> str:
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"Expected to import {module}, found {what}; run with --debug to see where."
