"""Protections: the secure sums and mechanisms of a computation, and which of the clients' values they stand before.

A value that a client hands out by itself, and that flows into a secure sum or a mechanism too, goes around it. What
flows where is read off the graph of the normal form alone, field by field, so that it is the same after serialisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from federated_language import framework

from fedlens.compiler.functions import function_names_in
from fedlens.compiler.mechanisms import Clip, GaussianNoise, LocalGaussian, Mechanism, mechanism_of
from fedlens.compiler.normalize import PARAMETER, Block, calls_and_result, referenced_names
from fedlens.compiler.operations import EXTREMES, MAP, REDUCTIONS, SECURE_SUMS, SELECTS
from fedlens.compiler.origins import (
    Origin,
    Part,
    argument,
    operation_of,
    origin_of,
    origins,
    parts_of,
)
from fedlens.language.types import is_at_clients


@dataclass
class Protection:
    """A secure sum or a mechanism.

    Attributes:
      name: what it is, and of what: "secure sum of client_update.delta".
      parts: the clients' values that flow into it, on whatever way.
      direct: those of them that enter as they are, or clipped.
    """

    name: str
    parts: set[Part] = field(default_factory=set)
    direct: set[Part] = field(default_factory=set)


class Protections:
    """The protections of one computation; `names` are those that stand before a value."""

    def __init__(self, normal_form: framework.Lambda):
        """Takes the computation, as `normalize` gives it."""
        calls, _ = calls_and_result(normal_form)
        self._calls = dict(calls)
        self._origins = origins(calls)
        self.all: tuple[Protection, ...] = tuple(self._find(calls))

    def names(self, origin: Origin) -> tuple[str, ...]:
        """The protections that handing out a client's value, or a part of it, goes around.

        Args:
          origin: where the value comes from (`fedlens.compiler.origins`).

        Returns:
          Those that it flows into, on whatever way; and those that something flows into directly that it was computed
          from. A value that a local mechanism returned was protected by it, and is computed from nothing else.
        """
        own = list(parts_of(origin))
        before = [part for part, _ in self._upstream(own, through_local=False)]
        return tuple(found.name for found in self.all if _overlap(own, found.parts) or _overlap(before, found.direct))

    def origin(self, block: Block) -> Origin:
        """Where a value made of selections and structs comes from."""
        return origin_of(block, self._origins)

    def _find(self, calls: Iterable[tuple[str, framework.Call]]) -> Iterator[Protection]:
        seen: dict[str, int] = {}
        for name, call in calls:
            operation = operation_of(call)
            if operation in SECURE_SUMS:
                start, what = self._parts_in(argument(call, 0)), "secure sum"
            else:
                mechanism = next((found for found in _mechanisms(call) if not isinstance(found, Clip)), None)
                if mechanism is None:
                    continue
                what = _kind(mechanism)
                # Of a client's noise the value alone: a key is no value that it protects.
                own = operation == MAP
                start = self._parts_in(argument(call, 1), first=True) if own else self._reduced_in(call)
            label = f"{what} of {', '.join(dict.fromkeys(map(self._text, start))) or name}"
            seen[label] = seen.get(label, 0) + 1
            protection = Protection(label if seen[label] == 1 else f"{label} #{seen[label]}")
            for part, is_direct in self._upstream(start):
                protection.parts.add(part)
                if is_direct:
                    protection.direct.add(part)
            yield protection

    def _upstream(self, start: Iterable[Part], *, through_local: bool = True) -> Iterator[tuple[Part, bool]]:
        """The clients' values that some parts are computed from, themselves too, and whether without a function."""
        waiting = [(part, True) for part in start]
        seen: set[tuple[Part, bool]] = set()
        while waiting:
            part, is_direct = waiting.pop()
            if (part, is_direct) in seen:
                continue
            seen.add((part, is_direct))
            yield part, is_direct
            call = self._calls.get(part.name)
            if not _at_clients(call):
                continue
            mechanisms = list(_mechanisms(call))
            if not through_local and any(isinstance(found, LocalGaussian) for found in mechanisms):
                continue
            only_clips = operation_of(call) == MAP and isinstance(mechanism_of(argument(call, 0)), Clip)
            waiting += [(before, is_direct and only_clips) for before in self._given(call)]

    def _given(self, call: framework.Call) -> list[Part]:
        """The clients' values that a call at the clients reads."""
        if operation_of(call) in SELECTS:
            return self._parts_in(argument(call, 0))
        return self._parts_in(argument(call, 1)) if operation_of(call) == MAP else []

    def _parts_in(self, block: Block | None, *, first: bool = False) -> list[Part]:
        """The clients' values in an operand; with `first`, in the first of its fields."""
        if block is None:
            return []
        origin = self.origin(block)
        if first:
            origin = origin.values[0] if not isinstance(origin, Part) else Part(origin.name, (*origin.path, 0))
        return [part for part in parts_of(origin) if part.name == PARAMETER or _at_clients(self._calls.get(part.name))]

    def _reduced_in(self, call: framework.Call) -> list[Part]:
        """The clients' values that the server's values before a call are reduced from."""
        found: list[Part] = []
        waiting, seen = [call], set[str]()
        while waiting:
            for name in referenced_names(waiting.pop()) & self._calls.keys() - seen:
                seen.add(name)
                before = self._calls[name]
                if operation_of(before) not in REDUCTIONS:
                    waiting.append(before)
                elif before.argument is not None:
                    alone = {"federated_sum", "federated_mean"} | EXTREMES
                    value = before.argument if operation_of(before) in alone else argument(before, 0)
                    found += self._parts_in(value)
        return found

    def _text(self, part: Part) -> str:
        """A part as plans call it: the function that gives it, and its field; of a clip what is clipped."""
        call = self._calls.get(part.name)
        if call is not None and operation_of(call) == MAP and isinstance(mechanism_of(argument(call, 0)), Clip):
            return ", ".join(dict.fromkeys(self._text(before) for before in self._given(call)))
        names = [] if call is None else list(dict.fromkeys(function_names_in(call)))
        text = ", ".join(names) or part.name
        type_ = None if call is None else call.type_signature.member
        for index in part.path:
            name = None if type_ is None else list(type_.items())[index][0]
            text += f"[{index}]" if name is None else f".{name}"
            type_ = None if type_ is None else type_[index]
        return text


def _overlap(parts: Iterable[Part], others: Iterable[Part]) -> bool:
    known = list(others)
    return any(part.overlaps(other) for part in parts for other in known)


def _mechanisms(block: Block) -> Iterator[Mechanism]:
    """The mechanisms in a building block, wherever they stand."""
    if isinstance(block, framework.CompiledComputation):
        found = mechanism_of(block)
        if found is not None:
            yield found
    for child in block.children():
        yield from _mechanisms(child)


def _kind(mechanism: Mechanism) -> str:
    return "gaussian noise on the sum" if isinstance(mechanism, GaussianNoise) else "local gaussian noise"


def _at_clients(call: framework.Call | None) -> bool:
    return call is not None and is_at_clients(call.type_signature)
