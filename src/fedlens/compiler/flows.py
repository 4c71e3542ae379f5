"""Information flow over the normal form: what each named value tells about one client, rule by rule.

Every call is evaluated over flows instead of values. Whatever moves values keeps the flow of each field; a function of
the user's is opaque, each of its results depends on everything that it is given. A level falls by one of few rules, and
each of them says so in the flow's reasons; `docs/disclosure.md` has the table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import federated_language as fl
from federated_language import framework

from fedlens.compiler.flow import (
    PUBLIC,
    Flow,
    clipped,
    each_joined,
    joined,
    lowered,
    moved,
    named,
    noted,
    selected_name,
    shaped,
    struct_of,
    summed,
    unmarked,
    with_part,
)
from fedlens.compiler.functions import function_name, function_names_in, function_of
from fedlens.compiler.guarantees import noise_multiplier, objection_to
from fedlens.compiler.levels import Level
from fedlens.compiler.mechanisms import Clip, LocalGaussian, Mechanism, mechanism_of
from fedlens.compiler.normalize import PARAMETER, Block, calls_and_result, referenced_names
from fedlens.compiler.operations import EVALS, EXTREMES, GENERIC, MAPS, MEANS, SECURE_SUMS, SELECTS, ZIP, unsupported
from fedlens.compiler.origins import argument, operation_of
from fedlens.compiler.sums import is_sum
from fedlens.language import LocalComputation
from fedlens.language.types import is_at_clients, member_of

_MOVES = {
    "federated_broadcast",
    "federated_value_at_clients",
    "federated_value_at_server",
    ZIP,
    "federated_zip_at_server",
}
_Function: TypeAlias = Callable[[Flow | None], Flow]
_Known: TypeAlias = Mapping[str, Flow]


def flows(normal_form: framework.Lambda) -> dict[str, Flow]:
    """What each value of a computation tells about one client.

    Args:
      normal_form: the computation, as `normalize` gives it.

    Returns:
      The flow of each named call, of the parameter (`arg`), and of each part of it that has a placement (`arg[0]`, as
      in a plan). A struct's fields have flows of their own.

    Raises:
      UnsupportedError: an intrinsic that fedlens does not execute, or a mechanism that it does not know.
    """
    return flows_and_result(normal_form)[0]


def flows_and_result(normal_form: framework.Lambda) -> tuple[dict[str, Flow], Flow]:
    """The flows of all named values, and that of the result."""
    reader = _Reader(normal_form, {})
    found = reader.read()
    uses = Counter(reader.keys)
    handed_out = {flow.origin for flow in leaves_of(found[1])}
    spoiled = {origin: "serves another mechanism too" for origin, count in uses.items() if count > 1}
    spoiled |= dict.fromkeys(uses.keys() & reader.read_elsewhere, "is read by something else too")
    spoiled |= dict.fromkeys(uses.keys() & handed_out, "is handed out")
    return _Reader(normal_form, spoiled).read() if spoiled else found


def leaves_of(flow: Flow) -> Iterator[Flow]:
    """The flows of the tensors and sequences in a value."""
    if not flow.fields:
        yield flow
    for _, field in flow.fields:
        yield from leaves_of(field)


class _Reader:
    """Reads a normal form from its first call to its last.

    Attributes:
      keys: where the keys of mechanisms came from, one entry for each mechanism.
      read_elsewhere: where came from what other functions read.
    """

    def __init__(self, normal_form: framework.Lambda, spoiled: Mapping[str, str]):
        self._normal_form = normal_form
        self._spoiled = spoiled  # origin of a key that hides nothing -> why
        self._client_inputs: set[str] = set()
        self.keys: list[str] = []
        self.read_elsewhere: set[str] = set()

    def read(self) -> tuple[dict[str, Flow], Flow]:
        calls, result = calls_and_result(self._normal_form)
        known: dict[str, Flow] = {}
        if self._normal_form.parameter_type is not None:
            known[PARAMETER] = self._input(PARAMETER, "", self._normal_form.parameter_type, known)
        for name, call in calls:
            known[name] = self._call(name, call, known)
        return known, self._value(result, known)

    def _input(self, key: str, name: str, type_: fl.Type, known: dict[str, Flow]) -> Flow:
        """The flow of a part of the argument, called as the user's function calls it."""
        if isinstance(type_, fl.StructType):
            fields = []
            for index, (field, part) in enumerate(type_.items()):
                inner = selected_name(name, index, field) if name else field or f"argument {index}"
                fields.append((field, self._input(f"{key}[{index}]", inner, part, known)))
            return struct_of(fields, key)
        name = name or "argument"
        is_clients_own = is_at_clients(type_)
        if is_clients_own:
            self._client_inputs.add(key)
        level = Level.RAW if is_clients_own else Level.PUBLIC
        known[key] = shaped(Flow(frozenset({level}), inputs=frozenset({key})), member_of(type_), name, key)
        return known[key]

    def _value(self, block: Block, known: _Known) -> Flow:
        match block:
            case framework.Reference():
                return known.get(block.name, PUBLIC)
            case framework.Selection():
                return self._value(block.source, known).field(block.as_index())
            case framework.Struct():
                return struct_of((name, self._value(value, known)) for name, value in block.items())
            case framework.Block():
                inner = dict(known)
                for name, value in block.locals:
                    inner[name] = self._call(name, value, inner)
                return self._value(block.result, inner)
            case framework.Call():
                return self._call("", block, known)
        # A literal; a function stands where it is handed on as a value, and tells what it has captured.
        return self._captured(block, known)

    def _captured(self, function: Block, known: _Known) -> Flow:
        """What a function tells by the values around it that it reads."""
        return joined(*(known[name] for name in sorted(referenced_names(function) & known.keys())))

    def _call(self, name: str, call: framework.Call, known: _Known) -> Flow:
        operation = operation_of(call)
        if operation is None or operation in GENERIC or operation.startswith("sequence_"):
            given = None if call.argument is None else self._value(call.argument, known)
            return self._apply(call.function, given, known, name)
        if operation in _MOVES:
            return self._value(call.argument, known)
        if operation in MAPS:
            return self._apply(argument(call, 0), self._value(argument(call, 1), known), known, name)
        if operation in EVALS:
            return self._apply(call.argument, None, known, name)
        self._note_read(self._value(call.argument, known))
        if operation in SELECTS:
            return self._select(name, call, known)
        return self._reduce(name, operation, call, known)

    def _note_read(self, given: Flow) -> None:
        self.read_elsewhere |= {leaf.origin for leaf in leaves_of(given)}

    def _apply(self, function: Block, given: Flow | None, known: _Known, name: str) -> Flow:
        type_ = function.type_signature.result
        if isinstance(function, framework.Lambda):
            inner = dict(known)
            if function.parameter_name is not None and given is not None:
                inner[function.parameter_name] = given
            return self._value(function.result, inner)
        if isinstance(function, framework.Intrinsic):
            self._note_read(given or PUBLIC)
            return self._operator(function.uri, given or PUBLIC, type_, name)
        if not isinstance(function, framework.CompiledComputation):  # a function that is an argument
            return _computed("a function", joined(given or PUBLIC, self._captured(function, known)), type_, name)
        mechanism = mechanism_of(function)
        if mechanism is not None:
            return self._mechanism(mechanism, given or PUBLIC, type_, name)
        given = PUBLIC if given is None else given
        self._note_read(given)
        called = function_name(function)
        result = _computed(called, given, type_, name)
        local = function_of(function)
        for path, source in local.unchanged if isinstance(local, LocalComputation) else ():
            if given.at(source).level is Level.RAW:
                result = with_part(result, path, moved(given.at(source), result.at(path).path[-1]))
        return result

    def _operator(self, uri: str, given: Flow, type_: fl.Type, name: str) -> Flow:
        """The operators over sequences and the generic ones, wherever they run."""
        if uri == "sequence_map":  # a sequence of what is computed from each element is still all of the data
            return shaped(joined(given), type_, uri, name)
        if uri in GENERIC or uri in ("sequence_reduce", "sequence_sum"):
            return _computed(uri, given, type_, name)
        raise unsupported(uri)

    def _mechanism(self, mechanism: Mechanism, given: Flow, type_: fl.Type, name: str) -> Flow:
        if isinstance(mechanism, Clip):
            return clipped(_computed("clip", given, type_, name), mechanism.norm)
        value, key = given.field(0), given.field(1)
        self.keys.append(key.origin)
        is_local = isinstance(mechanism, LocalGaussian)
        step = "local gaussian noise" if is_local else "gaussian noise"
        objection = objection_to(mechanism, value, key, self._spoiled, self._client_inputs)
        # The path is the value's, and a key's where the value tells nothing.
        telling = given if value.level is Level.PUBLIC or objection is not None else value
        result = _computed(step, telling, type_, name)
        if objection is None:
            how = f"noise multiplier {noise_multiplier(mechanism):g}"
            return lowered(result, Level.LOCAL_DP if is_local else Level.CENTRAL_DP, f"{mechanism}: {how}")
        return noted(result, f"{mechanism} counts for nothing: {objection}")

    def _select(self, name: str, call: framework.Call, known: _Known) -> Flow:
        keys = lowered(
            joined(self._value(argument(call, 0), known)),
            Level.PER_CLIENT,
            "rows of the server's, which tell the keys and nothing else of the client's data",
        )
        of_server = joined(self._value(argument(call, 2), known), self._captured(argument(call, 3), known))
        return shaped(joined(keys, of_server), call.type_signature.member, "select", name)

    def _reduce(self, name: str, operation: str, call: framework.Call, known: _Known) -> Flow:
        what = operation.removeprefix("federated_").removesuffix("_bitwidth").replace("_", " ")
        if operation == "federated_aggregate":
            return self._aggregate(name, call, known)
        if operation in EXTREMES:
            value = self._value(call.argument, known)
            reason = f"{what} over all clients: every number in it is one client's own, and not said whose"
            return named(moved(lowered(unmarked(value), Level.PER_CLIENT, reason), what), name)
        if operation == "federated_sum":
            return named(summed(moved(_over_cohort(self._value(call.argument, known), what), what)), name)
        if operation in MEANS | SECURE_SUMS:
            if operation == "federated_mean":
                value, rest = self._value(call.argument, known), PUBLIC
            else:
                value, rest = self._value(argument(call, 0), known), self._value(argument(call, 1), known)
            value = _over_cohort(each_joined(value, rest), what)
            return named(moved(summed(value) if operation in SECURE_SUMS else unmarked(value), what), name)
        raise unsupported(operation)

    def _aggregate(self, name: str, call: framework.Call, known: _Known) -> Flow:
        functions = [argument(call, index) for index in (2, 3, 4)]
        value, zero = (self._value(argument(call, index), known) for index in (0, 1))
        together = joined(value, zero, *(self._captured(function, known) for function in functions))
        if is_sum(functions[0]) and is_sum(functions[1]):
            together = _over_cohort(together, "aggregate, whose accumulation is a sum,")
        else:
            called = ", ".join(dict.fromkeys(function_names_in(functions[0]))) or "its accumulation"
            reason = f"aggregate over all clients: {called} is not shown to be a sum, and may keep one client's value"
            together = lowered(together, Level.PER_CLIENT, reason)
        return shaped(together, call.type_signature.member, "aggregate", name)


def _over_cohort(flow: Flow, what: str) -> Flow:
    return lowered(flow, Level.AGGREGATE, f"{what} over all clients")


def _computed(step: str, given: Flow, type_: fl.Type, name: str) -> Flow:
    """The result of a function that nothing is known of: each part of it depends on all that it is given."""
    base = lowered(joined(given), Level.PER_CLIENT, f"{step} computes it from the data")
    return shaped(base, type_, step, name)
