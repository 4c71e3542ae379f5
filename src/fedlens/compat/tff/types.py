"""`tff.types`: the language's types under TFF's names, made of what TFF programs write them with.

What is made are the language's own types: they compare, print and check as everywhere else in fedlens. TensorFlow's
dtypes, shapes and specifications are recognised without importing TensorFlow.
"""

from __future__ import annotations

from typing import Any

import federated_language as fl
from federated_language import AbstractType as AbstractType
from federated_language import ArrayShape as ArrayShape
from federated_language import PlacementType as PlacementType
from federated_language import Type as Type
from federated_language import TypedObject as TypedObject
from federated_language import framework
from federated_language.framework import TypeNotAssignableError as TypeNotAssignableError
from federated_language.framework import TypesNotEquivalentError as TypesNotEquivalentError
from federated_language.framework import UnexpectedTypeError as UnexpectedTypeError
from federated_language.framework import is_structure_of_floats as is_structure_of_floats
from federated_language.framework import is_structure_of_integers as is_structure_of_integers
from federated_language.framework import is_structure_of_tensors as is_structure_of_tensors
from federated_language.framework import type_to_py_container as type_to_py_container

from fedlens import trees
from fedlens.errors import StructureError
from fedlens.language.tensorflow_values import is_tensorflow, language_dtype
from fedlens.language.types import type_of

CLIENTS, SERVER = fl.CLIENTS, fl.SERVER

# The language has these under longer names.
is_shape_fully_defined, num_elements_in_shape = fl.array_shape_is_fully_defined, fl.num_elements_in_array_shape
contains, contains_only, count = framework.type_contains, framework.type_contains_only, framework.type_count


class _TypeName(type):
    """A name that builds one of the language's types out of TFF's ways to write it, and recognises that type."""

    named: type[fl.Type]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.named(*map(_translated, args), **{key: _translated(value) for key, value in kwargs.items()})

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.named)


class TensorType(metaclass=_TypeName):
    """`TensorType(dtype, shape=())`: arrays of one dtype and shape, whose undefined dimensions are None."""

    named = fl.TensorType


class SequenceType(metaclass=_TypeName):
    """`SequenceType(element)`: batches that a client goes over one by one."""

    named = fl.SequenceType


class StructType(metaclass=_TypeName):
    """`StructType([(name, type), ...])`: fields in order, with names or without."""

    named = fl.StructType


class StructWithPythonType(metaclass=_TypeName):
    """`StructWithPythonType(elements, container)`: a struct that remembers its Python container."""

    named = fl.StructWithPythonType


class FederatedType(metaclass=_TypeName):
    """`FederatedType(member, placement, all_equal=None)`: a value at the clients or at the server."""

    named = fl.FederatedType


class FunctionType(metaclass=_TypeName):
    """`FunctionType(parameter, result)`: the type of a computation."""

    named = fl.FunctionType


def to_type(spec: Any) -> fl.Type:
    """The type that a specification stands for.

    Example:
      >>> str(to_type({"x": tf.TensorSpec([None, 784], tf.float32), "y": (np.int32, [None])}))
      '<x=float32[?,784],y=int32[?]>'

    Args:
      spec: a type; a dtype of NumPy or TensorFlow, alone or as `(dtype, shape)`; a `tf.TensorSpec`; the spec of a
        `tf.data.Dataset`; or a nesting of those in dicts, lists, tuples and classes with fields.

    Raises:
      StructureError: it stands for no type.
    """
    try:
        return fl.to_type(_translated(spec))
    except TypeError as error:
        raise StructureError(
            f"Expected a type, a dtype, a pair (dtype, shape) or a structure of those, found {spec!r}."
        ) from error


tensorflow_to_type = to_type


def at_clients(type_spec: Any, all_equal: bool = False) -> fl.FederatedType:
    """The type of values at the clients."""
    return fl.FederatedType(to_type(type_spec), fl.CLIENTS, all_equal)


def at_server(type_spec: Any) -> fl.FederatedType:
    """The type of a value at the server."""
    return fl.FederatedType(to_type(type_spec), fl.SERVER)


def _translated(spec: Any) -> Any:
    """A specification without TensorFlow in it; what is not known here is left for the language to judge."""
    if isinstance(spec, fl.Type | str | type) or callable(spec):
        return spec
    if is_tensorflow(spec):
        if hasattr(spec, "as_numpy_dtype"):
            return language_dtype(spec)
        if hasattr(spec, "as_list"):
            return None if spec.rank is None else tuple(spec.as_list())
        return type_of(spec)
    fields = trees.fields_of(spec)
    if fields is None or spec is None:
        return spec
    return trees.build(type(spec), [(name, _translated(child)) for name, child in fields])
