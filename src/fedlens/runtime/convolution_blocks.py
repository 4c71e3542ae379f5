"""Images cut into what fits a cache: blocks of several images, or bands of one large image.

The patches of a whole batch are 9 times its size for a 3x3 kernel, and bound by memory: 28 ms for a layer of 32 to 64
channels on 20 images of 26x26, 12 ms where the patches of one block are in the L2 cache when they are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

from fedlens.runtime.convolution_geometry import Geometry

CACHE_BYTES = 1 << 20
"""Patches that one step may hold: an L2 cache of 1 MB a core, the usual size; measured flat from 0.5 to 4 MB."""

_MAX_BANDS = 64  # each is a slice to compile


def by_blocks(function: Callable[[Array], Array], images: Array, size: int) -> Array:
    """Applies `function` to `size` images at a time."""
    count = images.shape[0]
    if size == count:
        return function(images)
    results = lax.map(function, images.reshape(count // size, size, *images.shape[1:]))
    return results.reshape(count, *results.shape[2:])


def sum_over_blocks(function: Callable[[Array, Array], Array], images: Array, kernel: Array, size: int) -> Array:
    """Applies `function` to `size` rows of both at a time; the sum of the results."""
    count = images.shape[0]
    if size == count:
        return function(images, kernel)
    blocks = tuple(array.reshape(count // size, size, *array.shape[1:]) for array in (images, kernel))
    result = jax.eval_shape(function, *(block[0] for block in blocks))

    def add(total: Array, block: tuple[Array, ...]) -> tuple[Array, None]:
        return total + function(*block), None

    return lax.scan(add, lax.full(result.shape, 0, result.dtype), blocks)[0]


def block_size(count: int, elements: int) -> int:
    """The largest divisor of `count` such that as many patches of `elements` 4-byte numbers fit the cache, or 1."""
    fitting = max(CACHE_BYTES // (4 * elements), 1)
    return max(divisor for divisor in range(1, count + 1) if count % divisor == 0 and divisor <= fitting)


def rows_that_fit(extent: int, elements: int) -> int:
    """How many of the `extent` rows of an image to unroll at once, of `elements` in all, in bands of similar size."""
    fitting = max(CACHE_BYTES * extent // (4 * elements), 1)
    bands = min(-(-extent // fitting), _MAX_BANDS)
    return -(-extent // bands)


def cut_into_bands(
    geometry: Geometry, images: Float[Array, "image *position group channel"], rows: int, extent: int, stride: int
) -> Float[Array, "image_band *padded group channel"]:
    """Cuts each image into bands along its first axis, as images of their own.

    A band has what `rows` of the `extent` patches (or windows) read, whose elements lie `stride` apart. Neighbouring
    bands share the rows that both read; the last one reads zeros beyond the extent.
    """
    starts = range(0, extent * stride, rows * stride)
    whole = pad(geometry, images, beyond=-extent % rows * stride)
    height = whole.shape[1] - starts[-1]
    bands = [lax.expand_dims(lax.slice_in_dim(whole, start, start + height, axis=1), (1,)) for start in starts]
    return lax.concatenate(bands, 1).reshape(-1, height, *whole.shape[2:])


def pad(
    geometry: Geometry, images: Float[Array, "image *position ..."], beyond: int = 0
) -> Float[Array, "image *padded ..."]:
    """Pads and dilates the images; adds `beyond` rows of zeros after the first axis."""
    between = [step - 1 for step in geometry.image_dilation]
    spatial = [(low, high, step) for (low, high), step in zip(geometry.padding, between, strict=True)]
    config = [(0, 0, 0), *spatial] + [(0, 0, 0)] * (images.ndim - 1 - len(spatial))
    if beyond:
        low, high, step = config[1]
        config[1] = (low, high + beyond, step)
    return lax.pad(images, zero(images), config) if any(any(amounts) for amounts in config) else images


def zero(like: Array) -> Array:
    """Zero, of the dtype of an array."""
    return lax.full((), 0, like.dtype)


def of_bands(geometry: Geometry, bands: Array, **sizes: Any) -> Geometry:
    """The geometry with `bands` as its images, which `cut_into_bands` has padded."""
    axes = len(geometry.image)
    image = tuple(bands.shape[1 : 1 + axes])
    return replace(geometry, image=image, padding=((0, 0),) * axes, image_dilation=(1,) * axes, **sizes)
