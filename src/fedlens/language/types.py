"""Python values and language types: infer the one from the other, and translate values for the compiler.

Inside the compiler and the runtime a value is *positional*: a struct is a tuple of its fields in the order of its type,
a tensor is an array, a sequence is a `Sequence`. Containers (dict, NamedTuple, dataclass, ...) exist only at the edges,
where a user's function is called and where a result is handed out; `StructWithPythonType` remembers them.
"""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import federated_language as fl
import numpy as np
from federated_language.common_libs import structure

from fedlens import trees
from fedlens.errors import StructureError
from fedlens.language.strings import is_string_array, without_numpy_dtype
from fedlens.language.tensorflow_values import in_numpy, is_tensorflow, leaf_type

_WIDE = (np.dtype(np.int64), np.dtype(np.uint64), np.dtype(np.float64), np.dtype(np.complex128))


def type_of(value: object) -> fl.Type:
    """The language type of a Python value: nested containers of arrays, scalars, types, or typed values.

    Example:
      >>> str(type_of({"w": np.zeros((2, 3), np.float32), "b": 0.5}))
      '<w=float32[2,3],b=float32>'

    Args:
      value: arrays (NumPy, JAX, `jax.ShapeDtypeStruct`), Python scalars, `federated_language` types and values, in any
        nesting of dict, OrderedDict, list, tuple, NamedTuple, dataclass and attrs classes; TensorFlow's tensors, data
        sets and specifications of them.

    Returns:
      The type; its structs remember the Python container (`StructWithPythonType`).

    Raises:
      StructureError: a leaf that is no array, scalar or type.
    """
    return _type_of(value, "")


def _type_of(value: Any, path: str) -> fl.Type:
    if isinstance(value, fl.Type):
        return value
    if isinstance(value, fl.TypedObject):
        return value.type_signature
    fields = trees.fields_of(value)
    if fields is not None:
        elements = [
            (name, _type_of(child, f"{path}/{position if name is None else name}".lstrip("/")))
            if name is not None
            else _type_of(child, f"{path}/{position}".lstrip("/"))
            for position, (name, child) in enumerate(fields)
        ]
        try:
            return fl.StructWithPythonType(elements, type(value))
        except ValueError as error:
            raise StructureError(
                f"Expected field names that the federated language allows{_at(path)}, found a reserved one: {error}"
            ) from error
    if is_tensorflow(value):
        element = getattr(value, "element_spec", None)
        return leaf_type(value) if element is None else fl.SequenceType(_type_of(element, path))
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        if is_string_array(value):
            return fl.TensorType(np.str_, tuple(value.shape))
        try:
            return fl.TensorType(np.dtype(value.dtype), tuple(value.shape))
        except (TypeError, NotImplementedError) as error:
            hint = " Pass jax.random.key_data(key) instead." if "key<" in str(value.dtype) else ""
            raise StructureError(
                f"Expected a dtype that the federated language knows{_at(path)}, found {value.dtype}.{hint}"
            ) from error
    if isinstance(value, bool | int | float | complex | str | bytes):
        return fl.TensorType(fl.infer_dtype(value))
    raise StructureError(f"Expected an array or a scalar{_at(path)}, found {type(value).__name__}.")


def to_positional(value: Any, type_: fl.Type, path: str = "") -> Any:
    """Checks `value` against its type and strips its containers.

    Args:
      value: what the user passed.
      type_: its type; tensors and structs of them (sequences are the business of a cohort's columns).
      path: where `value` stands in a larger value, for errors.

    Returns:
      `value` with tuples for structs and arrays (NumPy or JAX, as they came) for tensors.

    Raises:
      StructureError: structure, shape or dtype differ; nothing is cast, Python scalars excepted.
    """
    if isinstance(type_, fl.StructType):
        return tuple(
            to_positional(child, field_type, f"{path}/{position if name is None else name}".lstrip("/"))
            for position, ((name, field_type), child) in enumerate(
                zip(type_.items(), matched_fields(value, type_, path), strict=True)
            )
        )
    if isinstance(type_, fl.TensorType):
        return _to_array(value, type_, path)
    raise StructureError(f"Expected a tensor or a struct of tensors{_at(path)}, found the type {type_}.")


def matched_fields(value: Any, type_: fl.StructType, path: str = "") -> list[Any]:
    """What a container holds for each field of a struct type, found by name where both have names.

    Args:
      value: what the user passed.
      type_: the struct type.
      path: where `value` stands in a larger value, for errors.

    Raises:
      StructureError: `value` is no container, or its fields are not those of the type.
    """
    fields = argument_fields(value)
    expected = list(type_.items())
    if fields is None:
        raise StructureError(f"Expected a container {type_}{_at(path)}, found {describe(value)}.")
    if len(fields) != len(expected):
        raise StructureError(
            f"Expected {_field_names(expected)}{_at(path)}, found {_field_names(fields)}: "
            f"{len(expected)} fields against {len(fields)}."
        )
    by_name = {name: child for name, child in fields if name is not None}
    matched = []
    for (name, _), (found_name, child) in zip(expected, fields, strict=True):
        if name is None or found_name is None:
            matched.append(child)
        elif name in by_name:
            matched.append(by_name[name])
        else:
            raise StructureError(f"Expected a field {name!r}{_at(path)}, found {_field_names(fields)}.")
    return matched


def from_positional(value: Any, type_: fl.Type) -> Any:
    """Puts the containers of `type_` back around a positional value; the inverse of `to_positional`."""
    if isinstance(type_, fl.StructType):
        return trees.build(
            type_.python_container,
            [
                (name, from_positional(child, field_type))
                for (name, field_type), child in zip(type_.items(), value, strict=True)
            ],
        )
    return value


def tensor_types(type_: fl.Type) -> list[fl.TensorType]:
    """The tensors of a type in field order; a federated type counts as its member, a sequence as its element."""
    if isinstance(type_, fl.TensorType):
        return [type_]
    if isinstance(type_, fl.StructType):
        return [tensor for _, field in type_.items() for tensor in tensor_types(field)]
    if isinstance(type_, fl.FederatedType):
        return tensor_types(type_.member)
    if isinstance(type_, fl.SequenceType):
        return tensor_types(type_.element)
    raise StructureError(f"Expected a type made of tensors, found {type_}.")


def leaf_paths(type_: fl.Type, path: str = "") -> list[str]:
    """The paths of a type's tensors in field order, as `trees.items` gives them for values."""
    if isinstance(type_, fl.FederatedType):
        return leaf_paths(type_.member, path)
    if not isinstance(type_, fl.StructType):
        return [path]
    return [
        leaf
        for position, (name, field) in enumerate(type_.items())
        for leaf in leaf_paths(field, f"{path}/{position if name is None else name}".lstrip("/"))
    ]


def is_wide(type_: fl.Type | None) -> bool:
    """Whether a type has 64-bit leaves (128-bit complex), which JAX narrows unless it is told not to."""
    return type_ is not None and any(tensor.dtype in _WIDE for tensor in tensor_types(type_))


def is_static(type_: fl.Type | None) -> bool:
    """Whether every tensor of a type has a known shape."""
    return type_ is None or all(tensor.shape is not None and None not in tensor.shape for tensor in tensor_types(type_))


def holds_strings(type_: fl.Type | None) -> bool:
    """Whether a tensor of a type is of strings, which the host alone computes with."""
    return type_ is not None and any(tensor.dtype.kind in "US" for tensor in tensor_types(type_))


def fits(shape: tuple[int, ...], expected: tuple[int | None, ...] | None) -> bool:
    """Whether an array of `shape` is of a type whose shape is `expected`, in which None is any size."""
    if expected is None:
        return True
    return len(shape) == len(expected) and all(want in (None, dim) for dim, want in zip(shape, expected, strict=True))


def is_at_clients(type_: fl.Type) -> bool:
    """Whether a value of a type is one for each client, its own."""
    return isinstance(type_, fl.FederatedType) and type_.placement is fl.CLIENTS and not type_.all_equal


def member_of(type_: fl.Type) -> fl.Type:
    """The type of a value without its placement."""
    return type_.member if isinstance(type_, fl.FederatedType) else type_


def contains_sequence(type_: fl.Type) -> bool:
    """Whether a sequence occurs in a type."""
    if isinstance(type_, fl.StructType):
        return any(contains_sequence(field) for _, field in type_.items())
    if isinstance(type_, fl.FederatedType):
        return contains_sequence(type_.member)
    return isinstance(type_, fl.SequenceType)


def num_bytes(type_: fl.Type) -> int:
    """The bytes of one value of a type of known shapes; sequences count as one batch."""
    return sum(
        reduce(operator.mul, (dim or 0 for dim in tensor.shape or ()), 1) * tensor.dtype.itemsize
        for tensor in tensor_types(type_)
    )


def describe(value: object) -> str:
    """A value in a few words, for errors: `float32[2,3]`, `dict with fields a, b`, `str`."""
    fields = trees.fields_of(value)
    if fields is not None:
        return f"{type(value).__name__} with {_field_names(fields)}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return type(value).__name__


def argument_fields(value: Any) -> list[tuple[str | None, Any]] | None:
    """The fields of a container, or of the struct in which the language hands several arguments to a context."""
    if isinstance(value, structure.Struct):
        return list(structure.iter_elements(value))
    return trees.fields_of(value)


def _to_array(value: Any, type_: fl.TensorType, path: str) -> Any:
    value = in_numpy(value)
    if type_.dtype.kind in "US":
        return _to_strings(value, type_, path)
    # NumPy's scalars have a dtype of their own; np.float64, a float too, would be narrowed here.
    if isinstance(value, bool | int | float | complex) and not isinstance(value, np.generic):
        if type_.shape != ():
            raise StructureError(f"Expected {type_}{_at(path)}, found the Python scalar {value!r}.")
        kind = type_.dtype.kind
        allowed = {"b": bool, "i": int, "u": int, "c": complex}.get(kind, float)
        accepted = isinstance(value, bool) == (kind == "b") and isinstance(
            value, allowed if kind != "c" else complex | float | int
        )
        if not (accepted or (allowed is float and isinstance(value, int) and not isinstance(value, bool))):
            raise StructureError(f"Expected {type_}{_at(path)}, found the Python scalar {value!r}.")
        if not fl.can_cast_dtype(value, type_.dtype.type):
            raise StructureError(f"Expected a value that fits {type_}{_at(path)}, found {value!r}.")
        return np.asarray(value, type_.dtype)
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        raise StructureError(f"Expected {type_}{_at(path)}, found {describe(value)}.")
    if value.dtype != type_.dtype or not fits(tuple(value.shape), type_.shape):
        raise StructureError(f"Expected {type_}{_at(path)}, found {describe(value)}.")
    return value


def _to_strings(value: Any, type_: fl.TensorType, path: str) -> Any:
    shape: tuple[int, ...] | None = None
    if isinstance(value, str | bytes):
        shape = ()
    elif is_string_array(value):
        shape = value.shape
    if shape is None or not fits(shape, type_.shape):
        raise StructureError(f"Expected {type_}{_at(path)}, found {describe(value)}.")
    return without_numpy_dtype(value)


def _field_names(fields: list[tuple[str | None, Any]]) -> str:
    if not fields:
        return "no fields"
    return "fields " + ", ".join(str(position) if name is None else name for position, (name, _) in enumerate(fields))


def _at(path: str) -> str:
    return f" at {path!r}" if path else ""
