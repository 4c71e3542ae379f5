"""`Disclosure`: what a computation's outputs tell, as a person reads it, in a terminal, in a notebook, or as data."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from typing import Any

from fedlens.compiler.levels import Level, at_most, join

_MARK = "!"  # of what tells about single clients; ASCII, as not every terminal and log shows a warning sign
_LEGEND = f"{_MARK} tells about single clients: a value for each of them, or one that may be one client's own."


@dataclass(frozen=True)
class Output:
    """One output.

    Attributes:
      name: the path of a part of the result; "" for the only one.
      level: how much it tells about one client.
      path: the way that decides it, from an input to the output.
      reasons: why it tells less than what it comes from; and of a mechanism that counts for nothing, why.
      bypasses: the secure sums and mechanisms that the output goes around.
      also: a further level that it is at most, as the mean of locally private values is an aggregate too.
      type: its type, in a few words if it is long.
    """

    name: str
    level: Level
    path: tuple[str, ...]
    reasons: tuple[str, ...]
    bypasses: tuple[str, ...]
    also: tuple[Level, ...]
    type: str

    def within(self, limit: Level) -> bool:
        """Whether it tells no more than `limit`."""
        return any(at_most(level, limit) for level in (self.level, *self.also))


@dataclass(frozen=True)
class Disclosure:
    """What a computation tells about one client, output by output: see `disclosure`.

    Printed it is text for a terminal; in a notebook it shows as a table.

    Attributes:
      outputs: the parts of the result, each at one level; then the keys of selects.
    """

    outputs: tuple[Output, ...]

    @property
    def level(self) -> Level:
        """What all outputs tell together."""
        return join(*(output.level for output in self.outputs))

    @property
    def bypasses(self) -> tuple[str, ...]:
        """The secure sums and mechanisms that some output goes around."""
        return tuple(dict.fromkeys(name for output in self.outputs for name in output.bypasses))

    def exceeding(self, limit: Level) -> tuple[Output, ...]:
        """The outputs that are not known to tell no more than `limit`."""
        return tuple(output for output in self.outputs if not output.within(limit))

    def to_dict(self) -> dict[str, Any]:
        """The disclosure as JSON has it: dicts, lists, strings and numbers."""
        outputs = []
        for output in self.outputs:
            values = {
                name: list(value) if isinstance(value, tuple) else value for name, value in asdict(output).items()
            }
            outputs.append(values | {"level": output.level.value, "also": [level.value for level in output.also]})
        return {"level": self.level.value, "outputs": outputs}

    def __str__(self) -> str:
        lines = [self._heading()]
        rows = [(f"{_MARK if _is_marked(output) else ' '}   {_title(output)}", output) for output in self.outputs]
        width = max((len(left) for left, _ in rows), default=0)
        for left, output in rows:
            lines += ["", f"{left:<{width}}  {output.type}".rstrip()]
            lines += [f"      {line}" for line in _details(output)]
        return "\n".join([*lines, *(["", _LEGEND] if any(map(_is_marked, self.outputs)) else [])])

    def _repr_html_(self) -> str:
        left = 'style="text-align: left"'
        body = []
        for output in self.outputs:
            mark = "&#9888; " if _is_marked(output) else ""
            details = "<br>".join(html.escape(line) for line in _details(output))
            body.append(
                f"<tr><td {left}>{mark}{html.escape(_title(output))}</td><td {left}>{details}</td>"
                f"<td {left}><code>{html.escape(output.type)}</code></td></tr>"
            )
        return f"<p>{html.escape(self._heading())}</p><table><tbody>{''.join(body)}</tbody></table>"

    def _heading(self) -> str:
        count = len(self.outputs)
        return f"{count or 'no'} output{'s' * (count != 1)}, {self.level} in all"


def _is_marked(output: Output) -> bool:
    return not output.within(Level.AGGREGATE)


def _title(output: Output) -> str:
    levels = " and ".join(map(str, (output.level, *output.also)))
    return f"{output.name or 'result'}, {levels}"


def _details(output: Output) -> list[str]:
    return [
        " -> ".join(output.path),
        *(f"because: {reason}" for reason in output.reasons),
        *(f"bypasses: {name}" for name in output.bypasses),
    ]
