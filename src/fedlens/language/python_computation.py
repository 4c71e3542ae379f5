"""`python_computation`: declares any Python function as a local computation of the language.

It runs on the host, at the server or once for each client, on NumPy arrays: scikit-learn, XGBoost, a PyTorch loop, a
file that only this client has. Nothing is traced, so its result type must be declared, and is checked in every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import federated_language as fl
from federated_language import framework

from fedlens.errors import LanguageError
from fedlens.language.host_computation import HostComputation
from fedlens.language.jax_computation import name_of
from fedlens.language.local_computation import to_proto, with_one_argument
from fedlens.language.types import contains_sequence, tensor_types


def python_computation(
    parameter_type: object, result_type: object
) -> Callable[[Callable[..., Any]], framework.ConcreteComputation]:
    """Declares a Python function as a computation that runs at one place, on the host.

    Example:
      >>> batches_type = fed.SequenceType(fed.TensorType(np.float32, (None, 64)))
      >>> @fed.python_computation(batches_type, fed.TensorType(np.float32, (64,)))
      ... def median(batches):
      ...     return np.median(np.concatenate(list(batches)), axis=0)
      >>> @fed.federated_computation(fed.FederatedType(batches_type, fed.CLIENTS))
      ... def mean_of_medians(batches):
      ...     return fed.federated_mean(fed.federated_map(median, batches))

    The function gets NumPy arrays and scalars in the containers of its type, its own to write into; strings as `str` or
    `bytes`, arrays of them as arrays of objects; a sequence as a `fed.Sequence` that it may iterate over. It may keep
    state and read files: when and how often it runs is once for each client and call, in the order of the cohort.

    Args:
      parameter_type: the type of its argument, or of its arguments as a struct; None for a function without any.
      result_type: the type of what it returns: tensors and structs of them. A dimension may be undefined (None) where
        another `python_computation` or the server takes the result.

    Returns:
      A decorator, which makes the function a computation.

    Raises:
      LanguageError: a type that is missing or holds a sequence or a function as result, or arguments that do not fit.
    """
    parameter = None if parameter_type is None else fl.to_type(parameter_type)
    result = None if result_type is None else fl.to_type(result_type)
    if result is None or not _is_made_of_tensors(result):
        raise LanguageError(
            f"Expected a result type of tensors and structs of them for a Python computation, found {result}. "
            "Return batches as an array with a leading dimension."
        )

    def declare(function: Callable[..., Any]) -> framework.ConcreteComputation:
        host = HostComputation(
            name_of(function), with_one_argument(function, parameter, unpack=None), fl.FunctionType(parameter, result)
        )
        return framework.ConcreteComputation(
            computation_proto=to_proto(host),
            context_stack=framework.get_context_stack(),
            annotated_type=host.type_signature,
        )

    return declare


def _is_made_of_tensors(type_: fl.Type) -> bool:
    if isinstance(type_, fl.StructType):
        return len(tensor_types(type_)) > 0 and not contains_sequence(type_)
    return isinstance(type_, fl.TensorType)
