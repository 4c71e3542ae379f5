"""A writer that dies at any moment: what it committed stays whole, and a resumed run ends as an uninterrupted one.

The writers are real processes, see `dying`.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from dying import LARGE, ROUNDS, SMALL, committed, files_of

from fedlens.errors import LedgerError
from fedlens.ledger import Ledger, LedgerWriter


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
