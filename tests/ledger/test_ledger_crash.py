"""A writer that dies at any moment: what it committed stays whole, and a resumed run ends as an uninterrupted one.

The writers are real processes. One server process imports everything once and forks a writer for each request, so that
dozens of deaths take a second or two.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedlens.errors import LedgerError
from fedlens.ledger import Ledger, LedgerWriter

ROUNDS = 30
SERVER = """
import json, os, resource, signal, sys, warnings
import numpy as np
import pyarrow as pa
from fedlens.errors import LedgerError
from fedlens.ledger import ClientPart, LedgerWriter, RoundRecord

# The one other thread is jemalloc's, which takes care of forks.
warnings.filterwarnings("ignore", "This process .* is multi-threaded")
pa.array([""])  # imports pandas where there is one, once and not in every writer

# The death of a process, unlike that of a machine, loses nothing written: syncing would only take time here.
os.fsync = lambda descriptor: None

def record(number):
    local = np.full((4, 3000), number, np.float32) + np.arange(4, dtype=np.float32)[:, None]
    part = ClientPart(("a", "b", "c", "d"), np.arange(4), [local], np.arange(4), {})
    return RoundRecord(number, [np.full(3000, number, np.float32)], [part], {}, {"round": np.array(number)})

def die_at(count):
    calls = [0]
    def wrap(function):
        def counted(*arguments, **options):
            calls[0] += 1
            if calls[0] > count:
                os._exit(9)
            return function(*arguments, **options)
        return counted
    for name in ("open", "write", "fsync", "replace", "unlink", "mkdir", "ftruncate", "close"):
        setattr(os, name, wrap(getattr(os, name)))

def write(path, rounds, calls, limit, hold):
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if calls is not None:
        die_at(calls)
    if os.path.exists(path + "/run.json"):
        writer = LedgerWriter.open(path)
    else:
        writer = LedgerWriter.create(path, weights=np.zeros(3000, np.float32), config={}, rounds=30)
    if hold:
        os.kill(os.getpid(), signal.SIGSTOP)
    first = 0 if writer.last_round is None else int(writer.checkpoint()["round"]) + 1
    with writer:
        for number in range(first, rounds):
            writer.record(record(number))

for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        print(os.getpid(), flush=True)  # said by the writer, or its result could come before it
        try:
            write(**request)
            result = ""
        except LedgerError as error:
            result = str(error)
        print(json.dumps(result), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
    print("gone", flush=True)
"""


class Server:
    """The process that forks writers, and the lines it answers."""

    def __init__(self) -> None:
        # No threads of linear algebra, so that forking is safe.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
        )

    def start(
        self,
        path: Path,
        rounds: int = ROUNDS,
        calls: int | None = None,
        limit: int | None = None,
        hold: bool = False,
    ) -> int:
        """Forks a writer that dies after `calls` system calls, may write files of `limit` bytes, or stops on `hold`."""
        request = {"path": str(path), "rounds": rounds, "calls": calls, "limit": limit, "hold": hold}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        return int(self.process.stdout.readline())

    def finish(self) -> str | None:
        """Waits for the writer; returns what it said, None when it died before."""
        line = self.process.stdout.readline()
        if line == b"gone\n":
            return None
        assert self.process.stdout.readline() == b"gone\n"
        return json.loads(line)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait(30)
    server.process.stdout.close()


def committed(path: Path) -> list[int]:
    """The committed rounds, after reading all that is in them."""
    if not (path / "run.json").exists():
        return []
    ledger = Ledger(path)
    for number in ledger.rounds:
        stored = ledger.round(number)
        assert stored.ids == ("a", "b", "c", "d")
        np.testing.assert_array_equal(stored.leaf("weights"), np.tile(number + np.arange(4)[:, None], (1, 3000)))
        np.testing.assert_array_equal(stored.global_weights, np.full(3000, number))
    assert ledger.rounds == list(range(len(ledger.rounds)))
    return ledger.rounds


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_kill_9_at_random_moments(server, tmp_path):
    server.start(tmp_path / "undisturbed")
    assert server.finish() == ""
    expected = files_of(tmp_path / "undisturbed")
    rng = random.Random(0)
    kills = ledgers = 0
    while kills < 20:
        path = tmp_path / str(ledgers)
        before = committed(path)
        pid = server.start(path)
        # The wait ends early only when the writer is done with all rounds.
        if select.select([server.process.stdout], [], [], rng.uniform(0.001, 0.03))[0]:
            assert server.finish() == ""
            assert files_of(path) == expected
            ledgers += 1
            continue
        with contextlib.suppress(ProcessLookupError):  # it may have finished just now
            os.kill(pid, signal.SIGKILL)
        server.finish()
        kills += 1
        assert committed(path)[: len(before)] == before
    server.start(path)
    assert server.finish() == ""
    assert files_of(path) == expected
    assert committed(path) == list(range(ROUNDS))
    assert Ledger(path).state == "complete"


def test_death_before_every_single_system_call(server, tmp_path):
    server.start(tmp_path / "undisturbed", rounds=2)
    assert server.finish() == ""
    expected = files_of(tmp_path / "undisturbed")
    for calls in range(200):
        path = tmp_path / str(calls)
        server.start(path, rounds=2, calls=calls)
        survived = server.finish() is not None
        seen = committed(path)
        if seen:
            with LedgerWriter.open(path) as writer:
                assert writer.checkpoint()["round"] == seen[-1]
        server.start(path, rounds=2)
        assert server.finish() == ""
        assert files_of(path) == expected, f"after dying at call {calls + 1}"
        if survived:
            break
    assert survived
    assert calls > 30


def test_a_file_that_may_not_grow(server, tmp_path):
    path = tmp_path / "run"
    server.start(path, rounds=2)
    assert server.finish() == ""
    before = files_of(path)
    server.start(path, limit=40_000)
    message = server.finish()
    assert message.startswith("Expected to write round 2, found: File too large, in ")
    assert str(path) in message
    assert files_of(path) == before
    assert committed(path) == [0, 1]


def test_a_dead_writer_leaves_no_lock(server, tmp_path):
    path = tmp_path / "run"
    pid = server.start(path, hold=True)
    while not (path / "run.json").exists():
        select.select([server.process.stdout], [], [], 0.001)
    assert Ledger(path).state == "running"
    with pytest.raises(LedgerError, match="a running writer"):
        LedgerWriter.open(path)
    os.kill(pid, signal.SIGKILL)
    server.finish()
    assert Ledger(path).state == "interrupted"
    LedgerWriter.open(path).close()
