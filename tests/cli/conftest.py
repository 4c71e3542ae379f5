"""A tiny experiment as a config file, one finished ledger of it, and the commands called in process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlens.cli.app import app

TINY = """\
name = "tiny"
rounds = 3

[data]
set = "digits"
held_out = 0.25

[model]
architecture = "mlp"
hidden = [6]

[training]
client_learning_rate = 0.3
batch_size = 20
"""


@pytest.fixture(autouse=True)
def _no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny_text() -> str:
    return TINY


@pytest.fixture(scope="session")
def fedlens() -> Callable[..., object]:
    """Runs a command: `fedlens("ls", "--json")` gives exit code, stdout and stderr."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="fedlens")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: Path, fedlens: Callable[..., object]):
    """The result of `fedlens run tiny.toml`, and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = fedlens("run", tiny)
    finally:
        os.chdir(before)
    assert result.exit_code == 0, result.stderr
    return result, folder


@pytest.fixture(scope="session")
def ledger(finished) -> Path:
    """The ledger of the finished run; tests only read it."""
    return finished[1] / "runs" / "tiny"
