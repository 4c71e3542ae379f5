"""Pruning that dies at any moment: the ledger stays whole, and the next prune finishes what was begun."""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from dying import files_of

from fedlens.ledger import Ledger


def pruned_state(path: Path, gone: str, every: int) -> set[str]:
    """Which of two states each round of a ledger is in, after reading all of it: with the client or without."""
    states = set()
    ledger = Ledger(path)
    for number in ledger.rounds:
        stored = ledger.round(number)
        places = [place for place, client in enumerate("abcd") if client in stored]
        assert stored.ids in (tuple("abcd"), tuple(client for client in "abcd" if client != gone))
        np.testing.assert_array_equal(stored.leaf("weights"), np.tile(number + np.array(places)[:, None], (1, 3000)))
        np.testing.assert_array_equal(stored.global_weights, np.full(3000, number))
        states.add("with" if gone in stored else "without")
    assert set(ledger.rounds) >= {number for number in range(5) if number % every == 0 or number == 4}
    return states


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.soak)])
def test_pruning_that_dies_before_a_system_call_is_finished_by_the_next(server, tmp_path, step):
    server.start(tmp_path / "whole", rounds=5)
    assert server.finish() == ""
    undisturbed = shutil.copytree(tmp_path / "whole", tmp_path / "undisturbed")
    server.prune(undisturbed, keep_every=2, drop_clients=["b"])
    assert server.finish() == ""
    expected = files_of(undisturbed)
    mixed = 0
    for calls in range(0, 400, step):
        path = shutil.copytree(tmp_path / "whole", tmp_path / str(calls))
        server.prune(path, keep_every=2, drop_clients=["b"], calls=calls)
        survived = server.finish() is not None
        mixed += len(pruned_state(path, "b", 2)) == 2
        recorded = (path / "removals.jsonl").exists() and '"clients"' in (path / "removals.jsonl").read_text()
        if recorded and not survived and files_of(path) != expected:
            # What was begun is named, and finished without saying again what it was.
            server.prune(path)
            assert server.finish() == ""
            assert files_of(path) == expected, f"after dying at call {calls + 1}"
        server.prune(path, keep_every=2, drop_clients=["b"])
        assert server.finish() == ""
        assert files_of(path) == expected, f"after dying at call {calls + 1}"
        shutil.rmtree(path)
        if survived:
            break
    assert survived
    assert calls > 50
    assert mixed * step > 10


@pytest.mark.parametrize("wanted", [10, pytest.param(300, marks=pytest.mark.soak)])
def test_pruning_that_is_killed_at_random_moments(server, tmp_path, wanted):
    server.start(tmp_path / "whole", rounds=5)
    assert server.finish() == ""
    undisturbed = shutil.copytree(tmp_path / "whole", tmp_path / "undisturbed")
    server.prune(undisturbed, drop_clients=["a", "d"])
    assert server.finish() == ""
    expected = files_of(undisturbed)
    rng = random.Random(0)
    for kill in range(wanted):
        path = shutil.copytree(tmp_path / "whole", tmp_path / str(kill))
        pid = server.prune(path, drop_clients=["a", "d"])
        if not select.select([server.process.stdout], [], [], rng.uniform(0.001, 0.03))[0]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.finish()
        server.prune(path, drop_clients=["a", "d"])
        assert server.finish() == ""
        assert files_of(path) == expected
        shutil.rmtree(path)


def test_pruning_on_a_full_disk_is_finished_when_there_is_room(server, tmp_path):
    server.start(tmp_path / "whole", rounds=5)
    assert server.finish() == ""
    undisturbed = shutil.copytree(tmp_path / "whole", tmp_path / "undisturbed")
    server.prune(undisturbed, drop_clients=["b"])
    assert server.finish() == ""
    expected = files_of(undisturbed)
    for room in (0, 1, 100, 30_000, 40_000, 60_000, 150_000):
        path = shutil.copytree(tmp_path / "whole", tmp_path / str(room))
        server.prune(path, drop_clients=["b"], room=room)
        message = server.finish()
        assert "No space left on device" in message
        assert "fedlens prune" in message
        pruned_state(path, "b", 1)
        server.prune(path, drop_clients=["b"])
        assert server.finish() == ""
        assert files_of(path) == expected
