"""A payload's graph inside of another: its bindings, and its data sets as TensorFlow and the language see them.

A payload (`TensorFlow` in the language's computation.proto) is a GraphDef and two bindings, which say what tensors of
the graph the leaves of the parameter and of the result are. The elements of a data set are dicts where the language's
fields have names and tuples where they have none, as TensorFlow Federated has them; `tf.data` itself sorts a dict by
name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import federated_language as fl
from federated_language.proto import computation_pb2

from fedlens.errors import UnsupportedError
from fedlens.language.tensorflow_library import tensorflow
from fedlens.language.tensorflow_values import tensorflow_dtype

_GRAPH_DEF = "tensorflow.GraphDef"


@dataclass(frozen=True)
class Leaf:
    """A tensor or a sequence of a parameter or result, and the tensor of the graph that stands for it.

    Attributes:
      type: the leaf's type.
      tensor: the name of the tensor: of the leaf itself, or of the variant that a data set is.
      is_serialized: whether a data set stands there as the bytes of a graph that makes it.
    """

    type: fl.Type
    tensor: str
    is_serialized: bool = False


def leaves(binding: computation_pb2.TensorFlow.Binding, type_: fl.Type | None) -> list[Leaf]:
    """The leaves that a binding names, in field order; none for a parameter that is absent.

    Raises:
      UnsupportedError: the binding does not fit the type.
    """
    if type_ is None:
        return []
    kind = binding.WhichOneof("binding")
    if isinstance(type_, fl.StructType) and kind in ("struct", None) and len(binding.struct.element) == len(type_):
        pairs = zip(binding.struct.element, type_.items(), strict=True)
        return [leaf for element, (_, field) in pairs for leaf in leaves(element, field)]
    if isinstance(type_, fl.TensorType) and kind == "tensor":
        return [Leaf(type_, str(binding.tensor.tensor_name))]
    if isinstance(type_, fl.SequenceType) and kind == "sequence":
        field = binding.sequence.WhichOneof("binding")
        if field is not None:
            return [Leaf(type_, str(getattr(binding.sequence, field)), field == "graph_def_tensor_name")]
    raise UnsupportedError(
        f"Expected a TensorFlow payload with a binding for the type {type_}, found {kind or 'none'}. "
        "It is damaged, or was made by a version of the language that fedlens does not know."
    )


def nested(type_: fl.Type, of_leaves: Iterator[Any]) -> Any:
    """Leaves in field order, in the dicts and tuples that a data set's elements are made of.

    Raises:
      UnsupportedError: a struct with names for some of its fields only, or without any field.
    """
    if not isinstance(type_, fl.StructType):
        return next(of_leaves)
    names = [name for name, _ in type_.items()]
    values = [nested(field, of_leaves) for _, field in type_.items()]
    if names and None not in names:
        return dict(zip(names, values, strict=True))
    if not names or any(names):
        raise UnsupportedError(
            f"Expected batches whose fields all have names, or none has, for a tf.data.Dataset, found {type_}."
        )
    return tuple(values)


def flat(structure: Any, type_: fl.Type) -> list[Any]:
    """The leaves, in field order, of what `nested` built; the inverse of it."""
    if not isinstance(type_, fl.StructType):
        return [structure]
    fields = enumerate(type_.items())
    return [leaf for place, (name, field) in fields for leaf in flat(structure[place if name is None else name], field)]


def specification(type_: fl.Type) -> Any:
    """What the elements of a data set of batches of `type_` are, for TensorFlow."""
    tf = tensorflow()

    def tensors(part: fl.Type) -> Iterator[Any]:
        if isinstance(part, fl.StructType):
            for _, field in part.items():
                yield from tensors(field)
        elif isinstance(part, fl.TensorType):
            yield tf.TensorSpec(part.shape, tensorflow_dtype(part.dtype))
        else:
            raise UnsupportedError(f"Expected batches of tensors in a tf.data.Dataset, found {part}.")

    return nested(type_, tensors(type_))


def dataset_of(variant: Any, element_type: fl.Type) -> Any:
    """The `tf.data.Dataset` that a variant tensor holds."""
    tf = tensorflow()
    with tf.device("/device:CPU:0"):
        return tf.data.experimental.from_variant(variant, specification(element_type))


def embed(payload: computation_pb2.TensorFlow, type_: fl.FunctionType, inputs: Sequence[Any]) -> tuple[list[Any], Any]:
    """Puts a payload's graph into TensorFlow's current graph.

    Args:
      payload: the graph and its bindings.
      type_: its parameter and result.
      inputs: for each leaf of the parameter a tensor of the current graph, or a data set.

    Returns:
      For each leaf of the result a tensor or a data set; and the operation that initialises the graph, or None.

    Raises:
      UnsupportedError: the payload is damaged, or needs operations that this TensorFlow does not have.
    """
    tf = tensorflow()
    scope = tf.compat.v1.get_default_graph().unique_name("embedded")
    input_map: dict[str, Any] = {}
    for leaf, value in zip(leaves(payload.parameter, type_.parameter), inputs, strict=True):
        tensor = value
        if isinstance(leaf.type, fl.SequenceType):
            with tf.device("/device:CPU:0"):
                tensor = tf.data.experimental.to_variant(value)
                if leaf.is_serialized:
                    tensor = tf.raw_ops.DatasetToGraphV2(input_dataset=tensor)
        tensor = tf.identity(tensor)
        input_map |= {leaf.tensor: tensor, f"^{leaf.tensor.partition(':')[0]}": tensor}
    if payload.session_token_tensor_name:
        input_map[payload.session_token_tensor_name] = tf.constant(scope)
    results = leaves(payload.result, type_.result)
    initialize = re.sub(r"^\^|:\d+$", "", payload.initialize_op)
    try:
        found = tf.graph_util.import_graph_def(
            _with_names_of_its_own(graph_of(payload), scope),
            input_map=input_map,
            return_elements=[*(leaf.tensor for leaf in results), *([initialize] if initialize else [])],
            name=scope,
        )
    except (ValueError, KeyError, TypeError, tf.errors.OpError) as error:
        raise UnsupportedError(
            f"Expected a TensorFlow payload that TensorFlow {tf.__version__} reads, found one that it refuses "
            f"({type(error).__name__}: {error})."
        ) from error
    outputs = []
    for leaf, tensor in zip(results, found, strict=False):
        if isinstance(leaf.type, fl.TensorType):
            expected = tensorflow_dtype(leaf.type.dtype)
        else:
            expected = tf.string if leaf.is_serialized else tf.variant
        if tensor.dtype.base_dtype != expected:
            raise UnsupportedError(
                f"Expected a TensorFlow payload whose result {leaf.tensor!r} is of type {leaf.type}, "
                f"found {tensor.dtype.name}. Its bindings do not fit its graph."
            )
        if isinstance(leaf.type, fl.SequenceType):
            variant = tf.raw_ops.DatasetFromGraph(graph_def=tensor) if leaf.is_serialized else tensor
            tensor = dataset_of(variant, leaf.type.element)
        outputs.append(tensor)
    return outputs, found[-1] if initialize else None


def graph_of(payload: computation_pb2.TensorFlow) -> Any:
    """The GraphDef in a payload.

    Raises:
      UnsupportedError: there is something else, or it is damaged.
    """
    tf = tensorflow()
    graph_def = tf.compat.v1.GraphDef()
    if not payload.graph_def.type_url.endswith(_GRAPH_DEF):
        raise UnsupportedError(
            f"Expected a TensorFlow payload with a {_GRAPH_DEF}, found {payload.graph_def.type_url!r}."
        )
    try:
        graph_def.ParseFromString(payload.graph_def.value)
    except Exception as error:  # DecodeError of whichever protobuf is at work
        raise UnsupportedError(
            f"Expected the bytes of a {_GRAPH_DEF} in a TensorFlow payload, found {len(payload.graph_def.value)} bytes "
            "that are none: they were cut or changed on their way. Send it again."
        ) from error
    return graph_def


def pack(graph_def: Any) -> Any:
    """A GraphDef as a payload holds it: any message, with the name of its type."""
    payload = computation_pb2.TensorFlow()
    payload.graph_def.type_url = f"type.googleapis.com/{_GRAPH_DEF}"
    payload.graph_def.value = graph_def.SerializeToString(deterministic=True)
    return payload.graph_def


def nodes_of(graph_def: Any) -> Iterator[Any]:
    """The nodes of a graph and of the functions in its library."""
    yield from graph_def.node
    for function in graph_def.library.function:
        yield from function.node_def


def _with_names_of_its_own(graph_def: Any, scope: str) -> Any:
    """A graph whose variables and tables are not those of another graph, or of the same one, embedded elsewhere."""
    for node in nodes_of(graph_def):
        if "shared_name" in node.attr and node.attr["shared_name"].s:
            node.attr["shared_name"].s += f"/{scope}".encode()
    return graph_def
