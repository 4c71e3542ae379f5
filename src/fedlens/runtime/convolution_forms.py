"""The forms of a convolution. Inside a loop, where training happens, XLA's CPU backend is slow with most of them.

XLA hands a convolution to a library (Eigen) where its axes are in the order of that library. Outside of loops XLA
brings them into that order; inside it does not, and runs what JAX's gradients are as nested scalar loops: 600 ms for a
step of a 3x3 layer of 32 to 64 channels on 20 images of 26x26, 10 ms in the forms below (JAX 0.12, one core).

- *library*: the axes are transposed, and XLA's convolution does the rest.
- *gather*: every output position collects the inputs under the kernel, which makes a convolution one matrix product
  (Chellapilla, Puri, Simard: High performance convolutional neural networks for document processing, 2006).
- *window*: every output position is a window as large as the kernel, summed over blocks. The gradient of a kernel,
  which JAX writes as a convolution whose kernel, the output's gradient, is larger than its output.
- *scatter*: every input is multiplied by the whole kernel, and the products are added where they belong. The gradient
  of an image, where output channels are few; a stride of the forward pass costs nothing here.
- *shift*: sums shifted images, each times one kernel element, where groups have too few channels for a product.

`convolution_cost` says which one is the cheapest. Patches are unrolled one spatial axis at a time: `height + width`
slices instead of `height * width`, with long runs to copy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

from fedlens.runtime.convolution_blocks import (
    block_size,
    by_blocks,
    cut_into_bands,
    of_bands,
    pad,
    rows_that_fit,
    sum_over_blocks,
    zero,
)
from fedlens.runtime.convolution_cost import Form
from fedlens.runtime.convolution_geometry import Geometry
from fedlens.runtime.interleaving import interleaved

CANONICAL = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}
"""The order of axes that the library takes, by the number of spatial axes."""


def convolve(geometry: Geometry, form: Form, images: Array, kernel: Array, precision: Any = None) -> Array:
    """Convolves `images` with `kernel` (not flipped, as in neural networks).

    Args:
      geometry: all sizes.
      form: one that is possible for them; see `convolution_cost`.
      images: `[image, *position, group, input channel]`.
      kernel: `[*position, input channel, group, output channel]`, of the dtype of `images`, float32 or float64.
      precision: for `lax.dot_general`.

    Returns:
      `[image, *position, group, output channel]`.
    """
    functions = {"library": library, "gather": gather, "window": window, "scatter": scatter, "shift": shift}
    return functions[form](geometry, precision, images, kernel)


def library(
    geometry: Geometry,
    precision: Any,
    images: Float[Array, "image *position 1 input"],
    kernel: Float[Array, "*position input 1 output"],
) -> Float[Array, "image *position 1 output"]:
    """XLA's own convolution, of axes in an order that it hands on. There is one group."""
    result = lax.conv_general_dilated(
        lax.squeeze(images, (images.ndim - 2,)),
        lax.squeeze(kernel, (kernel.ndim - 2,)),
        geometry.strides,
        geometry.padding,
        geometry.image_dilation,
        geometry.kernel_dilation,
        CANONICAL[len(geometry.image)],
        precision=precision,
    )
    return lax.expand_dims(result, (result.ndim - 1,))


def gather(
    geometry: Geometry,
    precision: Any,
    images: Float[Array, "image *position group input"],
    kernel: Float[Array, "*position input group output"],
) -> Float[Array, "image *position group output"]:
    """Every output position collects the inputs under the kernel: `patches [positions, kernel * inputs] @ kernel`."""
    axes = len(geometry.image)
    elements = math.prod(geometry.output) * math.prod(geometry.kernel) * geometry.inputs * geometry.groups
    rows = rows_that_fit(geometry.output[0], elements)
    if rows < geometry.output[0]:
        bands = cut_into_bands(geometry, images, rows, geometry.output[0], geometry.strides[0])
        narrow = of_bands(geometry, bands, images=len(bands), output=(rows, *geometry.output[1:]))
        result = gather(narrow, precision, bands, kernel)
        result = result.reshape(geometry.images, -1, *result.shape[2:])
        return lax.slice_in_dim(result, 0, geometry.output[0], axis=1)

    def one_group(block: Array, weights: Array) -> Array:
        padded = pad(geometry, block)
        if math.prod(geometry.output) == 1:  # one patch, which is all of the image
            patches = _shifted(padded, [0] * axes, geometry.strides, geometry.kernel, geometry.kernel_dilation)
            patches = patches.reshape(patches.shape[0], *geometry.output, -1)
        else:
            patches = _unroll(
                padded,
                counts=geometry.kernel,
                steps=geometry.kernel_dilation,
                extents=geometry.output,
                strides=geometry.strides,
            )
        return _product(patches, weights.reshape(-1, geometry.outputs), ((patches.ndim - 1,), (0,)), precision)

    whole = math.prod(geometry.kernel) == 1 or math.prod(geometry.output) == 1
    size = geometry.images if whole else block_size(geometry.images, elements)
    return by_blocks(lambda block: _by_group(one_group)(block, kernel), images, size)


def window(
    geometry: Geometry,
    precision: Any,
    images: Float[Array, "image *position group input"],
    kernel: Float[Array, "*position input group output"],
) -> Float[Array, "image *position group output"]:
    """Every output position is one window as large as the kernel; sums the products of blocks of *input channels*.

    In the gradient of a kernel the input channels are what was the images of the forward pass, and the positions of
    the output what was the kernel's. Where that saves work, images and kernel change places first.
    """
    axes = len(geometry.image)
    if geometry.exchanges:
        exchanged = lax.transpose(kernel, (axes + 2, *range(axes), axes + 1, axes))
        result = window(
            geometry.exchanged(),
            precision,
            exchanged,
            lax.transpose(images, (*range(1, axes + 1), axes + 2, axes + 1, 0)),
        )
        result = lax.rev(result, range(1, axes + 1))
        return lax.transpose(result, (axes + 2, *range(1, axes + 2), 0))
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
    rows = rows_that_fit(geometry.kernel[0], elements)
    if rows < geometry.kernel[0]:
        bands = cut_into_bands(geometry, images, rows, geometry.kernel[0], geometry.kernel_dilation[0])
        narrow = of_bands(geometry, bands, inputs=len(bands), kernel=(rows, *geometry.kernel[1:]))
        beyond = -geometry.kernel[0] % rows
        kernel = lax.pad(kernel, zero(kernel), [(0, 0, 0), (0, beyond, 0)] + [(0, 0, 0)] * (kernel.ndim - 2))
        return _sum_of_windows(narrow, precision, bands, kernel.reshape(len(bands), rows, *kernel.shape[2:]))
    contracted = tuple(range(len(geometry.image) + 1))

    def one_group(block: Array, weights: Array) -> Array:
        windows = _unroll(
            pad(geometry, block),
            counts=geometry.output,
            steps=geometry.strides,
            extents=geometry.kernel,
            strides=geometry.kernel_dilation,
        )
        return _product(windows, weights, (contracted, contracted), precision)

    size = geometry.inputs if math.prod(geometry.output) == 1 else block_size(geometry.inputs, elements)
    return sum_over_blocks(_by_group(one_group), images, kernel, size)


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
                pieces.append(lax.pad(piece, zero(piece), config))
            total = sum(pieces[1:], pieces[0])
        return total

    elements = math.prod(geometry.image) * math.prod(geometry.kernel) * geometry.outputs * geometry.groups
    return by_blocks(lambda block: _by_group(one_group)(block, kernel), images, block_size(geometry.images, elements))


def shift(
    geometry: Geometry,
    precision: Any,
    images: Float[Array, "image *position group input"],
    kernel: Float[Array, "*position input group output"],
) -> Float[Array, "image *position group output"]:
    """Sums shifted images, each times one kernel element; XLA fuses them into one loop, with groups as its vectors."""
    if geometry.kernel_is_larger:
        return _shifted_windows(geometry, precision, images, kernel)
    axes = range(len(geometry.image))
    # The outputs of one phase read image elements that lie whole steps apart, none of them a zero in between.
    common = [math.gcd(*pair) for pair in zip(geometry.image_dilation, geometry.strides, strict=True)]
    periods = [spread // divisor for spread, divisor in zip(geometry.image_dilation, common, strict=True)]
    steps = [stride // divisor for stride, divisor in zip(geometry.strides, common, strict=True)]
    counts = [-(-count // period) for count, period in zip(geometry.output, periods, strict=True)]
    readings = [[_readings(geometry, axis, rest) for rest in range(periods[axis])] for axis in axes]
    starts = [[start for phase in readings[axis] for _, start in phase] or [0] for axis in axes]
    before = [max(0, -min(starts[axis])) for axis in axes]
    ends = [max(starts[axis]) + (counts[axis] - 1) * steps[axis] for axis in axes]
    after = [max(0, end - size + 1) for end, size in zip(ends, geometry.image, strict=True)]
    config = [(0, 0, 0), *((low, high, 0) for low, high in zip(before, after, strict=True)), (0, 0, 0), (0, 0, 0)]
    padded = lax.pad(images, zero(images), config)
    phases = {}
    for phase in itertools.product(*map(range, periods)):
        terms: list[list[Array]] = [[] for _ in range(geometry.outputs)]
        for pairs in itertools.product(*(readings[axis][phase[axis]] for axis in axes)):
            offset = [start + low for (_, start), low in zip(pairs, before, strict=True)]
            shifted = _shifted(padded, offset, [1] * len(axes), counts, steps)
            weights = kernel[tuple(element for element, _ in pairs)]
            for channel, column in itertools.product(range(geometry.inputs), range(geometry.outputs)):
                terms[column].append(shifted[..., channel] * weights[channel, :, column])
        if terms[0]:
            sums = [lax.expand_dims(sum(column[1:], column[0]), (images.ndim - 1,)) for column in terms]
            phases[(0, *phase, 0, 0)] = lax.concatenate(sums, images.ndim - 1)
    absent = lax.full((geometry.images, *counts, geometry.groups, geometry.outputs), 0, images.dtype)
    result = interleaved(phases, (1, *periods, 1, 1), absent)
    return lax.slice(result, [0] * images.ndim, (geometry.images, *geometry.output, *result.shape[-2:]))


def _readings(geometry: Geometry, axis: int, rest: int) -> list[tuple[int, int]]:
    """The kernel elements that meet image elements in a phase of the output, each with the first of those."""
    spread, low = geometry.image_dilation[axis], geometry.padding[axis][0]
    places = [
        (element, rest * geometry.strides[axis] + element * geometry.kernel_dilation[axis] - low)
        for element in range(geometry.kernel[axis])
    ]
    return [(element, place // spread) for element, place in places if place % spread == 0]


def _shifted_windows(
    geometry: Geometry,
    precision: Any,
    images: Float[Array, "image *position group input"],
    kernel: Float[Array, "*position input group output"],
) -> Float[Array, "image *position group output"]:
    """Each output position sums one shifted image times the kernel, over blocks of input channels, as `window` does."""
    axes = len(geometry.image)
    positions = list(itertools.product(*map(range, geometry.output)))

    def one_block(block: Array, weights: Array) -> Array:
        block = pad(geometry, block)
        sums = []
        for offset in positions:
            shifted = _shifted(block, offset, geometry.strides, geometry.kernel, geometry.kernel_dilation)
            for image, column in itertools.product(range(geometry.images), range(geometry.outputs)):
                products = (shifted[..., image] * weights[..., column]).reshape(-1, geometry.groups)
                # As a product with ones: XLA:CPU does not vectorise a sum that it fuses with what it sums.
                ones = lax.full((products.shape[0],), 1, products.dtype)
                sums.append(_product(ones, products, ((0,), (0,)), precision))
        return lax.concatenate([lax.expand_dims(one, (0,)) for one in sums], 0)

    by_input = lax.transpose(images, (axes + 2, *range(1, axes + 1), axes + 1, 0))  # [input, *position, group, image]
    by_channel = lax.transpose(kernel, (axes, *range(axes), axes + 1, axes + 2))  # [input, *position, group, output]
    size = block_size(geometry.inputs, math.prod(geometry.kernel) * geometry.images * geometry.groups)
    summed = sum_over_blocks(one_block, by_input, by_channel, size)
    summed = summed.reshape(*geometry.output, geometry.images, geometry.outputs, geometry.groups)
    return lax.transpose(summed, (axes, *range(axes), axes + 2, axes + 1))


def _shifted(
    images: Float[Array, "image *padded ..."],
    offset: Sequence[int],
    steps: Sequence[int],
    extents: Sequence[int],
    strides: Sequence[int],
) -> Float[Array, "image *extent ..."]:
    """The part of images that starts `offset` steps from their corner."""
    more = images.ndim - 1 - len(offset)
    starts = [number * step for number, step in zip(offset, steps, strict=True)]
    ends = [start + (extent - 1) * stride + 1 for start, extent, stride in zip(starts, extents, strides, strict=True)]
    sizes = images.shape
    return lax.slice(
        images, (0, *starts, *[0] * more), (sizes[0], *ends, *sizes[len(sizes) - more :]), (1, *strides, *[1] * more)
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


def _product(left: Array, right: Array, contracting: tuple[tuple[int, ...], tuple[int, ...]], precision: Any) -> Array:
    return lax.dot_general(left, right, (contracting, ((), ())), precision=precision)
