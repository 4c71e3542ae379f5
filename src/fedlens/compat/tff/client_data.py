"""Clients' data sets as TFF programs hold them, as a cohort that a fedlens process trains on.

A TFF program batches its data itself: `dataset.batch(20)` leaves a last batch of 7. fedlens compiles one program for
batches of one size with a mask, so batches are filled up here, each on its own: which examples share a batch, and in
which order batches come, stays what the program made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import federated_language as fl
import numpy as np

from fedlens.errors import CohortError, StructureError
from fedlens.language.sequence import MASK
from fedlens.language.tensorflow_values import batches_of, is_dataset
from fedlens.language.types import describe
from fedlens.learning.models import INPUT, TARGET
from fedlens.runtime import Cohort

Rows = tuple[np.ndarray, np.ndarray]  # x and y of one batch, with as many rows


@dataclass(frozen=True)
class ClientBatches:
    """The batches of every client of a round.

    Attributes:
      cohort: the clients with lists of batches of `batch_size` rows, which end in a mask.
      batch_size: rows in a batch.
      num_batches: how many batches all clients have together.
    """

    cohort: Cohort
    batch_size: int
    num_batches: int


def client_batches(data: Any, inputs: fl.StructType) -> ClientBatches:
    """Reads the batches of all clients, and fills them up to the rows of the largest.

    Args:
      data: a data set for each client: a list, a mapping from client ids, or a cohort of them. A data set is a list of
        batches or a `tf.data.Dataset`; a batch is a mapping with the fields `x` and `y`, or a pair.
      inputs: the type of one example.

    Raises:
      CohortError: no client, a batch of another form, or integers that do not fit the model's; client and batch are
        named.
    """
    if isinstance(data, Cohort):
        if not isinstance(data.source, list):
            raise CohortError(
                f"Expected a list of batches for each client, found {data!r}, which was drawn from a data set or came "
                "back from clients. Train on it with fed.learning, which batches it."
            )
        data = dict(zip(data.ids, data.source, strict=True))
    clients = Cohort(data)
    data_sets: Any = clients.source
    held = [_batches(data_set, inputs, client_id) for client_id, data_set in zip(clients.ids, data_sets, strict=True)]
    size = max((len(x) for batches in held for x, _ in batches), default=1)
    filled = {
        client_id: [_filled(rows, size) for rows in batches]
        for client_id, batches in zip(clients.ids, held, strict=True)
    }
    return ClientBatches(Cohort(filled, chunk_size=clients.chunk_size), size, sum(map(len, held)))


def _batches(data_set: Any, inputs: fl.StructType, client_id: str) -> list[Rows]:
    """The batches of one client that have rows."""
    if isinstance(data_set, Mapping | str | bytes) or not isinstance(data_set, Iterable):
        raise CohortError(
            f"Expected a list of batches or a tf.data.Dataset, found {describe(data_set)}, in client {client_id!r}."
        )
    try:
        batches = batches_of(data_set) if is_dataset(data_set) else data_set
    except StructureError as error:
        raise CohortError(f"{str(error).rstrip('.')}, in client {client_id!r}.") from error
    read = (_rows(batch, inputs, f"batch {number} of client {client_id!r}") for number, batch in enumerate(batches))
    return [rows for rows in read if len(rows[0])]


def _rows(batch: Any, inputs: fl.StructType, where: str) -> Rows:
    if isinstance(batch, Mapping) and set(batch) >= {INPUT, TARGET}:
        fields = [batch[INPUT], batch[TARGET]]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        fields = list(batch)
    else:
        raise CohortError(
            f"Expected a batch with the fields {INPUT!r} and {TARGET!r} or a pair of them, found {describe(batch)}, "
            f"in {where}."
        )
    x, y = (
        _fitting(np.asarray(field), inputs[name].dtype, where)
        for name, field in zip((INPUT, TARGET), fields, strict=True)
    )
    if not (x.ndim and y.ndim and len(x) == len(y)):
        raise CohortError(
            f"Expected as many rows in {TARGET!r} as in {INPUT!r}, found {describe(y)} and {describe(x)}, in {where}."
        )
    return x, y


def _fitting(array: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """Integers in the dtype of the model: NumPy and tf.data count in 64 bits, JAX in 32. Nothing else is cast."""
    if array.dtype == dtype or not (array.dtype.kind in "iu" and dtype.kind in "iu"):
        return array
    limits = np.iinfo(dtype)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise CohortError(f"Expected integers that fit {dtype}, found {array.min()} to {array.max()}, in {where}.")
    return array.astype(dtype)


def _filled(rows: Rows, size: int) -> dict[str, np.ndarray]:
    x, y = rows
    # Rows that fill up repeat the first: what a model makes of zeros could be NaN, and a mask does not stop a gradient.
    places = np.where(np.arange(size) < len(x), np.arange(size), 0)
    return {INPUT: x[places], TARGET: y[places], MASK: np.arange(size) < len(x)}
