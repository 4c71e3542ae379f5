"""Max pooling and its gradient, lowered for CPU as elementwise operations; the forms are in `pooling_forms`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax import lax
from jaxtyping import Array, Shaped

from fedlens.runtime.lowering import register
from fedlens.runtime.pooling_forms import MAX_POSITIONS, Window, pool, pool_gradient

_TYPES = ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")


def install() -> bool:
    """Registers the rules for `lax.reduce_window_max_p` and its gradient, `lax.select_and_scatter_add_p`.

    Returns:
      Whether both are registered; see `lowering.register`.
    """
    pooled = register(lax.reduce_window_max_p, _pool, _pools)
    return register(lax.select_and_scatter_add_p, _pool_gradient, _pools_gradient) and pooled


def _window(output: Sequence[int], parameters: dict[str, Any]) -> Window:
    return Window(
        tuple(parameters["window_dimensions"]),
        tuple(parameters["window_strides"]),
        tuple((int(low), int(high)) for low, high in parameters["padding"]),
        tuple(output),
    )


def _pools(arrays: Sequence[Any], parameters: dict[str, Any]) -> bool:
    dilations = (*parameters["base_dilation"], *parameters["window_dilation"])
    return _are_plain(arrays) and all(step == 1 for step in dilations) and _is_small(arrays[-1], parameters)


def _pools_gradient(arrays: Sequence[Any], parameters: dict[str, Any]) -> bool:
    source, between = arrays[0], math.prod(parameters["window_strides"])
    is_maximum = parameters["select_prim"] is lax.ge_p
    return _are_plain(arrays) and is_maximum and _is_small(source, parameters) and between <= MAX_POSITIONS


def _are_plain(arrays: Sequence[Any]) -> bool:
    """Whether arrays are of numbers and of known shape, without an empty axis."""
    sizes = [size for array in arrays for size in array.shape]
    return all(isinstance(size, int) and size > 0 for size in sizes) and all(
        array.dtype.name in _TYPES for array in arrays
    )


def _is_small(output: Any, parameters: dict[str, Any]) -> bool:
    return _window(output.shape, parameters).positions <= MAX_POSITIONS


def _pool(operand: Shaped[Array, "..."], **parameters: Any) -> Shaped[Array, "..."]:
    shape = [
        (extent + low + high - size) // stride + 1
        for extent, (low, high), size, stride in zip(
            operand.shape,
            parameters["padding"],
            parameters["window_dimensions"],
            parameters["window_strides"],
            strict=True,
        )
    ]
    return pool(operand, _window(shape, parameters))


def _pool_gradient(
    source: Shaped[Array, "..."], operand: Shaped[Array, "..."], **parameters: Any
) -> Shaped[Array, "..."]:
    return pool_gradient(source, operand, _window(source.shape, parameters))
