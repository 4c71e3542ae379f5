"""The edges of a payload's graph: values of NumPy and sequences that are fed, tensors and data sets that are fetched.

A session takes no data set. So the batches of a client are fed as arrays, one for each leaf, of which the graph makes a
data set; and what is returned as one is walked through, batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import federated_language as fl
import numpy as np

from fedlens.language.sequence import Sequence, SequenceLayout
from fedlens.language.tensorflow_graph import flat, nested, specification
from fedlens.language.tensorflow_library import tensorflow
from fedlens.language.tensorflow_values import tensorflow_dtype
from fedlens.language.types import is_static, matched_fields, tensor_types
from fedlens.language.unequal_batches import of_batches


@dataclass(frozen=True)
class Feed:
    """A leaf of the parameter in the graph.

    Attributes:
      value: the tensor or data set that stands for it.
      placeholders: what is fed.
      arrays: takes the leaf's value apart into an array for each of them.
    """

    value: Any
    placeholders: tuple[Any, ...]
    arrays: Callable[[Any], list[Any]]


@dataclass(frozen=True)
class Fetch:
    """A leaf of the result in the graph: a tensor, or the first operation of a walk through a data set.

    Attributes:
      fetched: what is evaluated.
      batch: for a data set the leaves of its next element, in field order.
      type: the leaf's type.
    """

    fetched: Any
    batch: tuple[Any, ...] | None
    type: fl.Type


def feed(type_: fl.Type) -> Feed:
    """Makes the placeholders of a leaf, and the data set of a sequence, in TensorFlow's current graph."""
    tf = tensorflow()
    if isinstance(type_, fl.TensorType):
        placeholder = tf.compat.v1.placeholder(tensorflow_dtype(type_.dtype), type_.shape)
        return Feed(placeholder, (placeholder,), lambda value: [value])
    element_type, tensors = type_.element, tensor_types(type_.element)
    if is_static(type_):
        placeholders = tuple(
            tf.compat.v1.placeholder(tensorflow_dtype(tensor.dtype), (None, *tensor.shape)) for tensor in tensors
        )
        dataset = tf.data.Dataset.from_tensor_slices(nested(element_type, iter(placeholders)))
    else:  # batches of several sizes do not stack: each leaf of each batch is fed as the bytes of a tensor
        placeholders = tuple(tf.compat.v1.placeholder(tf.string, (None,)) for _ in tensors)
        specifications = flat(specification(element_type), element_type)

        def parsed(*serialized: Any) -> Any:
            pairs = zip(serialized, specifications, strict=True)
            parts = [tf.ensure_shape(tf.io.parse_tensor(part, spec.dtype), spec.shape) for part, spec in pairs]
            return nested(element_type, iter(parts))

        dataset = tf.data.Dataset.from_tensor_slices(placeholders).map(parsed)
    options = tf.data.Options()
    options.autotune.enabled = (
        False  # it would search in a thread of its own, in each call, and warn when it is cut off
    )
    options.experimental_optimization.apply_default_optimizations = False
    return Feed(dataset.with_options(options), placeholders, lambda value: _columns(value, element_type))


def _columns(batches: Any, element_type: fl.Type) -> list[Any]:
    """An array of all batches for each leaf of a batch: of its values, or of them as bytes where sizes differ."""
    tf = tensorflow()
    rows = [leaves_of(batch, element_type) for batch in batches]
    columns = []
    for place, tensor in enumerate(tensor_types(element_type)):
        of_leaf = [row[place] for row in rows]
        if not is_static(element_type):
            dtype = tensorflow_dtype(tensor.dtype)
            packed = [tf.make_tensor_proto(leaf, dtype).SerializeToString() for leaf in of_leaf]
            columns.append(np.array(packed, np.object_))
            continue
        column = np.empty((len(rows), *tensor.shape), np.object_ if tensor.dtype.kind in "US" else tensor.dtype)
        for row, leaf in enumerate(of_leaf):
            column[row] = leaf
        columns.append(column)
    return columns


def fetch(output: Any, type_: fl.Type) -> Fetch:
    """What is fetched of a leaf of the result, which is a tensor or a data set of TensorFlow's current graph."""
    if isinstance(type_, fl.TensorType):
        return Fetch(output, None, type_)
    iterator = tensorflow().compat.v1.data.make_initializable_iterator(output)
    return Fetch(iterator.initializer, tuple(flat(iterator.get_next(), type_.element)), type_)


def batches_of(session: Any, batch: tuple[Any, ...], element_type: fl.Type) -> Any:
    """The batches of a data set whose walk has begun."""
    rows = []
    while True:
        try:
            rows.append(session.run(list(batch)))
        except tensorflow().errors.OutOfRangeError:
            break
    if not is_static(element_type):
        return of_batches(element_type, rows, lambda count: count)
    columns = []
    for place, tensor in enumerate(tensor_types(element_type)):
        dtype = np.object_ if tensor.dtype.kind in "US" else tensor.dtype
        column = np.zeros((max(len(rows), 1), *tensor.shape), dtype)  # arrays without rows cannot be indexed
        for number, row in enumerate(rows):
            column[number] = row[place]
        columns.append(column)
    layout = SequenceLayout(element_type, rows_per_batch=None, masked=False, max_rows=max(len(rows), 1))
    return Sequence(tuple(columns), 0, len(rows), None, layout)


def leaves_of(value: Any, type_: fl.Type) -> list[Any]:
    """The leaves of a value in containers, in field order; a sequence is one of them."""
    if not isinstance(type_, fl.StructType):
        return [value]
    fields = zip(matched_fields(value, type_, ""), type_.items(), strict=True)
    return [leaf for child, (_, field) in fields for leaf in leaves_of(child, field)]
