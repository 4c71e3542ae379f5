"""`tff.jax`."""

from fedlens.compat.tff.computations import jax_computation as computation

__all__ = ["computation"]
