"""`UnequalBatches`: the batches of one client when their type leaves a dimension undefined (`float32[?,64]`).

Each batch arrives with its true size, so a program is compiled for the sizes it meets. Batches of one size that follow
each other are a `Sequence`, whose fold is one loop: 99 batches of 20 examples and one of 7 are two of them, and clients
that differ little in the number of their full batches share a program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Positions
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np

from fedlens.errors import LanguageError
from fedlens.language.sequence import Sequence, SequenceLayout, State
from fedlens.language.types import tensor_types


@functools.partial(jax.tree_util.register_dataclass, data_fields=["runs"], meta_fields=["element_type"])
@dataclass(frozen=True)
class UnequalBatches:
    """The batches of one client, of several sizes; a local computation uses it as it uses a `Sequence`.

    Attributes:
      runs: batches of one size that follow each other, in order.
      element_type: the type of a batch, with its containers and its undefined dimensions.
    """

    runs: tuple[Sequence, ...]
    element_type: fl.Type

    @property
    def num_batches(self) -> Any:
        """How many batches there are."""
        return sum((run.num_batches for run in self.runs), 0)

    def reduce(self, zero: State, step: Callable[[State, Any], State]) -> State:
        """Folds `step` over the batches; see `Sequence.reduce`. `step` is traced once for each size of a batch."""
        return functools.reduce(lambda state, run: run.reduce(state, step), self.runs, zero)

    def map(self, function: Callable[[Any], Any]) -> UnequalBatches:
        """The batches `function(batch)`."""
        return replace(self, runs=tuple(run.map(function) for run in self.runs))

    def sum(self) -> Any:
        """The sum of all batches, leaf by leaf; they must be of one size, after `map`.

        Raises:
          LanguageError: there is no batch, so that the shape of the sum is unknown.
        """
        if not self.runs:
            raise LanguageError(
                f"Expected a batch to sum, found none, of type {self.element_type}: their sum has no known shape. "
                "Use sequence.reduce, which has a zero."
            )
        return functools.reduce(
            lambda total, part: jax.tree.map(jnp.add, total, part), [run.sum() for run in self.runs]
        )

    def shuffle(self, key: Any) -> UnequalBatches:
        """Refused: which batch comes when would decide what is compiled.

        Raises:
          LanguageError: always.
        """
        raise LanguageError(
            f"Expected batches of one known size to shuffle, found the type {self.element_type}. "
            "Shuffle the examples before they are batched, or use fed.batch_type."
        )

    def batch(self, position: Any) -> Any:
        """The batch at `position`, on the host.

        Raises:
          LanguageError: inside of a traced function, where the position decides what would be compiled.
        """
        if not (isinstance(self.num_batches, int) and isinstance(position, int)):
            raise LanguageError(
                f"Expected batches of one known size to select from, found the type {self.element_type}: "
                "use sequence.reduce, which visits all of them, or fed.python_computation."
            )
        return list(self)[position]

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self.runs)


def of_batches(element_type: fl.Type, batches: Positions[Positions[Any]], capacity: Callable[[int], int]) -> Any:
    """The sequence of some batches in host memory.

    Args:
      element_type: the type of a batch.
      batches: the leaves of each batch, in field order.
      capacity: rounds up how many batches of one size there is room for, so that fewer programs are compiled.
    """
    runs = []
    for shapes, group in groupby(batches, lambda leaves: tuple(np.shape(leaf) for leaf in leaves)):
        same = list(group)
        room = capacity(len(same))
        leaves = []
        for number, (shape, tensor) in enumerate(zip(shapes, tensor_types(element_type), strict=True)):
            rows = np.zeros((room, *shape), np.object_ if tensor.dtype.kind in "US" else tensor.dtype)
            for row, batch in enumerate(same):
                rows[row] = batch[number]
            leaves.append(rows)
        layout = SequenceLayout(element_type, rows_per_batch=None, masked=False, max_rows=room)
        runs.append(Sequence(tuple(leaves), 0, len(same), None, layout))
    return UnequalBatches(tuple(runs), element_type)


def representative(element_type: fl.Type, size: int) -> UnequalBatches:
    """Abstract batches to infer a result type with: undefined dimensions are `size` in one, `size + 1` in another."""
    index = jax.ShapeDtypeStruct((), jnp.int32)
    layout = SequenceLayout(element_type, rows_per_batch=None, masked=False, max_rows=1)
    return UnequalBatches(
        tuple(
            Sequence(
                tuple(
                    jax.ShapeDtypeStruct(
                        (1, *(size + run if dim is None else dim for dim in tensor.shape or ())), tensor.dtype
                    )
                    for tensor in tensor_types(element_type)
                ),
                index,
                index,
                None,
                layout,
            )
            for run in range(2)
        ),
        element_type,
    )
