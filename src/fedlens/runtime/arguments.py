"""A cohort meets a type: from what clients hold to columns, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import federated_language as fl
import numpy as np

from fedlens.compiler import Input
from fedlens.compiler.normalize import PARAMETER
from fedlens.errors import CohortError, StructureError
from fedlens.language.sequence import MASK
from fedlens.language.strings import is_string_array
from fedlens.language.tensorflow_values import batches_of, is_dataset
from fedlens.language.types import (
    contains_sequence,
    describe,
    is_static,
    leaf_paths,
    matched_fields,
    tensor_types,
    to_positional,
)
from fedlens.language.unequal_batches import of_batches
from fedlens.runtime.cohort import Cohort
from fedlens.runtime.columns import Column, SequenceColumn, StructColumn, TensorColumn, bucket
from fedlens.runtime.examples import Examples
from fedlens.runtime.value_columns import ValuesColumn, column_of_positional, leaves_of, storage_dtype
from fedlens.runtime.values import ClientValues


def as_cohort(value: object, name: str) -> Cohort:
    """The cohort that a clients-placed argument stands for.

    Raises:
      CohortError: the argument is neither a cohort, nor client values, nor a list.
    """
    if isinstance(value, Cohort):
        return value
    if isinstance(value, ClientValues):
        return Cohort.from_client_values(value)
    if isinstance(value, list | tuple):
        return Cohort(value)
    hint = " Wrap the mapping: fed.Cohort({...})." if isinstance(value, Mapping) else ""
    raise CohortError(
        f"Expected a fed.Cohort, client values or a list for the clients-placed argument {name}, "
        f"found {describe(value)}.{hint}"
    )


def part_of(argument: Any, type_: fl.Type, each: Input) -> Any:
    """The part of an argument of type `type_` at an input's path; fields of a dict are found by name."""
    value, name = argument, PARAMETER
    for index in each.path:
        value, type_ = matched_fields(value, type_, name)[index], type_[index]
        name += f"[{index}]"
    return value


def join(cohorts: Mapping[str, Cohort]) -> tuple[tuple[str, ...], int | None, dict[str, np.ndarray | None]]:
    """Joins the cohorts of one call by client id.

    Args:
      cohorts: argument name -> cohort, at least one.

    Returns:
      The ids in the order of the first cohort; the smallest chunk size that any cohort asks for; and for each argument
      the positions in its cohort of those ids, None when its order is the same.

    Raises:
      CohortError: two cohorts do not have the same clients.
    """
    (first_name, first), *others = cohorts.items()
    order: dict[str, np.ndarray | None] = {first_name: None}
    for name, cohort in others:
        order[name] = None
        if cohort.ids == first.ids:
            continue
        position = {client_id: place for place, client_id in enumerate(cohort.ids)}
        missing = [client_id for client_id in first.ids if client_id not in position]
        extra = set(cohort.ids) - set(first.ids)
        if missing or extra:
            where = (
                f"client {missing[0]!r} only in {first_name}" if missing else f"client {min(extra)!r} only in {name}"
            )
            raise CohortError(
                f"Expected the same clients in all cohorts of one call, found {where} "
                f"({len(first)} clients in {first_name}, {len(cohort)} in {name})."
            )
        order[name] = np.array([position[client_id] for client_id in first.ids])
    sizes = [cohort.chunk_size for cohort in cohorts.values() if cohort.chunk_size is not None]
    return first.ids, min(sizes, default=None), order


def column_of(cohort: Cohort, type_: fl.Type, order: np.ndarray | None = None) -> Column:
    """Lays out what a cohort's clients hold as a column of type `type_`.

    Args:
      cohort: the cohort.
      type_: the type of one client's value.
      order: positions in the cohort to take the clients from; None in cohort order.

    Raises:
      CohortError: a client's value has another structure, shape or dtype; client and leaf are named.
    """
    source = cohort.source
    if isinstance(source, Examples):
        return _column_of_examples(cohort.ids, source, type_, order)
    if isinstance(source, ClientValues):
        return _column_of_values(source, type_, order)
    positions = range(len(cohort)) if order is None else order
    owners = [f"client {cohort.ids[position]!r}" for position in positions]
    return _column_of_list(owners, [source[position] for position in positions], type_, "")


def server_value(value: Any, type_: fl.Type, name: str) -> Any:
    """The positional value of an argument that is not clients-placed; a list of batches becomes a `Sequence`.

    Args:
      value: what the user passed.
      type_: its type, without a placement.
      name: what errors call it.

    Raises:
      StructureError: the value is not of its type.
    """
    owner = f"the argument {name}"
    try:
        if contains_sequence(type_):
            return _column_of_list([owner], [value], type_, "").value(0)
        return _checked(owner, value, type_, "")
    except CohortError as error:
        raise StructureError(str(error)) from error


def _column_of_list(owners: Sequence[str], values: Sequence[Any], type_: fl.Type, path: str) -> Column:
    if not contains_sequence(type_):
        rows = [_checked(owner, value, type_, path) for owner, value in zip(owners, values, strict=True)]
        return column_of_positional(rows, type_)
    if isinstance(type_, fl.SequenceType):
        return _column_of_batches(owners, values, type_, path)
    matched = [_matched(owner, value, type_, path) for owner, value in zip(owners, values, strict=True)]
    fields = []
    for position, (name, field_type) in enumerate(type_.items()):
        step = f"{path}/{position if name is None else name}".lstrip("/")
        fields.append(_column_of_list(owners, [of_owner[position] for of_owner in matched], field_type, step))
    return StructColumn(tuple(fields))


def _column_of_batches(owners: Sequence[str], values: Sequence[Any], type_: fl.SequenceType, path: str) -> Column:
    rows: list[list[Any]] = []
    lengths = []
    for owner, batches in zip(owners, values, strict=True):
        if isinstance(batches, Mapping | str | bytes) or not isinstance(batches, Iterable):
            raise CohortError(
                f"Expected a list of batches of type {type_.element}{_where(owner, path)}, found {describe(batches)}."
            )
        before = len(rows)
        for number, batch in enumerate(_in_numpy(owner, batches, path)):
            rows.append(leaves_of(_checked(owner, batch, type_.element, f"{path}/batch {number}".lstrip("/"))))
        lengths.append(len(rows) - before)
    tensors = tensor_types(type_.element)
    sizes = np.array(lengths, np.int64)
    if not is_static(type_):
        ends = np.cumsum(sizes)
        of_clients = [rows[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        return ValuesColumn(type_, tuple(of_batches(type_.element, batches, bucket) for batches in of_clients))
    leaves = (
        tuple(
            np.stack([np.asarray(leaf, storage_dtype(tensor)) for leaf in leaf_rows])
            for tensor, leaf_rows in zip(tensors, zip(*rows, strict=True), strict=True)
        )
        if rows
        else tuple(np.zeros((0, *tensor.shape), storage_dtype(tensor)) for tensor in tensors)
    )
    return SequenceColumn(type_.element, leaves, np.cumsum(sizes) - sizes, sizes, rows_per_batch=None, masked=False)


def _in_numpy(owner: str, batches: Iterable[Any], path: str) -> Iterable[Any]:
    if not is_dataset(batches):
        return batches
    try:
        return batches_of(batches)
    except StructureError as error:
        raise CohortError(f"{error} This is the value{_where(owner, path)}.") from error


def _column_of_examples(
    ids: Sequence[str], examples: Examples, type_: fl.Type, order: np.ndarray | None
) -> SequenceColumn:
    if not isinstance(type_, fl.SequenceType) or not isinstance(type_.element, fl.StructType):
        raise CohortError(
            f"Expected a cohort of values of type {type_}, found examples of a data set. "
            "They come as sequences of batches."
        )
    fields = list(type_.element.items())
    names = [name for name, _ in fields]
    masked = bool(names) and names[-1] == MASK and MASK not in examples.columns
    if masked:
        fields = fields[:-1]
    sizes = {
        tensor.shape[0] if isinstance(tensor, fl.TensorType) and tensor.shape else None
        for _, tensor in type_.element.items()
    }
    size = sizes.pop() if len(sizes) == 1 else None
    if size is None:
        raise CohortError(
            f"Expected batches whose fields all have one known leading dimension, found {type_.element}: examples of a "
            "data set say nothing of a batch size. Use fed.batch_type, or give each client a list of batches."
        )
    leaves = []
    for name, tensor in fields:
        column = examples.columns.get(name) if name is not None else None
        if column is None:
            raise CohortError(
                f"Expected a data set with the fields {', '.join(map(str, names))}, "
                f"found {', '.join(examples.columns)}."
            )
        if not _is_of_dtype(column, tensor) or column.shape[1:] != tuple(tensor.shape[1:]):
            expected, found = (
                fl.TensorType(dtype, shape[1:])
                for dtype, shape in ((tensor.dtype, tensor.shape), (column.dtype, column.shape))
            )
            raise CohortError(f"Expected examples with {expected} in field {name!r}, found {found}.")
        leaves.append(column)
    starts, lengths = (
        (examples.starts, examples.lengths) if order is None else (examples.starts[order], examples.lengths[order])
    )
    if not masked and np.any(lengths % size):
        position = int(np.argmax(lengths % size != 0))
        client_id = ids[position if order is None else int(order[position])]
        raise CohortError(
            f"Expected a multiple of {size} examples, because batches of type {type_.element} have no mask, "
            f"found {lengths[position]} in client {client_id!r}. "
            f"Use fed.batch_type(element_type, {size}), which adds a mask."
        )
    return SequenceColumn(type_.element, tuple(leaves), starts, lengths, size, masked, examples.in_place)


def _column_of_values(values: ClientValues, type_: fl.Type, order: np.ndarray | None) -> TensorColumn:
    if not type_.is_assignable_from(values.type):
        raise CohortError(
            f"Expected client values of type {type_}, found {values.type}{_difference(type_, values.type)}."
        )
    leaves = tuple(leaf if order is None else leaf[order] for leaf in values.stacked_leaves())
    return TensorColumn(type_, leaves, len(values))


def _difference(expected: fl.Type, found: fl.Type) -> str:
    """The first leaf in which two types of the same leaves differ, in words; the types themselves may be long."""
    paths = leaf_paths(expected)
    if paths != leaf_paths(found):
        return ""
    pairs = zip(paths, tensor_types(expected), tensor_types(found), strict=True)
    differing = [(path, one, other) for path, one, other in pairs if path and not one.is_assignable_from(other)]
    return "".join(f": {one} against {other} at {path!r}, in all clients" for path, one, other in differing[:1])


def _checked(owner: str, value: Any, type_: fl.Type, path: str) -> Any:
    try:
        return to_positional(value, type_, path)
    except StructureError as error:
        raise CohortError(f"{str(error).rstrip('.')}, in {owner}.") from error


def _matched(owner: str, value: Any, type_: fl.StructType, path: str) -> list[Any]:
    try:
        return matched_fields(value, type_, path)
    except StructureError as error:
        raise CohortError(f"{str(error).rstrip('.')}, in {owner}.") from error


def _is_of_dtype(column: np.ndarray, tensor: fl.TensorType) -> bool:
    return is_string_array(column) if tensor.dtype.kind in "US" else column.dtype == tensor.dtype


def _where(owner: str, path: str) -> str:
    return f" at {path!r} in {owner}" if path else f" in {owner}"
