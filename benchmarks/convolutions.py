"""The forms of convolutions against XLA's own, on one core: forward, input gradient, kernel gradient of usual layers.

    taskset -c 0 python benchmarks/convolutions.py [--layers NAME ...] [--repetitions N] [--json FILE]

Milliseconds of one convolution, the least of several runs, all forms in turn. "in loop" is where fedlens trains;
"alone" is a program of nothing else, which XLA:CPU optimises further. The form that fedlens chooses has a star.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedlens.runtime.convolution import chosen_form, convolved
from fedlens.runtime.convolution_cost import FORMS, is_possible, seconds
from fedlens.runtime.convolution_geometry import geometry_of

LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}
# images, kernel, stride, padding, more
LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, Any, dict[str, Any]]] = {
    "W1 first": ((20, 28, 28, 1), (3, 3, 1, 32), 1, "VALID", {}),
    "W1 second": ((20, 26, 26, 32), (3, 3, 32, 64), 1, "VALID", {}),
    "3x3": ((20, 32, 32, 64), (3, 3, 64, 64), 1, "SAME", {}),
    "3x3 stride 2": ((20, 32, 32, 64), (3, 3, 64, 128), 2, "SAME", {}),
    "3x3 dilated": ((20, 32, 32, 32), (3, 3, 32, 32), 1, "SAME", {"rhs_dilation": (2, 2)}),
    "3x3 of 7x7x256": ((20, 7, 7, 256), (3, 3, 256, 256), 1, "SAME", {}),
    "3x3 of 4x4x512": ((20, 4, 4, 512), (3, 3, 512, 512), 1, "SAME", {}),
    "3x3 valid of 4x4x512": ((20, 4, 4, 512), (3, 3, 512, 512), 1, "VALID", {}),
    "3x3 of digits": ((20, 8, 8, 1), (3, 3, 1, 16), 1, "SAME", {}),
    "1x1": ((20, 32, 32, 64), (1, 1, 64, 128), 1, "SAME", {}),
    "1x1 stride 2": ((20, 32, 32, 64), (1, 1, 64, 128), 2, "SAME", {}),
    "5x5 stride 2": ((20, 32, 32, 32), (5, 5, 32, 64), 2, "SAME", {}),
    "7x7 stride 2": ((10, 64, 64, 3), (7, 7, 3, 64), 2, "SAME", {}),
    "4x4 stride 4": ((20, 32, 32, 3), (4, 4, 3, 64), 4, "VALID", {}),
    "depthwise": ((20, 32, 32, 64), (3, 3, 1, 64), 1, "SAME", {"feature_group_count": 64}),
    "depthwise stride 2": ((20, 16, 16, 128), (3, 3, 1, 128), 2, "SAME", {"feature_group_count": 128}),
    "depthwise 5x5": ((20, 14, 14, 240), (5, 5, 1, 240), 1, "SAME", {"feature_group_count": 240}),
    "4 groups": ((20, 32, 32, 64), (3, 3, 16, 64), 1, "SAME", {"feature_group_count": 4}),
    "32 groups": ((20, 16, 16, 128), (3, 3, 4, 128), 1, "SAME", {"feature_group_count": 32}),
    "1-D, 9": ((20, 256, 32), (9, 32, 64), 1, "SAME", {}),
    "3-D": ((4, 16, 16, 16, 8), (3, 3, 3, 8, 16), 1, "SAME", {}),
    "transposed 4x4": ((20, 16, 16, 64), (4, 4, 64, 32), 1, ((2, 2), (2, 2)), {"lhs_dilation": (2, 2)}),
}


def equations(layer: str) -> Iterator[tuple[str, Any]]:
    """The convolution that JAX makes of each pass through a layer, as an equation of a jaxpr."""
    lhs, rhs, stride, padding, more = LAYERS[layer]
    axes = len(lhs) - 2
    images, kernel = jax.ShapeDtypeStruct(lhs, np.float32), jax.ShapeDtypeStruct(rhs, np.float32)

    def forward(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(x, w, (stride,) * axes, padding, dimension_numbers=LAYOUTS[axes], **more)

    result = jax.eval_shape(forward, images, kernel)
    yield "forward", _equation(jax.make_jaxpr(forward)(images, kernel))
    by_input = jax.make_jaxpr(lambda w, g: jax.linear_transpose(lambda x: forward(x, w), images)(g))(kernel, result)
    yield "input gradient", _equation(by_input)
    by_kernel = jax.make_jaxpr(lambda x, g: jax.linear_transpose(lambda w: forward(x, w), kernel)(g))(images, result)
    yield "kernel gradient", _equation(by_kernel)


def _equation(program: Any) -> Any:
    (found,) = _convolutions(program.jaxpr)
    return found


def _convolutions(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive is lax.conv_general_dilated_p:
            yield equation
        for parameter in equation.params.values():
            if hasattr(parameter, "jaxpr"):
                yield from _convolutions(parameter.jaxpr)


def measure(layer: str, name: str, equation: Any, repetitions: int) -> dict[str, Any]:
    """Times a convolution in all forms that are possible for it, and checks that their results agree."""
    shapes = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    geometry = geometry_of(shapes[0].shape, shapes[1].shape, equation.params)
    generator = np.random.default_rng(0)
    operands = [jnp.asarray(generator.standard_normal((2, *shape.shape), np.float32)) for shape in shapes[:2]]

    def of_form(form: Any) -> Callable[..., Any]:
        return lambda lhs, rhs: convolved(lhs, rhs, form=form, **equation.params)

    def xla(lhs: Any, rhs: Any) -> Any:
        return lax.conv_general_dilated_p.bind(lhs, rhs, **equation.params)

    forms = {"xla": xla} | {form: of_form(form) for form in FORMS if is_possible(geometry, form)}
    looped = {form: _looped(function, shapes[2]) for form, function in forms.items()}
    results, compiling = {}, {}
    for form, run in looped.items():
        started = time.perf_counter()
        results[form] = np.asarray(run(1, *operands))
        compiling[form] = time.perf_counter() - started
        error = np.linalg.norm(results[form] - results["xla"]) / np.linalg.norm(results["xla"])
        if error > 1e-5:
            raise SystemExit(f"{layer}, {name}, {form}: expected the result of XLA, found an error of {error:.1e}")
    alone = jax.jit(xla)
    alone(operands[0][0], operands[1][0]).block_until_ready()
    once = {form: _seconds(run, 1, *operands) for form, run in looped.items()}
    counts = {form: max(1, min(100, int(0.02 / duration))) for form, duration in once.items()}
    times, times_alone = {form: [duration] for form, duration in once.items()}, []
    for _ in range(repetitions):
        for form, run in looped.items():
            if once[form] < 0.2:  # what takes longer is not in the running
                times[form].append(_seconds(run, counts[form], *operands) / counts[form])
        times_alone.append(_seconds(alone, operands[0][0], operands[1][0]))
    return {
        "layer": layer,
        "pass": name,
        "chosen": chosen_form(shapes, equation.params),
        "ms": {form: 1e3 * min(found) for form, found in times.items()} | {"alone": 1e3 * min(times_alone)},
        "estimated_ms": {form: 1e3 * seconds(geometry, form) for form in forms if form != "xla"},
        "first_call_s": compiling,
    }


def _looped(function: Callable[..., Any], result: Any) -> Callable[..., Any]:
    """The function as the body of a loop whose operands differ from step to step."""

    def run(count: Any, lhs: Any, rhs: Any) -> Any:
        def step(number: Any, _: Any) -> Any:
            one, other = (lax.dynamic_index_in_dim(array, number % 2, keepdims=False) for array in (lhs, rhs))
            return lax.optimization_barrier(function(one, other))

        return lax.fori_loop(0, count, step, jnp.zeros(result.shape, result.dtype))

    return jax.jit(run)


def _seconds(function: Callable[..., Any], *operands: Any) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function(*operands))
    return time.perf_counter() - started


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    columns = ["alone", "xla", *FORMS]
    cells = [f"{found['ms'][c]:.2f}" + "*" * (c == found["chosen"]) if c in found["ms"] else "-" for c in columns]
    best = min(found["ms"][form] for form in ("xla", *FORMS) if form in found["ms"])
    cells.append(f"{found['ms'][found['chosen'] or 'xla'] / best:.2f}")
    return f"{found['layer']:21}{found['pass']:16}" + "".join(f"{cell:>10}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="*", choices=LAYERS, default=list(LAYERS), metavar="NAME")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write everything measured, and the estimates, to this file")
    options = parser.parse_args()
    heads = ["xla alone", "in loop:", *FORMS, "to best"]
    print(f"{'layer':21}{'pass':16}" + "".join(f"{head:>10}" for head in heads))
    everything = []
    for layer in options.layers:
        for name, equation in equations(layer):
            everything.append(measure(layer, name, equation, options.repetitions))
            print(line(everything[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
