"""A convolution as few large matrix products, a cache-sized block of images at a time.

Inside a loop, where training happens, XLA's CPU backend runs convolutions and their gradients as nested scalar loops:
600 ms for a step of a 3x3 layer of 32 to 64 channels on 20 images of 26x26, 12 ms as products (JAX 0.12, one core).
Unrolling an image into its patches makes a convolution one product (Chellapilla, Puri, Simard: High performance
convolutional neural networks for document processing, 2006), but the patches of a whole batch are 9 times its size for
a 3x3 kernel, and bound by memory: 28 ms. So only a block of images is unrolled at once, or a band of one large image,
whose patches stay in the L2 cache, and of three ways to write the product the cheapest is taken:

- *gather*: every output position collects the inputs under the kernel. The forward pass.
- *window*: every output position is a window as large as the kernel, summed over blocks. The gradient of a kernel,
  which JAX writes as a convolution whose kernel, the output's gradient, is larger than its output.
- *scatter*: every input is multiplied by the whole kernel, and the products are added where they belong. The gradient
  of an image, where output channels are few; a stride of the forward pass costs nothing here.

Patches are unrolled one spatial axis at a time: `height + width` slices instead of `height * width`, with long runs to
copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

CACHE_BYTES = 1 << 20
"""Patches that one step may hold: an L2 cache of 1 MB a core, the usual size; measured flat from 0.5 to 4 MB."""

_SCATTERED_BYTES = 8 * CACHE_BYTES  # products of one image: they overlap in the output, so bands of them do not stack
_MAX_BANDS = 64  # each is a slice to compile


@dataclass(frozen=True)
class Geometry:
    """The sizes of a convolution, each at least 1.

    Attributes:
      images: number of images.
      inputs: number of input channels, of one group.
      outputs: number of output channels, of one group.
      groups: number of groups of channels.
      image: extent of an image along each spatial axis.
      kernel: extent of the kernel.
      output: extent of the output.
      strides: step of the kernel between neighbouring outputs.
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
        fits = 4 * scattered * math.prod(self.kernel) * self.groups <= _SCATTERED_BYTES
        if all(stride == 1 for stride in self.strides) and scattered < gathered and fits:
            return scatter
        return gather

    @property
    def slices(self) -> int:
        """How many slices the form unrolls into; compiling takes time in proportion."""
        return sum(self.output if self.form is window else self.kernel)


def convolve(geometry: Geometry, images: Array, kernel: Array, precision: Any = None) -> Array:
    """Convolves `images` with `kernel` (not flipped, as in neural networks) in the form that suits `geometry`.

    Args:
      geometry: all sizes.
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
    elements = math.prod(geometry.output) * math.prod(geometry.kernel) * geometry.inputs * geometry.groups
    rows = _rows_that_fit(geometry.output[0], elements)
    if rows < geometry.output[0]:
        bands = _bands(geometry, images, rows, geometry.output[0], geometry.strides[0])
        narrow = _unpadded(geometry, bands, images=len(bands), output=(rows, *geometry.output[1:]))
        result = gather(narrow, precision, bands, kernel)
        result = result.reshape(geometry.images, -1, *result.shape[2:])
        return lax.slice_in_dim(result, 0, geometry.output[0], axis=1)

    def one_group(block: Array, weights: Array) -> Array:
        patches = _unroll(
            _pad(geometry, block),
            counts=geometry.kernel,
            steps=geometry.kernel_dilation,
            extents=geometry.output,
            strides=geometry.strides,
        )
        return _product(patches, weights.reshape(-1, geometry.outputs), ((patches.ndim - 1,), (0,)), precision)

    size = geometry.images if math.prod(geometry.kernel) == 1 else _block_size(geometry.images, elements)
    return _by_blocks(lambda block: _by_group(one_group)(block, kernel), images, size)


def window(
    geometry: Geometry,
    precision: Any,
    images: Float[Array, "image *position group input"],
    kernel: Float[Array, "*position input group output"],
) -> Float[Array, "image *position group output"]:
    """Every output position is one window as large as the kernel; sums the products of blocks of *input channels*.

    In the gradient of a kernel the input channels are what was the images of the forward pass, and the positions of
    the output what was the kernel's.
    """
    axes = len(geometry.image)
    by_input = lax.transpose(images, (axes + 2, *range(1, axes + 1), axes + 1, 0))  # [input, *position, group, image]
    weights = lax.transpose(kernel, (axes, *range(axes), axes + 1, axes + 2))  # [input, *position, group, output]
    summed = _sum_of_windows(geometry, precision, by_input, weights)
    summed = summed.reshape(*geometry.output, geometry.images, geometry.groups, geometry.outputs)
    return lax.transpose(summed, (axes, *range(axes), axes + 1, axes + 2))


def _sum_of_windows(
    geometry: Geometry,
    precision: Any,
    images: Float[Array, "input *position group image"],
    kernel: Float[Array, "input *position group output"],
) -> Float[Array, "position_image group output"]:
    elements = math.prod(geometry.output) * math.prod(geometry.kernel) * geometry.images * geometry.groups
    rows = _rows_that_fit(geometry.kernel[0], elements)
    if rows < geometry.kernel[0]:
        bands = _bands(geometry, images, rows, geometry.kernel[0], geometry.kernel_dilation[0])
        narrow = _unpadded(geometry, bands, inputs=len(bands), kernel=(rows, *geometry.kernel[1:]))
        beyond = -geometry.kernel[0] % rows
        kernel = lax.pad(kernel, _zero(kernel), [(0, 0, 0), (0, beyond, 0)] + [(0, 0, 0)] * (kernel.ndim - 2))
        return _sum_of_windows(narrow, precision, bands, kernel.reshape(len(bands), rows, *kernel.shape[2:]))
    contracted = tuple(range(len(geometry.image) + 1))

    def one_group(block: Array, weights: Array) -> Array:
        windows = _unroll(
            _pad(geometry, block),
            counts=geometry.output,
            steps=geometry.strides,
            extents=geometry.kernel,
            strides=geometry.kernel_dilation,
        )
        return _product(windows, weights, (contracted, contracted), precision)

    size = geometry.inputs if math.prod(geometry.output) == 1 else _block_size(geometry.inputs, elements)
    return _sum_over_blocks(_by_group(one_group), images, kernel, size)


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
        for axis in range(axes):
            pieces = []
            for offset in range(geometry.kernel[axis]):
                # Input i meets kernel element k at output i * image_dilation + low - k * kernel_dilation.
                spread = geometry.image_dilation[axis]
                first = geometry.padding[axis][0] - offset * geometry.kernel_dilation[axis]
                after = geometry.output[axis] - first - (geometry.image[axis] - 1) * spread - 1
                piece = lax.index_in_dim(total, offset, 1 + axes, keepdims=False)
                config = [(0, 0, 0)] * piece.ndim
                config[1 + axis] = (first, after, spread - 1)
                pieces.append(lax.pad(piece, _zero(piece), config))
            total = sum(pieces[1:], pieces[0])
        return total

    elements = math.prod(geometry.image) * math.prod(geometry.kernel) * geometry.outputs * geometry.groups
    return _by_blocks(lambda block: _by_group(one_group)(block, kernel), images, _block_size(geometry.images, elements))


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


def _pad(
    geometry: Geometry, images: Float[Array, "image *position ..."], beyond: int = 0
) -> Float[Array, "image *padded ..."]:
    """Pads and dilates the images; adds `beyond` rows of zeros after the first axis."""
    between = [step - 1 for step in geometry.image_dilation]
    spatial = [(low, high, step) for (low, high), step in zip(geometry.padding, between, strict=True)]
    config = [(0, 0, 0), *spatial] + [(0, 0, 0)] * (images.ndim - 1 - len(spatial))
    if beyond:
        low, high, step = config[1]
        config[1] = (low, high + beyond, step)
    return lax.pad(images, _zero(images), config) if any(any(amounts) for amounts in config) else images


def _zero(like: Array) -> Array:
    return lax.full((), 0, like.dtype)


def _product(left: Array, right: Array, contracting: tuple[tuple[int, ...], tuple[int, ...]], precision: Any) -> Array:
    return lax.dot_general(left, right, (contracting, ((), ())), precision=precision)


def _bands(
    geometry: Geometry, images: Float[Array, "image *position group channel"], rows: int, extent: int, stride: int
) -> Float[Array, "image_band *padded group channel"]:
    """Cuts each image into bands along its first axis, as images of their own.

    A band has what `rows` of the `extent` patches (or windows) read, whose elements lie `stride` apart. Neighbouring
    bands share the rows that both read; the last one reads zeros beyond the extent.
    """
    starts = range(0, extent * stride, rows * stride)
    padded = _pad(geometry, images, beyond=-extent % rows * stride)
    height = padded.shape[1] - starts[-1]
    bands = [lax.expand_dims(lax.slice_in_dim(padded, start, start + height, axis=1), (1,)) for start in starts]
    return lax.concatenate(bands, 1).reshape(-1, height, *padded.shape[2:])


def _unpadded(geometry: Geometry, bands: Array, **sizes: Any) -> Geometry:
    """The geometry with `bands` as its images, which `_bands` has padded."""
    axes = len(geometry.image)
    image = tuple(bands.shape[1 : 1 + axes])
    return replace(geometry, image=image, padding=((0, 0),) * axes, image_dilation=(1,) * axes, **sizes)


def _rows_that_fit(extent: int, elements: int) -> int:
    """How many of the `extent` rows of an image to unroll at once, of `elements` in all, in bands of similar size."""
    fitting = max(CACHE_BYTES * extent // (4 * elements), 1)
    bands = min(-(-extent // fitting), _MAX_BANDS)
    return -(-extent // bands)


def _block_size(count: int, elements: int) -> int:
    """The largest divisor of `count` such that as many patches of `elements` 4-byte numbers fit the cache, or 1."""
    fitting = max(CACHE_BYTES // (4 * elements), 1)
    return max(divisor for divisor in range(1, count + 1) if count % divisor == 0 and divisor <= fitting)


def _by_blocks(function: Callable[[Array], Array], images: Array, size: int) -> Array:
    """Applies `function` to `size` images at a time."""
    count = images.shape[0]
    if size == count:
        return function(images)
    results = lax.map(function, images.reshape(count // size, size, *images.shape[1:]))
    return results.reshape(count, *results.shape[2:])


def _sum_over_blocks(function: Callable[[Array, Array], Array], images: Array, kernel: Array, size: int) -> Array:
    """Applies `function` to `size` rows of both at a time; the sum of the results."""
    count = images.shape[0]
    if size == count:
        return function(images, kernel)
    blocks = tuple(array.reshape(count // size, size, *array.shape[1:]) for array in (images, kernel))
    result = jax.eval_shape(function, *(block[0] for block in blocks))

    def add(total: Array, block: tuple[Array, ...]) -> tuple[Array, None]:
        return total + function(*block), None

    return lax.scan(add, lax.full(result.shape, 0, result.dtype), blocks)[0]
