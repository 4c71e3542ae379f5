"""The lines of the log: one for each stage, on a clock that the test moves, so that every second is accounted for."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedlens as fed
from fedlens.data import FederatedData
from fedlens.ledger import LedgerWriter
from fedlens.runtime import Context, Debug, Local, stage_log
from fedlens.runtime.arguments import column_of
from fedlens.runtime.interpreter import run_step

AT_CLIENTS = fed.FederatedType(np.float32, fed.CLIENTS)
PHASES = ("packing", "computing", "writing", "compiling")


@fed.federated_computation(AT_CLIENTS)
def two_passes(values):
    @fed.jax_computation
    def shift(value, mean):
        return value - mean

    mean = fed.federated_broadcast(fed.federated_mean(values))
    return fed.federated_map(shift, (values, mean))


class Lines(logging.Handler):
    """What was logged, as a dict for each line."""

    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        self.found.append(dict(part.split("=", 1) for part in record.getMessage().split()))


@pytest.fixture
def logger():
    """The logger of fedlens, whose state is put back."""
    logger = logging.getLogger("fedlens")
    before = logger.level, list(logger.handlers), logger.propagate
    yield logger
    logger.setLevel(before[0])
    logger.handlers[:] = before[1]
    logger.propagate = before[2]


@pytest.fixture
def lines(logger):
    handler = Lines()
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    return handler.found


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def moves(self, seconds: float, function: Callable) -> Callable:
        """`function`, during which the clock moves."""

        def moving(*arguments, **options):
            self.now += seconds
            return function(*arguments, **options)

        return moving


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stage_log, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(stage_log, "_COMPILED", "/never")  # XLA's compiler has a clock of its own
    return clock


def test_one_line_a_stage_with_who_took_part(lines, engine):
    Context(engine).run(two_passes, fed.Cohort([1.0, 2.0, 3.0, 4.0, 5.0], chunk_size=2))
    assert [line["stage"] for line in lines] == ["arguments", "clients", "server", "clients"]
    assert [line.get("index") for line in lines] == [None, "0", "0", "1"]
    assert [line.get("clients") for line in lines] == ["5", "5", None, "5"]
    assert [line.get("chunks") for line in lines] == [None, "3", None, "3"]
    assert [line.get("functions") for line in lines] == [None, "-", "-", "shift"]
    assert {line["engine"] for line in lines[1:]} == {type(engine).__name__.lower()}


def test_the_phases_add_up_to_the_whole(lines):
    Context(Local()).run(two_passes, fed.Cohort([1.0, 2.0]))
    for line in lines:
        seconds = [float(line[phase]) for phase in PHASES]
        assert min(seconds) >= 0
        assert sum(seconds) == pytest.approx(float(line["seconds"]), abs=4e-6)
        shares = [float(line[f"{phase}_share"]) for phase in PHASES]
        assert sum(shares) == pytest.approx(1, abs=4e-3)


def test_seconds_are_counted_where_they_are_spent(lines, clock, monkeypatch):
    monkeypatch.setattr(Local, "_pack", clock.moves(3, Local._pack))
    monkeypatch.setattr("fedlens.runtime.context.column_of", clock.moves(11, column_of))
    monkeypatch.setattr("fedlens.runtime.chunk_program.run_step", clock.moves(0.5, run_step))  # while it is traced
    sink = clock.moves(7, lambda chunk: None)
    Context(Local()).run(two_passes, fed.Cohort([1.0, 2.0, 3.0], chunk_size=1), sink=sink)
    found = {(line["stage"], line.get("index")): [float(line[phase]) for phase in PHASES] for line in lines}
    assert found["arguments", None] == [11, 0, 0, 0]
    assert found["clients", "0"] == [3 * 3, 0, 0, 0]  # it reduces, and runs no function
    packing, computing, writing, compiling = found["clients", "1"]
    assert (packing, writing, compiling) == (3 * 3, 3 * 7, 0)
    assert computing > 0
    assert computing % 0.5 == 0


class Pending:
    """A result that takes nine seconds after its program was started."""

    def __init__(self, clock):
        self.clock = clock

    def block_until_ready(self):
        self.clock.now += 9
        return self


class Asynchronous(Debug):
    """An engine that returns before its results are there, as JAX does."""

    def __init__(self, clock):
        self.clock = clock

    def run_server(self, stage, environment):
        return {name: Pending(self.clock) for name in stage.outputs}


@fed.federated_computation(fed.FederatedType(np.float32, fed.SERVER))
def at_the_server(value):
    return fed.federated_map(lambda x: x + 1, value)


def test_waiting_for_results_is_computing(lines, clock):
    Context(Asynchronous(clock)).run(at_the_server, np.float32(1))
    assert [float(line["computing"]) for line in lines] == [0, 9]


def test_without_a_listener_nothing_is_measured_or_awaited(logger, clock):
    logger.setLevel(logging.WARNING)
    started = clock.now
    Context(Asynchronous(clock)).run(at_the_server, np.float32(1))
    assert clock.now == started
    assert stage_log.phase("packing") is stage_log.phase("writing")  # the same nothing


def test_compilation_is_counted_once(lines):
    context = Context(Local())
    for _ in range(2):
        context.run(two_passes, fed.Cohort([1.0, 2.0]))
    first, second = lines[:4], lines[4:]
    assert all(float(line["compiling"]) > 0 for line in first if line["stage"] == "clients")
    assert [float(line["compiling"]) for line in second] == [0] * 4


def test_a_stage_that_fails_has_no_line(lines, engine):
    with pytest.raises(fed.NonFiniteError):
        Context(engine).run(two_passes, fed.Cohort([1.0, np.nan]), on_nonfinite="raise")
    assert [line["stage"] for line in lines] == ["arguments"]
    Context(engine).run(two_passes, fed.Cohort([1.0]))
    assert len(lines) == 5


def test_a_computation_within_a_sink_has_lines_of_its_own(lines, clock):
    inner = clock.moves(2, lambda chunk: Context(Debug()).run(at_the_server, np.float32(1)))
    Context(Debug()).run(two_passes, fed.Cohort([1.0, 2.0], chunk_size=1), sink=inner)
    assert [line["stage"] for line in lines].count("server") == 1 + 2
    assert float(lines[-1]["writing"]) == 2 * 2


def test_a_run_says_how_long_each_round_waited_for_the_ledger(lines, clock, monkeypatch, tmp_path):
    monkeypatch.setattr(LedgerWriter, "commit", clock.moves(6, LedgerWriter.commit))
    examples = {"x": np.ones((3, 2), np.float32), "y": np.zeros(3, np.int32)}
    data = FederatedData.from_clients({"ann": examples, "bob": examples})
    model = fed.models.from_functions(
        init=lambda key: {"w": jnp.zeros((2, 2))},
        apply=lambda weights, x: x @ weights["w"],
        inputs=data.element_type,
        loss=fed.losses.cross_entropy,
    )
    process = fed.learning.build_weighted_fed_avg(model, optax.sgd(0.1))
    fed.run(process, data, rounds=2, ledger=tmp_path / "run", progress=False)
    found = [(line["round"], line["clients"], line["writing"]) for line in lines if line["stage"] == "ledger"]
    assert found == [("0", "2", "6.000000"), ("1", "2", "6.000000")]


@pytest.mark.parametrize("level", ["debug", " DEBUG ", "info", "warning", "error"])
def test_the_variable_sets_the_level(logger, level, capsys):
    logger.handlers.clear()
    stage_log.configure({"FEDLENS_LOG": level})
    stage_log.configure({"FEDLENS_LOG": level})
    assert logger.level == getattr(logging, level.strip().upper())
    logger.error("seen once")
    assert capsys.readouterr().err == "fedlens ERROR seen once\n"


def test_an_unknown_level_is_named_with_the_known_ones(logger):
    before = logger.level, list(logger.handlers)
    with pytest.warns(UserWarning, match="FEDLENS_LOG to be one of debug, info, warning, error, found 'loud'"):
        stage_log.configure({"FEDLENS_LOG": "loud"})
    assert (logger.level, list(logger.handlers)) == before


@pytest.mark.parametrize("variables", [{}, {"FEDLENS_LOG": ""}])
def test_without_the_variable_logging_is_left_alone(logger, variables):
    before = logger.level, list(logger.handlers), logger.propagate
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stage_log.configure(variables)
    assert (logger.level, list(logger.handlers), logger.propagate) == before


def test_a_fresh_process_writes_to_standard_error_alone():
    code = (
        "import fedlens as fed, numpy as np\n"
        "total = fed.federated_computation(lambda x: fed.federated_sum(x), fed.FederatedType(np.int32, fed.CLIENTS))\n"
        "print(int(total([1, 2, 3])))"
    )
    environment = os.environ | {"FEDLENS_LOG": "debug"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    assert done.stdout == "6\n"
    starts = [" ".join(line.split()[:3]) for line in done.stderr.splitlines()]
    assert starts == ["fedlens DEBUG stage=arguments", "fedlens DEBUG stage=clients"]
