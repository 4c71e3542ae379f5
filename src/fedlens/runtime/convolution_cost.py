"""Which form computes a convolution in the least time, estimated from its sizes.

An estimate is the time of the floating-point operations, plus that of the bytes moved besides operands and result:
patches, or products to be added up. The rates are of one core of a current server (AMD Zen 5), measured inside a loop
by `benchmarks/convolutions.py`. Only their ratios matter here, and forms differ by more than machines do.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from fedlens.runtime.convolution_geometry import Geometry

Form = Literal["library", "gather", "window", "scatter", "shift"]
"""How a convolution is computed: by XLA's call of a library, or as one of `convolution_forms`' functions."""

FORMS: tuple[Form, ...] = get_args(Form)

MAX_SLICES = 256
"""Compiling takes time in proportion to the slices that a form unrolls into, seconds for as many; no form has more."""

_PRODUCTS = 190e9  # operations a second in a large matrix product
_ELEMENTWISE = 40e9  # and where arrays are multiplied and added element by element
_LANES = 16  # numbers of 4 bytes in a vector register
_PACKED = 36e9  # bytes a second of patches that the library copies piece by piece
_COPIED = 10e9  # of patches written and read as arrays
_ADDED = 18e9  # of products written and added up
_REORDERED = 3e9  # of a kernel whose elements are brought into another order
_TRANSPOSED = 1.5e9  # of operands whose axes have the wrong order for a form
_CALL = 40e-6  # seconds that the library takes to hand out its work

_SCATTERED_BYTES = 8 << 20  # products of one image: they overlap in the output, so that bands of them do not stack


def cheapest(geometry: Geometry, *, library: bool = True) -> Form | None:
    """The form with the least estimate.

    Args:
      geometry: all sizes.
      library: whether XLA has a library's convolution for numbers of this type; it has one for float32.

    Returns:
      The form; None if there is none, where kernel and output are both long.

    Example:
      >>> layer = dict(strides=(1, 1), padding=((0, 0), (0, 0)), image_dilation=(1, 1), kernel_dilation=(1, 1))
      >>> forward = Geometry(20, 32, 64, 1, image=(26, 26), kernel=(3, 3), output=(24, 24), **layer)
      >>> layer["images_inside"] = True
      >>> kernel_gradient = Geometry(32, 20, 64, 1, image=(26, 26), kernel=(24, 24), output=(3, 3), **layer)
      >>> cheapest(forward), cheapest(kernel_gradient)
      ('library', 'window')
    """
    found = {form: seconds(geometry, form) for form in FORMS if is_possible(geometry, form)}
    if not library:
        found.pop("library", None)
    return min(found, key=lambda form: found[form], default=None)


def is_possible(geometry: Geometry, form: Form) -> bool:
    """Whether a form computes a convolution.

    The library is XLA's convolution of one or two axes. With groups of channels it took 2 to 50 times as long as the
    other forms, and where a kernel is larger than its images, up to 70 times.
    """
    if form == "library":
        fits = all(
            (width - 1) * gap <= (size - 1) * spread
            for width, gap, size, spread in zip(
                geometry.kernel, geometry.kernel_dilation, geometry.image, geometry.image_dilation, strict=True
            )
        )
        return fits and geometry.groups == 1 and len(geometry.image) <= 2
    if form == "scatter":
        scattered = 4 * math.prod(geometry.image) * math.prod(geometry.kernel) * geometry.outputs * geometry.groups
        if any(stride > 1 for stride in geometry.strides) or scattered > _SCATTERED_BYTES:
            return False
    return _slices(geometry, form) <= MAX_SLICES


def seconds(geometry: Geometry, form: Form) -> float:
    """Estimates the time of a form on one core."""
    if form == "window" and geometry.exchanges:
        geometry = geometry.exchanged()
    kernel, output, image = (math.prod(extent) for extent in (geometry.kernel, geometry.output, geometry.image))
    by_group = geometry.images * geometry.groups
    pairs = 2 * by_group * kernel * geometry.inputs * geometry.outputs  # operations for each position
    patches = 4 * by_group * output * kernel * geometry.inputs
    products = 4 * by_group * image * kernel * geometry.outputs
    reordered = 4 * geometry.groups * kernel * geometry.inputs * geometry.outputs
    transposed = 0.0
    if (form == "window") != geometry.images_inside:
        transposed = (4 * by_group * image * geometry.inputs + reordered) / _TRANSPOSED
    if form == "library":  # which skips the zeros between image elements
        computing = min(output, image) * pairs / _PRODUCTS
        return transposed + computing + min(patches, products) / _PACKED + reordered / _REORDERED + _CALL
    if form == "scatter":
        results = 4 * by_group * output * geometry.outputs
        return transposed + image * pairs / _PRODUCTS + (products + results) / _ADDED + reordered / _REORDERED
    if form == "shift":
        summed = geometry.kernel_is_larger
        channels = geometry.outputs * (geometry.images if summed else geometry.inputs)  # next to each other in memory
        rate = _ELEMENTWISE * min(geometry.groups / _LANES, 1) / channels
        if summed:
            return output * pairs / rate + 2 * output * pairs / _ADDED
        return min(output, image) * pairs / rate
    copied = 0 if kernel == 1 or output == 1 else patches / _COPIED
    return transposed + output * pairs / _PRODUCTS + copied


def _slices(geometry: Geometry, form: Form) -> int:
    """How many slices a form unrolls into."""
    if form == "library" or (form == "gather" and math.prod(geometry.output) == 1):
        return 1
    if form == "shift":
        positions, rows = (
            (geometry.output, geometry.images) if geometry.kernel_is_larger else (geometry.kernel, geometry.inputs)
        )
        return math.prod(positions) * rows * geometry.outputs
    return sum(geometry.output if form == "window" else geometry.kernel)
