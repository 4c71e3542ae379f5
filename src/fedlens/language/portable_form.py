"""What an exported program takes and returns: the flat arrays that a local computation's argument and result are.

A `Sequence` becomes its rows, its first row, its number of rows, and an array that is as long as `max_rows` and is read
by nobody: two dimensions, of the rows and of `max_rows`, stay symbolic, and one program serves cohorts of any size. How
rows make a batch is static, though, and known only when a cohort comes: as whole batches, or as examples of a data set
with or without a mask to fill in. There is one program for each of these forms.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from fedlens import trees
from fedlens.language.sequence import MASK, SequenceLayout
from fedlens.language.sequence import Sequence as ClientSequence
from fedlens.language.types import tensor_types


@dataclass(frozen=True)
class SequenceForm:
    """How the rows of a packed sequence make batches; the part of a `SequenceLayout` that the type leaves open.

    Attributes:
      rows_per_batch: how many rows make a batch; None when a row is a whole batch.
      masked: whether a batch ends in a mask that is not among the rows.
    """

    rows_per_batch: int | None
    masked: bool

    def __str__(self) -> str:
        if self.rows_per_batch is None:
            return "batches"
        return "masked rows" if self.masked else "rows"


Form = tuple[SequenceForm, ...]  # one for each sequence of a parameter, in field order


def forms(parameter: fl.Type | None) -> list[Form]:
    """All forms in which the runtime may lay out the sequences of a parameter; one empty form when it has none.

    Example:
      >>> examples = batch_type(fl.StructType([("x", np.float32)]), 20)
      >>> [", ".join(map(str, form)) for form in forms(fl.SequenceType(examples))]
      ['batches', 'rows', 'masked rows']
    """
    sequences = [part for part in _parts(parameter) if isinstance(part, fl.SequenceType)]
    return list(itertools.product(*(_sequence_forms(sequence.element) for sequence in sequences)))


def _sequence_forms(element: fl.Type) -> list[SequenceForm]:
    found = [SequenceForm(None, False)]
    if not isinstance(element, fl.StructType) or len(element) == 0:
        return found
    fields = list(element.items())
    sizes = {
        field.shape[0] if isinstance(field, fl.TensorType) and field.shape else None for _, field in element.items()
    }
    size = sizes.pop() if len(sizes) == 1 else None
    if size is not None:
        found.append(SequenceForm(size, False))
        if fields[-1][0] == MASK and len(fields) > 1:
            found.append(SequenceForm(size, True))
    return found


def arguments(parameter: fl.Type | None, form: Form) -> list[jax.ShapeDtypeStruct]:
    """The arrays that a program of this form takes; dimensions that depend on the cohort are symbolic.

    Args:
      parameter: the parameter's type, None without one.
      form: how its sequences are laid out.
    """
    specs: list[jax.ShapeDtypeStruct] = []
    names = [name for number in range(len(form)) for name in (f"rows_{number}", f"max_rows_{number}")]
    dimensions = iter(export.symbolic_shape(",".join(names)))
    of_sequences = iter(form)
    for part in _parts(parameter):
        if isinstance(part, fl.SequenceType):
            of_part, rows, max_rows = next(of_sequences), next(dimensions), next(dimensions)
            specs += [
                jax.ShapeDtypeStruct((rows, *shape), dtype) for shape, dtype in _row_shapes(part.element, of_part)
            ]
            specs += [jax.ShapeDtypeStruct((), np.int32)] * 2
            specs.append(jax.ShapeDtypeStruct((max_rows,), np.bool_))
        else:
            specs.append(jax.ShapeDtypeStruct(part.shape, part.dtype))
    return specs


def results(result: fl.Type) -> list[jax.ShapeDtypeStruct]:
    """The arrays that a program returns."""
    return [jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for tensor in tensor_types(result)]


def flatten(value: Any, parameter: fl.Type | None) -> tuple[Form, list[Any]]:
    """The form of an argument in its containers, and the arrays that it is."""
    form: list[SequenceForm] = []
    arrays: list[Any] = []
    for part, of_part in _values(value, parameter):
        if isinstance(part, fl.SequenceType):
            packed = _packed(of_part, part.element)
            form.append(SequenceForm(packed.layout.rows_per_batch, packed.layout.masked))
            arrays += [*packed.leaves, jnp.asarray(packed.start, jnp.int32), jnp.asarray(packed.num_rows, jnp.int32)]
            arrays.append(jnp.zeros(packed.layout.max_rows, jnp.bool_))
        else:
            arrays.append(of_part)
    return tuple(form), arrays


def unflatten(arrays: Sequence[Any], parameter: fl.Type, form: Form) -> Any:
    """The positional argument that these arrays are; the inverse of `flatten`."""
    remaining, of_sequences = iter(arrays), iter(form)

    def take(type_: fl.Type) -> Any:
        if isinstance(type_, fl.StructType):
            return tuple(take(field) for _, field in type_.items())
        if not isinstance(type_, fl.SequenceType):
            return next(remaining)
        of_type = next(of_sequences)
        rows = tuple(next(remaining) for _ in _row_shapes(type_.element, of_type))
        start, num_rows, longest = (next(remaining) for _ in range(3))
        layout = SequenceLayout(type_.element, of_type.rows_per_batch, of_type.masked, longest.shape[0])
        return ClientSequence(rows, start, num_rows, None, layout)

    return take(parameter)


def nested(arrays: Iterator[Any], type_: fl.Type) -> Any:
    """The positional result that these arrays are."""
    if isinstance(type_, fl.StructType):
        return tuple(nested(arrays, field) for _, field in type_.items())
    return next(arrays)


def _parts(type_: fl.Type | None) -> list[Any]:
    """The tensors and sequences of a type, in field order."""
    if type_ is None:
        return []
    if isinstance(type_, fl.StructType):
        return [part for _, field in type_.items() for part in _parts(field)]
    return [type_]


def _values(value: Any, type_: fl.Type | None) -> Iterator[tuple[fl.Type, Any]]:
    """The tensors and sequences of a type, each with what a value in containers holds for it."""
    if isinstance(type_, fl.StructType):
        for (_, child), (_, field) in zip(trees.fields_of(value) or [], type_.items(), strict=True):
            yield from _values(child, field)
    elif type_ is not None:
        yield type_, value


def _row_shapes(element: fl.Type, form: SequenceForm) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    tensors = tensor_types(element)
    if form.masked:
        tensors = tensors[:-1]
    without = 0 if form.rows_per_batch is None else 1
    return [(tuple(tensor.shape)[without:], tensor.dtype) for tensor in tensors]


def _packed(sequence: ClientSequence, element: fl.Type) -> ClientSequence:
    """The same batches as rows that are read as they lie: what was mapped or shuffled is computed first."""
    if sequence.transforms or sequence.order is not None:
        sequence = _computed(sequence, element)
    if not isinstance(sequence.num_rows, int):
        return sequence
    # Eager, in the debug engine: a client's rows are filled up to a power of two, as each shape compiles anew.
    capacity = 1 << (sequence.layout.max_rows - 1).bit_length()
    rows = tuple(
        jnp.pad(leaf, [(0, max(capacity - leaf.shape[0], 0)), *[(0, 0)] * (leaf.ndim - 1)]) for leaf in sequence.leaves
    )
    layout = SequenceLayout(
        sequence.layout.element_type, sequence.layout.rows_per_batch, sequence.layout.masked, capacity
    )
    return ClientSequence(rows, sequence.start, sequence.num_rows, None, layout)


def _computed(sequence: ClientSequence, element: fl.Type) -> ClientSequence:
    capacity = max(-(-sequence.layout.max_rows // (sequence.layout.rows_per_batch or 1)), 1)
    buffers = tuple(jnp.zeros((capacity, *tensor.shape), tensor.dtype) for tensor in tensor_types(element))

    def write(state: Any, batch: Any) -> Any:
        position, rows = state
        leaves = [leaf for _, leaf in _values(batch, element)]
        written = (
            lax.dynamic_update_index_in_dim(row, leaf, position, 0) for row, leaf in zip(rows, leaves, strict=True)
        )
        return position + 1, tuple(written)

    _, rows = sequence.reduce((jnp.int32(0), buffers), write)
    layout = SequenceLayout(element, None, False, capacity)
    return ClientSequence(rows, 0, sequence.num_batches, None, layout)
