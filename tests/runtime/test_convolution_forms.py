"""Convolutions in all their forms against XLA's own. Most data are small integers, whose sums are exact."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import Phase, given, reject, settings
from hypothesis import strategies as st
from jax import lax

from fedlens.runtime import convolution, convolution_blocks, convolution_cost
from fedlens.runtime.convolution import install
from fedlens.runtime.lowering import lowered_for_cpu

QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


@pytest.fixture(autouse=True, scope="module")
def _installed():
    assert install()


@dataclass(frozen=True)
class Case:
    """A convolution: shapes in the layouts above, and parameters of `lax.conv_general_dilated`."""

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    strides: tuple[int, ...] = ()
    padding: object = "VALID"
    dtype: str = "float32"
    layout: tuple[str, str, str] | None = None
    more: dict = field(default_factory=dict)

    def convolve(self, lhs, rhs):
        axes = len(self.lhs) - 2
        return lax.conv_general_dilated(
            lhs,
            rhs,
            self.strides or (1,) * axes,
            self.padding,
            dimension_numbers=self.layout or LAYOUTS[axes],
            **self.more,
        )

    def operands(self):
        generator = np.random.default_rng(7)
        return [generator.integers(-3, 4, shape).astype(jnp.dtype(self.dtype)) for shape in (self.lhs, self.rhs)]

    def everything(self, lhs, rhs):
        """The result, and its gradients along both operands for a cotangent of small integers."""
        result, pull_back = jax.vjp(self.convolve, lhs, rhs)
        cotangent = (jnp.arange(result.size) % 5 - 2).reshape(result.shape).astype(result.dtype)
        return result, *pull_back(cotangent)


CASES = {
    "W1, first layer": Case((4, 12, 12, 1), (3, 3, 1, 8)),
    "W1, second layer": Case((4, 10, 10, 8), (3, 3, 8, 16)),
    "same": Case((2, 9, 8, 6), (3, 3, 6, 8), padding="SAME"),
    "same, strided": Case((2, 9, 8, 6), (5, 4, 6, 8), (2, 3), "SAME"),
    "fewer outputs than inputs": Case((2, 9, 8, 6), (3, 2, 6, 2), padding="SAME"),
    "cropped and padded": Case((2, 9, 8, 6), (3, 2, 6, 2), padding=((3, -1), (-2, 4))),
    "kernel of one": Case((3, 5, 5, 4), (1, 1, 4, 6)),
    "kernel as large as the image": Case((3, 5, 5, 4), (5, 5, 4, 6)),
    "kernel larger than the image": Case((3, 3, 2, 4), (5, 5, 4, 3), padding=((2, 2), (3, 4))),
    "one output position, far from most": Case((2, 3, 3, 2), (2, 2, 2, 3), (9, 9), ((8, 8), (8, 8))),
    "image dilated, kernel larger than output": Case(
        (2, 4, 3, 3), (6, 4, 3, 5), (2, 1), ((2, 1), (0, 1)), more={"lhs_dilation": (2, 3)}
    ),
    "kernel dilated": Case((2, 12, 9, 3), (3, 2, 3, 4), more={"rhs_dilation": (3, 2)}),
    "image dilated": Case((2, 4, 5, 3), (3, 3, 3, 4), padding=((1, 2), (2, 2)), more={"lhs_dilation": (3, 2)}),
    "image dilated, few outputs": Case(
        (2, 4, 5, 6), (3, 3, 6, 2), padding=((1, 2), (-2, 2)), more={"lhs_dilation": (3, 2)}
    ),
    "all dilated and strided": Case(
        (2, 5, 6, 3), (3, 2, 3, 4), (2, 3), ((4, 1), (0, 5)), more={"lhs_dilation": (2, 3), "rhs_dilation": (2, 1)}
    ),
    "grouped": Case((2, 6, 7, 6), (3, 3, 2, 9), more={"feature_group_count": 3}),
    "depthwise": Case((2, 6, 7, 5), (3, 3, 1, 10), (2, 2), "SAME", more={"feature_group_count": 5}),
    "grouped, kernel larger than output": Case((2, 5, 5, 4), (4, 4, 2, 6), more={"feature_group_count": 2}),
    "depthwise, three axes": Case((2, 4, 5, 3, 4), (2, 3, 2, 1, 4), more={"feature_group_count": 4}),
    "batch grouped": Case((6, 6, 7, 4), (3, 3, 4, 6), more={"batch_group_count": 3}),
    "batch grouped, kernel larger than output": Case((6, 5, 5, 4), (4, 4, 4, 3), more={"batch_group_count": 3}),
    "one axis": Case((3, 20, 4), (5, 4, 6), (2,), "SAME"),
    "one axis, dilated": Case((3, 20, 4), (3, 4, 2), padding=((5, -2),), more={"rhs_dilation": (4,)}),
    "three axes": Case((2, 5, 6, 4, 3), (2, 3, 2, 3, 4), (1, 2, 1), "SAME"),
    "three axes, grouped": Case((2, 5, 6, 4, 4), (2, 3, 2, 2, 4), more={"feature_group_count": 2}),
    "channels first": Case((2, 3, 9, 8), (4, 3, 3, 2), layout=("NCHW", "OIHW", "NCHW")),
    "layouts mixed": Case((9, 2, 3, 8), (3, 4, 2, 3), layout=("HNCW", "HOWI", "WCNH")),
    "no axes, with XLA": Case((3, 4), (4, 5), layout=("NC", "IO", "NC")),
    "float16": Case((2, 6, 6, 3), (3, 3, 3, 4), dtype="float16"),
    "bfloat16": Case((2, 6, 6, 3), (3, 3, 3, 4), dtype="bfloat16"),
    "bfloat16 to float32": Case(
        (2, 6, 6, 3), (3, 3, 3, 4), dtype="bfloat16", more={"preferred_element_type": np.dtype("float32")}
    ),
    "highest precision": Case((2, 6, 6, 3), (3, 3, 3, 4), more={"precision": lax.Precision.HIGHEST}),
    "integers stay with XLA": Case((2, 6, 6, 3), (3, 3, 3, 4), dtype="int32"),
    "complex numbers stay with XLA": Case((2, 6, 6, 3), (3, 3, 3, 4), dtype="complex64"),
    "empty arrays stay with XLA": Case((2, 6, 6, 3), (3, 3, 3, 0)),
}


def compute(cases, as_products):
    """What every case computes, in one program; integers have no gradients."""

    def program(operands):
        return {
            name: cases[name].everything(*pair) if pair[0].dtype != np.int32 else (cases[name].convolve(*pair),)
            for name, pair in operands.items()
        }

    with lowered_for_cpu() if as_products else contextlib.nullcontext():
        compiled = jax.jit(program, compiler_options=QUICK_TO_COMPILE)
        return jax.device_get(compiled({name: case.operands() for name, case in cases.items()}))


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.fixture(scope="module")
def xla():
    return compute(CASES, as_products=False)


def by(order):
    """A choice among the possible forms other than the cheapest: the first of `order`, of few enough slices."""

    def choose(geometry, *, library=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(convolution_cost, "MAX_SLICES", 32)
            possible = [form for form in order if convolution_cost.is_possible(geometry, form)]
        return next((form for form in possible if library or form != "library"), "scatter")

    return choose


CHOICES = {
    "cheapest, in blocks": (convolution_cost.cheapest, 6000),
    "products, in bands of rows": (by(["gather", "window"]), 64),
    "others, cached whole": (by(["shift", "scatter", "library", "window", "gather"]), 1 << 20),
}


@contextlib.contextmanager
def choosing(name):
    choice, cache = CHOICES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "cheapest", choice)
        patch.setattr(convolution_blocks, "CACHE_BYTES", cache)
        yield


@pytest.fixture(scope="module", params=CHOICES)
def products(request):
    """All cases, in several forms; with a cache so small that they are cut into blocks of images, or bands of rows."""
    with choosing(request.param):
        return compute(CASES, as_products=True)


@pytest.mark.parametrize("name", CASES)
def test_products_and_their_gradients_equal_xlas_convolution(name, products, xla):
    assert_equal(products[name], xla[name])


@st.composite
def convolutions(draw):
    axes = draw(st.integers(1, 3))
    groups, small = draw(st.integers(1, 3)), st.integers(1, 3)
    kind = draw(st.sampled_from(["feature_group_count", "batch_group_count"]))

    def sizes(numbers):
        return draw(st.tuples(*[numbers] * axes))

    image, kernel = sizes(st.integers(1, 7)), sizes(st.integers(1, 5))
    lhs_dilation, rhs_dilation = sizes(small), sizes(small)
    padding = []
    for size, width, spread, gap in zip(image, kernel, lhs_dilation, rhs_dilation, strict=True):
        low = draw(st.integers(-2, 4))
        least = (width - 1) * gap - (size - 1) * spread - low  # the kernel fits once
        padding.append((low, draw(st.integers(least, least + 8))))
    inputs, outputs, images = draw(small), draw(small), draw(st.integers(1, 4))
    by_feature = kind == "feature_group_count"
    letters = "DHW"[-axes:]
    layout = tuple("".join(draw(st.permutations(ends + letters))) for ends in ("NC", "IO", "NC"))

    def laid_out(ends, spatial, order):
        sizes_by_letter = dict(zip("".join(ends) + letters, [*ends.values(), *spatial], strict=True))
        return tuple(sizes_by_letter[letter] for letter in order)

    images, channels = (images, inputs * groups) if by_feature else (images * groups, inputs)
    case = Case(
        lhs=laid_out({"N": images, "C": channels}, image, layout[0]),
        rhs=laid_out({"I": inputs, "O": outputs * groups}, kernel, layout[1]),
        layout=layout,
        strides=sizes(small),
        padding=tuple(padding),
        more={kind: groups, "lhs_dilation": lhs_dilation, "rhs_dilation": rhs_dilation},
    )
    try:
        jax.eval_shape(case.everything, *case.operands())
    except ValueError as error:  # JAX refuses to crop more than there is, of a gradient too
        if "Negative padding" not in str(error):
            raise
        reject()
    return case


@settings(max_examples=5, phases=[Phase.reuse, Phase.generate])  # compiling is slow, and shrinking compiles
@given(cases=st.lists(convolutions(), min_size=6, max_size=6), choice=st.sampled_from(list(CHOICES)))
def test_any_convolution_equals_xlas(cases, choice):
    named = {str(number): case for number, case in enumerate(cases)}
    expected = compute(named, as_products=False)
    with choosing(choice):
        found = compute(named, as_products=True)
    for name, values in found.items():
        assert_equal(values, expected[name])


LAYERS = {
    "pooled": nn.Conv(8, (3, 3)),
    "stride": nn.Conv(8, (3, 3), strides=(2, 2), padding="SAME"),
    "dilation": nn.Conv(8, (3, 3), kernel_dilation=(2, 2)),
    "groups": nn.Conv(8, (3, 3), feature_group_count=2),
    "depthwise, strided": nn.Conv(8, (5, 5), strides=(2, 2), feature_group_count=4),
    "asymmetric padding": nn.Conv(8, (4, 2), padding=((0, 3), (1, 0))),
    "transposed": nn.ConvTranspose(8, (4, 4), strides=(2, 2)),
    "kernel of one": nn.Conv(8, (1, 1), strides=(2, 2)),
    "bfloat16": nn.Conv(8, (3, 3), dtype=jnp.bfloat16),
    "one axis": nn.Conv(8, (9,), strides=(2,)),
    "three axes": nn.Conv(8, (3, 3, 3), strides=(1, 2, 1)),
}


def test_gradients_of_flax_networks_equal_xlas():
    """Training steps are inside a loop, as in fedlens; of all networks in one program, which compiles faster."""

    class Network(nn.Module):
        middle: nn.Module
        pools: bool

        @nn.compact
        def __call__(self, x):
            axes = x.ndim - 2
            x = nn.relu(self.middle(nn.relu(nn.Dense(4)(x))))
            if self.pools:
                x = nn.avg_pool(nn.max_pool(x, (3,) * axes, (2,) * axes, "SAME"), (2,) * axes, (1,) * axes)
            return nn.Dense(3)(x.astype(jnp.float32).reshape(x.shape[0], -1))

    shapes = dict.fromkeys(LAYERS, (2, 9, 8, 2)) | {"one axis": (2, 30, 2), "three axes": (2, 5, 6, 5, 2)}
    generator = np.random.default_rng(5)
    images = {name: generator.normal(size=(2, *shape)).astype(np.float32) for name, shape in shapes.items()}
    networks = {name: Network(middle, name in ("one axis", "pooled")) for name, middle in LAYERS.items()}
    start = jax.tree.map(
        lambda weight: generator.normal(scale=0.3, size=weight.shape).astype(np.float32),
        {name: jax.eval_shape(network.init, jax.random.key(1), images[name][0]) for name, network in networks.items()},
    )

    def gradients(weights, images):
        def step(total, batch):
            def loss(weights):
                return sum((networks[name].apply(weights[name], batch[name]) ** 2).mean() for name in networks)

            return jax.tree.map(jnp.add, total, jax.grad(loss)(weights)), None

        return lax.scan(step, jax.tree.map(jnp.zeros_like, weights), images)[0]

    lowered = jax.jit(gradients).lower(start, images)
    expected = lowered.compile(QUICK_TO_COMPILE)(start, images)
    with lowered_for_cpu():
        found = jax.jit(gradients).lower(start, images).compile(QUICK_TO_COMPILE)(start, images)
    for (path, left), right in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        # bfloat16 rounds both at other places; its own step is 2 ** -8.
        limit = 2.0**-8 if path[0].key == "bfloat16" else 1e-5
        assert np.linalg.norm(left - right) <= limit * np.linalg.norm(right), jax.tree_util.keystr(path)


def test_a_convolution_by_its_definition():
    case = CASES["all dilated and strided"]
    lhs, rhs = case.operands()
    zeros = np.zeros((2, (5 - 1) * 2 + 1 + 5, (6 - 1) * 3 + 1 + 5, 3), np.float32)
    zeros[:, 4 : 4 + 9 : 2, 0:16:3] = lhs
    height, width = (zeros.shape[1] - 5) // 2 + 1, (zeros.shape[2] - 2) // 3 + 1
    expected = np.zeros((2, height, width, 4), np.float32)
    for row, column, i, j in np.ndindex(height, width, 3, 2):
        expected[:, row, column] += zeros[:, 2 * row + 2 * i, 3 * column + j] @ rhs[i, j]
    with lowered_for_cpu():
        np.testing.assert_array_equal(jax.jit(case.convolve)(lhs, rhs), expected)


def test_16_bit_floats_accumulate_in_32_bits():
    """Added one by one in float16, 2048 + 1 is 2048 again; in bfloat16, 256 + 1 is 256."""
    ones = np.ones((1, 64, 64, 1))
    for dtype in ("float16", "bfloat16"):
        case = Case((1, 64, 64, 1), (64, 64, 1, 1))
        with lowered_for_cpu():
            total = jax.jit(case.convolve)(ones.astype(dtype), ones[0, :, :, :, None].astype(dtype))
        assert float(total[0, 0, 0, 0]) == 4096


def test_64_bit_floats_stay_exact():
    case = replace(CASES["same"], dtype="float64")
    lhs, rhs = (operand + 2.0**40 for operand in case.operands())
    with jax.enable_x64(True):
        expected = jax.device_get(jax.jit(case.everything)(lhs, rhs))
        with lowered_for_cpu():
            assert "convolution" not in jax.jit(case.everything).lower(lhs, rhs).as_text()
            found = jax.device_get(jax.jit(case.everything)(lhs, rhs))
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == np.float64
        # 54 products of numbers near 2**40 are rounded in one order or another.
        np.testing.assert_allclose(left, right, rtol=54 * 2.0**-52)


def test_rounding_is_that_of_a_sum_in_another_order():
    """Two sums of n products in float32 differ by at most 2 n eps times the sum of their absolute values."""
    case = CASES["W1, second layer"]
    generator = np.random.default_rng(3)
    lhs, rhs = (generator.standard_normal(shape, dtype=np.float32) for shape in (case.lhs, case.rhs))
    expected, size = jax.jit(case.convolve)(lhs, rhs), case.convolve(np.abs(lhs), np.abs(rhs))
    with lowered_for_cpu():
        found = jax.jit(case.convolve)(lhs, rhs)
    assert np.all(np.abs(found - expected) <= 2 * 72 * np.finfo(np.float32).eps * size)
    assert np.any(found != expected)  # else both came from one program
