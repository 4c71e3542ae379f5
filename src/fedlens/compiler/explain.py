"""`explain`: what a computation does, read off its plan.

Every step of the plan is evaluated over names instead of values: an argument stands for itself, a call for the name of
the user's function, `train`, a selection from it for `train.update`. Zips, selections and broadcasts move values and
are seen through, so that what is left are the functions, what they are given, and what is reduced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import federated_language as fl
from federated_language import framework

from fedlens.compiler.explanation import Call, Explanation, Placement, Reduction, Stage, Value
from fedlens.compiler.functions import function_name, function_names_in, function_of
from fedlens.compiler.normalize import Block, referenced_names
from fedlens.compiler.operations import ELEMENTS, EVALS, LOCAL_CALL, MAPS, SHARED, ZIP
from fedlens.compiler.plan import plan
from fedlens.compiler.stages import ClientStage, Input, Plan, ServerStage, Step, result_parts
from fedlens.errors import LanguageError
from fedlens.language import HostComputation
from fedlens.language.type_summaries import summarize

_MOVES = SHARED | {ZIP, "federated_zip_at_server", "federated_value_at_server", ELEMENTS}
_HOW = {  # what the members of a reduction's operand after the first are called
    "federated_weighted_mean": ("weighted by",),
    "federated_aggregate": ("from", "accumulated by", "merged by", "reported by"),
    "federated_secure_sum": ("each at most",),
    "federated_secure_sum_bitwidth": ("bits of each:",),
}
_LONGEST = 60  # characters of the arguments of one call


@dataclass(frozen=True)
class _Fields:
    """A struct of names."""

    names: tuple[str | None, ...]
    values: tuple[_Named, ...]


@dataclass(frozen=True)
class _Function:
    """A function over names; calling it is what adds it to the calls of a stage."""

    name: str
    apply: Callable[[_Named | None], _Named]


_Named: TypeAlias = Any  # a str, _Fields or _Function


def explain(computation: fl.Computation) -> Explanation:
    """Explains what a computation does: what runs where, what is reduced, and what leaves a client.

    Example:
      >>> print(explain(average_with_extraction))

    Args:
      computation: a computation with concrete types, federated or local.

    Returns:
      The explanation; printed it is text, in a notebook a table.

    Raises:
      LanguageError: `computation` is no computation, or has no types yet.
      UnsupportedError: it has an intrinsic that fedlens does not execute.
    """
    if isinstance(computation, framework.PolymorphicComputation):
        raise LanguageError(
            "Expected a computation with types, found one whose types depend on what it is called with. "
            "Give the types where it is defined, as in fed.jax_computation(fed.TensorType(np.float32, (3,)))."
        )
    if not isinstance(computation, fl.Computation):
        raise LanguageError(
            f"Expected a computation, such as fed.federated_computation makes, found {type(computation).__name__}."
        )
    planned = plan(computation)
    return _Reader(planned, computation.type_signature).read()


class _Reader:
    """Reads a plan from its first stage to its last, remembering what each name stands for."""

    def __init__(self, planned: Plan, type_: fl.FunctionType):
        self._plan = planned
        self._result_type = type_.result
        self._named: dict[str, _Named] = {each.name: _argument(each, type_.parameter) for each in planned.inputs}
        self._seen: Counter[str] = Counter()  # how often a name was given
        self._calls: list[Call] = []  # of the stage that is being read

    def read(self) -> Explanation:
        inputs = tuple(_value(self._named[each.name], "", each.type) for each in self._plan.inputs)
        parts = list(result_parts(self._plan.result, self._result_type))
        handed_out = {name for _, block, _ in parts for name in referenced_names(block)}
        counts: Counter[type] = Counter()
        stages = []
        for stage in self._plan.stages:
            stages.append(self._stage(stage, counts[type(stage)], handed_out))
            counts[type(stage)] += 1
        result = tuple(_value(path, _text(self._evaluate(block, self._named)), part) for path, block, part in parts)
        return Explanation(inputs, tuple(stages), result)

    def _stage(self, stage: ServerStage | ClientStage, index: int, handed_out: set[str]) -> Stage:
        self._calls = []
        sends = []
        for step in stage.body:
            if step.name not in self._named:  # what makes a sequence is repeated wherever the sequence is folded
                self._named[step.name] = self._step(step)
            if step.operation in SHARED:
                sends.append(self._value_of(step.name, step.type))
        calls = tuple(self._calls)
        if isinstance(stage, ServerStage):
            return Stage("server", index, calls, tuple(sends), (), (), ())
        outputs = list(zip(stage.outputs, stage.output_types, strict=True))
        later = {name for other in self._plan.stages if isinstance(other, ClientStage) for name in other.columns}
        return Stage(
            "clients",
            index,
            calls,
            tuple(sends),
            tuple(self._reduction(step) for step in stage.reductions),
            tuple(self._value_of(name, type_) for name, type_ in outputs if name in later),
            tuple(self._value_of(name, type_) for name, type_ in outputs if name in handed_out),
        )

    def _value_of(self, name: str, type_: fl.Type) -> Value:
        if not isinstance(type_, fl.FederatedType):
            type_ = fl.FederatedType(type_, fl.CLIENTS)
        return _value("", _text(self._named[name]), type_)

    def _step(self, step: Step) -> _Named:
        operand = None if step.operand is None else self._evaluate(step.operand, self._named)
        if step.operation in MAPS:
            function, argument = _members(operand, 2)
            return self._apply(function, argument, step.type)
        if step.operation in EVALS:
            return self._apply(operand, None, step.type)
        if step.operation == LOCAL_CALL:
            return self._apply(self._evaluate(step.function, self._named), operand, step.type)
        if step.operation in _MOVES:
            return operand
        return self._call(step.operation.removeprefix("federated_"), operand, step.type)

    def _reduction(self, step: Step) -> Reduction:
        operand = self._evaluate(step.operand, self._named)
        operation = step.operation.removeprefix("federated_").removesuffix("_bitwidth").replace("_", " ")
        of, how = operand, ""
        if step.operation in _HOW:
            labels = _HOW[step.operation]
            of, *rest = _members(operand, 1 + len(labels))
            how = ", ".join(f"{label} {_text(value)}" for label, value in zip(labels, rest, strict=True))
        self._named[step.name] = self._unique(f"{operation.split()[-1]}({_text(of)})")
        return Reduction(operation, _text(of), how, summarize(step.type))

    def _apply(self, function: _Named, argument: _Named | None, type_: fl.Type) -> _Named:
        if isinstance(function, _Function):
            return function.apply(argument)
        return self._call(_text(function), argument, type_)  # a function that is an argument

    def _call(self, name: str, argument: _Named | None, type_: fl.Type, on_host: bool = False) -> str:
        """Notes a call, and returns what its result is called."""
        given = "" if argument is None else _text(argument, outermost=True)
        self._calls.append(Call(name, given, summarize(type_), on_host))
        return self._unique(name)

    def _unique(self, name: str) -> str:
        self._seen[name] += 1
        return name if self._seen[name] == 1 else f"{name}#{self._seen[name]}"

    def _evaluate(self, block: Block | None, named: Mapping[str, _Named]) -> _Named:
        """What a building block stands for."""
        match block:
            case framework.Reference():
                return named[block.name]
            case framework.Selection():
                field = list(block.source.type_signature.items())[block.as_index()][0]
                return _select(self._evaluate(block.source, named), block.as_index(), field)
            case framework.Struct():
                fields = list(block.items())
                return _Fields(
                    tuple(name for name, _ in fields), tuple(self._evaluate(value, named) for _, value in fields)
                )
            case framework.CompiledComputation():
                name, result = function_name(block), block.type_signature.result
                on_host = isinstance(function_of(block), HostComputation)
                return _Function(name, lambda argument: self._call(name, argument, result, on_host))
            case framework.Intrinsic():
                uri, result = block.uri, block.type_signature.result
                return _Function(uri, lambda argument: self._call(uri, argument, result))
            case framework.Lambda():
                return _Function(
                    ", ".join(dict.fromkeys(function_names_in(block))) or "a selection",
                    lambda argument: self._evaluate(block.result, {**named, str(block.parameter_name): argument}),
                )
            case framework.Call():
                argument = None if block.argument is None else self._evaluate(block.argument, named)
                return self._apply(self._evaluate(block.function, named), argument, block.type_signature)
            case framework.Block():
                inner = dict(named)
                for name, value in block.locals:
                    inner[name] = self._evaluate(value, inner)
                return self._evaluate(block.result, inner)
        return str(block)  # a literal


def _argument(each: Input, parameter_type: fl.Type) -> str:
    """The name of a part of the argument, as the user's function has it."""
    name, type_ = "", parameter_type
    for index in each.path:
        field = list(type_.items())[index][0]
        name = _select(name, index, field) if name else field or f"argument {index}"
        type_ = type_[index]
    return name or "argument"


def _select(value: _Named, index: int, field: str | None) -> _Named:
    if isinstance(value, _Fields):
        return value.values[index]
    return f"{value}[{index}]" if field is None else f"{value}.{field}"


def _members(value: _Named, count: int) -> tuple[_Named, ...]:
    return value.values if isinstance(value, _Fields) else tuple(_select(value, index, None) for index in range(count))


def _value(name: str, source: str, type_: fl.Type) -> Value:
    return Value(name, source, _placement(type_), summarize(type_), str(type_))


def _placement(type_: fl.Type) -> Placement:
    if not isinstance(type_, fl.FederatedType):
        return "without placement"
    if type_.placement is fl.SERVER:
        return "at the server"
    return "equal at all clients" if type_.all_equal else "per client"


def _text(value: _Named, *, outermost: bool = False) -> str:
    """What stands for a value, on one line."""
    match value:
        case _Function():
            return value.name
        case _Fields():
            inner = ", ".join(_text(field) for field in value.values)
            text = inner if outermost else f"({inner})"
        case _:
            text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
