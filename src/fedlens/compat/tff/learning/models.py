"""`tff.learning.models`: a model as weights and functions, which here are functions of JAX.

TFF's losses and metrics speak of a whole batch; fedlens measures each example, so that rows which only fill up a batch
count for nothing. A loss of TFF is taken example by example, and what is built from it is right if the loss of a batch
is the mean of the losses of its examples: that is tried out on two rows when a model is built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np

from fedlens.compat.tff.absent import refusing
from fedlens.compat.tff.types import to_type
from fedlens.errors import StructureError, UnsupportedError
from fedlens.language.types import type_of
from fedlens.learning.metrics import EXAMPLES, LOSS, Metric
from fedlens.learning.models import INPUT, TARGET, Model

__getattr__ = refusing(__name__)

_NARROW = {np.dtype(np.int64): np.int32, np.dtype(np.uint64): np.uint32}


class ModelWeights(NamedTuple):
    """The weights of a model: those that training changes, and those that it does not."""

    trainable: Any
    non_trainable: Any = ()


class BatchOutput(NamedTuple):
    """What a forward pass gives: the mean loss of a batch, what the model says, and how many examples there are."""

    loss: Any = None
    predictions: Any = None
    num_examples: Any = None


@dataclass(frozen=True)
class FunctionalModel:
    """`tff.learning.models.FunctionalModel`, of JAX functions.

    Example:
      >>> model = tff.learning.models.FunctionalModel(
      ...     initial_weights=((np.zeros((64, 10), np.float32), np.zeros(10, np.float32)), ()),
      ...     predict_on_batch_fn=lambda weights, x, training: x @ weights[0][0] + weights[0][1],
      ...     loss_fn=lambda output, label, sample_weight=None: optax.softmax_cross_entropy_with_integer_labels(
      ...         output, label).mean(),
      ...     input_spec=(tff.TensorType(np.float32, [None, 64]), tff.TensorType(np.int32, [None])))

    Attributes:
      initial_weights: `(trainable, non_trainable)`.
      forward_pass_fn: before TFF 0.76: `forward_pass_fn(weights, batch, training)` gives a `BatchOutput`.
      predict_on_batch_fn: `predict_on_batch_fn(weights, x, training)` gives predictions, a row for each example.
      input_spec: what a batch holds: `(x, y)` or a mapping with the fields `x` and `y`, of arrays [None, ...].
      loss_fn: `loss_fn(output, label, sample_weight)`, the mean loss of a batch; in place of `forward_pass_fn`.
      metrics_fns: `initialize()`, `update(state, labels, batch_output, sample_weight)`, `finalize(state)`; each metric
        has to be a mean over examples.
    """

    initial_weights: tuple[Any, Any]
    forward_pass_fn: Callable[[Any, Any, bool], BatchOutput] | None = None
    predict_on_batch_fn: Callable[[Any, Any, bool], Any] | None = None
    input_spec: Any = None
    loss_fn: Callable[..., Any] | None = None
    metrics_fns: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]] | None = None

    def predict_on_batch(self, model_weights: Any, x: Any, training: bool = True) -> Any:
        """What the model says about a batch."""
        if self.predict_on_batch_fn is None:
            raise StructureError("Expected a model with predict_on_batch_fn, found none.")
        return self.predict_on_batch_fn(model_weights, x, training)


@dataclass(frozen=True)
class SplitModel:
    """A model of fedlens and the weights that training leaves alone.

    Attributes:
      model: its weights are the trainable ones.
      non_trainable: the others, as they were given.
    """

    model: Model
    non_trainable: Any = ()


def as_model(model_fn: Any) -> SplitModel:
    """The model that a `model_fn` of TFF stands for.

    Args:
      model_fn: a `FunctionalModel`, a `fed.Model`, or a function without arguments that gives one of them.

    Raises:
      StructureError: batches that are not of one `x` and one `y`, or a loss that is no mean over examples.
      UnsupportedError: a model of TensorFlow's or Keras's variables; a metric that is no mean over examples.
    """
    if isinstance(model_fn, Model):
        return SplitModel(model_fn)
    if isinstance(model_fn, FunctionalModel):
        return SplitModel(_from_functional(model_fn), model_fn.initial_weights[1])
    if hasattr(model_fn, "trainable_variables") or not callable(model_fn):
        raise UnsupportedError(
            f"Expected a fed.Model or a tff.learning.models.FunctionalModel of JAX functions, found "
            f"{type(model_fn).__name__}. Write its forward pass in JAX (fed.models.from_flax, "
            "fed.models.from_functions), or train it in a tff.tf_computation of your own."
        )
    return as_model(model_fn())


def weights_type_from_model(model: Any) -> fl.Type:
    """The type of a model's `ModelWeights`; the model as `as_model` takes it."""
    split = as_model(model)
    weights = jax.eval_shape(split.model.init, jax.random.key(0))
    return type_of(ModelWeights(weights, split.non_trainable))


@dataclass(frozen=True)
class _ForwardPass:
    """A forward pass that waits for its targets: what `Model.apply` gives for a model with `forward_pass_fn`."""

    weights: Any
    x: Any
    training: bool


def _from_functional(model: FunctionalModel) -> Model:
    inputs = _examples_type(model.input_spec)
    if model.forward_pass_fn is not None and model.loss_fn is None:
        return _from_forward_pass(model, model.forward_pass_fn, inputs)
    if model.forward_pass_fn is None and model.loss_fn is not None:
        return _from_loss(model, model.loss_fn, inputs)
    raise StructureError("Expected a FunctionalModel with one of loss_fn and forward_pass_fn, found both or none.")


def _from_loss(model: FunctionalModel, loss_fn: Callable[..., Any], inputs: fl.StructType) -> Model:
    def apply(weights: Any, x: Any, key: Any) -> Any:
        return model.predict_on_batch((weights, model.initial_weights[1]), x, key is not None)

    loss = _without_weight(loss_fn, 2)
    built = Model(inputs, _initializer(model), apply, _by_example(loss))
    _check_mean(LOSS, built, loss, built.loss)
    return built if model.metrics_fns is None else replace(built, metrics=_metrics(model.metrics_fns, built))


def _from_forward_pass(
    model: FunctionalModel, forward_pass: Callable[[Any, Any, bool], BatchOutput], inputs: fl.StructType
) -> Model:
    by_name = isinstance(model.input_spec, Mapping)

    def begin(weights: Any, x: Any, key: Any) -> Any:
        return _ForwardPass((weights, model.initial_weights[1]), x, key is not None)

    def finish(begun: _ForwardPass, y: Any) -> Any:
        batch = {INPUT: begun.x, TARGET: y} if by_name else (begun.x, y)
        return forward_pass(begun.weights, batch, begun.training).loss

    def finish_by_example(begun: Any, y: Any) -> Any:
        def of_row(x: Any, y: Any) -> Any:
            return finish(_ForwardPass(begun.weights, x[None], begun.training), y[None])

        return jax.vmap(of_row)(begun.x, y)

    built = Model(inputs, _initializer(model), begin, finish_by_example)
    _check_mean(LOSS, built, finish, finish_by_example)
    return built


def _initializer(model: FunctionalModel) -> Callable[[Any], Any]:
    return lambda key: jax.tree.map(jnp.asarray, model.initial_weights[0])


def _examples_type(input_spec: Any) -> fl.StructType:
    """The type of one example of batches [None, ...]; integers of 64 bits become ones of 32, as in JAX."""
    type_ = to_type(input_spec)
    fields = list(type_.items()) if isinstance(type_, fl.StructType) else []
    names = [name for name, _ in fields]
    if names not in ([None, None], [INPUT, TARGET]) or not all(
        isinstance(field, fl.TensorType) and field.shape and None not in field.shape[1:] for _, field in fields
    ):
        raise StructureError(
            f"Expected an input_spec (x, y) or with the fields {INPUT!r} and {TARGET!r}, of one array each whose "
            f"first dimension counts examples and whose others are known, found {type_}."
        )
    examples = [fl.TensorType(_NARROW.get(field.dtype, field.dtype.type), field.shape[1:]) for _, field in fields]
    return fl.StructWithPythonType(list(zip((INPUT, TARGET), examples, strict=True)), dict)


def _without_weight(function: Callable[..., Any], places: int) -> Callable[..., Any]:
    """`function` of its first arguments; where it insists on TFF's sample weight it gets None."""
    parameters = list(inspect.signature(function).parameters.values())
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [each for each in parameters if each.default is each.empty and each.kind in by_position]
    return lambda *args: function(*args, *[None] * (len(required) - places))


def _by_example(of_batch: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The value of each example, from a function of a batch's outputs and targets."""

    def of_row(outputs: Any, target: Any) -> Any:
        return of_batch(jax.tree.map(lambda leaf: leaf[None], outputs), target[None])

    return jax.vmap(of_row)


def _metrics(metrics_fns: tuple[Callable[..., Any], ...], model: Model) -> tuple[Metric, ...]:
    initialize, update, finalize = metrics_fns
    updated = _without_weight(update, 3)

    def of_batch(outputs: Any, targets: Any) -> Mapping[str, Any]:
        rows = targets.shape[0]
        losses = model.loss(outputs, targets)
        return finalize(updated(initialize(), targets, BatchOutput(losses.mean(), outputs, rows)))

    x, y = _two_rows(model.inputs)
    outputs = jax.eval_shape(lambda: model.apply(model.init(jax.random.key(0)), x, None))
    names = [name for name in jax.eval_shape(of_batch, outputs, y) if name not in (LOSS, EXAMPLES)]
    metrics = []
    for name in names:

        def named(outputs: Any, targets: Any, name: str = name) -> Any:
            return of_batch(outputs, targets)[name]

        metric = Metric(name, _by_example(named))
        _check_mean(name, model, named, metric.measure)
        metrics.append(metric)
    return tuple(metrics)


def _check_mean(
    name: str, model: Model, of_batch: Callable[[Any, Any], Any], by_example: Callable[[Any, Any], Any]
) -> None:
    """Checks on two rows that the value of a batch is the mean of the values of its examples."""
    x, y = _two_rows(model.inputs)
    outputs = model.apply(model.init(jax.random.key(0)), x, None)
    whole, rows = np.asarray(of_batch(outputs, y)), np.asarray(by_example(outputs, y))
    if whole.shape == () and np.allclose(whole, rows.mean(), rtol=1e-3, atol=1e-6, equal_nan=True):
        return
    found = f"an array {list(whole.shape)}" if whole.shape else f"{whole} where the examples alone give {rows}"
    raise UnsupportedError(
        f"Expected {name!r} of a batch to be the mean over its examples, found {found}. Take the mean in it; what is "
        "no mean over examples can be computed from the local models (process.with_local_models())."
    )


def _two_rows(inputs: fl.StructType) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)

    def rows(type_: fl.TensorType) -> np.ndarray:
        shape = (2, *type_.shape)
        is_float = np.issubdtype(type_.dtype, np.inexact)
        return rng.normal(size=shape).astype(type_.dtype) if is_float else np.zeros(shape, type_.dtype)

    return rows(inputs[INPUT]), rows(inputs[TARGET])
