"""TensorFlow's values where NumPy's are expected: recognised without importing TensorFlow, and turned into NumPy's.

Whoever hands over a `tf.Tensor` or a `tf.data.Dataset` has imported TensorFlow already; everybody else pays nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import federated_language as fl
import numpy as np

from fedlens.errors import StructureError


def is_tensorflow(value: object) -> bool:
    """Whether TensorFlow made a value: a tensor, a variable, a data set, a specification of one."""
    return type(value).__module__.startswith("tensorflow.")


def in_numpy(value: Any) -> Any:
    """A value with NumPy's arrays and scalars in place of an eager tensor or a variable; any other as it is.

    Example:
      >>> in_numpy(tf.constant([1.0, 2.0]))
      array([1., 2.], dtype=float32)
    """
    return value.numpy() if is_tensorflow(value) and hasattr(value, "numpy") else value


def is_dataset(value: object) -> bool:
    """Whether a value is a `tf.data.Dataset`."""
    data = getattr(sys.modules.get("tensorflow"), "data", None)
    return data is not None and isinstance(value, data.Dataset)


def batches_of(dataset: Any) -> Iterator[Any]:
    """The elements of a `tf.data.Dataset` in NumPy, in their own containers.

    Args:
      dataset: a finite `tf.data.Dataset` of dense tensors.

    Raises:
      StructureError: the data set repeats for ever, or its elements are no dense tensors.
    """
    if int(dataset.cardinality()) == -1:
        raise StructureError("Expected a finite tf.data.Dataset, found one that repeats for ever. Use dataset.take(n).")
    try:
        return iter(dataset.as_numpy_iterator())
    except TypeError as error:
        raise StructureError(
            f"Expected a tf.data.Dataset of dense tensors, found elements of {dataset.element_spec}."
        ) from error


def leaf_type(value: Any) -> fl.TensorType:
    """The type of a tensor, a variable or a `tf.TensorSpec`.

    Raises:
      StructureError: a sparse or ragged tensor, or anything else that is no dense array.
    """
    dtype: Any = getattr(value, "dtype", None)
    shape: Any = getattr(value, "shape", None)
    is_array = hasattr(dtype, "base_dtype") and hasattr(shape, "rank")
    if not is_array or any(word in type(value).__name__ for word in ("Ragged", "Sparse", "IndexedSlices")):
        raise StructureError(f"Expected a dense tensor, found {type(value).__name__}.")
    return fl.TensorType(language_dtype(dtype), None if shape.rank is None else tuple(shape.as_list()))


def language_dtype(dtype: Any) -> Any:
    """The language's dtype for one of TensorFlow's.

    Raises:
      StructureError: a dtype that the language does not have, such as a quantized integer.
    """
    if dtype.base_dtype.name == "string":
        return np.str_
    try:
        return fl.TensorType(np.dtype(dtype.as_numpy_dtype)).dtype
    except (TypeError, KeyError, NotImplementedError) as error:
        raise StructureError(
            f"Expected a dtype that the federated language knows, found TensorFlow's {dtype.name}."
        ) from error


def tensorflow_dtype(dtype: np.dtype[Any]) -> Any:
    """TensorFlow's dtype for one of the language's: strings of both kinds are `tf.string`."""
    tf = sys.modules["tensorflow"]
    return tf.string if dtype.kind in "US" else tf.as_dtype(dtype)
