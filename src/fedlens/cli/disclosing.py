"""`fedlens disclosure`: what a computation of a user's module tells about one client, and a limit on it."""

from __future__ import annotations

from fedlens.cli.finding import find_computation
from fedlens.cli.printing import print_json
from fedlens.compiler.disclosure import disclosure as disclosure_of
from fedlens.compiler.levels import Level, at_most
from fedlens.compiler.outputs import Disclosure
from fedlens.errors import ConfigError, DisclosureError


def disclosure(target: str, *, as_json: bool, limit: str | None) -> None:
    """Prints what the computation at `target`, or the round of the learning process there, tells about one client.

    Args:
      target: MODULE:NAME, as in `studies.rounds:average`, or FILE.py:NAME.
      as_json: whether to print JSON.
      limit: the level that no output may exceed; None for no limit.

    Raises:
      ConfigError: there is no such module or name, importing it fails, what it names is no computation; or there is no
        such level.
      DisclosureError: an output exceeds the limit; it is printed before.
      UnsupportedError: the computation has an intrinsic that fedlens does not execute.
    """
    highest = None if limit is None else level_of(limit)
    found = disclosure_of(find_computation(target))
    if as_json:
        print_json(found.to_dict())
    else:
        print(found)  # noqa: T201
    if highest is not None:
        _check(found, highest)


def level_of(name: str) -> Level:
    """The level of that name; `raw` is short for `raw data`.

    Raises:
      ConfigError: there is none.
    """
    known = {level.value: level for level in Level} | {"raw": Level.RAW}
    if name not in known:
        raise ConfigError(f"Expected one of the levels {', '.join(level.value for level in Level)}, found {name!r}.")
    return known[name]


def _check(found: Disclosure, highest: Level) -> None:
    beyond = found.exceeding(highest)
    if not beyond:
        return
    named = ", ".join(f"{output.name or 'result'!r} of {output.level}" for output in beyond)
    beside = list(dict.fromkeys(output.level for output in beyond if not at_most(highest, output.level)))
    note = "".join(f" Of {level} and {highest} neither tells less than the other." for level in beside)
    raise DisclosureError(
        f"Expected outputs of {highest} at most, found {named}.{note} Aggregate them, leave them out, or allow more."
    )
