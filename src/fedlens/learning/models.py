"""A model as plain functions, and adapters that make one from a Flax module or from functions of your own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import federated_language as fl
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from fedlens import trees
from fedlens.errors import StructureError, UnsupportedError
from fedlens.language import type_of
from fedlens.learning import metrics as metrics_
from fedlens.learning.losses import Loss
from fedlens.learning.metrics import Metric

if TYPE_CHECKING:
    from fedlens.learning.recurrent import LSTM as LSTM

INPUT, TARGET = "x", "y"


def __getattr__(name: str) -> Any:
    if name == "LSTM":  # a Flax module; models that are no such modules do without Flax
        from fedlens.learning.recurrent import LSTM

        return LSTM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, eq=False)
class Model:
    """What learning needs to know of a model.

    Attributes:
      inputs: the type of one example: a struct with the fields `x` (what the model reads) and `y` (what it should say).
      init: `init(key) -> weights`, a pytree of arrays.
      apply: `apply(weights, x, key) -> outputs` on a batch; `key` is None when the model is evaluated, and a PRNG key
        for dropout and the like when it is trained.
      loss: `loss(outputs, y) -> losses`, one for each example.
      metrics: what else to measure.
    """

    inputs: fl.StructType
    init: Callable[[PRNGKeyArray], Any]
    apply: Callable[[Any, Array, PRNGKeyArray | None], Array]
    loss: Loss
    metrics: tuple[Metric, ...] = ()

    def measure(
        self, outputs: Array, targets: Array, mask: Bool[Array, " batch"]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The mean loss over a batch's examples, and the sums of all metrics over them."""
        losses = self.loss(outputs, targets)
        if jnp.shape(losses) != mask.shape:
            raise StructureError(
                f"Expected a loss for each of {mask.shape[0]} examples of a batch, found the shape "
                f"{jnp.shape(losses)}. Return one number an example; fedlens takes the mean."
            )
        mean = jnp.where(mask, losses, 0).sum() / jnp.maximum(mask.sum(), 1).astype(losses.dtype)
        return mean, metrics_.sums_of_batch(self.metrics, losses, outputs, targets, mask)


def from_functions(
    init: Callable[[PRNGKeyArray], Any],
    apply: Callable[..., Array],
    *,
    inputs: Any,
    loss: Loss,
    metrics: Sequence[Metric] = (),
) -> Model:
    """A model of plain functions.

    Example:
      >>> model = from_functions(
      ...     init=lambda key: {"w": 0.01 * jax.random.normal(key, (64, 10)), "b": jnp.zeros(10)},
      ...     apply=lambda weights, x: x @ weights["w"] + weights["b"],
      ...     inputs=data.element_type, loss=fed.losses.cross_entropy, metrics=[fed.metrics.accuracy])

    Args:
      init: `init(key) -> weights`.
      apply: `apply(weights, x)`, or `apply(weights, x, key)` for a model that is random in training; its key is None in
        evaluation.
      inputs: the type of one example with the fields `x` and `y`, or an example.
      loss: one loss for each example of a batch.
      metrics: what else to measure.

    Raises:
      StructureError: `inputs` has other fields than `x` and `y`, or they are no arrays; two metrics have one name.
    """
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes_key = sum(each.kind in by_position for each in inspect.signature(apply).parameters.values()) > 2

    def apply_with_key(weights: Any, x: Array, key: PRNGKeyArray | None) -> Array:
        return apply(weights, x, key) if takes_key else apply(weights, x)

    def init_in_order(key: PRNGKeyArray) -> Any:
        # JAX sorts the keys of a dict whenever it maps over one; start out that way, so that leaves keep one order.
        return jax.tree.map(jnp.asarray, init(key))

    return Model(_element_type(inputs), init_in_order, apply_with_key, loss, _named_once(metrics))


def from_flax(module: Any, *, inputs: Any, loss: Loss, metrics: Sequence[Metric] = ()) -> Model:
    """A model from a `flax.linen` module whose `__call__` takes a batch of `x`.

    A `train` or `training` argument of `__call__` is set to True in training and False in evaluation, `deterministic`
    the other way round; in training the module has a PRNG stream named "dropout".

    Args:
      module: the module; its only variables are parameters.
      inputs: the type of one example with the fields `x` and `y`, or an example.
      loss: one loss for each example of a batch.
      metrics: what else to measure.

    Raises:
      StructureError: as for `from_functions`, or `module` is not a linen module.
      UnsupportedError: the module keeps state besides its parameters, such as batch statistics.
    """
    try:
        import flax.linen as nn
    except ImportError as error:
        raise UnsupportedError("Expected the package flax, found none. Install it: pip install flax.") from error
    if not isinstance(module, nn.Module):
        raise StructureError(
            f"Expected a flax.linen module, found {type(module).__name__}. Use from_functions for other models."
        )
    element_type = _element_type(inputs)
    arguments = inspect.signature(type(module).__call__).parameters
    switches = {"train": True, "training": True, "deterministic": False}
    in_training = {name: value for name, value in switches.items() if name in arguments}
    in_evaluation = {name: not value for name, value in in_training.items()}

    def init(key: PRNGKeyArray) -> Any:
        x = element_type[INPUT]
        variables = module.init(key, jnp.zeros((1, *x.shape), x.dtype), **in_evaluation)
        extra = sorted(set(variables) - {"params"})
        if extra:
            raise UnsupportedError(
                f"Expected a module with parameters only, found the collection {extra[0]!r} as well. "
                "Replace layers that keep statistics (BatchNorm) by ones that do not (GroupNorm, LayerNorm)."
            )
        return variables.get("params", {})

    def apply(weights: Any, x: Array, key: PRNGKeyArray | None) -> Array:
        if key is None:
            return module.apply({"params": weights}, x, **in_evaluation)
        return module.apply({"params": weights}, x, rngs={"dropout": key}, **in_training)

    jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))  # a module that does not fit is refused here
    return from_functions(init, apply, inputs=element_type, loss=loss, metrics=metrics)


def _element_type(inputs: Any) -> fl.StructType:
    type_ = type_of(inputs)
    names = [name for name, _ in trees_fields(type_)]
    if sorted(map(str, names)) != [INPUT, TARGET]:
        raise StructureError(
            f"Expected examples with the fields {INPUT!r} and {TARGET!r}, found {', '.join(map(str, names)) or type_}. "
            "Pass inputs=data.element_type."
        )
    for name, field in type_.items():
        if not isinstance(field, fl.TensorType):
            raise StructureError(f"Expected one array an example in the field {name!r}, found {field}.")
    return type_


def trees_fields(type_: fl.Type) -> list[tuple[str | None, fl.Type]]:
    """The fields of a struct type; none of another type."""
    return list(type_.items()) if isinstance(type_, fl.StructType) else []


def _named_once(metrics: Sequence[Metric]) -> tuple[Metric, ...]:
    names = [metrics_.LOSS, metrics_.EXAMPLES, *(metric.name for metric in metrics)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise StructureError(
            f"Expected each metric under a name of its own, found {twice!r} twice. Name a metric anew."
        )
    return tuple(metrics)


def num_parameters(weights: Any) -> int:
    """The number of scalars in a model's weights."""
    return trees.size(weights)
