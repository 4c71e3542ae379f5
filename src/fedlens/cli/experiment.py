"""From a configuration to what `fed.run` takes: a learning process, data for training, and held-out data."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import optax

from fedlens import data, learning
from fedlens.cli.config import CNN, LSTM, Config, Perceptron, Shakespeare, Training
from fedlens.errors import ConfigError
from fedlens.learning import LearningProcess, architectures, losses, metrics, models


@dataclass(frozen=True, eq=False)
class Experiment:
    """What a configuration describes.

    Attributes:
      process: the algorithm with its model.
      train: what the clients train on.
      held_out: what they do not train on, of every client.
      evaluated: those clients of `held_out` on which the global model is evaluated after every round.
    """

    process: LearningProcess
    train: data.FederatedData
    held_out: data.FederatedData
    evaluated: data.FederatedData


def build(config: Config) -> Experiment:
    """Loads the data and builds the process of a configuration.

    Raises:
      ConfigError: there are fewer clients than the configuration asks for.
      DataError: the data cannot be loaded.
      UnsupportedError: a package that holds the data is not installed.
    """
    everything = load_data(config)
    _check_count("clients_per_round", config.clients_per_round, everything)
    _check_count("clients in [evaluation]", config.evaluation.clients, everything)
    train, held_out = everything.split(config.data.held_out, seed=config.data.held_out_seed)
    evaluated = held_out
    if config.evaluation.clients is not None:
        evaluated = held_out.sample(config.evaluation.clients, seed=config.data.held_out_seed)
    model = models.from_flax(
        network(config), inputs=everything.element_type, loss=losses.cross_entropy, metrics=[metrics.accuracy]
    )
    return Experiment(build_process(model, config.training), train, held_out, evaluated)


def load_data(config: Config) -> data.FederatedData:
    """The data set that a configuration names."""
    if isinstance(config.data, Shakespeare):
        return data.shakespeare(min_characters=config.data.min_characters, max_sequences=config.data.max_sequences)
    return data.digits()


def network(config: Config) -> nn.Module:
    """The architecture that a configuration names, in its sizes."""
    match config.model:
        case CNN(channels=channels, dense=dense):
            return architectures.DigitsCNN(tuple(channels), dense)
        case Perceptron(hidden=hidden):
            return architectures.MLP(tuple(hidden))
        case LSTM(embedding=embedding, units=units, layers=layers):
            return architectures.CharacterLSTM(len(data.SHAKESPEARE_VOCABULARY), embedding, units, layers)


def build_process(model: models.Model, training: Training) -> LearningProcess:
    """The algorithm that a configuration names."""
    optimizers = {"sgd": optax.sgd, "momentum": _momentum, "adam": optax.adam}
    algorithms = {
        "weighted_fed_avg": learning.build_weighted_fed_avg,
        "unweighted_fed_avg": learning.build_unweighted_fed_avg,
    }
    return algorithms[training.algorithm](
        model,
        optimizers[training.client_optimizer](training.client_learning_rate),
        optax.sgd(training.server_learning_rate),
        batch_size=training.batch_size,
        epochs=training.epochs,
        on_nonfinite=training.on_nonfinite,
    )


def _momentum(learning_rate: float) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, momentum=0.9)


def _check_count(key: str, count: int | None, everything: data.FederatedData) -> None:
    if count is not None and count > len(everything):
        raise ConfigError(f"Expected {key} of at most {len(everything)}, the clients that there are, found {count}.")
