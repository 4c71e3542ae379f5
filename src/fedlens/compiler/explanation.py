"""`Explanation`: a plan as a person reads it, in a terminal, in a notebook, or as data."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Placement = Literal["per client", "at the server", "equal at all clients", "without placement"]

_MARK = "!"  # of what leaves a client; ASCII, as not every terminal and log shows a warning sign
_LEGEND = f"{_MARK} one value for each client: it leaves the client as it is, not aggregated."
_WIDEST = 72  # characters before the column of types


@dataclass(frozen=True)
class Value:
    """A value that enters or leaves a part of a plan.

    Attributes:
      name: the name of an argument, or the path of a part of the result; "" for the only one.
      source: what it is: the function or the reduction that gave it.
      placement: where it is.
      type: its member type, in a few words if it is long.
      full_type: its type as the language writes it.
    """

    name: str
    source: str
    placement: Placement
    type: str
    full_type: str


@dataclass(frozen=True)
class Call:
    """A call of a user's function.

    Attributes:
      function: its name.
      arguments: what it is given: arguments of the computation, and results of other functions.
      type: the type of its result, in a few words if it is long.
      on_host: whether it runs on the host, a `python_computation` or `tensorflow_computation`, and is not traced.
    """

    function: str
    arguments: str
    type: str
    on_host: bool = False


@dataclass(frozen=True)
class Reduction:
    """A value of the server's that is made of all clients' values.

    Attributes:
      operation: sum, mean, ...
      of: what is reduced.
      how: what else decides the result, such as "weighted by train.num_examples".
      type: the type of the result, in a few words if it is long.
    """

    operation: str
    of: str
    how: str
    type: str


@dataclass(frozen=True)
class Stage:
    """A stage of a plan.

    Attributes:
      place: "clients" for a pass over the cohort.
      index: which stage of its place it is, from 0: errors and logs call it the same.
      calls: the functions that run, in their order.
      sends: values of the server's that go to all clients.
      reductions: what is reduced in the pass.
      kept: clients' values that a later pass reads.
      leaves: clients' values that are part of the result.
    """

    place: Literal["clients", "server"]
    index: int
    calls: tuple[Call, ...]
    sends: tuple[Value, ...]
    reductions: tuple[Reduction, ...]
    kept: tuple[Value, ...]
    leaves: tuple[Value, ...]


@dataclass(frozen=True)
class Explanation:
    """What a computation does, stage by stage: see `explain`.

    Printed it is text for a terminal; in a notebook it shows as a table.

    Attributes:
      inputs: the arguments.
      stages: what happens with them, in order.
      result: the parts of the result.
    """

    inputs: tuple[Value, ...]
    stages: tuple[Stage, ...]
    result: tuple[Value, ...]

    @property
    def leaves_clients(self) -> tuple[Value, ...]:
        """The parts of the result that hold a value of each client."""
        return tuple(value for value in self.result if value.placement == "per client")

    def to_dict(self) -> dict[str, Any]:
        """The explanation as JSON has it: dicts, lists, strings and numbers."""
        found: dict[str, Any] = _lists(asdict(self))
        return found

    def __str__(self) -> str:
        rows = [(f"{_MARK if row.marked else ' '} {'  ' * row.indent}{row.text}", row) for row in self._rows()]
        width = min(max((len(left) for left, row in rows if row.type), default=0), _WIDEST)
        lines = [self._heading()]
        for left, row in rows:
            lines += [f"{left:<{width}}  {row.type}".rstrip()] if row.indent else ["", row.text]
        return "\n".join([*lines, *(["", _LEGEND] if self.leaves_clients else [])])

    def _repr_html_(self) -> str:
        left = 'style="text-align: left"'
        body = []
        for row in self._rows():
            text = html.escape(row.text)
            if row.indent == 0:
                body.append(f'<tr><th colspan="2" {left}>{text}</th></tr>')
                continue
            mark = "&#9888; " if row.marked else ""
            pad = f'style="text-align: left; padding-left: {1.5 * row.indent}em"'
            body.append(f"<tr><td {pad}>{mark}{text}</td><td {left}><code>{html.escape(row.type)}</code></td></tr>")
        legend = html.escape(_LEGEND.removeprefix(_MARK).strip())
        note = f"<p>&#9888; {legend}</p>" if self.leaves_clients else ""
        return f"<p>{html.escape(self._heading())}</p><table><tbody>{''.join(body)}</tbody></table>{note}"

    def _heading(self) -> str:
        passes = sum(stage.place == "clients" for stage in self.stages)
        leaving = len(self.leaves_clients)
        values = "no value leaves a client" if not leaving else f"{_count(leaving, 'value')} of each client handed out"
        return f"{_count(passes, 'pass', 'passes')} over the cohort, {values}"

    def _rows(self) -> Iterator[_Row]:
        if self.inputs:
            yield _Row("inputs")
            for value in self.inputs:
                yield _Row(f"{value.name}, {value.placement}", 1, value.type)
        for stage in self.stages:
            yield from _stage_rows(stage)
        yield _Row("result")
        for value in self.result:
            name = f"{value.name} = " if value.name else ""
            marked = value.placement == "per client"
            yield _Row(f"{name}{value.source}, {value.placement}", 1, value.type, marked)


@dataclass(frozen=True)
class _Row:
    text: str
    indent: int = 0
    type: str = ""
    marked: bool = False


def _stage_rows(stage: Stage) -> Iterator[_Row]:
    at_clients = stage.place == "clients"
    yield _Row(f"client stage {stage.index}, one pass over the cohort" if at_clients else f"server stage {stage.index}")
    if stage.calls:
        yield _Row("each client runs" if at_clients else "runs", 1)
    for call in stage.calls:
        where = ", on the host" if call.on_host else ""
        yield _Row(f"{call.function}({call.arguments}){where}", 2, call.type)
    if stage.sends:
        yield _Row("sends to all clients", 1)
    for value in stage.sends:
        yield _Row(value.source, 2, value.type)
    if stage.reductions:
        yield _Row("reduces over all clients", 1)
    for reduction in stage.reductions:
        how = f", {reduction.how}" if reduction.how else ""
        yield _Row(f"{reduction.operation} of {reduction.of}{how}", 2, reduction.type)
    if stage.kept:
        yield _Row("keeps for a later pass", 1)
    for value in stage.kept:
        yield _Row(value.source, 2, value.type)
    if stage.leaves:
        yield _Row("hands out, client by client", 1)
    for value in stage.leaves:
        yield _Row(value.source, 2, value.type, marked=True)


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number or 'no'} {singular if number == 1 else plural or singular + 's'}"


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lists(part) for name, part in value.items()}
    return [_lists(part) for part in value] if isinstance(value, tuple | list) else value
