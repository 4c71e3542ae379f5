"""Which form a convolution takes, by its sizes; nothing is compiled."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from fedlens.runtime import convolution
from fedlens.runtime.convolution_geometry import Geometry

LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


@dataclass(frozen=True)
class Layer:
    """A convolution of float32 images; channels last."""

    images: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...] = (1, 1)
    padding: object = "VALID"
    more: dict = field(default_factory=dict)

    def convolve(self, images, kernel):
        layout = LAYOUTS[len(self.images) - 2]
        return lax.conv_general_dilated(
            images, kernel, self.strides, self.padding, dimension_numbers=layout, **self.more
        )


def forms(layer, dtype=np.float32):
    """The forms chosen for a convolution, for the gradient of its images, and for that of its kernel."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in (layer.images, layer.kernel)]
    images, kernel = shapes
    result = jax.eval_shape(layer.convolve, *shapes)
    programs = (
        jax.make_jaxpr(layer.convolve)(*shapes),
        jax.make_jaxpr(lambda w, g: jax.linear_transpose(lambda x: layer.convolve(x, w), images)(g))(kernel, result),
        jax.make_jaxpr(lambda x, g: jax.linear_transpose(lambda w: layer.convolve(x, w), kernel)(g))(images, result),
    )
    return tuple(
        convolution.chosen_form([variable.aval for variable in (*equation.invars, *equation.outvars)], equation.params)
        for program in programs
        for equation in program.jaxpr.eqns
        if equation.primitive is lax.conv_general_dilated_p
    )


# Forward, gradient of the images, of the kernel: the fastest, or close to it, by benchmarks/convolutions.py.
FASTEST = {
    "W1, second layer": (Layer((20, 26, 26, 32), (3, 3, 32, 64)), ("library", "library", "window")),
    "1x1": (Layer((20, 32, 32, 64), (1, 1, 64, 128)), ("gather", "gather", "window")),
    "5x5, strided": (Layer((20, 32, 32, 32), (5, 5, 32, 64), (2, 2), "SAME"), ("library", "library", "window")),
    "many channels of small images": (
        Layer((20, 4, 4, 512), (3, 3, 512, 512), padding="SAME"),
        ("gather", "gather", "window"),
    ),
    "kernel larger than the output": (
        Layer((20, 4, 4, 512), (3, 3, 512, 512)),
        ("gather", "scatter", "window"),
    ),
    "few channels of small images": (
        Layer((20, 8, 8, 1), (3, 3, 1, 16), padding="SAME"),
        ("gather", "scatter", "window"),
    ),
    "depthwise": (
        Layer((20, 32, 32, 64), (3, 3, 1, 64), padding="SAME", more={"feature_group_count": 64}),
        ("shift", "shift", "shift"),
    ),
    "groups": (
        Layer((20, 32, 32, 64), (3, 3, 16, 64), padding="SAME", more={"feature_group_count": 4}),
        ("scatter", "scatter", "window"),
    ),
    "three axes": (Layer((4, 16, 16, 16, 8), (3, 3, 3, 8, 16), (1, 1, 1), "SAME"), ("gather", "scatter", "window")),
    "transposed": (
        Layer((20, 16, 16, 64), (4, 4, 64, 32), padding=((2, 2), (2, 2)), more={"lhs_dilation": (2, 2)}),
        ("library", "library", "window"),
    ),
}


@pytest.mark.parametrize("name", FASTEST)
def test_the_chosen_form_is_one_of_the_fastest(name):
    layer, expected = FASTEST[name]
    assert forms(layer) == expected


def test_types_without_a_library_or_any_form():
    layer, expected = FASTEST["W1, second layer"]
    assert forms(layer, jnp.bfloat16) == expected
    with jax.enable_x64(True):
        assert forms(layer, np.float64) == ("gather", "scatter", "window")
    for dtype in (np.int32, np.complex64):
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in (layer.images, layer.kernel)]
        (equation,) = jax.make_jaxpr(layer.convolve)(*shapes).eqns
        arrays = [variable.aval for variable in (*equation.invars, *equation.outvars)]
        assert convolution.chosen_form(arrays, equation.params) is None


@given(st.data())
@settings(max_examples=30)
def test_images_and_kernels_exchange_places_by_definition(data):
    """Along one axis, with every product written out."""
    size, width, stride, spread = (data.draw(st.integers(1, 5)) for _ in range(4))
    low, high = data.draw(st.integers(-2, 4)), data.draw(st.integers(-2, 4))
    span = (size - 1) * spread + 1 + low + high
    if span < width:
        return
    geometry = Geometry(
        1, 1, 1, 1, (size,), (width,), ((span - width) // stride + 1,), (stride,), ((low, high),), (spread,), (1,)
    )
    other = geometry.exchanged()

    def terms(one):
        """The pairs of image and kernel elements of every output."""
        return [
            {
                (place // one.image_dilation[0], number)
                for number in range(one.kernel[0])
                for place in [output * one.strides[0] + number * one.kernel_dilation[0] - one.padding[0][0]]
                if place % one.image_dilation[0] == 0 and 0 <= place // one.image_dilation[0] < one.image[0]
            }
            for output in range(one.output[0])
        ]

    expected = terms(geometry)
    assert [{(image, kernel) for kernel, image in pairs} for pairs in reversed(terms(other))] == expected
    reach = other.image[0] + sum(other.padding[0]) - ((other.kernel[0] - 1) * other.kernel_dilation[0] + 1)
    assert reach // stride + 1 == geometry.output[0]
