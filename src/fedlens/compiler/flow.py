"""`Flow`: what is known about a value's way from the clients, and how flows join, fall and part into fields.

A flow has one bound, or two of which neither is below the other: a mean of values that are locally private is locally
private (post-processing) and an aggregate. Joined with another aggregate it still is an aggregate, which neither of the
two bounds says alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import federated_language as fl

from fedlens.compiler.levels import Level, at_most, join
from fedlens.language.types import contains_sequence


@dataclass(frozen=True)
class Flow:
    """What a value tells about one client, and the way that decides it.

    Attributes:
      bounds: levels that the value is at most, of which none is below another.
      path: readable names from an input to the value: `("data", "train", "mean")`.
      reasons: why it tells less than what it is computed from, in the order of the path.
      fields: name and flow of each field, of a struct; none of a tensor or a sequence.
      inputs: the parts of the argument that it depends on.
      origin: the same for values that are one value, moved; "" for a value that is put together from several.
      clipped: the norm that each client's value was clipped to, of the result of a clip.
      summed: the norm that each client's value was clipped to, of a sum of such results.
      in_sequence: whether there is a sequence in it: of a client's inputs, the one to name.
    """

    bounds: frozenset[Level] = frozenset({Level.PUBLIC})
    path: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    fields: tuple[tuple[str | None, Flow], ...] = ()
    inputs: frozenset[str] = frozenset()
    origin: str = ""
    clipped: float | None = None
    summed: float | None = None
    in_sequence: bool = False

    @property
    def level(self) -> Level:
        """The level to report: of two bounds the mechanism's, which has a guarantee."""
        return Level.LOCAL_DP if Level.LOCAL_DP in self.bounds else next(iter(self.bounds))

    def field(self, index: int) -> Flow:
        """The flow of a field of a struct."""
        return self.fields[index][1] if self.fields else self

    def at(self, path: Iterable[int]) -> Flow:
        """The flow of a field at a path, position by position."""
        found = self
        for index in path:
            found = found.field(index)
        return found


PUBLIC = Flow()


def within(flow: Flow, limit: Level) -> bool:
    """Whether a value tells no more than `limit`: one of its bounds does."""
    return any(at_most(bound, limit) for bound in flow.bounds)


def joined(*flows: Flow) -> Flow:
    """What several values tell together, without the fields of any; the path is that of the one that tells most."""
    if not flows:
        return PUBLIC
    bounds = flows[0].bounds
    for flow in flows[1:]:
        bounds = _least({join(one, other) for one in bounds for other in flow.bounds})
    inputs = frozenset[str]().union(*(flow.inputs for flow in flows))
    deciding = [flow for flow in flows if flow.bounds == bounds]
    if deciding:
        first = next((flow for flow in deciding if flow.in_sequence), deciding[0])
        return Flow(bounds, first.path, first.reasons, inputs=inputs, in_sequence=first.in_sequence)
    # No one of them tells as much as all together: the path is that of the first that tells anything.
    telling = [flow for flow in flows if flow.level is not Level.PUBLIC]
    reasons = dict.fromkeys(reason for flow in telling for reason in flow.reasons)
    return Flow(bounds, telling[0].path, tuple(reasons), inputs=inputs)


def struct_of(fields: Iterable[tuple[str | None, Flow]], origin: str = "") -> Flow:
    """A struct of values, each of which keeps its own flow."""
    found = tuple(fields)
    return replace(joined(*(flow for _, flow in found)), fields=found, origin=origin)


def lowered(flow: Flow, to: Level, reason: str) -> Flow:
    """A value that tells no more than `to`, and why; as it was where it tells no more than that already.

    The bounds that hold already stay beside a new one that does not imply them: whatever is computed from a locally
    private value is locally private.
    """
    if within(flow, to):
        return flow
    bounds = _least({to} | flow.bounds)
    fields = tuple((name, lowered(field, to, reason)) for name, field in flow.fields)
    return replace(flow, bounds=bounds, reasons=(*flow.reasons, reason), fields=fields)


def moved(flow: Flow, step: str) -> Flow:
    """The same value one step on."""
    fields = tuple((name, moved(field, step)) for name, field in flow.fields)
    return replace(flow, path=(*flow.path, step), fields=fields)


def unmarked(flow: Flow) -> Flow:
    """The same levels, without what is known of the value itself: its origin, and the norm that it was clipped to."""
    fields = tuple((name, unmarked(field)) for name, field in flow.fields)
    return replace(flow, origin="", clipped=None, summed=None, fields=fields)


def summed(flow: Flow) -> Flow:
    """A sum of values: what each of them was clipped to bounds what one client adds to it."""
    fields = tuple((name, summed(field)) for name, field in flow.fields)
    return replace(flow, clipped=None, summed=flow.clipped, fields=fields)


def clipped(flow: Flow, norm: float) -> Flow:
    """The result of a clip; a part of it is no longer than the whole."""
    fields = tuple((name, clipped(field, norm)) for name, field in flow.fields)
    return replace(flow, clipped=norm, fields=fields)


def each_joined(flow: Flow, other: Flow) -> Flow:
    """A value each of whose fields depends on another value too."""
    if other.level is Level.PUBLIC:
        return replace(flow, inputs=flow.inputs | other.inputs)
    both = joined(flow, other)
    return replace(both, fields=tuple((name, each_joined(field, other)) for name, field in flow.fields))


def shaped(base: Flow, type_: fl.Type, step: str, origin: str) -> Flow:
    """A flow for a value of a type, all of whose parts tell the same."""
    fields: tuple[tuple[str | None, Flow], ...] = ()
    if isinstance(type_, fl.StructType):
        fields = tuple(
            (field, shaped(base, part, selected_name(step, index, field), f"{origin}[{index}]"))
            for index, (field, part) in enumerate(type_.items())
        )
    in_sequence = contains_sequence(type_)
    return Flow(base.bounds, (*base.path, step), base.reasons, fields, base.inputs, origin, in_sequence=in_sequence)


def selected_name(name: str, index: int, field: str | None) -> str:
    """What a field is called, by name if it has one."""
    return f"{name}[{index}]" if field is None else f"{name}.{field}"


def with_part(flow: Flow, path: tuple[int, ...], leaf: Flow) -> Flow:
    """A struct with the flow of one part in place of another, and what it tells in all."""
    if not path:
        return leaf
    fields = list(flow.fields)
    name, field = fields[path[0]]
    fields[path[0]] = (name, with_part(field, path[1:], leaf))
    return struct_of(fields, flow.origin)


def named(flow: Flow, origin: str) -> Flow:
    """The flow of a new value, and of its parts."""
    fields = tuple((name, named(field, f"{origin}[{index}]")) for index, (name, field) in enumerate(flow.fields))
    return replace(flow, origin=origin, fields=fields)


def noted(flow: Flow, note: str) -> Flow:
    """The same value with one more reason."""
    fields = tuple((name, noted(field, note)) for name, field in flow.fields)
    return replace(flow, reasons=(*flow.reasons, note), fields=fields)


def _least(bounds: Iterable[Level]) -> frozenset[Level]:
    """The bounds that no other one implies."""
    found = set(bounds)
    return frozenset(
        bound for bound in found if not any(other is not bound and at_most(other, bound) for other in found)
    )
