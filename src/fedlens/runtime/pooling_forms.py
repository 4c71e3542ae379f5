"""Max pooling and its gradient as elementwise operations, which XLA:CPU vectorises; its own window loops it does not.

With a CNN of two convolutions, XLA's form of a 2x2 pooling took as long as a third of the convolutions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

MAX_POSITIONS = 64
"""Windows of more positions keep XLA's own form: each position is an operation of the program."""


@dataclass(frozen=True)
class Window:
    """A pooling window; everything has an entry for each axis of the operand.

    Attributes:
      sizes: the extent of the window.
      strides: from window to window.
      padding: cells added before and after the operand.
      output: the number of windows.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    output: tuple[int, ...]

    @property
    def positions(self) -> int:
        """How many cells a window has."""
        return math.prod(self.sizes)

    @property
    def tiles(self) -> bool:
        """Whether the windows lie side by side, so that no cell is in two of them."""
        return self.sizes == self.strides and all(pad == (0, 0) for pad in self.padding)


def pool(operand: Shaped[Array, "..."], window: Window) -> Shaped[Array, "..."]:
    """The largest cell of each window; cells that padding adds are never it."""
    is_float = jnp.issubdtype(operand.dtype, jnp.floating)
    lowest = -np.inf if is_float else np.iinfo(operand.dtype).min
    padded = lax.pad(operand, jnp.array(lowest, operand.dtype), [(low, high, 0) for low, high in window.padding])
    first, *others = itertools.product(*map(range, window.sizes))
    result = _cells(padded, window, first)
    for offset in others:
        result = lax.max(result, _cells(padded, window, offset))
    return result


def pool_gradient(source: Shaped[Array, "..."], operand: Shaped[Array, "..."], window: Window) -> Shaped[Array, "..."]:
    """Puts each window's number of `source` where the window's largest cell is, the first one if there are several.

    Args:
      source: one number for each window.
      operand: what was pooled.
      window: windows that tile the operand.

    Returns:
      An array of the shape of `operand`, zero elsewhere.
    """
    first, *others = itertools.product(*map(range, window.sizes))
    largest = _cells(operand, window, first)
    chosen = jnp.zeros(largest.shape, jnp.int32)
    for number, offset in enumerate(others, 1):
        cells = _cells(operand, window, offset)
        better = jnp.logical_not(largest >= cells)  # as XLA compares: NaN is better than anything before it
        chosen = jnp.where(better, np.int32(number), chosen)
        largest = jnp.where(better, cells, largest)
    tiled = [extent for pair in zip(window.output, window.sizes, strict=True) for extent in pair]
    whole = tuple(range(0, len(tiled), 2))
    number_of_cell = np.arange(window.positions, dtype=np.int32).reshape(
        [1 if axis % 2 == 0 else tiled[axis] for axis in range(len(tiled))]
    )
    result = jnp.where(
        lax.broadcast_in_dim(chosen, tiled, whole) == number_of_cell,
        lax.broadcast_in_dim(source, tiled, whole),
        jnp.zeros((), source.dtype),
    ).reshape([count * size for count, size in zip(window.output, window.sizes, strict=True)])
    return lax.pad(result, jnp.zeros((), source.dtype), _rest(operand.shape, result.shape))


def _cells(array: Shaped[Array, "..."], window: Window, offset: Sequence[int]) -> Shaped[Array, "..."]:
    """The cells at one offset of all windows."""
    ends = [
        start + (count - 1) * stride + 1
        for start, count, stride in zip(offset, window.output, window.strides, strict=True)
    ]
    return lax.slice(array, offset, ends, window.strides)


def _rest(shape: Sequence[int], covered: Sequence[int]) -> list[tuple[int, int, int]]:
    return [(0, full - part, 0) for full, part in zip(shape, covered, strict=True)]
