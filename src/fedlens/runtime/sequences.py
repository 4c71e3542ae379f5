"""Sequences in positional terms: the language's sequence intrinsics, selects, and what becomes of them at the edges.

A `fed.Sequence` hands out batches in the containers of its type, for the user's functions; the functions of a plan take
positional values. So a function of a plan that is mapped over a sequence gets each batch without its containers, and a
sequence that enters a user's function has each batch put into the containers that the function expects.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Positions
from dataclasses import replace
from typing import Any

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from fedlens import trees
from fedlens.language import Sequence
from fedlens.language.sequence import SequenceLayout
from fedlens.language.types import contains_sequence, from_positional
from fedlens.language.unequal_batches import UnequalBatches
from fedlens.runtime.arithmetic import accumulation_dtype
from fedlens.runtime.columns import nest
from fedlens.runtime.values import ClientValues, Part

Function = Callable[[Any], Any]  # of a positional value


def mapped(sequence: Sequence, function: Function, element_type: fl.Type) -> Sequence:
    """The sequence of `function(batch)`, batches of `element_type` and results positional; nothing is computed yet."""

    def transform(batch: Any) -> Any:
        with jax.enable_x64(True):  # who folds may be traced without 64-bit types, and then would narrow `batch`
            return function(without_containers(batch, element_type))

    return sequence.map(transform)


def reduced(sequence: Sequence, zero: Any, function: Function, element_type: fl.Type) -> Any:
    """Folds `function((state, batch))` over a sequence, from `zero`; all positional."""
    return sequence.reduce(zero, lambda state, batch: function((state, without_containers(batch, element_type))))


def summed(sequence: Sequence, element_type: fl.Type, tensors: list[fl.TensorType]) -> Any:
    """The sum of the batches; zeros when there is none. 16-bit floats accumulate in float32."""
    zeros = [jnp.zeros(tensor.shape, accumulation_dtype(tensor.dtype)) for tensor in tensors]

    def add(pair: tuple[Any, Any]) -> Any:
        total, batch = pair
        return jax.tree.map(lambda left, right: left + right.astype(left.dtype), total, batch)

    totals = jax.tree.leaves(reduced(sequence, nest(element_type, zeros), add, element_type))
    return nest(element_type, [total.astype(tensor.dtype) for total, tensor in zip(totals, tensors, strict=True)])


def selected(keys: Int32[Array, " keys"], server_value: Any, function: Function) -> Sequence:
    """The sequence of `function((server_value, key))` over a client's keys."""
    count = keys.shape[0]
    rows = jnp.zeros(1, jnp.int32) if count == 0 else keys  # arrays without rows cannot be indexed
    # Traced, a number of rows that is no tracer would still be a loop; as an int it stands for an eager fold.
    length: Any = np.int32(count) if isinstance(keys, jax.core.Tracer) else count
    start: Any = np.int32(0) if isinstance(keys, jax.core.Tracer) else 0
    layout = SequenceLayout(fl.TensorType(np.int32), rows_per_batch=None, masked=False, max_rows=max(count, 1))
    return Sequence((rows,), start, length, None, layout).map(lambda key: function((server_value, key)))


def stacked(sequence: Sequence, element_type: fl.Type, count: int) -> Any:
    """The first `count` batches as one positional value, whose leaves are [count, *leaf]."""

    def element(position: Any) -> Any:
        return without_containers(sequence.batch(position), element_type)

    if not isinstance(sequence.num_rows, int) or count == 0:
        return lax.map(element, jnp.arange(count, dtype=jnp.int32))
    return jax.tree.map(lambda *rows: jnp.stack(rows), *(element(position) for position in range(count)))


def elements(sequence: Sequence, element_type: fl.Type) -> list[Any]:
    """The batches of a sequence that is at hand, not traced, as positional values."""
    with jax.enable_x64(True):
        return [without_containers(batch, element_type) for batch in sequence]


def client_values(ids: Positions[str], member: fl.Type, parts: Positions[Part]) -> ClientValues:
    """The clients' values of a result; the stacked elements of a select as one list of elements for each client."""
    if not isinstance(member, fl.SequenceType):
        return ClientValues(ids, member, parts)
    count = parts[0].leaves[0].shape[1]
    split = [Part(part.positions, tuple(leaf[:, i] for i in range(count) for leaf in part.leaves)) for part in parts]
    return ClientValues(ids, fl.StructWithPythonType([(None, member.element)] * count, list), split)


def in_containers_of(value: Any, type_: fl.Type) -> Any:
    """A positional value whose sequences hand out batches in the containers of `type_`."""
    if not contains_sequence(type_):
        return value
    if isinstance(type_, fl.StructType):
        return tuple(in_containers_of(child, field) for child, (_, field) in zip(value, type_.items(), strict=True))
    element: fl.Type = type_.element
    if isinstance(value, UnequalBatches):
        return replace(value, runs=tuple(in_containers_of(run, type_) for run in value.runs), element_type=element)
    if isinstance(value, Sequence) and not value.transforms:
        return replace(value, layout=replace(value.layout, element_type=element))
    return value.map(lambda batch: from_positional(without_containers(batch, element), element))


def without_containers(value: Any, type_: fl.Type) -> Any:
    """The positional form of a value that is in containers, or already positional."""
    if not isinstance(type_, fl.StructType):
        return value
    fields = trees.fields_of(value) or []
    return tuple(without_containers(child, field) for (_, child), (_, field) in zip(fields, type_.items(), strict=True))


def without_python_lengths(values: Any) -> Any:
    """Values to trace with: the one Python number in a positional value is a sequence's length, an int32 in a trace."""
    return jax.tree.map(lambda leaf: np.int32(leaf) if isinstance(leaf, int) else leaf, values)
