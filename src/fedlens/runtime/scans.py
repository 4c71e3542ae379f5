"""Loops over time lowered for CPU with less in them: a rule for `lax.scan`, for recurrent layers and their gradients.

XLA:CPU computes a body step by step as it stands. `scan_plan` says which products need not wait for the step before,
`scan_outside` computes them for all steps at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core.primitives import scan_p
from jaxtyping import Array, Shaped

from fedlens.runtime.lowering import is_spread, register
from fedlens.runtime.scan_body import Body, read
from fedlens.runtime.scan_outside import rewritten
from fedlens.runtime.scan_plan import Plan, plan


def install() -> bool:
    """Registers the rule for `lax.scan_p`; see `scan_plan` for the loops that it changes.

    Example:
      >>> scans.install()
      True
      >>> def gram(x, y):  # the sum over steps of x.T @ y, as the gradient of a kernel is
      ...     return lax.scan(lambda total, at: (total + at[0].T @ at[1], ()), jnp.zeros((8, 8)), (x, y))[0]
      >>> x = jnp.ones((5, 2, 8))
      >>> with lowered_for_cpu():
      ...     text = jax.jit(gram).lower(x, x).as_text()
      >>> "contracting_dims = [0, 2] x [0, 1]" in text  # of time and rows: one product over all steps
      True

    Returns:
      Whether it is registered; see `lowering.register`.
    """
    return register(scan_p, _scan, _changes)


def _planned(parameters: dict[str, Any]) -> tuple[Body, Plan] | None:
    """The body of a scan and what to take out of it; None if it stays as it is."""
    closed = parameters["jaxpr"]
    if closed.effects or parameters["unroll"] < 1:
        return None
    body = read(parameters)
    chosen = plan(body, parameters["length"]) if body is not None else None
    return None if body is None or chosen is None else (body, chosen)


def _changes(arrays: Sequence[Any], parameters: dict[str, Any]) -> bool:
    """Whether the rule has anything to do: not for symbolic shapes, nor for arrays spread by explicit sharding."""
    sizes = [size for array in arrays for size in getattr(array, "shape", ())]
    if not all(isinstance(size, int) for size in (*sizes, parameters["length"])):
        return False
    if any(is_spread(getattr(array, "sharding", None)) for array in arrays):
        return False
    return _planned(parameters) is not None


def _scan(*operands: Shaped[Array, "..."], **parameters: Any) -> list[Shaped[Array, "..."]]:
    planned = _planned(parameters)
    if planned is None:
        raise ValueError("Expected a loop that has products to take out, found none.")
    settings = {name: parameters[name] for name in ("length", "reverse", "unroll")}
    return rewritten(*planned, operands, **settings)
