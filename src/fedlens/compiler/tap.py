"""`tap`: a computation that also hands out what its clients computed on the way.

The rewritten computation is the normal form of the original, all of whose calls stay as they are and in their order,
with the tapped values added to the result; a field is selected at the clients, so that nothing else leaves them. It is
made of the language's own building blocks, so that it can be planned, explained, serialised and tapped again.
"""

from __future__ import annotations

import federated_language as fl
from federated_language import framework

from fedlens.compiler.levels import Level
from fedlens.compiler.normalize import PARAMETER, Block, calls_and_result
from fedlens.compiler.tap_points import Point
from fedlens.compiler.taps import At, Tap, described_points
from fedlens.errors import ConfigError, DisclosureError, UnsupportedError
from fedlens.language.types import contains_sequence


def tap(computation: fl.Computation, at: At, *, allow_bypass: bool = False) -> framework.ConcreteComputation:
    """A computation that returns `(original result, tapped)`.

    The original result keeps its bits. `tapped` is one clients-placed value if `at` is one name; else a dict of them by
    the names of the taps.

    Example:
      >>> tapped_round = fed.tap(next_round, at="client_work.weights")
      >>> (state, metrics), weights = tapped_round(state, data)
      >>> weights["alice"]["dense"]["kernel"]

    Args:
      computation: a computation with types.
      at: what to hand out: the name of a tap (see `taps`) or of a field of one at any depth, several names, or a
        function of a `Tap` that says whether it is wanted.
      allow_bypass: whether values may be handed out that flow into a secure sum or a mechanism of differential privacy,
        which thereby no longer protects them.

    Returns:
      A computation of the same argument, in the language's own building blocks.

    Raises:
      DisclosureError: a tap of clients' raw data; or one that bypasses a protection, without `allow_bypass`.
      ConfigError: there is no such tap; or it is the client work, of which there are several or none.
      LanguageError: `computation` is no computation, or has no types yet.
      UnsupportedError: a tap of sequences; or the computation has a building block that fedlens does not know.
    """
    normal_form, chosen = described_points(computation, at)
    if not chosen:
        raise ConfigError("Expected at least one tap to hand out, found none that is wanted. fed.taps lists them all.")
    for _, described in chosen:
        _check(described, allow_bypass)
    calls, result = calls_and_result(normal_form)
    added: list[tuple[str, Block]] = []
    handed_out: list[tuple[str, Block]] = []
    for number, (point, _) in enumerate(chosen):
        value = point.value
        if point.path:
            name = f"tap_{number}"
            added.append((name, framework.create_federated_map(_selection(point), value)))
            value = framework.Reference(name, added[-1][1].type_signature)
        handed_out.append((point.name, value))
    type_ = computation.type_signature
    if isinstance(at, str):
        tapped, tapped_type = handed_out[0][1], _at_clients(chosen[0][1])
    else:
        tapped = framework.Struct(handed_out)
        tapped_type = fl.StructWithPythonType([(each.name, _at_clients(each)) for _, each in chosen], dict)
    both = framework.Block([*calls, *added], framework.Struct([(None, result), (None, tapped)]))
    block = framework.Lambda(normal_form.parameter_name, normal_form.parameter_type, both)
    return framework.ConcreteComputation(
        computation_proto=block.to_proto(),
        context_stack=framework.get_context_stack(),
        annotated_type=fl.FunctionType(type_.parameter, fl.StructWithPythonType([type_.result, tapped_type], tuple)),
    )


def _check(wanted: Tap, allow_bypass: bool) -> None:
    if wanted.level is Level.RAW:
        raise DisclosureError(
            f"Expected a tap of what a client computed, found clients' raw data in {wanted.name!r}. "
            "Raw data never leaves a client; tap what is computed from it."
        )
    if contains_sequence(wanted.type):
        raise UnsupportedError(
            f"Expected a tap of tensors, found sequences in {wanted.name!r}, of type {wanted.type}. "
            "Fold them at the clients, and tap what that gives."
        )
    if wanted.bypasses and not allow_bypass:
        raise DisclosureError(
            f"Expected a tap of values that nothing protects, found {wanted.name!r}, which bypasses "
            f"{', '.join(wanted.bypasses)}: every client's own value would be handed out beside it. "
            "Tap something else, or pass allow_bypass=True if those who run this may see it."
        )


def _selection(point: Point) -> framework.Lambda:
    """The function that selects what is at a point's path from its value."""
    member = point.value.type_signature.member
    selected: Block = framework.Reference(PARAMETER, member)
    for index in point.path:
        selected = framework.Selection(selected, index=index)
    return framework.Lambda(PARAMETER, member, selected)


def _at_clients(wanted: Tap) -> fl.FederatedType:
    return fl.FederatedType(wanted.type, fl.CLIENTS)
