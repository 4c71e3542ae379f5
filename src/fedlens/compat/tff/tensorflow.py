"""`tff.tensorflow`; TensorFlow itself is imported when a computation is made."""

from fedlens.compat.tff.computations import tf_computation as computation

__all__ = ["computation"]
