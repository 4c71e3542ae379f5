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
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from fedlens.errors import LedgerError
from fedlens.ledger import Ledger, LedgerWriter

ROUNDS = 30
SMALL = 3000  # numbers in the model
LARGE = 280_000  # with the four clients' models, a file that goes past the page cache in part
SERVER = """
import errno, json, os, resource, signal, sys, warnings
import numpy as np
import pyarrow as pa
from fedlens.errors import LedgerError
from fedlens.ledger import ClientPart, Ledger, LedgerWriter, RoundRecord, direct

# The one other thread is jemalloc's, which takes care of forks.
warnings.filterwarnings("ignore", "This process .* is multi-threaded")
pa.array([""])  # imports pandas where there is one, once and not in every writer

# The death of a process, unlike that of a machine, loses nothing written: syncing would only take time here.
os.fsync = lambda descriptor: None

def record(number, size):
    local = np.full((4, size), number, np.float32) + np.arange(4, dtype=np.float32)[:, None]
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


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait(30)
    server.process.stdout.close()


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


@pytest.mark.parametrize(
    ("wanted", "size", "rounds", "past_cache"),
    [
        (50, SMALL, ROUNDS, True),
        (10, LARGE, 6, True),
        (5, LARGE, 6, False),
        pytest.param(1000, SMALL, ROUNDS, True, marks=pytest.mark.soak),
        pytest.param(300, LARGE, 6, True, marks=pytest.mark.soak),
    ],
)
def test_kill_9_at_random_moments(server, tmp_path, wanted, size, rounds, past_cache):
    options = {"size": size, "rounds": rounds, "past_cache": past_cache}
    server.start(tmp_path / "undisturbed", **options)
    assert server.finish() == ""
    expected = files_of(tmp_path / "undisturbed")
    rng = random.Random(0)
    kills = ledgers = 0
    while kills < wanted:
        path = tmp_path / str(ledgers)
        before = committed(path, size)
        pid = server.start(path, **options)
        # The wait ends early only when the writer is done with all rounds.
        if select.select([server.process.stdout], [], [], rng.uniform(0.001, 0.03))[0]:
            assert server.finish() == ""
            assert files_of(path) == expected
            shutil.rmtree(path)
            ledgers += 1
            continue
        with contextlib.suppress(ProcessLookupError):  # it may have finished just now
            os.kill(pid, signal.SIGKILL)
        server.finish()
        kills += 1
        assert committed(path, size)[: len(before)] == before
    server.start(path, **options)
    assert server.finish() == ""
    assert files_of(path) == expected
    assert committed(path, size) == list(range(rounds))
    assert Ledger(path).run.planned_rounds == ROUNDS
    assert Ledger(path).state == ("complete" if rounds == ROUNDS else "interrupted")


def test_what_goes_past_the_cache_has_the_same_bytes(server, tmp_path):
    for past_cache in (True, False):
        server.start(tmp_path / str(past_cache), rounds=2, size=LARGE, past_cache=past_cache)
        assert server.finish() == ""
    assert files_of(tmp_path / "True") == files_of(tmp_path / "False")


@pytest.mark.parametrize(
    ("size", "past_cache", "step"),
    [
        (SMALL, True, 1),
        (LARGE, True, 3),
        (LARGE, False, 5),
        pytest.param(LARGE, True, 1, marks=pytest.mark.soak),
        pytest.param(LARGE, False, 1, marks=pytest.mark.soak),
    ],
)
def test_death_before_every_single_system_call(server, tmp_path, size, past_cache, step):
    options = {"rounds": 2, "size": size, "past_cache": past_cache}
    server.start(tmp_path / "undisturbed", **options)
    assert server.finish() == ""
    expected = files_of(tmp_path / "undisturbed")
    for calls in range(0, 200, step):
        path = tmp_path / str(calls)
        server.start(path, calls=calls, **options)
        survived = server.finish() is not None
        seen = committed(path, size)
        if seen:
            with LedgerWriter.open(path) as writer:
                assert writer.checkpoint()["round"] == seen[-1]
        server.start(path, **options)
        assert server.finish() == ""
        assert files_of(path) == expected, f"after dying at call {calls + 1}"
        shutil.rmtree(path)
        if survived:
            break
    assert survived
    assert calls > 30


@pytest.mark.parametrize(("size", "limit"), [(SMALL, 40_000), (LARGE, 4_000_000), (LARGE, 5_000_001)])
def test_a_file_that_may_not_grow(server, tmp_path, size, limit):
    path = tmp_path / "run"
    server.start(path, rounds=2, size=size)
    assert server.finish() == ""
    before = files_of(path)
    server.start(path, limit=limit, size=size)
    message = server.finish()
    assert message.startswith("Expected to write round 2, found: File too large, in ")
    assert str(path) in message
    assert files_of(path) == before
    assert committed(path, size) == [0, 1]


def test_a_dead_writer_leaves_no_lock(server, tmp_path):
    path = tmp_path / "run"
    pid = server.start(path, hold=True)
    while not (path / "run.json").exists():
        select.select([server.process.stdout], [], [], 0.001)
    assert Ledger(path).state == "running"
    with pytest.raises(LedgerError, match=rf"a running writer \(process {pid}\)"):
        LedgerWriter.open(path)
    with pytest.raises(LedgerError, match=rf"a running writer \(process {pid}\)"):
        Ledger(path).prune()
    os.kill(pid, signal.SIGKILL)
    server.finish()
    assert Ledger(path).state == "interrupted"
    LedgerWriter.open(path).close()


def test_a_reader_beside_a_writer_sees_whole_rounds_only(server, tmp_path):
    path = tmp_path / "run"
    server.start(path)
    seen = []
    while not select.select([server.process.stdout], [], [], 0)[0]:
        seen.append(len(committed(path)))  # reads all that is there
    assert server.finish() == ""
    assert seen == sorted(seen)
    assert committed(path) == list(range(ROUNDS))


@pytest.mark.parametrize(("size", "past_cache", "places"), [(SMALL, True, 24), (LARGE, True, 9), (LARGE, False, 5)])
def test_a_full_disk_at_any_byte(server, tmp_path, size, past_cache, places):
    options = {"size": size, "past_cache": past_cache}
    server.start(tmp_path / "undisturbed", rounds=5, **options)
    assert server.finish() == ""
    expected = files_of(tmp_path / "undisturbed")
    path = tmp_path / "run"
    server.start(path, rounds=2, **options)
    assert server.finish() == ""
    before = files_of(path)
    needed = sum(len(expected[name]) for name in expected.keys() - before.keys())
    for room in np.linspace(0, needed, places, dtype=int, endpoint=False).tolist():
        server.start(path, rounds=5, room=room, **options)
        message = server.finish()
        assert "No space left on device" in message
        assert str(path) in message
        seen = committed(path, size)
        assert seen[:2] == [0, 1]
        assert {name[:6] for name in os.listdir(path / "rounds")} == {f"{number:06d}" for number in seen}
        shutil.rmtree(path)
        server.start(path, rounds=2, **options)
        assert server.finish() == ""
        assert files_of(path) == before
    server.start(path, rounds=5, **options)
    assert server.finish() == ""
    assert files_of(path) == expected


FULL_DISK = """
import os, subprocess, sys
import numpy as np
from fedlens.errors import LedgerError
from fedlens.ledger import ClientPart, Ledger, LedgerWriter, RoundRecord

def mount(*options):
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", sys.argv[1]], check=True)

def record(number):
    local = np.full((4, 300_000), number, np.float32)
    return RoundRecord(number, [local[0]], [ClientPart(tuple("abcd"), np.arange(4), [local], np.arange(4), {})], {}, {})

mount("-o", "size=30m")
path = sys.argv[1] + "/run"
writer = LedgerWriter.create(path, weights=np.zeros(300_000, np.float32), config={}, rounds=30)
try:
    with writer:
        for number in range(30):
            writer.record(record(number))
except LedgerError as error:
    assert "No space left on device" in str(error), error
else:
    raise AssertionError("the disk was not full")
full = Ledger(path).rounds
assert full == list(range(len(full))) and 1 <= len(full) < 30
assert Ledger(path).verify() == []
mount("-o", "remount,size=600m")
with LedgerWriter.open(path) as writer:
    for number in range(len(full), 30):
        writer.record(record(number))
assert Ledger(path).state == "complete"
mount("-o", "remount,ro")
for attempt in (lambda: LedgerWriter.open(path), lambda: Ledger(path).prune(keep_every=2)):
    try:
        attempt()
    except LedgerError as error:
        assert "Read-only file system" in str(error), error
    else:
        raise AssertionError("a read-only ledger was opened for writing")
assert Ledger(path).verify() == []
assert Ledger(path).round(29).leaf("weights")[0, 0] == 29
print(len(full))
"""


def test_a_small_disk_and_one_that_becomes_read_only(tmp_path):
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("mounting needs user namespaces, which this system does not give")
    done = subprocess.run(
        [*apart, sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []  # it was mounted for that process alone


@pytest.mark.parametrize("gone", ["rounds", "checkpoints", "run.json", "checkpoints/000001.safetensors"])
def test_what_vanished_is_named(server, tmp_path, gone):
    path = tmp_path / "run"
    server.start(path, rounds=2)
    assert server.finish() == ""
    target = path / gone
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    server.start(path, rounds=4) if gone != "run.json" else server.prune(path, keep_every=2)
    message = server.finish()
    assert "No such file or directory" in message
    assert gone in message or str(path) in message
    if gone.startswith("checkpoints"):
        assert committed(path) == [0, 1]


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
