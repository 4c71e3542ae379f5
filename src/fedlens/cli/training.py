"""`fedlens run` and `fedlens resume`: train, then show what the clients learned."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from fedlens.cli.config import Config, check
from fedlens.errors import ConfigError, FedlensError, LedgerError
from fedlens.ledger import Ledger
from fedlens.ledger.folder import RUN
from fedlens.ledger.format import library_versions
from fedlens.report.consoles import messages, results

_EXPERIMENT = "experiment"  # where in a ledger's config the configuration stands
_RUNS = Path("runs")


def start(config: Config, ledger: Path | None) -> None:
    """Trains as `config` says, into a new ledger, and prints the results.

    Raises:
      LedgerError: the ledger exists already or cannot be written.
      FedlensError: the data cannot be loaded, a client went astray, or the run was interrupted.
    """
    _check_new(ledger)
    folder = ledger or _free_folder(config.name)
    _train(config, folder, resume_=False)


def resume(folder: Path) -> None:
    """Continues the run of a ledger that `start` made, and prints the results; those of a finished one at once.

    Raises:
      LedgerError: there is no ledger, it was started from Python, or somebody is writing it.
      FedlensError: as for `start`.
    """
    ledger = Ledger(folder)
    kept = ledger.config.get(_EXPERIMENT)
    if kept is None:
        raise LedgerError(
            f"Expected a ledger that `fedlens run` started, found one that was started from Python, in {folder}. "
            f'Continue it there, with the same process and data: fed.resume(process, data, ledger="{folder}").'
        )
    try:
        config = check(kept, f"the configuration in {folder}")
    except (ConfigError, TypeError) as error:
        raise LedgerError(f"{error} The ledger was changed, or made by another version of fedlens.") from None
    changed = [
        f"{name} {ledger.run.versions.get(name, 'none')} instead of {version}"
        for name, version in library_versions().items()
        if ledger.run.versions.get(name) != version
    ]
    if changed and ledger.state != "complete":
        messages().print(
            f"Note: the run began with {', '.join(changed)}; last digits may differ from an uninterrupted run."
        )
    _train(config, folder, resume_=True)


def _train(config: Config, folder: Path, *, resume_: bool) -> None:
    try:
        from fedlens import study
        from fedlens.cli.experiment import build
        from fedlens.runtime import use

        experiment = build(config)
        messages().print(
            f"{config.name}: {len(experiment.train)} clients, {experiment.train.num_examples:,} examples to train on, "
            f"{experiment.held_out.num_examples:,} held out. Ledger: {folder}"
        )
        with use("local", min_clients=config.min_clients):
            if resume_:
                finished = study.resume(experiment.process, experiment.train, ledger=folder, test=experiment.evaluated)
            else:
                finished = study.run(
                    experiment.process,
                    experiment.train,
                    rounds=config.rounds,
                    seed=config.seed,
                    clients_per_round=config.clients_per_round,
                    test=experiment.evaluated,
                    ledger=folder,
                    encodings=config.ledger.encoding,
                    keep=config.ledger.keep,
                    config={_EXPERIMENT: config.model_dump(mode="json", exclude_none=True)},
                )
        _report(experiment, finished.state.weights, Ledger(folder))
    except KeyboardInterrupt:
        raise FedlensError(_what_is_safe(folder)) from None


def _report(experiment: Any, weights: Any, ledger: Ledger) -> None:
    """Prints the table of clients and the paths, and draws the picture."""
    from fedlens.report.clients import compare_clients, last_local_models
    from fedlens.report.overview import save_overview
    from fedlens.report.tables import comparison_table

    local_models = last_local_models(ledger)
    if not local_models:
        results().print("No client is compared: the ledger keeps no whole local model.")
    rows = compare_clients(experiment.process.model, weights, local_models, experiment.held_out, experiment.evaluated)
    everybody = experiment.evaluated
    results().print(comparison_table(rows, len(ledger.clients), len(everybody), everybody.num_examples))
    results().print(f"Ledger:   {ledger.path}")
    if any(ledger.round(number).kept_ids for number in ledger.rounds):
        results().print(f"Overview: {save_overview(ledger)}")


def _check_new(folder: Path | None) -> None:
    """Refuses a folder that holds something, before the data are loaded."""
    if folder is None or not folder.exists():
        return
    if (folder / RUN).exists():
        raise LedgerError(
            f"Expected no ledger yet, found one, in {folder}. "
            f"Continue it with `fedlens resume {shlex.quote(str(folder))}`, or choose another folder."
        )
    if not folder.is_dir() or any(folder.iterdir()):
        raise LedgerError(f"Expected a new folder, found something else, at {folder}. Choose another folder.")


def _free_folder(name: str) -> Path:
    """The first of runs/name, runs/name-2, runs/name-3, ... that does not exist."""
    folder, number = _RUNS / name, 1
    while folder.exists():
        number += 1
        folder = _RUNS / f"{name}-{number}"
    return folder


def _what_is_safe(folder: Path) -> str:
    """After an interruption: which rounds are committed, and how to go on."""
    try:
        ledger = Ledger(folder)
        done, planned = max(ledger.rounds, default=-1) + 1, ledger.planned_rounds
    except LedgerError:
        return "Interrupted before the first round; nothing was kept."
    safe = {0: "no round is kept yet", 1: "round 0 is safe"}.get(done, f"rounds 0 to {done - 1} are safe")
    go_on = f"fedlens resume {shlex.quote(str(folder))}"
    return f"Interrupted: {safe} ({done} of {planned}), in {folder}. Continue with: {go_on}"
