"""Convolutions lowered for CPU as matrix products: inside loops, XLA:CPU runs them as scalar loops.

The rule is for `lax.conv_general_dilated_p`, which gradients and batched convolutions are again. The products are in
`convolution_forms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax
from jaxtyping import Array, Float

from fedlens.runtime.convolution_forms import Geometry, convolve
from fedlens.runtime.lowering import register

MAX_SLICES = 256
"""Beyond as many slices XLA takes many seconds to compile a convolution; longer ones keep its own form."""

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def install() -> bool:
    """Registers the rule; within `lowered_for_cpu` convolutions then become matrix products.

    Some stay as they were: of integers or complex numbers, of empty arrays, of symbolic shapes, sharded over devices
    outside `shard_map`, or with both kernel and output so long that they unroll into more than `MAX_SLICES` slices.

    Returns:
      Whether the rule is registered; see `lowering.register`.
    """
    return register(lax.conv_general_dilated_p, _convolution, _has_product_form)


def _has_product_form(arrays: Sequence[Any], parameters: dict[str, Any]) -> bool:
    """Whether a convolution, of `arrays` lhs, rhs and result, is one that `_convolution` computes."""
    if not all(isinstance(size, int) and size > 0 for array in arrays for size in array.shape):
        return False
    if not all(array.dtype.name in _FLOATS for array in arrays) or _is_spread(parameters.get("out_sharding")):
        return False
    if any(_varies(array) for array in arrays):
        return False
    lhs, rhs, _ = arrays
    if lhs.ndim == 2:  # no spatial axis: a product as it is
        return False
    return _geometry(lhs.shape, rhs.shape, parameters).slices <= MAX_SLICES


def _is_spread(sharding: Any) -> bool:
    """Whether a sharding names a mesh axis; under shard_map JAX gives one that names none."""
    return sharding is not None and any(axis is not None for axis in sharding.spec)


def _varies(array: Any) -> bool:
    """Whether shard_map tracks that an array differs between devices; then the carry of a scan over it must say so.

    Only shard_map with `check_vma=True` tracks it, and fedlens's programs have it off.
    """
    return bool(getattr(getattr(array, "manual_axis_type", array), "varying", None) or getattr(array, "vma", None))


def _geometry(lhs: Sequence[int], rhs: Sequence[int], parameters: dict[str, Any]) -> Geometry:
    """The sizes of a convolution from the parameters of the primitive."""
    numbers = parameters["dimension_numbers"]
    feature_groups, batch_groups = parameters["feature_group_count"], parameters["batch_group_count"]
    groups = feature_groups * batch_groups  # one of the two is 1
    image, kernel = (tuple(shape[axis] for axis in spec[2:]) for shape, spec in ((lhs, numbers[0]), (rhs, numbers[1])))
    padding = tuple((int(low), int(high)) for low, high in parameters["padding"])
    image_dilation, kernel_dilation = tuple(parameters["lhs_dilation"]), tuple(parameters["rhs_dilation"])
    strides = tuple(parameters["window_strides"])
    output = tuple(
        ((size - 1) * spread + 1 + low + high - ((width - 1) * gap + 1)) // stride + 1
        for size, spread, (low, high), width, gap, stride in zip(
            image, image_dilation, padding, kernel, kernel_dilation, strides, strict=True
        )
    )
    return Geometry(
        images=lhs[numbers[0][0]] // batch_groups,
        inputs=rhs[numbers[1][1]],
        outputs=rhs[numbers[1][0]] // groups,
        groups=groups,
        image=image,
        kernel=kernel,
        output=output,
        strides=strides,
        padding=padding,
        image_dilation=image_dilation,
        kernel_dilation=kernel_dilation,
    )


def _convolution(lhs: Float[Array, "..."], rhs: Float[Array, "..."], **parameters: Any) -> Float[Array, "..."]:
    """What the primitive computes, by `convolve`: brings the axes into its order and back. Traced by the rule."""
    geometry = _geometry(lhs.shape, rhs.shape, parameters)
    lhs_spec, rhs_spec, out_spec = parameters["dimension_numbers"]
    result_type = np.dtype(parameters["preferred_element_type"] or lhs.dtype)
    # 16-bit floats accumulate in 32 bits.
    computed = np.result_type(np.float32, *({lhs.dtype, rhs.dtype, result_type} & {np.dtype(np.float64)}))
    images = lax.transpose(lax.convert_element_type(lhs, computed), (lhs_spec[0], *lhs_spec[2:], lhs_spec[1]))
    kernel = lax.transpose(lax.convert_element_type(rhs, computed), (*rhs_spec[2:], rhs_spec[1], rhs_spec[0]))
    kernel = kernel.reshape(*kernel.shape[:-1], geometry.groups, geometry.outputs)
    if parameters["batch_group_count"] > 1:
        images = images.reshape(geometry.groups, geometry.images, *images.shape[1:])
        images = lax.transpose(images, (*range(1, images.ndim - 1), 0, images.ndim - 1))
    else:
        images = images.reshape(*images.shape[:-1], geometry.groups, geometry.inputs)
    result = convolve(geometry, images, kernel, parameters["precision"])
    result = result.reshape(*result.shape[:-2], geometry.groups * geometry.outputs)
    placed = (out_spec[0], *out_spec[2:], out_spec[1])
    result = lax.transpose(result, tuple(placed.index(axis) for axis in range(len(placed))))
    return lax.convert_element_type(result, result_type)
