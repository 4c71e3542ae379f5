"""A convolution as few large matrix products, a cache-sized block of images at a time.

XLA's CPU backend hands the convolutions of a forward pass to Eigen and runs all others, above all the gradient of a kernel,
as nested scalar loops: 61 s a round for a small CNN that takes 1.1 s as products. Unrolling an image into its patches
makes a convolution one product (Chellapilla, Puri, Simard: High performance convolutional neural networks for document
processing, 2006), but the patches of a whole batch are 9 times its size for a 3x3 kernel, and bound by memory. So blocks
of images are unrolled whose patches stay in the L2 cache, and of three ways to write the product the smallest is taken:

- *gather*: every output position collects the inputs under the kernel. The forward pass.
- *window*: every kernel position collects the inputs it meets, summed over blocks. The gradient of a kernel, which JAX
  writes as a convolution whose kernel, the output's gradient, is larger than its output.
- *scatter*: every input is multiplied by the whole kernel, and the products are added where they belong. The gradient of
  an image, where output channels are few; a stride of the forward pass costs nothing here.

Patches are unrolled one spatial axis at a time: `height + width` slices instead of `height * width`, with long runs to
copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Float

CACHE_BYTES = 1 << 20
"""Patches that one step may hold: an L2 cache of 1 MB a core, the usual size; measured flat from 0.5 to 2 MB."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a convolution, per spatial axis; one group of channels.

    Attributes:
      images: number of images.
      inputs: number of input channels, of one group.
      outputs: number of output channels, of one group.
      groups: number of groups of channels.
      image: extent of an image.
      kernel: extent of the kernel.
      output: extent of the output.
      strides: step of the window.
      padding: zeros before and after an axis; negative numbers crop.
      image_dilation: distance of neighbouring image elements, the space between filled with zeros.
      kernel_dilation: distance of neighbouring kernel elements.
    """

    images: int
    inputs: int
    outputs: int
    groups: int
    image: tuple[int, ...]
    kernel: tuple[int, ...]
    output: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    image_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]

    @property
    def form(self) -> Callable[[Geometry, Any, Array, Array], Array]:
        """The cheapest of `gather`, `window` and `scatter`."""
        if math.prod(self.kernel) > math.prod(self.output):
            return window
        scattered = math.prod(self.image) * self.outputs
        gathered = math.prod(self.output) * self.inputs
        if all(stride == 1 for stride in self.strides) and scattered < gathered:
            return scatter
        return gather

    @property
    def slices(self) -> int:
        """How many slices the form unrolls into; compiling takes time in proportion."""
        return sum(self.output if self.form is window else self.kernel)


def convolve(geometry: Geometry, images: Array, kernel: Array, precision: Any = None) -> Array:
    """Convolves `images` with `kernel` (unflipped, as in neural networks) in the form that suits `geometry`.

    Args:
      geometry: all sizes; every one at least 1.
      images: `[image, *position, group, input channel]`.
      kernel: `[*position, input channel, group, output channel]`, of the dtype of `images`, float32 or float64.
      precision: for `lax.dot_general`.

    Returns:
      `[image, *position, group, output channel]`.
    """
    return geometry.form(geometry, precision, images, kernel)


def gather(
    geometry: Geometry,
    precision: Any,
    images: Float[Array, "image *position group input"],
    kernel: Float[Array, "*position input group output"],
) -> Float[Array, "image *position group output"]:
    """Every output position collects the inputs under the kernel: `patches [positions, kernel * inputs] @ kernel`."""

    def one_group(block: Array, weights: Array) -> Array:
        patches = _unroll(
            _pad(geometry, block),
            counts=geometry.kernel,
            steps=geometry.kernel_dilation,
            extents=geometry.output,
            strides=geometry.strides,
        )
        return _product(patches, weights.reshape(-1, geometry.outputs), ((patches.ndim - 1,), (0,)), precision)

    return _by_blocks(
        lambda block: _by_group(one_group)(block, kernel),
        images,
        _block_size(
            geometry.images, geometry, math.prod(geometry.output) * math.prod(geometry.kernel) * geometry.inputs
        ),
    )


def window(
    geometry: Geometry,
    precision: Any,
    images: Float[Array, "image *position group input"],
    kernel: Float[Array, "*position input group output"],
) -> Float[Array, "image *position group output"]:
    """Every output position is one window as large as the kernel; sums the products of blocks of *input channels*.

    In the gradient of a kernel the input channels are what was the images of the forward pass, and the output's positions
    what was the kernel's.
    """
    axes = len(geometry.image)
    by_input = lax.transpose(images, (axes + 2, *range(1, axes + 1), axes + 1, 0))  # [input, *position, group, image]
    weights_by_input = lax.transpose(kernel, (axes, *range(axes), axes + 1, axes + 2))
    contracted = tuple(range(axes + 1))

    def one_group(block: Array, weights: Array) -> Array:
        windows = _unroll(
            _pad(geometry, block),
            counts=geometry.output,
            steps=geometry.strides,
            extents=geometry.kernel,
            strides=geometry.kernel_dilation,
        )
        return _product(windows, weights, (contracted, contracted), precision)

    summed = _sum_over_blocks(
        _by_group(one_group),
        (by_input, weights_by_input),
        _block_size(
            geometry.inputs, geometry, math.prod(geometry.output) * math.prod(geometry.kernel) * geometry.images
        ),
    )
    summed = summed.reshape(*geometry.output, geometry.images, geometry.groups, geometry.outputs)
    return lax.transpose(summed, (axes, *range(axes), axes + 1, axes + 2))


def scatter(
    geometry: Geometry,
    precision: Any,
    images: Float[Array, "image *position group input"],
    kernel: Float[Array, "*position input group output"],
) -> Float[Array, "image *position group output"]:
    """Every input times the whole kernel, each product added to the output position it belongs to. Strides are 1."""
    axes = len(geometry.image)

    def one_group(block: Array, weights: Array) -> Array:
        by_input = lax.transpose(weights, (axes, *range(axes), axes + 1))  # [input, *kernel, output]
        total = _product(block, by_input, ((block.ndim - 1,), (0,)), precision)  # [image, *position, *kernel, output]
        zero = _zero(total)
        for axis in range(axes):
            extent, dilation = geometry.image[axis], geometry.image_dilation[axis]
            pieces = []
            for offset in range(geometry.kernel[axis]):
                # Input i meets kernel element k at output i * image_dilation + low - k * kernel_dilation.
                first = geometry.padding[axis][0] - offset * geometry.kernel_dilation[axis]
                after = geometry.output[axis] - first - (extent - 1) * dilation - 1
                piece = lax.index_in_dim(total, offset, 1 + axes, keepdims=False)
                config = [(0, 0, 0)] * piece.ndim
                config[1 + axis] = (first, after, dilation - 1)
                pieces.append(lax.pad(piece, zero, config))
            total = sum(pieces[1:], pieces[0])
        return total

    return _by_blocks(
        lambda block: _by_group(one_group)(block, kernel),
        images,
        _block_size(
            geometry.images, geometry, math.prod(geometry.image) * math.prod(geometry.kernel) * geometry.outputs
        ),
    )


def _by_group(one_group: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """Maps over the groups, the second-to-last axis of images, kernels and results alike."""
    return jax.vmap(one_group, in_axes=-2, out_axes=-2)


def _unroll(
    images: Float[Array, "image *padded channel"],
    *,
    counts: Sequence[int],
    steps: Sequence[int],
    extents: Sequence[int],
    strides: Sequence[int],
) -> Float[Array, "image *extent counts_by_channel"]:
    """Along each axis takes `count` strided slices, `step` apart, and lays them side by side among the channels."""
    for axis in reversed(range(len(counts))):  # the first axis last, so that it varies slowest in the result
        stride, covered = strides[axis], (extents[axis] - 1) * strides[axis] + 1
        starts = [number * steps[axis] for number in range(counts[axis])]
        slices = [lax.slice_in_dim(images, start, start + covered, stride, axis + 1) for start in starts]
        images = lax.concatenate(slices, images.ndim - 1) if len(slices) > 1 else slices[0]
    return images


def _pad(geometry: Geometry, images: Array) -> Array:
    spatial = [
        (low, high, step - 1) for (low, high), step in zip(geometry.padding, geometry.image_dilation, strict=True)
    ]
    if not any(any(amounts) for amounts in spatial):
        return images
    return lax.pad(images, _zero(images), [(0, 0, 0), *spatial, (0, 0, 0)])


def _zero(like: Array) -> Array:
    return lax.full((), 0, like.dtype)


def _product(left: Array, right: Array, contracting: tuple[tuple[int, ...], tuple[int, ...]], precision: Any) -> Array:
    return lax.dot_general(left, right, (contracting, ((), ())), precision=precision)


def _block_size(count: int, geometry: Geometry, elements: int) -> int:
    """The largest divisor of `count` whose patches, `elements` to each of `count`, fit the cache; at least 1."""
    if math.prod(geometry.kernel) == 1 or math.prod(geometry.output) == 1:
        return count  # the only patch is the image
    fitting = CACHE_BYTES // (4 * elements * geometry.groups)
    return max(divisor for divisor in range(1, count + 1) if count % divisor == 0 and divisor <= max(fitting, 1))


def _by_blocks(function: Callable[[Array], Array], images: Array, size: int) -> Array:
    """Applies `function` to `size` images at a time."""
    count = images.shape[0]
    if size == count:
        return function(images)
    results = lax.map(function, images.reshape(count // size, size, *images.shape[1:]))
    return results.reshape(count, *results.shape[2:])


def _sum_over_blocks(function: Callable[[Array, Array], Array], operands: tuple[Array, Array], size: int) -> Array:
    """Applies `function` to `size` rows of both operands at a time; the sum of the results."""
    count = operands[0].shape[0]
    if size == count:
        return function(*operands)
    blocks = [operand.reshape(count // size, size, *operand.shape[1:]) for operand in operands]
    shape = jax.eval_shape(function, *[block[0] for block in blocks])

    def add(total: Array, block: Sequence[Array]) -> tuple[Array, None]:
        return total + function(*block), None

    return lax.scan(add, lax.full(shape.shape, 0, shape.dtype), tuple(blocks))[0]
