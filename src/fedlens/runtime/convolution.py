"""Makes XLA compile convolutions on CPU as matrix products, inside fedlens's own programs and nowhere else.

JAX keeps one lowering rule per primitive and platform. `install` puts a rule for `lax.conv_general_dilated_p` in front of
the one that was there; it acts inside `with lowered_as_products():` and hands everything else on. Any Flax or Keras model
profits unchanged, since gradients and batched convolutions are that primitive again. The forms of the products are in
`convolution_forms`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.interpreters import mlir
from jaxtyping import Array, Float

from fedlens.runtime.convolution_forms import Geometry, convolve

MAX_SLICES = 256
"""Beyond as many slices XLA takes many seconds to compile a convolution; longer ones keep its own form."""

_FLOATS = ("float16", "bfloat16", "float32", "float64")

# Part of the key of every cache of jit, and local to the thread: a function that was compiled inside
# `lowered_as_products` is compiled again outside, and the other way round. A ContextVar would not be seen by the caches.
_as_products = jax.make_user_context(default_value=None)  # type: ignore[no-untyped-call]

_Rule = Callable[..., Sequence[Any]]
_registering = threading.Lock()


@contextmanager
def lowered_as_products() -> Iterator[None]:
    """Within, convolutions that are lowered for CPU become matrix products; see `install`, which must have been called.

    Example:
      >>> install()
      True
      >>> images, kernel = jnp.ones((8, 1, 28, 28)), jnp.ones((32, 1, 3, 3))
      >>> with lowered_as_products():
      ...     text = jax.jit(lambda x, w: lax.conv(x, w, (1, 1), "VALID")).lower(images, kernel).as_text()
      >>> "convolution" in text
      False
    """
    with _as_products(True):
        yield


def install() -> bool:
    """Registers the rule, once per process; calling it again changes nothing.

    Returns:
      Whether the rule is registered. It is not when this version of JAX does not show the rule that it would replace;
      then convolutions stay as XLA has them, right and slow.
    """
    with _registering:
        registered = _registered_rule()
        if registered is None:
            return False
        if not isinstance(registered, _ProductRule):
            mlir.register_lowering(lax.conv_general_dilated_p, _ProductRule(registered), platform="cpu")
        return True


def _registered_rule() -> _Rule | None:
    # The one private name of JAX in this module: the rule in use cannot be asked for in any other way, and outside
    # fedlens's programs it must stay in use. An entry was the rule itself before JAX 0.7, and wraps it since.
    try:
        entry = mlir._platform_specific_lowerings["cpu"][lax.conv_general_dilated_p]
    except (AttributeError, KeyError, TypeError):
        return None
    rule: _Rule = getattr(entry, "rule", entry)
    return rule if callable(rule) else None


class _ProductRule:
    """The lowering rule: products where asked for and possible, else the rule that was registered before."""

    def __init__(self, otherwise: _Rule) -> None:
        self._otherwise = otherwise
        self._as_products = mlir.lower_fun(_convolution, multiple_results=False)

    def __call__(self, context: mlir.LoweringRuleContext, lhs: Any, rhs: Any, **parameters: Any) -> Sequence[Any]:
        if _as_products.value and _has_product_form(*context.avals_in, *context.avals_out, parameters):
            return self._as_products(context, lhs, rhs, **parameters)
        return self._otherwise(context, lhs, rhs, **parameters)


def _has_product_form(lhs: Any, rhs: Any, out: Any, parameters: dict[str, Any]) -> bool:
    """Whether a convolution is one of floats, of static shape, without empty axes, on one device, and not too long."""
    arrays = (lhs, rhs, out)
    if not all(isinstance(size, int) and size > 0 for array in arrays for size in array.shape):
        return False
    if not all(array.dtype.name in _FLOATS for array in arrays) or _is_spread(parameters.get("out_sharding")):
        return False
    # A scan's carry must be marked as varying over mesh axes; only shard_map with check_vma tracks that.
    if any(getattr(array, "vma", None) for array in arrays):
        return False
    return _geometry(lhs.shape, rhs.shape, parameters).slices <= MAX_SLICES


def _is_spread(sharding: Any) -> bool:
    """Whether a sharding names a mesh axis; under shard_map JAX gives one that names none."""
    return sharding is not None and any(axis is not None for axis in sharding.spec)


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
