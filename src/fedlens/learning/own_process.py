"""`from_computations`: a learning process of rounds that a user wrote in the language."""

from __future__ import annotations

import federated_language as fl
from federated_language import framework

from fedlens.errors import ConfigError
from fedlens.learning.models import Model
from fedlens.learning.process import LearningProcess
from fedlens.learning.state import KEY, ROUND, WEIGHTS, field_of_type
from fedlens.runtime.engine import OnNonFinite, check_on_nonfinite


def from_computations(
    initialize: framework.ConcreteComputation,
    next: framework.ConcreteComputation,  # noqa: A002
    *,
    model: Model | None = None,
    on_nonfinite: OnNonFinite = "raise",
) -> LearningProcess:
    """A learning process of computations that you wrote in the language.

    `fed.run` runs it, and `with_local_models()` taps it, if its client work (the map over the clients' batches) returns
    the fields `weights` or `update`, `num_examples`, and, if it measures something, `metrics`: numbers by name.

    Example:
      >>> process = fed.learning.from_computations(initialize, next_round)
      >>> finished = fed.run(process, data, rounds=5, ledger="runs/own")

    Args:
      initialize: nothing, or key data (uint32[2]) at the server -> the state at the server: a struct with the global
        model in its field `weights`.
      next: (state, batches), or (state, keys, batches) with key data for each client -> (state, metrics). The metrics
        are a struct of numbers at the server. With keys the state has the fields `key`, uint32[2], and `round`.
      model: what is learned, for evaluating it on held-out data.
      on_nonfinite: what to do with a client whose update is not finite: "raise", "drop" or "ignore".

    Raises:
      ConfigError: the computations are not of these types, or `on_nonfinite` is none of its values.
    """
    check_on_nonfinite(on_nonfinite)
    state_type = initialize.type_signature.result
    parameter, result = next.type_signature.parameter, next.type_signature.result
    expected = "a state at the server with the field 'weights'"
    _expect(_is_at_server(state_type) and _has(state_type.member, WEIGHTS), expected, state_type, "initialize")
    arguments = [each for _, each in parameter.items()] if isinstance(parameter, fl.StructType) else []
    expected = f"(state, batches) or (state, keys, batches), the state of type {state_type} and the rest at the clients"
    fits = (
        len(arguments) in (2, 3)
        and arguments[0].is_assignable_from(state_type)
        and all(isinstance(each, fl.FederatedType) and each.placement is fl.CLIENTS for each in arguments[1:])
    )
    _expect(fits, expected, parameter, "the argument of next")
    if len(arguments) == 3:
        expected = "a state with the fields 'key' and 'round', of which the clients' keys are made"
        _expect(_has(state_type.member, KEY) and _has(state_type.member, ROUND), expected, state_type, "initialize")
    results = [each for _, each in result.items()] if isinstance(result, fl.StructType) else []
    expected = f"(state, metrics), the state of type {state_type} and the metrics a struct of numbers at the server"
    fits = len(results) == 2 and state_type.is_assignable_from(results[0]) and _are_metrics(results[1])
    _expect(fits, expected, result, "the result of next")
    return LearningProcess(model, initialize, next, on_nonfinite)


def _expect(holds: bool, expected: str, found: object, where: str) -> None:
    if not holds:
        hint = "Fields have an order, and JAX's functions sort the keys of a dict: sort them from the start."
        raise ConfigError(f"Expected {expected}, found {found}, in {where}. {hint}")


def _is_at_server(type_: fl.Type) -> bool:
    return isinstance(type_, fl.FederatedType) and type_.placement is fl.SERVER


def _has(state_type: fl.Type, name: str) -> bool:
    return field_of_type(state_type, name) is not None


def _are_metrics(type_: fl.Type) -> bool:
    return (
        _is_at_server(type_)
        and isinstance(type_.member, fl.StructType)
        and all(isinstance(each, fl.TensorType) and each.shape == () for _, each in type_.member.items())
    )
