"""`tff.learning.algorithms`: TFF's algorithms, carried out by those of `fedlens.learning`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from fedlens import learning
from fedlens.compat.tff.absent import refusing
from fedlens.compat.tff.client_data import client_batches
from fedlens.compat.tff.learning.models import ModelWeights, as_model
from fedlens.compat.tff.learning.optimizers import as_optax
from fedlens.compat.tff.learning.templates import LearningAlgorithmState, LearningProcess, LearningProcessOutput
from fedlens.compat.tff.learning.training import BATCHES, TrainingProcess, get_model_weights, set_model_weights
from fedlens.compat.tff.learning.weighting import ClientWeighting
from fedlens.compat.tff.values import AttributeDict
from fedlens.errors import UnsupportedError
from fedlens.learning.aggregators import Aggregator, mean, weighted_mean
from fedlens.learning.metrics import EXAMPLES

__getattr__ = refusing(__name__)


def build_weighted_fed_avg(
    model_fn: Any,
    client_optimizer_fn: Any,
    server_optimizer_fn: Any = None,
    *,
    client_weighting: ClientWeighting | None = ClientWeighting.NUM_EXAMPLES,
    model_aggregator: Aggregator | None = None,
) -> TrainingProcess:
    """Federated averaging, each client weighted by its number of examples.

    Args:
      model_fn: a `FunctionalModel` or `fed.Model`, or a function that gives one.
      client_optimizer_fn: an optimizer of `tff.learning.optimizers` or optax, or a function that gives one.
      server_optimizer_fn: the server's; SGD with learning rate 1, which is plain averaging, by default.
      client_weighting: by number of examples, or each client that has examples the same.
      model_aggregator: how updates become one: of `tff.aggregators`, or any aggregator of fedlens.

    Returns:
      A learning process. A client whose update is not finite counts for nothing, as in TFF.

    Raises:
      UnsupportedError: a model or an optimizer that has no counterpart here; the message says what to use.
    """
    aggregator = model_aggregator or _mean_by(client_weighting)
    return _training(learning.build_weighted_fed_avg, model_fn, client_optimizer_fn, server_optimizer_fn, aggregator)


def build_unweighted_fed_avg(
    model_fn: Any,
    client_optimizer_fn: Any,
    server_optimizer_fn: Any = None,
    *,
    model_aggregator: Aggregator | None = None,
) -> TrainingProcess:
    """Federated averaging in which every client that has examples counts the same; see `build_weighted_fed_avg`."""
    return build_weighted_fed_avg(
        model_fn,
        client_optimizer_fn,
        server_optimizer_fn,
        client_weighting=ClientWeighting.UNIFORM,
        model_aggregator=model_aggregator,
    )


def build_weighted_fed_prox(
    model_fn: Any,
    proximal_strength: float,
    client_optimizer_fn: Any,
    server_optimizer_fn: Any = None,
    *,
    client_weighting: ClientWeighting | None = ClientWeighting.NUM_EXAMPLES,
    model_aggregator: Aggregator | None = None,
) -> TrainingProcess:
    """FedProx (`fed.learning.build_weighted_fed_prox`): clients are held near the global model.

    Args:
      model_fn: as in `build_weighted_fed_avg`, like the other arguments but the next.
      proximal_strength: mu, at least 0.
      client_optimizer_fn: the clients' optimizer.
      server_optimizer_fn: the server's.
      client_weighting: how much a client counts.
      model_aggregator: how updates become one.

    Raises:
      ConfigError: `proximal_strength` is negative.
      UnsupportedError: as for `build_weighted_fed_avg`.
    """
    aggregator = model_aggregator or _mean_by(client_weighting)
    build = functools.partial(learning.build_weighted_fed_prox, proximal_strength=proximal_strength)
    return _training(build, model_fn, client_optimizer_fn, server_optimizer_fn, aggregator)


def build_unweighted_fed_prox(
    model_fn: Any,
    proximal_strength: float,
    client_optimizer_fn: Any,
    server_optimizer_fn: Any = None,
    *,
    model_aggregator: Aggregator | None = None,
) -> TrainingProcess:
    """FedProx in which every client that has examples counts the same; see `build_weighted_fed_prox`."""
    return build_weighted_fed_prox(
        model_fn,
        proximal_strength,
        client_optimizer_fn,
        server_optimizer_fn,
        client_weighting=ClientWeighting.UNIFORM,
        model_aggregator=model_aggregator,
    )


def build_fed_eval(model_fn: Any) -> LearningProcess:
    """Evaluation of a model on the clients' data, as a learning process whose weights stay as they are.

    Example:
      >>> evaluation = tff.learning.algorithms.build_fed_eval(model_fn)
      >>> state = evaluation.set_model_weights(evaluation.initialize(), training.get_model_weights(training_state))
      >>> evaluation.next(state, test_data).metrics["client_work"]["eval"]["current_round_metrics"]

    Args:
      model_fn: as for `build_weighted_fed_avg`.

    Returns:
      A learning process; `total_rounds_metrics` are the means over all rounds since `initialize`.
    """
    split = as_model(model_fn)
    evaluation = functools.cache(lambda batch_size: learning.build_fed_eval(split.model, batch_size=batch_size))

    def initialize() -> LearningAlgorithmState:
        weights = jax.jit(split.model.init)(jax.random.key(0))
        return LearningAlgorithmState(ModelWeights(weights, split.non_trainable), (), AttributeDict(), (), ())

    def next_round(state: LearningAlgorithmState, client_data: Any) -> LearningProcessOutput:
        batches = client_batches(client_data, split.model.inputs)
        measured = evaluation(batches.batch_size)(state.global_model_weights.trainable, batches.cohort).metrics
        current = AttributeDict(measured, **{BATCHES: batches.num_batches})
        total = _joined(state.client_work, current)
        found = AttributeDict(current_round_metrics=current, total_rounds_metrics=total)
        metrics = AttributeDict(distributor=(), client_work=AttributeDict(eval=found), aggregator=(), finalizer=())
        return LearningProcessOutput(state._replace(client_work=total), metrics)

    return LearningProcess(initialize, next_round, get_model_weights, set_model_weights)


def _mean_by(client_weighting: Any) -> Aggregator:
    if client_weighting not in (None, *ClientWeighting):
        raise UnsupportedError(
            f"Expected tff.learning.ClientWeighting.NUM_EXAMPLES or UNIFORM, found {client_weighting!r}. "
            "Write a weighting of your own as an aggregator: model_aggregator=lambda update, num_examples: ..."
        )
    return mean if client_weighting is ClientWeighting.UNIFORM else weighted_mean


def _training(
    algorithm: Callable[..., learning.LearningProcess],
    model_fn: Any,
    client_optimizer_fn: Any,
    server_optimizer_fn: Any,
    aggregator: Aggregator,
) -> TrainingProcess:
    split, client = as_model(model_fn), as_optax(client_optimizer_fn)
    server = None if server_optimizer_fn is None else as_optax(server_optimizer_fn)

    @functools.cache  # what is compiled for a batch size stays with its process
    def build(batch_size: int) -> learning.LearningProcess:
        return algorithm(
            split.model,
            client,
            server,
            batch_size=batch_size,
            shuffle=False,  # the program orders its own data
            aggregator=aggregator,
            on_nonfinite="drop",
        )

    return TrainingProcess(split, build)


def _joined(before: AttributeDict, current: AttributeDict) -> AttributeDict:
    """The metrics of several rounds: numbers are added up, means weighted by the examples that they are over."""
    if not before:
        return current
    counts = {name: before[name] + current[name] for name in (EXAMPLES, BATCHES)}
    parts = [part for part in (before, current) if part[EXAMPLES]]
    means = {
        name: sum(part[name] * part[EXAMPLES] for part in parts) / counts[EXAMPLES] if parts else current[name]
        for name in current
        if name not in counts
    }
    return AttributeDict({name: (means | counts)[name] for name in current})
