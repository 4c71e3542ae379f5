"""Lowering rules that make XLA:CPU fast, inside fedlens's own programs and nowhere else.

JAX keeps one lowering rule per primitive and platform. `register` puts a rule in front of the one that was there; it
acts inside `with lowered_for_cpu():` and hands everything else on. Any Flax or Keras model profits unchanged, since
gradients and batched operations are primitives again. What the rules compute is in `convolution` and `pooling`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import jax
from jax.interpreters import mlir

# Local to the thread, and part of the key of every cache of jit, which a ContextVar is not: a function compiled inside
# `lowered_for_cpu` is compiled again outside, and the other way round.
_active = jax.make_user_context(default_value=None)

_Rule = Callable[..., Sequence[Any]]
_registering = threading.Lock()


@contextmanager
def lowered_for_cpu() -> Iterator[None]:
    """Within, operations that are lowered for CPU take the rules that were registered.

    Example:
      >>> convolution.install()
      True
      >>> images, kernel = jnp.ones((8, 1, 28, 28)), jnp.ones((32, 1, 3, 3))
      >>> with lowered_for_cpu():
      ...     text = jax.jit(lambda x, w: jax.lax.conv(x, w, (1, 1), "VALID")).lower(images, kernel).as_text()
      >>> "convolution" in text
      False
    """
    with _active(True):
        yield


def is_lowered_for_cpu() -> bool:
    """Whether what is traced here becomes a program of fedlens's own, on a machine that computes on its CPU."""
    return bool(_active.value) and jax.default_backend() == "cpu"


def cpu_options() -> dict[str, Any]:
    """How a program for clients is compiled for CPU. What the user's `XLA_FLAGS` say of an option stays as they say it.

    Vectors are as long as the processor has them: XLA stops at 256 bits, as processors slowed down once on longer ones.
    With 512, W4 takes a tenth less time.

    A device computes on one core: XLA would divide elementwise operations among all cores, and a device's update of
    some weights then waits for a core that trains another device's clients. W2 took 28 to 33 ms a round so, and takes
    24 to 26.
    """
    options = {"xla_cpu_prefer_vector_width": 512, "xla_disable_hlo_passes": "cpu-parallel-task-assigner"}
    chosen = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in chosen}


def register(
    primitive: Any,
    function: Callable[..., Any],
    applies: Callable[[Sequence[Any], dict[str, Any]], bool],
) -> bool:
    """Puts a rule in front of a primitive's own for CPU, once per process; doing it again changes nothing.

    Args:
      primitive: a primitive, with one result or several.
      function: what to trace in its place: `function(*operands, **parameters)` gives the result, or a list of them.
      applies: whether it computes the operation: `applies(abstract operands and result, parameters)`.

    Returns:
      Whether the rule is registered. It is not when this version of JAX does not show the rule that it would replace;
      then the operation stays as XLA has it, right and slow.
    """
    with _registering:
        registered = _registered_rule(primitive)
        if registered is None:
            return False
        if not isinstance(registered, _FastRule):
            fast = mlir.lower_fun(function, multiple_results=primitive.multiple_results)
            mlir.register_lowering(primitive, _FastRule(registered, fast, applies), platform="cpu")
        return True


def is_spread(sharding: Any) -> bool:
    """Whether a sharding names a mesh axis; under shard_map JAX gives one that names none."""
    return sharding is not None and any(axis is not None for axis in sharding.spec)


def _registered_rule(primitive: Any) -> _Rule | None:
    # The private names of JAX that fedlens uses: the rule in use cannot be asked for in any other way, and outside
    # fedlens's programs it must stay in use. An entry was the rule itself before JAX 0.7, and wraps it since.
    try:
        entry = mlir._platform_specific_lowerings["cpu"].get(primitive) or mlir._lowerings[primitive]
    except (AttributeError, KeyError, TypeError):
        return None
    rule = getattr(cast(Any, entry), "rule", entry)
    return cast(_Rule, rule) if callable(rule) else None


class _FastRule:
    """A lowering rule: the fast form where asked for and possible, else the rule that was registered before."""

    def __init__(self, otherwise: _Rule, fast: _Rule, applies: Callable[[Sequence[Any], dict[str, Any]], bool]) -> None:
        self._otherwise = otherwise
        self._fast = fast
        self._applies = applies

    def __call__(self, context: mlir.LoweringRuleContext, *operands: Any, **parameters: Any) -> Sequence[Any]:
        if _active.value and self._applies((*context.avals_in, *context.avals_out), parameters):
            return self._fast(context, *operands, **parameters)
        return self._otherwise(context, *operands, **parameters)
