"""`Sequence`: the batches of one client, as a local computation sees them.

A local computation whose argument has a `SequenceType` receives a `Sequence` and folds over it: `sequence.reduce(zero,
step)`. Under the `local` engine that is one `while_loop` with the client's own number of batches, so a client with few
examples costs what it holds; under `debug` it is a Python loop. Batches are never laid out in memory: a batch is
gathered from the client's rows when the loop reaches it, in an order that `shuffle` draws from the client's key. A
`python_computation` gets its batches in NumPy, and may iterate over them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PRNGKeyArray

from fedlens.errors import LanguageError
from fedlens.language.types import from_positional, is_wide

State = TypeVar("State")

_UNROLLED = 4  # batches, at most: XLA then fuses what one leaves with what the next begins
MASK = "mask"  # the field of a batch that says which of its rows are examples and which only fill it up


@dataclass(frozen=True)
class SequenceLayout:
    """What is static about a packed sequence; two clients of one cohort share it.

    Attributes:
      element_type: the type of a batch, with its containers.
      rows_per_batch: how many rows make a batch; None when a row is a whole batch already.
      masked: whether the batch type ends in a `mask` field, which the sequence fills in.
      max_rows: at least as many rows as any client of the cohort has.
      num_batches: how many batches every client has, all of them full; None if that differs, or is not to be relied on.
    """

    element_type: fl.Type
    rows_per_batch: int | None
    masked: bool
    max_rows: int
    num_batches: int | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["leaves", "start", "num_rows", "order"],
    meta_fields=["layout", "transforms"],
)
@dataclass(frozen=True)
class Sequence:
    """The batches of one client.

    Example:
      >>> import fedlens as fed
      >>> @fed.jax_computation(fed.SequenceType(fed.TensorType(np.float32, (2,))))
      ... def total(batches):
      ...     return batches.reduce(jnp.float32(0), lambda state, batch: state + batch.sum())
      >>> float(total([np.ones(2, np.float32), np.ones(2, np.float32)]))
      4.0

    Attributes:
      leaves: the rows of all clients that are computed together, one array for each leaf of a row.
      start: the client's first row.
      num_rows: how many rows the client has.
      order: the order in which its rows are visited; None as they are stored.
      layout: what is static.
      transforms: functions applied to each batch, by `map`.
    """

    leaves: tuple[Any, ...]  # [rows, *leaf]; these and the numbers are traced, or concrete in the debug engine
    start: Any
    num_rows: Any
    order: Int[Array | np.ndarray, " max_rows"] | None
    layout: SequenceLayout
    transforms: tuple[Callable[[Any], Any], ...] = field(default=())

    @property
    def num_batches(self) -> Int[Array, ""] | int:
        """How many batches there are; the last one may be filled up, see `mask`."""
        if self.layout.num_batches is not None:
            return self.layout.num_batches
        size = self.layout.rows_per_batch or 1
        return (self.num_rows + size - 1) // size

    @property
    def _is_on_host(self) -> bool:
        """Whether NumPy holds the batches, so that nothing is traced."""
        return isinstance(self.num_rows, int) and all(isinstance(leaf, np.ndarray) for leaf in self.leaves)

    def reduce(self, zero: State, step: Callable[[State, Any], State]) -> State:
        """Folds `step` over the batches: `step(... step(step(zero, batch0), batch1) ..., batchN)`.

        Args:
          zero: the initial state, a pytree of arrays.
          step: `step(state, batch) -> state`, of the same structure, shapes and dtypes as `zero`. Differentiate inside
            of it; a gradient cannot be taken through the fold.

        Returns:
          The last state; `zero` when there is no batch.

        Raises:
          LanguageError: `step` returns a state of another structure, shape or dtype than it was given.
        """
        if self._is_on_host:
            return functools.reduce(step, self, zero)
        zero = jax.tree.map(jnp.asarray, zero)
        checked = _checked(step, zero)
        if isinstance(self.num_rows, int):  # eager: the debug engine, where a user's print and breakpoint must work
            state = zero
            for position in range(int(self.num_batches)):
                state = checked(state, self.batch(position))
            return state

        if self.layout.num_batches is not None and self.layout.num_batches <= _UNROLLED:
            return functools.reduce(
                lambda state, position: checked(state, self.batch(jnp.int32(position))),
                range(self.layout.num_batches),
                zero,
            )

        def body(carry: tuple[Int[Array, ""], State]) -> tuple[Int[Array, ""], State]:
            position, state = carry
            return position + np.int32(1), checked(state, self.batch(position))

        count = jnp.asarray(self.num_batches, jnp.int32)
        return lax.while_loop(lambda carry: carry[0] < count, body, (jnp.int32(0), zero))[1]

    def map(self, function: Callable[[Any], Any]) -> Sequence:
        """The sequence of `function(batch)`."""
        return replace(self, transforms=(*self.transforms, function))

    def sum(self) -> Any:
        """The sum of all batches, leaf by leaf; zeros when there is no batch.

        Rows that only fill up the last batch are summed too: where there is a `mask`, apply it with `map` first.
        """
        if self._is_on_host:  # NumPy's sum, which keeps 64 bits without being told to
            zero = jax.tree.map(np.zeros_like, self.batch(0))
            return self.reduce(zero, lambda total, batch: jax.tree.map(np.add, total, batch))
        shape = jax.eval_shape(lambda: self.batch(jnp.int32(0)))
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
        return self.reduce(zero, lambda total, batch: jax.tree.map(jnp.add, total, batch))

    def shuffle(self, key: PRNGKeyArray) -> Sequence:
        """The same rows in a random order, drawn uniformly from `key`; rows that are whole batches trade places.

        The order depends on the key and the client's number of rows alone, not on the rows that other clients have.
        """
        with jax.threefry_partitionable(True):  # bits of the first rows do not depend on max_rows
            bits = jax.random.bits(key, (self.layout.max_rows,), jnp.uint32)
        rank = jnp.where(jnp.arange(self.layout.max_rows) < self.num_rows, bits, np.uint32(0xFFFFFFFF))
        with jax.enable_x64(True):
            # Row numbers are the lower half of what is sorted: XLA sorts one array twice as fast as one by another.
            rows = jnp.arange(self.layout.max_rows, dtype=jnp.uint64)
            in_order = lax.sort(rank.astype(jnp.uint64) << np.uint64(32) | rows)
            order = in_order.astype(jnp.uint32).astype(jnp.int32)
        return replace(self, order=order)

    def __iter__(self) -> Iterator[Any]:
        """The batches one after the other, where their number is known: in a `python_computation`, or under `debug`.

        Raises:
          LanguageError: inside of a traced function, which has no loop in Python over what it does not know yet.
        """
        if not isinstance(self.num_rows, int):
            raise LanguageError(
                "Expected to iterate over a sequence of known length, found one that is traced. "
                "Use sequence.reduce, or fed.python_computation, which is not traced."
            )
        return (self.batch(position) for position in range(int(self.num_batches)))

    def batch(self, position: Int[Array, ""] | int) -> Any:
        """The batch at `position`, in the containers of its type."""
        size = self.layout.rows_per_batch
        first = position * (size or 1)
        on_host = self._is_on_host and isinstance(position, int)
        numpy: Any = np if on_host else jnp
        places = numpy.asarray(first if size is None else first + np.arange(size), np.int32)
        if self.layout.num_batches is not None:
            is_example = numpy.ones(numpy.shape(places), bool)
        else:
            is_example = places < self.num_rows
            # Rows that fill up the last batch repeat a row of the same client: never another client's data.
            places = numpy.where(is_example, places, first)
        rows = self.start + (places if self.order is None else numpy.asarray(self.order)[places])
        if on_host:
            leaves = [np.take(leaf, rows, axis=0) for leaf in self.leaves]  # copies: users may write into them
        else:
            # Who folds may be traced without 64-bit types where a map makes narrow batches of wide rows.
            with jax.enable_x64(jax.config.jax_enable_x64 or is_wide(self.layout.element_type)):
                leaves = [jnp.asarray(leaf).at[rows].get(mode="promise_in_bounds") for leaf in self.leaves]
        if self.layout.masked:
            leaves.append(is_example)
        value = from_positional(_nest(self.layout.element_type, iter(leaves)), self.layout.element_type)
        for transform in self.transforms:
            value = transform(value)
        return value


def _nest(type_: fl.Type, leaves: Iterator[Any]) -> Any:
    if isinstance(type_, fl.StructType):
        return tuple(_nest(field_type, leaves) for _, field_type in type_.items())
    return next(leaves)


def _checked(step: Callable[[State, Any], State], zero: State) -> Callable[[State, Any], State]:
    """`step`, refusing a state that is not of the kind it was given: a while loop's own error names neither."""
    structure: Any = jax.tree.structure(zero)
    expected = jax.tree.map(jnp.shape, zero), jax.tree.map(jnp.result_type, zero)

    def checked(state: State, batch: Any) -> State:
        result = step(state, batch)
        if structure != jax.tree.structure(result):
            raise LanguageError(
                "Expected the step of sequence.reduce to return a state of the structure of its zero, "
                f"{structure}, found {jax.tree.structure(result)}."
            )
        result = jax.tree.map(lambda leaf, old: _as_kind_of(old, leaf), result, state)
        found = jax.tree.map(jnp.shape, result), jax.tree.map(jnp.result_type, result)
        if found != expected:
            raise LanguageError(
                "Expected the step of sequence.reduce to keep the shapes and dtypes of its state, "
                f"{_kinds(zero)}, found {_kinds(result)}. Give reduce a zero of the same shapes and dtypes."
            )
        return result

    return checked


def _as_kind_of(old: Any, new: Any) -> Any:
    """Python scalars that a step returns take the dtype of the state."""
    return jnp.asarray(new, jnp.result_type(old)) if isinstance(new, bool | int | float | complex) else jnp.asarray(new)


def _kinds(state: Any) -> str:
    return ", ".join(
        f"{jnp.result_type(leaf)}[{','.join(map(str, jnp.shape(leaf)))}]" for leaf in jax.tree.leaves(state)
    )
