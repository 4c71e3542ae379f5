"""A whole run: the loop over rounds with capture, checkpoints, progress and resume.

`run` is the loop that everybody would otherwise write around `process.next`. With a ledger, every client's local model
of every round is written while the next clients compute, and an interrupted run continues with `resume` from its last
committed round, to the same bits that an uninterrupted one gives.
"""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlens import trees
from fedlens.data import FederatedData
from fedlens.errors import ConfigError, LedgerError
from fedlens.language.types import leaf_paths
from fedlens.learning import LearningProcess, LocalModels, build_fed_eval
from fedlens.ledger import ClientPart, Keep, Ledger, LedgerWriter
from fedlens.report.progress import ProgressDisplay, RoundReport
from fedlens.runtime import stage_log

_STUDY = "study"  # where in a ledger's config the arguments of `run` stand


@dataclass(frozen=True)
class Run:
    """What a finished run leaves in memory.

    Attributes:
      state: the server's state after the last round; `state.weights` is the global model.
      history: the metrics of each round, those of the rounds before a resume included, unless they were removed.
      ledger: what was captured; None without a ledger.
    """

    state: Any
    history: list[dict[str, float]]
    ledger: Ledger | None


def run(
    process: LearningProcess,
    data: FederatedData,
    *,
    rounds: int,
    ledger: str | os.PathLike[str] | None = None,
    encodings: str | Mapping[str, str] | None = None,
    keep: Keep | None = None,
    seed: int = 0,
    clients_per_round: int | None = None,
    test: FederatedData | None = None,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
    on_round: Callable[[RoundReport], None] | None = None,
) -> Run:
    """Runs a learning process for some rounds.

    Example:
      >>> train, test = fed.data.digits().split(0.2)
      >>> finished = fed.run(process, train, rounds=20, test=test, ledger="runs/digits")
      >>> finished.ledger.round(12)["form-03"].weights

    Args:
      process: the algorithm; whether it hands out local models does not matter here.
      data: the clients' data.
      rounds: how many rounds, at least 1.
      ledger: a new folder that takes every client's local model of every round; None captures nothing.
      encodings: how local models are stored: "raw", "bf16-delta" or "int8-delta", for all leaves or by pattern of leaf
        names, such as `{"dense*": "int8-delta"}`; None is raw, which is bit-exact.
      keep: whose local models are stored, see `fed.Keep`; None is everybody's. Statistics are always recorded.
      seed: everything random follows from it: initial weights, who takes part, shuffling, dropout.
      clients_per_round: how many clients to draw for each round; None takes all.
      test: held-out data on which the global model is evaluated after every round (`test_loss`, ...).
      config: what else to keep in the ledger about the run, as JSON has it.
      progress: whether to show progress, on standard error.
      on_round: called after every round.

    Returns:
      The last state, the metrics by round, and the ledger.

    Raises:
      ConfigError: `rounds` is below 1, an argument is no integer, `config` has the key "study", under which the
        ledger keeps these arguments, the process does not know its model and there is test data, `keep` names a
        client that there is not, or there are `encodings` or `keep` without a ledger.
      DisclosureError: there is a ledger, and a secure sum or differential privacy protects the local models.
      DataError: `clients_per_round` is more than there are.
      LedgerError: the ledger exists already, or cannot be written.
    """
    plan = _Plan.of(rounds, seed, clients_per_round)
    if config is not None and _STUDY in config:
        raise ConfigError(f"Expected a config without the key {_STUDY!r}, which fed.run fills, found one. Rename it.")
    if ledger is None and (encodings is not None or keep is not None):
        raise ConfigError("Expected a ledger for encodings and keep, which say what goes into it, found none.")
    _check_keep(keep, data)
    # What does not fit is refused before a ledger exists.
    _check_evaluable(process, test)
    process.check(data.cohort(0, clients_per_round=clients_per_round, seed=seed))
    state = process.initialize(seed)
    if ledger is None:
        return _Study(process, data, plan, test, None, progress, on_round).go(state, [])
    kept = {_STUDY: plan.as_config(), **(config or {})}
    weights = trees.map(np.asarray, process.get_model_weights(state))
    capturing = process.with_local_models()
    policy = None if capturing.capture is None else capturing.capture.policy
    with LedgerWriter.create(
        ledger, weights=weights, config=kept, rounds=plan.rounds, encodings=encodings, keep=keep, policy=policy
    ) as writer:
        finished = _Study(capturing, data, plan, test, writer, progress, on_round).go(state, [])
    return Run(finished.state, finished.history, Ledger(ledger))


def resume(
    process: LearningProcess,
    data: FederatedData,
    *,
    ledger: str | os.PathLike[str],
    test: FederatedData | None = None,
    progress: bool = True,
    on_round: Callable[[RoundReport], None] | None = None,
) -> Run:
    """Continues an interrupted run from the last round that its ledger committed.

    Rounds, seed and clients per round come from the ledger. With the process, data and test data that the run was
    started with, the results are those of a run that was not interrupted, bit for bit.

    Args:
      process: the algorithm of the run.
      data: its data.
      ledger: its ledger; a finished one is returned as it is.
      test: its held-out data.
      progress: whether to show progress, on standard error.
      on_round: called after every round.

    Raises:
      ConfigError: the process does not know its model, and there is test data.
      LedgerError: the ledger cannot be read or written, was not made by `run`, or holds the state of another process.
    """
    _check_evaluable(process, test)
    with LedgerWriter.open(ledger) as writer:
        so_far = Ledger(ledger)
        plan = _Plan.from_config(so_far.config, ledger)
        state = process.initialize(plan.seed)
        history = [{name: value for name, value in row.items() if name != "round"} for row in so_far.metrics()]
        first = 0
        if writer.last_round is not None:
            state = _restored(state, writer.checkpoint(), ledger)
            first = writer.last_round + 1
        finished = _Study(process, data, plan, test, writer, progress, on_round).go(state, history, first)
    return Run(finished.state, finished.history, Ledger(ledger))


def _check_keep(keep: Keep | None, data: FederatedData) -> None:
    if keep is None or keep.clients is None or isinstance(keep.clients, str):
        return
    known = set(data.ids)
    unknown = next((client for client in keep.clients if client not in known), None)
    if unknown is not None:
        raise ConfigError(
            f"Expected clients of the data to be kept, found {unknown!r}. "
            "Correct the list, or give a pattern in its place, such as 'form-*'."
        )


def _check_evaluable(process: LearningProcess, test: FederatedData | None) -> None:
    if test is not None and process.model is None:
        raise ConfigError(
            "Expected a process that knows its model, to evaluate it on the test data, found none. "
            "Give fed.learning.from_computations the model, or leave out test."
        )


@dataclass(frozen=True)
class _Plan:
    """The arguments of `run` that resuming needs."""

    rounds: int
    seed: int
    clients_per_round: int | None

    @classmethod
    def of(cls, rounds: int, seed: int, clients_per_round: int | None) -> _Plan:
        try:  # NumPy's integers become Python's, which JSON has
            clients = None if clients_per_round is None else operator.index(clients_per_round)
            plan = cls(operator.index(rounds), operator.index(seed), clients)
        except TypeError:
            raise ConfigError(
                "Expected integers as rounds, seed and clients_per_round, "
                f"found {rounds!r}, {seed!r} and {clients_per_round!r}."
            ) from None
        if plan.rounds < 1:
            raise ConfigError(f"Expected at least 1 round, found {rounds}.")
        return plan

    def as_config(self) -> dict[str, int | None]:
        return {"rounds": self.rounds, "seed": self.seed, "clients_per_round": self.clients_per_round}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], ledger: str | os.PathLike[str]) -> _Plan:
        found, where = config.get(_STUDY), os.fspath(ledger)
        try:
            return cls.of(found["rounds"], found["seed"], found["clients_per_round"])  # type: ignore[index]
        except (KeyError, TypeError):
            raise LedgerError(
                f"Expected a ledger that fed.run started, found one without {_STUDY!r} in its config, in {where}."
            ) from None
        except ConfigError as error:
            raise LedgerError(
                f"{error} In {_STUDY!r} of the config, in {where}. The file was changed: restore it from a copy."
            ) from None


class _Study:
    """The loop over rounds."""

    def __init__(
        self,
        process: LearningProcess,
        data: FederatedData,
        plan: _Plan,
        test: FederatedData | None,
        writer: LedgerWriter | None,
        progress: bool,
        on_round: Callable[[RoundReport], None] | None,
    ):
        self._process = process.with_local_models() if writer is not None else process
        self._data = data
        self._plan = plan
        self._evaluate = None if test is None or process.model is None else build_fed_eval(process.model)
        self._test = None if test is None else test.cohort(0)
        self._writer = writer
        self._progress = progress
        self._on_round = on_round

    def go(self, state: Any, history: list[dict[str, float]], first: int = 0) -> Run:
        """Runs the rounds from `first` on; `history` is of those before, as far as the ledger still has them."""
        with ProgressDisplay(self._plan.rounds, first, enabled=self._progress) as display:
            for number in range(first, self._plan.rounds):
                started = time.perf_counter()
                cohort = self._data.cohort(number, clients_per_round=self._plan.clients_per_round, seed=self._plan.seed)
                if self._writer is None:
                    state, metrics, *_ = self._process.next(state, cohort)
                    dropped: tuple[str, ...] = ()
                else:
                    weights = trees.leaves(self._process.get_model_weights(state))
                    self._writer.begin(number, [np.asarray(leaf) for leaf in weights])
                    state, metrics, dropped = self._process.next(state, cohort, sink=_Capture(self._writer))
                if self._evaluate is not None and self._test is not None:
                    measured = self._evaluate(self._process.get_model_weights(state), self._test).metrics
                    metrics |= {f"test_{name}": value for name, value in measured.items() if name != "num_examples"}
                if self._writer is not None:
                    facts = {"round": number, "clients": len(cohort)}
                    with stage_log.timed("ledger", facts.copy), stage_log.phase("writing"):
                        checkpoint = {path: np.asarray(leaf) for path, leaf in trees.items(state)}
                        self._writer.commit(metrics, checkpoint, dropped)
                history.append(metrics)
                report = RoundReport(number, self._plan.rounds, len(cohort), time.perf_counter() - started, metrics)
                display.round_done(report)
                if self._on_round is not None:
                    self._on_round(report)
        return Run(state, history, None)


class _Capture:
    """Hands the local models of a round to the ledger, chunk by chunk: the arrays as they were computed, uncopied."""

    def __init__(self, writer: LedgerWriter):
        self._writer = writer
        self._clients = 0

    def __call__(self, local_models: LocalModels) -> None:
        values = local_models.values
        place = {path: position for position, path in enumerate(leaf_paths(values.type))}
        weights = [position for path, position in place.items() if path.split("/")[0] == "weights"]
        measured = {
            path.removeprefix("metrics/"): position for path, position in place.items() if path.startswith("metrics/")
        }
        parts = [
            ClientPart(
                ids=tuple(values.ids[position] for position in part.positions),
                positions=self._clients + part.positions,
                weights=[part.leaves[position] for position in weights],
                num_examples=part.leaves[place["num_examples"]],
                metrics={name: part.leaves[position] for name, position in sorted(measured.items())},
            )
            for part in values.parts
        ]
        self._clients += len(values.ids)
        self._writer.add(parts)


def _restored(template: Any, checkpoint: Mapping[str, np.ndarray], ledger: str | os.PathLike[str]) -> Any:
    """The state of a checkpoint, in the containers of `template`."""
    expected = {path: (np.shape(leaf), np.asarray(leaf).dtype) for path, leaf in trees.items(template)}
    found = {path: (leaf.shape, leaf.dtype) for path, leaf in checkpoint.items()}
    if expected != found:
        wrong = next(path for path in sorted(expected.keys() | found.keys()) if expected.get(path) != found.get(path))
        raise LedgerError(
            f"Expected the state of the process that the run was started with, found another leaf {wrong!r}: "
            f"{found.get(wrong, 'none')} instead of {expected.get(wrong, 'none')}, in {os.fspath(ledger)}."
        )
    paths = iter([path for path, _ in trees.items(template)])
    return trees.map(lambda _: checkpoint[next(paths)], template)
