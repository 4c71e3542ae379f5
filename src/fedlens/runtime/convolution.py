"""Convolutions lowered for CPU in the form that costs least: inside loops, XLA:CPU runs most of them as scalar loops.

The rule is for `lax.conv_general_dilated_p`, which gradients and batched convolutions are again. The forms are in
`convolution_forms`, what they cost in `convolution_cost`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax
from jaxtyping import Array, Float

from fedlens.runtime.convolution_cost import Form, cheapest
from fedlens.runtime.convolution_forms import CANONICAL, convolve
from fedlens.runtime.convolution_geometry import geometry_of
from fedlens.runtime.lowering import is_spread, register

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def install() -> bool:
    """Registers the rule; within `lowered_for_cpu` convolutions then take the form that `chosen_form` says.

    Returns:
      Whether the rule is registered; see `lowering.register`.
    """
    return register(lax.conv_general_dilated_p, convolved, _changes)


def chosen_form(arrays: Sequence[Any], parameters: dict[str, Any]) -> Form | None:
    """The form in which a convolution is computed within `lowered_for_cpu`.

    Args:
      arrays: lhs, rhs and result, or their shapes and dtypes.
      parameters: of the primitive `lax.conv_general_dilated_p`.

    Returns:
      The form. None for convolutions that stay as they are: of integers or complex numbers, of empty arrays, of
      symbolic shapes, sharded over devices outside `shard_map`, or with both kernel and output so long that no form
      computes them in `convolution_cost.MAX_SLICES` slices.
    """
    if not all(isinstance(size, int) and size > 0 for array in arrays for size in array.shape):
        return None
    if not all(array.dtype.name in _FLOATS for array in arrays) or is_spread(parameters.get("out_sharding")):
        return None
    if any(_varies(array) for array in arrays):
        return None
    lhs, rhs, _ = arrays
    if lhs.ndim == 2:  # no spatial axis: a product as it is
        return None
    computed = _computed_type(lhs, rhs, parameters)
    return cheapest(geometry_of(lhs.shape, rhs.shape, parameters), library=computed == np.float32)


def _changes(arrays: Sequence[Any], parameters: dict[str, Any]) -> bool:
    """Whether the rule has anything to do: not for what XLA hands to the library as it is."""
    form = chosen_form(arrays, parameters)
    if form != "library":
        return form is not None
    lhs = arrays[0]
    of_library = lax.conv_dimension_numbers(lhs.shape, lhs.shape, CANONICAL[lhs.ndim - 2])
    canonical = tuple(parameters["dimension_numbers"]) == tuple(of_library)
    return not (canonical and all(array.dtype == np.float32 for array in arrays))


def _varies(array: Any) -> bool:
    """Whether shard_map tracks that an array differs between devices; then the carry of a scan over it must say so.

    Only shard_map with `check_vma=True` tracks it, and fedlens's programs have it off.
    """
    return bool(getattr(getattr(array, "manual_axis_type", array), "varying", None) or getattr(array, "vma", None))


def convolved(
    lhs: Float[Array, "..."], rhs: Float[Array, "..."], *, form: Form | None = None, **parameters: Any
) -> Float[Array, "..."]:
    """What the primitive computes, in one of the forms: brings the axes into their order and back.

    Args:
      lhs: images, in any layout.
      rhs: the kernel.
      form: one that is possible; the cheapest unless given.
      **parameters: of the primitive.
    """
    geometry = geometry_of(lhs.shape, rhs.shape, parameters)
    lhs_spec, rhs_spec, out_spec = parameters["dimension_numbers"]
    computed = _computed_type(lhs, rhs, parameters)
    images = lax.transpose(lax.convert_element_type(lhs, computed), (lhs_spec[0], *lhs_spec[2:], lhs_spec[1]))
    kernel = lax.transpose(lax.convert_element_type(rhs, computed), (*rhs_spec[2:], rhs_spec[1], rhs_spec[0]))
    kernel = kernel.reshape(*kernel.shape[:-1], geometry.groups, geometry.outputs)
    if parameters["batch_group_count"] > 1:
        images = images.reshape(geometry.groups, geometry.images, *images.shape[1:])
        images = lax.transpose(images, (*range(1, images.ndim - 1), 0, images.ndim - 1))
    else:
        images = images.reshape(*images.shape[:-1], geometry.groups, geometry.inputs)
    form = form or cheapest(geometry, library=computed == np.float32)
    if form is None:
        raise ValueError(f"Expected a convolution that some form computes, found {geometry}.")
    result = convolve(geometry, form, images, kernel, parameters["precision"])
    result = result.reshape(*result.shape[:-2], geometry.groups * geometry.outputs)
    placed = (out_spec[0], *out_spec[2:], out_spec[1])
    result = lax.transpose(result, tuple(placed.index(axis) for axis in range(len(placed))))
    return lax.convert_element_type(result, parameters["preferred_element_type"] or lhs.dtype)


def _computed_type(lhs: Any, rhs: Any, parameters: dict[str, Any]) -> np.dtype[Any]:
    """The type of sums: 16-bit floats accumulate in 32 bits."""
    types = {np.dtype(lhs.dtype), np.dtype(rhs.dtype), np.dtype(parameters["preferred_element_type"] or lhs.dtype)}
    return np.dtype(np.float64 if np.dtype(np.float64) in types else np.float32)
