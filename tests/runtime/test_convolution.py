"""Where convolutions take fedlens's forms, and where they stay with XLA."""

from __future__ import annotations

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.interpreters import mlir
from jax.sharding import Mesh, PartitionSpec

from fedlens.runtime import convolution, convolution_blocks, convolution_cost, convolution_forms, lowering
from fedlens.runtime.convolution import install
from fedlens.runtime.lowering import lowered_for_cpu

LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


@pytest.fixture(autouse=True, scope="module")
def _installed():
    assert install()


X, W = (np.ones(shape, np.float32) for shape in ((2, 6, 6, 3), (3, 3, 3, 3)))


def plain(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAYOUTS[2])


PROGRAMS = {
    "alone": lambda f: f,
    "inside another jit": lambda f: lambda x, w: jax.jit(f)(x, w) + 1,
    "in a scan": lambda f: lambda x, w: lax.scan(lambda c, _: (f(c, w), None), x, None, length=2)[0],
    "in a while loop": lambda f: lambda x, w: lax.while_loop(lambda c: c[0, 0, 0, 0] < 9, lambda c: f(c, w), x),
    "in a branch": lambda f: lambda x, w: lax.cond(x[0, 0, 0, 0] > 0, f, lambda x, w: x, x, w),
    "mapped over images": lambda f: lambda x, w: jax.vmap(f, (0, None))(jnp.stack([x, x]), w),
    "mapped over kernels": lambda f: lambda x, w: jax.vmap(f)(jnp.stack([x, x]), jnp.stack([w, w])),
    "differentiated": lambda f: jax.grad(lambda x, w: f(x, w).sum(), argnums=(0, 1)),
    "differentiated twice": lambda f: jax.hessian(lambda x, w: (f(x[:1, :2, :2], w) ** 2).sum()),
    "rematerialised": lambda f: jax.grad(lambda x, w: jax.checkpoint(f)(x, w).sum()),
}


@pytest.mark.parametrize("inside_first", [True, False])
@pytest.mark.parametrize("program", PROGRAMS)
def test_one_function_lowers_one_way_inside_and_the_other_outside(program, inside_first):
    shared = jax.jit(plain)  # the user's own jit, whose cache knows both
    function = jax.jit(PROGRAMS[program](shared))

    def convolutions_left():
        return "stablehlo.convolution" in function.lower(X, W).as_text()

    for inside in (inside_first, not inside_first, inside_first):
        with lowered_for_cpu() if inside else contextlib.nullcontext():
            assert convolutions_left() != inside


def test_a_call_runs_the_program_of_its_place(monkeypatch):
    """Calls take a shorter way through jit's caches than `lower` does."""
    traced = []

    def convolve(*operands):
        traced.append(1)
        return convolution_forms.convolve(*operands)

    monkeypatch.setattr(convolution, "convolve", convolve)
    function = jax.jit(lambda x, w: plain(x, w) + 17)
    counts = []
    for inside in (False, True, False, True, False):
        with lowered_for_cpu() if inside else contextlib.nullcontext():
            function(X, W).block_until_ready()
        counts.append(len(traced))
    assert counts == [0, 1, 1, 1, 1]


def test_compiled_programs_hold_no_convolution():
    """XLA makes convolutions into other things, never the other way round; read from what it compiled."""
    gradient = jax.jit(jax.grad(lambda w, x: (plain(x, w) ** 2).sum()))
    assert " convolution(" in gradient.lower(W, X).compile().as_text()
    with lowered_for_cpu():
        assert " convolution(" not in gradient.lower(W, X).compile().as_text()


def test_traced_inside_and_lowered_outside_is_outside():
    with lowered_for_cpu():
        traced = jax.jit(plain).trace(X, W)
    assert "stablehlo.convolution" in traced.lower().as_text()


def test_contexts_nest_and_end_after_an_error():
    def left():
        return "stablehlo.convolution" in jax.jit(plain).lower(X, W).as_text()

    with lowered_for_cpu():
        with lowered_for_cpu():
            assert not left()
        assert not left()
    with pytest.raises(ZeroDivisionError), lowered_for_cpu():
        1 / 0  # noqa: B018
    assert left()


def test_another_thread_is_outside():
    left = []
    with lowered_for_cpu():
        thread = threading.Thread(
            target=lambda: left.append("stablehlo.convolution" in jax.jit(plain).lower(X, W).as_text())
        )
        thread.start()
        thread.join()
    assert left == [True]


def test_other_platforms_keep_their_convolutions():
    with lowered_for_cpu():
        assert "stablehlo.convolution" in jax.jit(plain).trace(X, W).lower(lowering_platforms=("cuda",)).as_text()


def test_symbolic_shapes_stay_with_xla():
    batch = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), 6, 6, 3), np.float32)
    with lowered_for_cpu():
        exported = jax.export.export(jax.jit(plain))(batch, W)
    assert "stablehlo.convolution" in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(X, W), jax.jit(plain)(X, W))


def test_long_kernels_of_long_outputs_stay_with_xla():
    limit = convolution_cost.MAX_SLICES
    kernel, image = np.ones((limit + 1, 1, 1)), np.ones((1, 3 * limit, 1))
    convolve = jax.jit(lambda x, w: lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=LAYOUTS[1]))
    with lowered_for_cpu():
        assert "stablehlo.convolution" in convolve.lower(image, kernel).as_text()
        assert "stablehlo.convolution" not in convolve.lower(image, kernel[:50]).as_text()


@pytest.mark.parametrize("tracked", [False, True])
def test_under_shard_map(tracked, monkeypatch):
    """As the local engine runs it, not tracked; and where shard_map tracks what varies, which our scan does not."""
    monkeypatch.setattr(convolution_blocks, "CACHE_BYTES", 400)
    mesh = Mesh(np.array(jax.devices()[:1]), ("clients",))
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("clients")), "out_specs": PartitionSpec("clients")}
    gradient = jax.grad(lambda w, x: (plain(x, w) ** 2).sum())
    function = jax.jit(jax.shard_map(gradient, mesh=mesh, check_vma=tracked, **specs))
    expected = function(W, X)
    with lowered_for_cpu():
        assert ("stablehlo.convolution" in function.lower(W, X).as_text()) == tracked
        np.testing.assert_array_equal(function(W, X), expected)


def test_installing_again_changes_nothing():
    before = mlir._platform_specific_lowerings["cpu"][lax.conv_general_dilated_p]
    assert install()
    assert mlir._platform_specific_lowerings["cpu"][lax.conv_general_dilated_p] is before


def test_outside_the_rule_registered_before_is_used(monkeypatch):
    rules = mlir._platform_specific_lowerings["cpu"]
    monkeypatch.setitem(rules, lax.conv_general_dilated_p, rules[lax.conv_general_dilated_p])  # put back afterwards
    called = []

    def of_another_library(context, lhs, rhs, **parameters):
        called.append(parameters)
        return original(context, lhs, rhs, **parameters)

    original = lowering._registered_rule(lax.conv_general_dilated_p)
    mlir.register_lowering(lax.conv_general_dilated_p, of_another_library, platform="cpu")
    assert install()
    with lowered_for_cpu():
        jax.jit(lambda x, w: plain(x, w) + 1).lower(X, W)
    assert not called
    jax.jit(lambda x, w: plain(x, w) + 2).lower(X, W)
    assert len(called) == 1


@pytest.mark.parametrize("hidden", [None, {}, {"cpu": {}}, {"cpu": {lax.conv_general_dilated_p: "a string"}}])
def test_a_jax_that_hides_its_rules_is_left_alone(hidden, monkeypatch):
    monkeypatch.setattr(mlir, "register_lowering", lambda *_, **__: pytest.fail("registered"))
    monkeypatch.setattr(mlir, "_lowerings", {})
    if hidden is None:
        monkeypatch.delattr(mlir, "_platform_specific_lowerings")
    else:
        monkeypatch.setattr(mlir, "_platform_specific_lowerings", hidden)
    assert not install()
