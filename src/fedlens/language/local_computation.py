"""Local computations: Python functions of JAX operations with a type, and how the language carries them.

The language's intermediate representation holds a local computation as an opaque payload. In process fedlens's payload
is a key into a registry of the functions themselves, so nothing is serialised and a map over clients can be traced
together with the code around it. A key means nothing in another process: reading one there is an error that says so.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np
from federated_language.proto import computation_pb2

from fedlens import trees
from fedlens.errors import LanguageError, UnsupportedError
from fedlens.language.host_computation import HostComputation
from fedlens.language.portable_payload import PORTABLE
from fedlens.language.sequence import MASK, Sequence, SequenceLayout
from fedlens.language.types import describe, from_positional, is_static, is_wide, tensor_types, type_of
from fedlens.language.unequal_batches import UnequalBatches, representative

_PAYLOAD = "fedlens.local_computation"
Path: TypeAlias = tuple[int, ...]
_SIZES = (3, 5)  # what undefined dimensions are while a result type is inferred


@dataclass(frozen=True, eq=False)
class LocalComputation:
    """A function that runs at one place.

    Attributes:
      name: the name of the Python function, for errors and plans.
      function: takes the argument in its containers (or nothing, without a parameter type), returns the result in its
        own.
      type_signature: parameter (or None) and result, with containers.
      wide: whether it runs with 64-bit types; JAX narrows them otherwise.
      unchanged: pairs of paths, position by position: an array of the result, and the array of the argument that it is.
      mechanism: what the function is known to do to privacy, as `fedlens.compiler.mechanisms` writes it; "" if nothing.
    """

    name: str
    function: Callable[..., Any]
    type_signature: fl.FunctionType
    wide: bool
    unchanged: tuple[tuple[Path, Path], ...] = ()
    mechanism: str = ""

    def __call__(self, *positional: Any) -> Any:
        """Calls the function on a positional value, and returns a positional value of the declared result type.

        Raises:
          LanguageError: a gradient through `Sequence.reduce`; or a result whose shape is another for the sizes of this
            argument than for those that its type was inferred with.
        """
        with jax.enable_x64(self.wide):
            result = _call(self.name, self.function, self.type_signature.parameter, positional)
            return _positional_result(self.name, result, self.type_signature.result)


def _call(name: str, function: Callable[..., Any], parameter: fl.Type | None, positional: tuple[Any, ...]) -> Any:
    try:
        return function() if parameter is None else function(from_positional(positional[0], parameter))
    except ValueError as error:
        if "Reverse-mode differentiation does not work for lax.while_loop" not in str(error):
            raise
        raise LanguageError(
            f"Expected {name!r} to differentiate inside the step of sequence.reduce, found a gradient taken "
            "through reduce: a fold over an unknown number of batches has none. Move jax.grad into the step."
        ) from error


def make_local_computation(
    name: str, function: Callable[..., Any], parameter: fl.Type | None, mechanism: str = ""
) -> LocalComputation:
    """Types `function` by abstract evaluation (`jax.eval_shape`): no arithmetic runs.

    Args:
      name: what to call it.
      function: takes one argument of type `parameter`, or none.
      parameter: tensors, structs and sequences; None for a function without arguments.
      mechanism: what it is known to do to privacy, see `LocalComputation`.

    Raises:
      UnsupportedError: a tensor of an unknown number of dimensions, or of strings.
      LanguageError: the function returns None, a sequence, or something that is no array; or arrays whose shapes
        depend on dimensions that the parameter's type leaves undefined.
    """
    for tensor in tensor_types(parameter) if parameter is not None else ():
        if tensor.shape is None:
            raise UnsupportedError(
                f"Expected a known number of dimensions in a JAX computation's parameter, found {tensor} in {name!r}. "
                "Leave single dimensions undefined (None), or use fed.python_computation."
            )
        if tensor.dtype.kind in "US":
            raise UnsupportedError(
                f"Expected numbers as arguments of a JAX computation, found strings in {name!r}, of type {tensor}. "
                "Use fed.python_computation, which runs on the host."
            )
    wide = is_wide(parameter)
    result_type, returns_wide_constant, unchanged = _infer_result(name, function, parameter, wide)
    if returns_wide_constant and not wide:  # tracing a constant of 64 bits narrow would change its value
        wide = True
        result_type, _, unchanged = _infer_result(name, function, parameter, wide)
    if not is_static(parameter):
        other_type, _, _ = _infer_result(name, function, parameter, wide, size=_SIZES[1])
        if other_type != result_type:
            raise LanguageError(
                f"Expected {name!r} to return arrays whose shapes do not depend on the undefined dimensions of its "
                f"argument, of type {parameter}, found {result_type} and {other_type}. Reduce over those dimensions, "
                "or use fed.python_computation."
            )
    return LocalComputation(name, function, fl.FunctionType(parameter, result_type), wide, unchanged, mechanism)


def _infer_result(
    name: str, function: Callable[..., Any], parameter: fl.Type | None, wide: bool, size: int = _SIZES[0]
) -> tuple[fl.Type, bool, tuple[tuple[Path, Path], ...]]:
    found: list[tuple[fl.Type, bool, tuple[tuple[Path, Path], ...]]] = []

    def traced(*positional: Any) -> list[jax.Array]:
        result = _call(name, function, parameter, positional)
        if _holds_sequence(result):
            raise LanguageError(f"Expected {name!r} to return arrays, found a sequence. Fold it with sequence.reduce.")
        leaves = trees.leaves(result)
        if not leaves:
            raise LanguageError(f"Expected {name!r} to return at least one array, found {result!r}.")
        wide_constant = any(_is_wide_constant(leaf) for leaf in leaves)
        given = {id(tracer): path for path, tracer in _arrays(positional[0] if positional else ())}
        unchanged = tuple((path, given[id(leaf)]) for path, leaf in _arrays(result) if id(leaf) in given)
        found.append((type_of(result), wide_constant, unchanged))
        return [] if wide_constant and not wide else [jnp.asarray(leaf) for leaf in leaves]

    with jax.enable_x64(wide):
        jax.eval_shape(traced, *(() if parameter is None else (abstract_value(parameter, size),)))
    return found[-1]


def _arrays(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The arrays in a value, outside of sequences, and where they stand."""
    fields = None if isinstance(value, Sequence | UnequalBatches) else trees.fields_of(value)
    if fields is not None:
        for index, (_, child) in enumerate(fields):
            yield from _arrays(child, (*path, index))
    elif not isinstance(value, Sequence | UnequalBatches):
        yield path, value


def _holds_sequence(value: object) -> bool:
    return isinstance(value, Sequence | UnequalBatches) or any(
        _holds_sequence(child) for _, child in trees.fields_of(value) or ()
    )


def _is_wide_constant(leaf: object) -> bool:
    return isinstance(leaf, np.ndarray | np.generic | int) and is_wide(type_of(leaf))


def _positional_result(name: str, result: Any, type_: fl.Type) -> Any:
    if isinstance(type_, fl.StructType):
        fields = trees.fields_of(result) or []
        return tuple(
            _positional_result(name, child, field) for (_, child), (_, field) in zip(fields, type_.items(), strict=True)
        )
    array = jnp.asarray(result, type_.dtype)
    if array.shape != type_.shape:
        raise LanguageError(
            f"Expected {name!r} to return {type_} for arguments of any size, as it did when its type was inferred, "
            f"found {describe(array)}. Its result must not depend on dimensions that its parameter leaves undefined."
        )
    return array


def abstract_value(type_: fl.Type, size: int = _SIZES[0]) -> Any:
    """A positional value of `jax.ShapeDtypeStruct`s; a sequence has one row, and undefined dimensions are `size`."""
    if isinstance(type_, fl.StructType):
        return tuple(abstract_value(field, size) for _, field in type_.items())
    if isinstance(type_, fl.SequenceType):
        if not is_static(type_):
            return representative(type_.element, size)
        index = jax.ShapeDtypeStruct((), jnp.int32)
        rows = tuple(jax.ShapeDtypeStruct((1, *tensor.shape), tensor.dtype) for tensor in tensor_types(type_))
        layout = SequenceLayout(type_.element, rows_per_batch=None, masked=False, max_rows=1)
        return Sequence(rows, index, index, None, layout)
    return jax.ShapeDtypeStruct(tuple(size if dim is None else dim for dim in type_.shape), type_.dtype)


class _Registry:
    """Local computations by key, for the life of the process: a proto can outlive every other reference."""

    def __init__(self) -> None:
        self._entries: dict[str, LocalComputation | HostComputation] = {}
        self._lock = threading.Lock()
        self._next = itertools.count()

    def add(self, local: LocalComputation | HostComputation) -> str:
        with self._lock:
            key = f"{local.name}-{next(self._next)}"
            self._entries[key] = local
            return key

    def get(self, key: str) -> LocalComputation | HostComputation | None:
        return self._entries.get(key)


_registry = _Registry()


def to_proto(local: LocalComputation | HostComputation) -> computation_pb2.Computation:
    """A computation whose payload is the registry key of `local`."""
    proto = computation_pb2.Computation(type=local.type_signature.to_proto())
    proto.xla.hlo_module.type_url = _PAYLOAD
    proto.xla.hlo_module.value = _registry.add(local).encode()
    return proto


def from_proto(proto: computation_pb2.Computation) -> LocalComputation | HostComputation:
    """The local computation that a payload names.

    Raises:
      UnsupportedError: the payload is another runtime's, or was made in another process.
    """
    kind = proto.WhichOneof("computation")
    if kind == "tensorflow":
        from fedlens.language.tensorflow_payload import from_tensorflow_proto  # read when there is one

        return from_tensorflow_proto(proto)
    if kind == "xla" and proto.xla.hlo_module.type_url == PORTABLE:
        from fedlens.language.portable import from_portable_proto  # it imports this module

        return from_portable_proto(proto)
    if kind != "xla" or proto.xla.hlo_module.type_url != _PAYLOAD:
        raise UnsupportedError(
            "Expected a local computation made by fedlens (fed.jax_computation, fed.python_computation) or TensorFlow, "
            f"found a payload of kind {kind!r}."
        )
    key = proto.xla.hlo_module.value.decode()
    local = _registry.get(key)
    if local is None:
        raise UnsupportedError(
            f"Expected a local computation made in this process, found {key!r} of another one. "
            "Build the computation again from its Python code, or make it portable there with fed.to_portable."
        )
    return local


def with_one_argument(
    function: Callable[..., Any], parameter_type: fl.Type | None, unpack: bool | None
) -> Callable[..., Any]:
    """`function` as the language types it, with one argument: a struct of several is unpacked by name or position.

    Args:
      function: takes no argument, one, or one for each field of `parameter_type`.
      parameter_type: the type of the one argument; None for a function without arguments.
      unpack: whether to unpack a struct for a function of one argument too.

    Raises:
      LanguageError: the function takes another number of arguments than the type has fields.
    """
    if parameter_type is None:
        return function
    expected = list(inspect.signature(function).parameters)
    if not unpack and len(expected) == 1:
        return function
    if not isinstance(parameter_type, fl.StructType) or len(parameter_type) != len(expected):
        raise LanguageError(
            f"Expected a parameter type with a field for each of the arguments {', '.join(expected) or 'none'}, "
            f"found {parameter_type}."
        )

    def of_one_argument(argument: Any) -> Any:
        fields = trees.fields_of(argument) or []
        names = [field_name for field_name, _ in parameter_type.items()]
        positional = [value for name, (_, value) in zip(names, fields, strict=True) if name is None]
        named = {name: value for name, (_, value) in zip(names, fields, strict=True) if name is not None}
        return function(*positional, **named)

    return of_one_argument


def batch_type(element_type: fl.Type, batch_size: int) -> fl.StructType:
    """The type of a batch: each field gains a leading dimension, and a field `mask` says which rows are examples.

    Example:
      >>> str(batch_type(fl.StructType([("x", fl.TensorType(np.float32, (4,))), ("y", np.int32)]), 20))
      '<x=float32[20,4],y=int32[20],mask=bool[20]>'

    Args:
      element_type: the type of one example, a struct with named tensor fields.
      batch_size: rows in a batch, at least 1.
    """
    if batch_size < 1:
        raise LanguageError(f"Expected a batch size of at least 1, found {batch_size}.")
    fields = [(name, fl.TensorType(tensor.dtype, (batch_size, *tensor.shape))) for name, tensor in element_type.items()]
    return fl.StructWithPythonType([*fields, (MASK, fl.TensorType(np.bool_, (batch_size,)))], dict)
