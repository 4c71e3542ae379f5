"""Partitioners: deal the examples of one pooled data set to clients that do not exist, evenly or with skewed labels.

Each example goes to exactly one client. Clients are called "client-0", "client-1", ..., with leading zeros so that they
sort, and keep their examples in the order of the pooled data set. For data whose clients are real, use
`FederatedData.from_arrays` or `from_table`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int, Shaped
from numpy.typing import ArrayLike

from fedlens.data.columns import Columns, check_columns, rows_of
from fedlens.data.federated_data import FederatedData
from fedlens.data.rows import offsets_of
from fedlens.data.sampling import generator, integer
from fedlens.errors import DataError


def partition_iid(columns: Mapping[str, ArrayLike], clients: int, seed: int = 0) -> FederatedData:
    """Deals shuffled examples to `clients` clients, whose sizes differ by one at most.

    Args:
      columns: name -> array with one row an example.
      clients: how many clients, at most one for each example.
      seed: any integer.

    Raises:
      DataError: a column is not usable, or `clients` is out of range.

    Example:
      >>> partition_iid({"y": range(10)}, clients=3)
      FederatedData(3 clients, 10 examples, y: int64[])
    """
    arrays = check_columns(columns)
    rows = rows_of(arrays)
    _check_clients(clients, rows)
    owner = np.empty(rows, np.int64)
    owner[generator("partition_iid", seed).permutation(rows)] = np.arange(rows) % clients
    return _deal(arrays, owner, clients)


def partition_by_label(
    columns: Mapping[str, ArrayLike], clients: int, labels_per_client: int, seed: int = 0, label: str = "y"
) -> FederatedData:
    """Gives each client the examples of exactly `labels_per_client` labels.

    Labels are dealt so that each has the same number of owners, give or take one, and a label's shuffled examples are
    shared equally among its owners. This is the "#C=k" setting of Li, Diao, Chen and He, "Federated learning on non-IID
    data silos: an experimental study", ICDE 2022 (arXiv:2102.02079), with balanced owners.

    Args:
      columns: name -> array with one row an example.
      clients: how many clients; together they must have room for every label.
      labels_per_client: how many labels each client sees, at most as many as there are.
      seed: any integer.
      label: the column of labels, integers of shape [examples].

    Raises:
      DataError: a column is not usable; a number is out of range; a label has fewer examples than owners.
    """
    arrays = check_columns(columns)
    values, labels = _labels(arrays, label)
    _check_clients(clients, len(labels))
    if not 1 <= integer("labels_per_client", labels_per_client) <= len(values):
        raise DataError(
            f"Expected labels_per_client from 1 to {len(values)}, the labels in column {label!r}, "
            f"found {labels_per_client}."
        )
    if clients * labels_per_client < len(values):
        raise DataError(
            f"Expected clients * labels_per_client of at least {len(values)}, the labels in column {label!r}, "
            f"or some examples would be left over; found {clients} * {labels_per_client}."
        )
    source = generator("partition_by_label", seed)
    owners_of: list[list[int]] = [[] for _ in values]
    for client in source.permutation(clients):
        fewest_first = np.lexsort([source.random(len(values)), [len(owners) for owners in owners_of]])
        for index in fewest_first[:labels_per_client]:
            owners_of[index].append(int(client))
    owner = np.empty(len(labels), np.int64)
    for index, owners in enumerate(owners_of):
        rows = source.permutation(np.flatnonzero(labels == index))
        if len(rows) < len(owners):
            raise DataError(
                f"Expected an example of label {values[index]} in column {label!r} for each of the {len(owners)} "
                f"clients that own it, found {len(rows)}. Take fewer clients, or fewer labels_per_client."
            )
        owner[rows] = np.asarray(owners)[np.arange(len(rows)) % len(owners)]
    return _deal(arrays, owner, clients)


def partition_dirichlet(
    columns: Mapping[str, ArrayLike], clients: int, alpha: float, seed: int = 0, label: str = "y"
) -> FederatedData:
    """Gives each client its own mixture of labels, drawn from a Dirichlet distribution around the pooled mixture.

    Client by client, q ~ Dirichlet(alpha * p) where p are the label frequencies of the pooled data, and the client's
    examples are drawn without replacement, each label with probability q among those that have examples left. All
    clients have the same number of examples, give or take one. With alpha -> infinity every client looks like the
    pool, with alpha -> 0 it sees one label; the last clients take what is left. After Hsu, Qi and Brown, "Measuring
    the effects of non-identical data distribution for federated visual classification", 2019 (arXiv:1909.06335).

    Args:
      columns: name -> array with one row an example.
      clients: how many clients, at most one for each example.
      alpha: the concentration, above 0; Hsu et al. use 0.05 to 100.
      seed: any integer.
      label: the column of labels, integers of shape [examples].

    Raises:
      DataError: a column is not usable, or a number is out of range.
    """
    arrays = check_columns(columns)
    values, labels = _labels(arrays, label)
    _check_clients(clients, len(labels))
    if not (math.isfinite(alpha) and alpha > 0):
        raise DataError(f"Expected alpha to be a finite number above 0, found {alpha}.")
    source = generator("partition_dirichlet", seed)
    left = np.bincount(labels, minlength=len(values))
    queues = np.split(np.lexsort([source.random(len(labels)), labels]), np.cumsum(left)[:-1])  # shuffled within a label
    prior = left / left.sum()
    owner = np.empty(len(labels), np.int64)
    for client, size in enumerate(_even_sizes(len(labels), clients)):
        taken = _draw_labels(source, source.dirichlet(alpha * prior), left, size)
        for index in np.flatnonzero(taken):
            start = len(queues[index]) - left[index]
            owner[queues[index][start : start + taken[index]]] = client
        left = left - taken
    return _deal(arrays, owner, clients)


def _draw_labels(
    source: np.random.Generator, mixture: Shaped[np.ndarray, " labels"], left: Int[np.ndarray, " labels"], size: int
) -> Int[np.ndarray, " labels"]:
    """How many examples of each label `size` draws from `mixture` give when only `left` of each remain.

    Draws of a label that has run out are drawn again among the others, as if each example were drawn on its own.
    """
    taken = np.zeros_like(left)
    while taken.sum() < size:
        open_labels = taken < left
        weights = np.where(open_labels, mixture, 0.0)
        if not weights.sum() > 0:  # the mixture has only labels that ran out, or underflowed at a tiny alpha
            weights = (left - taken).astype(np.float64)
        drawn = source.multinomial(int(size - taken.sum()), weights / weights.sum())
        taken = np.minimum(taken + drawn, left)
    return taken


def _even_sizes(rows: int, clients: int) -> list[int]:
    return [rows // clients + (client < rows % clients) for client in range(clients)]


def _labels(columns: Columns, label: str) -> tuple[Shaped[np.ndarray, " labels"], Int[np.ndarray, " examples"]]:
    """The distinct labels, and the position of each example's label among them."""
    if label not in columns:
        raise DataError(f"Expected a column {label!r} of labels, found {', '.join(columns)}. Name it with `label=`.")
    column = columns[label]
    if column.ndim != 1 or column.dtype.kind not in "biu":
        raise DataError(
            f"Expected one integer label an example in column {label!r}, found {column.dtype}{list(column.shape)}."
        )
    values, labels = np.unique(column, return_inverse=True)
    return values, labels


def _check_clients(clients: int, rows: int) -> None:
    if not 1 <= integer("clients", clients) <= rows:
        raise DataError(f"Expected clients from 1 to {rows}, the number of examples, found {clients}.")


def _deal(columns: Columns, owner: Int[np.ndarray, " examples"], clients: int) -> FederatedData:
    order = np.argsort(owner, kind="stable")
    width = len(str(clients - 1))
    return FederatedData(
        {name: column[order] for name, column in columns.items()},
        offsets_of(np.bincount(owner, minlength=clients)),
        tuple(f"client-{client:0{width}}" for client in range(clients)),
    )
