"""Writers and pruners of ledgers that die at any moment: real processes, which one server process forks.

The server imports everything once, so that dozens of deaths take a second or two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedlens.ledger import Ledger

ROUNDS = 30
SMALL = 3000  # numbers in the model
LARGE = 280_000  # with the four clients' models, a file that goes past the page cache in part
SERVER = """
import errno, json, os, resource, signal, sys, warnings
import numpy as np
import pyarrow as pa
from fedlens.errors import LedgerError
from fedlens.ledger import ClientPart, Ledger, LedgerWriter, RoundRecord, direct
from fedlens.memory import BEYOND_PAGE, PAGE

# The one other thread is jemalloc's, which takes care of forks.
warnings.filterwarnings("ignore", "This process .* is multi-threaded")
pa.array([""])  # imports pandas where there is one, once and not in every writer

# The death of a process, unlike that of a machine, loses nothing written: syncing would only take time here.
os.fsync = lambda descriptor: None

def record(number, size):
    # Those of even rounds lie in memory as in the file and are written from there, others through a buffer.
    memory = np.empty(16 * size + 2 * PAGE, np.uint8)
    start = (BEYOND_PAGE + 16 * (number % 2) - memory.ctypes.data) % PAGE
    local = memory[start : start + 16 * size].view(np.float32).reshape(4, size)
    local[:] = number + np.arange(4)[:, None]
    part = ClientPart(("a", "b", "c", "d"), np.arange(4), [local], np.arange(4), {})
    return RoundRecord(number, [np.full(size, number, np.float32)], [part], {}, {"round": np.array(number)})

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

def fill_disk_after(room):
    left, write = [room], os.write
    def limited(descriptor, memory):
        count = min(len(memory), left[0])
        if len(memory) and not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= write(descriptor, memory[:count])
        return count
    os.write = limited

def prune(path, keep_every, drop_clients, calls, room):
    if calls is not None:
        die_at(calls)
    if room is not None:
        fill_disk_after(room)
    Ledger(path).prune(keep_every=keep_every, drop_clients=drop_clients)

def write(path, rounds, calls, limit, hold, room, size, past_cache):
    if not past_cache:
        direct._FLAG = 0  # as on a system without direct files
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if calls is not None:
        die_at(calls)
    if room is not None:
        fill_disk_after(room)
    if os.path.exists(path + "/run.json"):
        writer = LedgerWriter.open(path)
    else:
        writer = LedgerWriter.create(path, weights=np.zeros(size, np.float32), config={}, rounds=30)
    if hold:
        os.kill(os.getpid(), signal.SIGSTOP)
    first = 0 if writer.last_round is None else int(writer.checkpoint()["round"]) + 1
    with writer:
        for number in range(first, rounds):
            writer.record(record(number, size))

for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        print(os.getpid(), flush=True)  # said by the writer, or its result could come before it
        try:
            do = request.pop("do")
            (prune if do == "prune" else write)(**request)
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
        room: int | None = None,
        size: int = SMALL,
        past_cache: bool = True,
    ) -> int:
        """Forks a writer that dies after `calls` system calls, may write files of `limit` bytes, or stops on `hold`.

        With `room` the disk is full after so many bytes; the model has `size` numbers.
        """
        of_writer = {"rounds": rounds, "calls": calls, "limit": limit, "hold": hold, "room": room}
        return self._request("write", path=str(path), **of_writer, size=size, past_cache=past_cache)

    def prune(
        self,
        path: Path,
        keep_every: int | None = None,
        drop_clients: Sequence[str] = (),
        calls: int | None = None,
        room: int | None = None,
    ) -> int:
        """Forks a process that prunes a ledger, and dies or finds the disk full likewise."""
        return self._request(
            "prune", path=str(path), keep_every=keep_every, drop_clients=list(drop_clients), calls=calls, room=room
        )

    def _request(self, do: str, **fields: object) -> int:
        self.process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        return int(self.process.stdout.readline())

    def finish(self) -> str | None:
        """Waits for the writer; returns what it said, None when it died before."""
        line = self.process.stdout.readline()
        if line == b"gone\n":
            return None
        assert self.process.stdout.readline() == b"gone\n"
        return json.loads(line)


def committed(path: Path, size: int = SMALL) -> list[int]:
    """The committed rounds, after reading all that is in them."""
    if not (path / "run.json").exists():
        return []
    ledger = Ledger(path)
    rounds = ledger.rounds  # asked for once: a writer may be at work
    for number in rounds:
        stored = ledger.round(number)
        assert stored.ids == ("a", "b", "c", "d")
        np.testing.assert_array_equal(stored.leaf("weights"), np.tile(number + np.arange(4)[:, None], (1, size)))
        np.testing.assert_array_equal(stored.global_weights, np.full(size, number))
    assert rounds == list(range(len(rounds)))
    return rounds


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
