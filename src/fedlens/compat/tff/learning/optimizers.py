"""`tff.learning.optimizers`: TFF's optimizers in optax, with TFF's arguments, defaults and update rules.

TFF, like Keras, adds Adam's epsilon to the root of a second moment that is not yet corrected for its bias; optax adds
it after the correction. The two differ most in the first steps, so Adam's family is written out here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from optax import GradientTransformation as Optimizer

from fedlens.compat.tff.absent import refusing
from fedlens.errors import UnsupportedError

__getattr__ = refusing(__name__)


def build_sgdm(learning_rate: float = 0.01, momentum: float | None = None) -> Optimizer:
    """SGD: `w - learning_rate * v`, where `v = momentum * v + g`, or the gradient alone without momentum."""
    return optax.sgd(learning_rate, momentum=momentum)


def build_adam(learning_rate: float, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-7) -> Optimizer:
    """Adam (Kingma and Ba, ICLR 2015, arXiv:1412.6980), in the form that precedes its section 2.1."""
    return optax.chain(_by_moments(beta_1, beta_2, epsilon, 0.0, _second_moment), optax.scale(-learning_rate))


def build_adamw(
    learning_rate: float,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    weight_decay: float = 0.004,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019, arXiv:1711.05101)."""
    moments = _by_moments(beta_1, beta_2, epsilon, 0.0, _second_moment)
    return optax.chain(moments, optax.add_decayed_weights(weight_decay), optax.scale(-learning_rate))


def build_yogi(
    learning_rate: float,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-3,
    initial_preconditioner_value: float = 1e-6,
) -> Optimizer:
    """Yogi (Zaheer et al., NeurIPS 2018): Adam whose second moment moves by steps of the squared gradient."""
    moments = _by_moments(beta_1, beta_2, epsilon, initial_preconditioner_value, _yogi_moment)
    return optax.chain(moments, optax.scale(-learning_rate))


def build_adagrad(learning_rate: float, initial_preconditioner_value: float = 0.1, epsilon: float = 1e-7) -> Optimizer:
    """Adagrad (Duchi, Hazan and Singer, JMLR 2011): `g / sqrt(s + epsilon)`, where `s` adds up the squares."""
    return optax.adagrad(learning_rate, initial_preconditioner_value, epsilon)


def build_rmsprop(learning_rate: float, decay: float = 0.9, epsilon: float = 1e-7) -> Optimizer:
    """RMSprop (Tieleman and Hinton, 2012): `g / (sqrt(s) + epsilon)`, where `s` is the decaying mean of the squares."""
    return optax.rmsprop(learning_rate, decay, epsilon, eps_in_sqrt=False)


def as_optax(optimizer: Any) -> Optimizer:
    """What a `client_optimizer_fn` or `server_optimizer_fn` stands for.

    Args:
      optimizer: an optimizer of this module or any of optax; a function without arguments that gives one; or one of
        Keras's SGD and Adam, of which the hyperparameters are read.

    Raises:
      UnsupportedError: another optimizer, or a setting of a Keras optimizer that is not translated.
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    if hasattr(optimizer, "get_config"):
        return _from_keras(type(optimizer).__name__, optimizer.get_config())
    if callable(optimizer):
        return as_optax(optimizer())
    raise UnsupportedError(
        f"Expected an optimizer of tff.learning.optimizers or of optax, found {type(optimizer).__name__}."
    )


class _Moments(NamedTuple):
    step: Int[Array, ""]
    accumulator: Any
    preconditioner: Any


def _by_moments(
    beta_1: float,
    beta_2: float,
    epsilon: float,
    initial_preconditioner: float,
    moved: Callable[[Array, Array, float], Array],
) -> Optimizer:
    """Scales gradients by their moments; `moved(preconditioner, square, beta_2)` is the new second moment."""

    def init(weights: Any) -> _Moments:
        preconditioner = jax.tree.map(lambda leaf: jnp.full_like(leaf, initial_preconditioner), weights)
        return _Moments(jnp.int32(0), jax.tree.map(jnp.zeros_like, weights), preconditioner)

    def update(gradients: Any, state: _Moments, weights: Any = None) -> tuple[Any, _Moments]:
        step = state.step + 1
        accumulator = jax.tree.map(lambda mean, g: mean + (g - mean) * (1 - beta_1), state.accumulator, gradients)
        preconditioner = jax.tree.map(lambda old, g: moved(old, g * g, beta_2), state.preconditioner, gradients)
        rate = jnp.sqrt(1 - jnp.power(jnp.float32(beta_2), step)) / (1 - jnp.power(jnp.float32(beta_1), step))
        updates = jax.tree.map(
            lambda mean, scale: (rate * mean / (jnp.sqrt(scale) + epsilon)).astype(mean.dtype),
            accumulator,
            preconditioner,
        )
        return updates, _Moments(step, accumulator, preconditioner)

    return Optimizer(init, update)


def _second_moment(old: Array, square: Array, beta_2: float) -> Array:
    return old + (square - old) * (1 - beta_2)


def _yogi_moment(old: Array, square: Array, beta_2: float) -> Array:
    return old + (1 - beta_2) * jnp.sign(square - old) * square


_OF_KERAS = {  # class -> its settings that are translated, and to what; all others must be off
    "SGD": ({"learning_rate", "momentum", "nesterov"}, optax.sgd),
    "Adam": ({"learning_rate", "beta_1", "beta_2", "epsilon"}, build_adam),
}


def _from_keras(name: str, config: dict[str, Any]) -> Optimizer:
    if name not in _OF_KERAS:
        raise UnsupportedError(
            f"Expected one of the Keras optimizers {', '.join(_OF_KERAS)}, found {name}. "
            "Use one of tff.learning.optimizers or of optax."
        )
    known, build = _OF_KERAS[name]
    settings = {key: value for key, value in config.items() if key in known}
    about_the_loop = {"name", "is_legacy_optimizer", "jit_compile", "ema_momentum", "ema_overwrite_frequency"}
    left = [key for key in config if key not in known | about_the_loop and config[key]]
    if left or not isinstance(settings["learning_rate"], float | int):
        raise UnsupportedError(
            f"Expected a Keras {name} with {', '.join(sorted(known))} as plain numbers, "
            f"found {left[0] if left else 'a schedule of learning rates'}. Write the optimizer with optax."
        )
    return build(**settings)
