"""`fedlens explain`: finds a computation in a user's module and says what it does."""

from __future__ import annotations

from fedlens.cli.finding import find, hint
from fedlens.cli.printing import print_json
from fedlens.errors import ConfigError, LanguageError
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
    found, module, name = find(target)
    try:
        explanation = explanation_of(found)
    except LanguageError as error:
        raise ConfigError(f"{str(error).rstrip('.')}, at {target}.{hint(module, name)}") from error
    if as_json:
        print_json(explanation.to_dict())
    else:
        print(explanation)  # noqa: T201
