"""`tensorflow_computation`: traces a function of TensorFlow operations into the language's own TensorFlow payload.

The payload is a GraphDef with bindings for its parameter and result, as the language's proto defines it and TensorFlow
Federated writes it. It holds no Python: bytes of it run in any process that has TensorFlow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import federated_language as fl
from federated_language import framework
from federated_language.proto import computation_pb2

from fedlens import trees
from fedlens.errors import LanguageError, UnsupportedError
from fedlens.language.jax_computation import name_of
from fedlens.language.local_computation import with_one_argument
from fedlens.language.tensorflow_graph import dataset_of, embed, nested, pack
from fedlens.language.tensorflow_library import tensorflow, tracing
from fedlens.language.tensorflow_values import is_dataset, tensorflow_dtype
from fedlens.language.tracebacks import noting
from fedlens.language.type_summaries import summarize
from fedlens.language.types import from_positional, matched_fields, type_of


def _wrap(
    function: Callable[..., Any], parameter_type: fl.Type | None, unpack: bool | None, name: str | None = None
) -> framework.ConcreteComputation:
    name = name_of(function, name)
    argument = "without an argument" if parameter_type is None else f"with an argument {summarize(parameter_type)}"
    with noting(f"in {name!r}, traced {argument} into a TensorFlow graph; it is the same for all clients"), tracing():
        payload, type_signature = _trace(name, with_one_argument(function, parameter_type, unpack), parameter_type)
    return framework.ConcreteComputation(
        computation_proto=computation_pb2.Computation(type=type_signature.to_proto(), tensorflow=payload),
        context_stack=framework.get_context_stack(),
        annotated_type=type_signature,
    )


def _trace(
    name: str, function: Callable[..., Any], parameter: fl.Type | None
) -> tuple[computation_pb2.TensorFlow, fl.FunctionType]:
    tf = tensorflow()
    graph = tf.Graph()
    variables: list[Any] = []

    def creator(create: Callable[..., Any], **settings: Any) -> Any:
        variables.append(create(**settings))
        return variables[-1]

    scope = re.sub(r"[^\w.-]|^[^\w.]", "_", name, flags=re.ASCII).lstrip("_-") or "function"
    context = _Embedding(graph)
    with graph.as_default(), tf.name_scope(scope):
        argument, of_parameter = (None, None) if parameter is None else _placeholders(parameter)
        with tf.variable_creator_scope(creator), framework.get_context_stack().install(context):
            returned = function() if parameter is None else function(from_positional(argument, parameter))
            result = _captured(name, returned)
        result_type = type_of(result)
        of_result = _binding(result)
        tables = graph.get_collection(tf.compat.v1.GraphKeys.TABLE_INITIALIZERS)
        initializers = [*context.initializers, *(variable.initializer for variable in variables), *tables]
        initialize = tf.group(*initializers, name="initialize").name if initializers else ""
    payload = computation_pb2.TensorFlow(
        graph_def=pack(graph.as_graph_def()), parameter=of_parameter, result=of_result, initialize_op=initialize
    )
    return payload, fl.FunctionType(parameter, result_type)


class _Embedding(framework.SyncContext):
    """What runs computations that the traced function calls: it puts their graphs into the one that is made."""

    def __init__(self, graph: Any):
        self._graph = graph
        self.initializers: list[Any] = []

    def invoke(self, comp: framework.ConcreteComputation, arg: Any) -> Any:
        """The symbolic result of a computation for a symbolic argument."""
        proto, type_ = comp.to_proto(), comp.type_signature
        if proto.WhichOneof("computation") != "tensorflow":
            raise UnsupportedError(
                "Expected calls of other TensorFlow computations in a function that is traced into a graph, found a "
                f"computation of type {type_.compact_representation()} that is none."
            )
        inputs = [] if type_.parameter is None else list(_inputs(arg, type_.parameter))
        outputs, initialize = embed(proto.tensorflow, type_, inputs)
        if initialize is not None:
            if initialize.graph is not self._graph:
                raise UnsupportedError(
                    "Expected a TensorFlow computation without variables of its own inside of a tf.function or of what "
                    "a data set is mapped with, found one with some. Call it outside, or make the variables there."
                )
            self.initializers.append(initialize)
        remaining = iter(outputs)
        return from_positional(_positional(type_.result, remaining), type_.result)


def _positional(type_: fl.Type, leaves: Iterator[Any]) -> Any:
    if isinstance(type_, fl.StructType):
        return tuple(_positional(field, leaves) for _, field in type_.items())
    leaf = next(leaves)
    return _in_containers(leaf, type_.element) if isinstance(type_, fl.SequenceType) else leaf


def _inputs(value: Any, type_: fl.Type) -> Iterator[Any]:
    """The leaves of a symbolic argument of type `type_`: tensors and data sets."""
    if isinstance(type_, fl.StructType):
        for child, (_, field) in zip(matched_fields(value, type_, ""), type_.items(), strict=True):
            yield from _inputs(child, field)
    elif isinstance(type_, fl.SequenceType) and is_dataset(value):
        yield _without_containers(value)
    else:
        yield tensorflow().convert_to_tensor(value, tensorflow_dtype(type_.dtype))


def _placeholders(type_: fl.Type) -> tuple[Any, computation_pb2.TensorFlow.Binding]:
    """The positional argument of a type, symbolic, and its binding."""
    tf = tensorflow()
    binding = computation_pb2.TensorFlow.Binding()
    if isinstance(type_, fl.StructType):
        parts = [_placeholders(field) for _, field in type_.items()]
        binding.struct.element.extend(part for _, part in parts)
        return tuple(value for value, _ in parts), binding
    if isinstance(type_, fl.TensorType):
        placeholder = tf.compat.v1.placeholder(tensorflow_dtype(type_.dtype), type_.shape, name="argument")
        binding.tensor.tensor_name = placeholder.name
        return placeholder, binding
    if isinstance(type_, fl.SequenceType):
        variant = tf.compat.v1.placeholder(tf.variant, (), name="argument")
        binding.sequence.variant_tensor_name = variant.name
        return _in_containers(dataset_of(variant, type_.element), type_.element), binding
    raise UnsupportedError(f"Expected tensors, structs and sequences as arguments of TensorFlow, found {type_}.")


def _captured(name: str, result: Any) -> Any:
    """What a function returned, with a tensor of its own for each leaf: what is fed cannot be fetched."""
    tf = tensorflow()
    if result is None:
        raise LanguageError(f"Expected {name!r} to return tensors, found None.")

    def captured(leaf: Any) -> Any:
        if is_dataset(leaf):
            return leaf
        try:
            tensor = tf.convert_to_tensor(leaf)
        except (TypeError, ValueError) as error:
            raise LanguageError(
                f"Expected {name!r} to return dense tensors, numbers, strings and data sets, "
                f"found {type(leaf).__name__}: {error}"
            ) from error
        return tf.identity(tensor, name="result")

    return trees.map(captured, result)


def _binding(result: Any) -> computation_pb2.TensorFlow.Binding:
    tf = tensorflow()
    binding = computation_pb2.TensorFlow.Binding()
    fields = trees.fields_of(result)
    if fields is not None:
        binding.struct.SetInParent()
        binding.struct.element.extend(_binding(child) for _, child in fields)
    elif is_dataset(result):
        with tf.device("/device:CPU:0"):
            variant = tf.identity(tf.data.experimental.to_variant(_without_containers(result)), name="result")
        binding.sequence.variant_tensor_name = variant.name
    else:
        binding.tensor.tensor_name = result.name
    return binding


def _in_containers(dataset: Any, element_type: fl.Type) -> Any:
    """A data set whose elements are in the containers of their type; a list is a tuple, as everywhere in `tf.data`."""
    if not _has_containers_of_its_own(element_type):
        return dataset

    def build(value: Any, type_: fl.Type) -> Any:
        if not isinstance(type_, fl.StructType):
            return value
        parts = [
            (name, build(value[place if name is None else name], field))
            for place, (name, field) in enumerate(type_.items())
        ]
        container = type_.python_container
        return trees.build(None if container is list else container, parts)

    # tf.data calls the function with several arguments where an element is a tuple.
    return dataset.map(lambda *element: build(element if len(element) > 1 else element[0], element_type))


def _without_containers(dataset: Any) -> Any:
    """A data set of dicts and tuples, whatever the elements' containers are."""
    element_type = type_of(dataset.element_spec)
    if not _has_containers_of_its_own(element_type):
        return dataset

    def strip(*element: Any) -> Any:
        leaves = trees.leaves(element if len(element) > 1 else element[0])
        return nested(element_type, iter(leaves))

    return dataset.map(strip)


def _has_containers_of_its_own(type_: fl.Type) -> bool:
    """Whether there is a NamedTuple or an attrs class, whose fields `tf.data` does not sort by name."""
    if not isinstance(type_, fl.StructType):
        return False
    container = type_.python_container
    is_mapping = container is not None and issubclass(container, Mapping)
    is_named = any(name is not None for name, _ in type_.items())
    return (is_named and not is_mapping and container is not None) or any(
        _has_containers_of_its_own(field) for _, field in type_.items()
    )


tensorflow_computation = framework.ComputationWrapper(_wrap, infer_type_fn=type_of)
tensorflow_computation.__doc__ = """Wraps a function of TensorFlow operations as a computation that runs at one place.

Types may be given, or are inferred when the computation is called or mapped:

  >>> @fed.tensorflow_computation
  ... def clip(weights):
  ...     return tf.clip_by_global_norm(weights, 1.0)[0]

  >>> batches_type = fed.SequenceType(fed.TensorType(np.float32, (None, 64)))
  >>> @fed.tensorflow_computation(batches_type)
  ... def count(batches):
  ...     return batches.reduce(np.int64(0), lambda total, batch: total + tf.shape(batch, tf.int64)[0])

The function is called once, in a graph: it sees tensors without values in the containers of its type, and a
`tf.data.Dataset` for each sequence. It may make variables, call other TensorFlow computations, and return data sets. As
in every graph, Python's `if` and `for` over tensors need a `tf.function` around them, and an assignment to a variable
outside of one runs only if something that is returned depends on it.

It runs on the host's CPU, once for each client and call, and leaves nothing behind: variables start anew, and an
operation with a seed draws the same numbers in every call, at every client; give `tf.random.stateless_*` a seed from
the arguments. Without a seed the draws cannot be repeated.

Needs the extra `tensorflow`: `pip install 'fedlens[tensorflow]'`.

Args:
  *args: a function, or types, or a function followed by types, as for `fed.federated_computation`.

Returns:
  A computation, or without types and with arguments a polymorphic one; with types alone, a decorator.

Raises:
  UnsupportedError: TensorFlow is not installed, or an argument's type has no counterpart there.
  LanguageError: the function returns None or what is no dense tensor, or its arguments do not fit the types.
"""
