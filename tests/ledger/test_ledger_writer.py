"""Writing: what is refused and how, the writer's thread and its errors, one writer at a time, identical bytes."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fedlens.errors import LedgerError
from fedlens.ledger import ClientPart, Ledger, LedgerWriter, RoundRecord, commit, delivery, handover, measure

SMALL = np.zeros(2, np.float32)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse_writes_below(monkeypatch: pytest.MonkeyPatch, folder: Path, suffix: str, code: int) -> None:
    """Lets every file below `folder` whose name contains `suffix` fail in the middle of its first write."""
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        if target.startswith(str(folder)) and suffix in target:
            if os.fstat(descriptor).st_size:
                raise OSError(code, os.strerror(code))
            data = data[:10]
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)


def record_until_closed(writer: LedgerWriter, rounds: list[RoundRecord]) -> None:
    for record in rounds:
        writer.record(record)
    writer.close()


def test_identical_input_gives_identical_ledgers(make_writer, make_round):
    ledgers = []
    for name in ("one", "two"):
        with make_writer(name) as writer:
            for number in range(3):
                writer.record(make_round(number))
        ledgers.append(files_of(writer.path))
    assert ledgers[0] == ledgers[1]
    everything = b"".join(ledgers[0].values())
    for name in (b"/tmp", os.uname().nodename.encode(), writer.path.name.encode() + b"/"):
        assert name not in everything


def test_a_resumed_ledger_is_identical_to_an_uninterrupted_one(make_writer, make_round):
    with make_writer("whole") as writer:
        for number in range(3):
            writer.record(make_round(number))
    with make_writer("parts") as first:
        first.record(make_round(0))
    for number in (1, 2):
        with LedgerWriter.open(first.path) as writer:
            assert writer.last_round == number - 1
            np.testing.assert_array_equal(writer.checkpoint()["round"], number - 1)
            writer.record(make_round(number))
    assert files_of(first.path) == files_of(first.path.with_name("whole"))


def test_opening_clears_a_torn_round_and_nothing_else(ledger_path):
    before = files_of(ledger_path)
    for name in ("rounds/000002.safetensors", "rounds/000002.parquet.tmp", "checkpoints/000002.safetensors"):
        (ledger_path / name).write_bytes(b"half")
    (ledger_path / "checkpoints" / "000000.safetensors").write_bytes(b"old")
    (ledger_path / "rounds" / "notes.txt").write_text("mine")
    with LedgerWriter.open(ledger_path) as writer:
        assert writer.last_round == 1
    assert files_of(ledger_path) == before | {"rounds/notes.txt": b"mine"}


def test_a_new_ledger_has_no_checkpoint(make_writer):
    with make_writer() as writer:
        assert writer.last_round is None
        with pytest.raises(LedgerError, match="Expected a committed round, found none"):
            writer.checkpoint()


def test_an_existing_ledger_or_folder_is_refused(ledger_path, make_writer, tmp_path):
    with pytest.raises(LedgerError, match=r"found one, in .*run. Resume it, or choose another folder"):
        make_writer()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(LedgerError, match="Expected an empty folder"):
        make_writer("full")
    with pytest.raises(LedgerError, match="Not a directory"):
        make_writer("full/thesis.txt/run")
    assert files_of(tmp_path / "full") == {"thesis.txt": b"mine"}


def test_what_a_killed_create_left_behind_is_no_obstacle(tmp_path, make_writer):
    for name in ("rounds", "checkpoints"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "run.json.tmp").write_text("a longer text than the new one" * 100)
    make_writer().close()
    assert Ledger(tmp_path / "run").rounds == []


def test_a_second_writer_is_refused(make_writer, make_round):
    with make_writer() as writer:
        with pytest.raises(LedgerError, match=r"found a running writer \(this process\), in .*run"):
            LedgerWriter.open(writer.path)
        writer.record(make_round(0))
    with LedgerWriter.open(writer.path) as second:
        assert second.last_round == 0


def test_asking_for_the_state_does_not_keep_writers_out(ledger_path):
    stop = threading.Event()
    ledger = Ledger(ledger_path)
    states = set()

    def poll() -> None:
        while not stop.is_set():
            states.add(ledger.state)

    poller = threading.Thread(target=poll)
    poller.start()
    for _ in range(20):
        LedgerWriter.open(ledger_path).close()
    stop.set()
    poller.join()
    assert states <= {"running", "interrupted"}


def test_rounds_come_in_order(make_writer, make_round):
    with make_writer(rounds=1) as writer:
        with pytest.raises(LedgerError, match="Expected round 0 of the 1 planned, found round 1"):
            writer.record(make_round(1))
        writer.record(make_round(0))
        with pytest.raises(LedgerError, match="Expected round 1 of the 1 planned, found round 1"):
            writer.record(make_round(1))
    assert Ledger(writer.path).rounds == [0]
    with pytest.raises(LedgerError, match="found a closed one"):
        writer.record(make_round(1))
    writer.close()


def test_an_exception_inside_still_commits_what_was_handed_over(make_writer, make_round):
    with pytest.raises(ZeroDivisionError), make_writer() as writer:  # noqa: PT012
        writer.record(make_round(0))
        writer.record(make_round(1))
        raise ZeroDivisionError
    assert Ledger(writer.path).rounds == [0, 1]


def test_who_hands_over_waits_while_too_many_bytes_are_on_their_way(make_writer, make_round, monkeypatch):
    record = make_round(0)
    size = sum(leaf.nbytes for part in record.parts for leaf in part.weights)
    monkeypatch.setattr(handover, "IN_FLIGHT", 2 * size)
    go_on = threading.Event()
    add = commit.RoundWriter.add

    def slowly(*arguments: object) -> None:
        go_on.wait(30)
        add(*arguments)

    monkeypatch.setattr(commit.RoundWriter, "add", slowly)
    with make_writer() as writer:
        writer.record(record)
        writer.record(make_round(1))
        third = threading.Thread(target=writer.record, args=(make_round(2),))
        third.start()
        third.join(0.1)
        assert third.is_alive()
        assert writer.last_round is None
        go_on.set()
        third.join(30)
        assert not third.is_alive()
    assert writer.last_round == 2


def test_a_round_larger_than_the_bound_goes_alone(make_writer, make_round, monkeypatch):
    monkeypatch.setattr(handover, "IN_FLIGHT", 1)
    with make_writer() as writer:
        for number in range(3):
            writer.record(make_round(number))
    assert Ledger(writer.path).rounds == [0, 1, 2]


@pytest.mark.parametrize("suffix", ["rounds/000001.safetensors", "checkpoints/000001", "000001.parquet"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_the_committed_rounds(make_writer, make_round, monkeypatch, suffix, code):
    writer = make_writer(rounds=5)
    writer.record(make_round(0))
    writer.close()
    before = files_of(writer.path)
    writer = LedgerWriter.open(writer.path)
    with monkeypatch.context() as patch:
        refuse_writes_below(patch, writer.path, suffix, code)
        writer.record(make_round(1))
        with pytest.raises(LedgerError, match=f"write round 1, found: {os.strerror(code)}, in .*run.*resume") as caught:
            record_until_closed(writer, [make_round(number) for number in range(2, 5)])
        assert caught.value.__cause__.errno == code
    # There is room again, but nothing follows a round that failed.
    with pytest.raises(LedgerError, match=r"write round 1|closed one"):
        writer.record(make_round(2))
    writer.close()
    assert files_of(writer.path) == before
    assert Ledger(writer.path).round(0).leaf("dense/bias").shape == (5, 3)
    with LedgerWriter.open(writer.path) as writer:
        writer.record(make_round(1))
    assert Ledger(writer.path).rounds == [0, 1]


def test_a_folder_that_vanishes(make_writer, make_round):
    writer = make_writer()
    shutil.rmtree(writer.path)
    writer.record(make_round(0))
    with pytest.raises(LedgerError, match="write round 0, found: No such file"):
        writer.close()


def test_a_failure_beside_another_exception_is_noted_on_it(make_writer, make_round):
    with pytest.raises(ZeroDivisionError) as caught, make_writer() as writer:  # noqa: PT012
        shutil.rmtree(writer.path)
        writer.record(make_round(0))
        raise ZeroDivisionError
    assert "write round 0" in caught.value.__notes__[0]


def test_a_failure_in_measuring_is_one_of_the_round(make_writer, make_round, monkeypatch):
    writer = make_writer()
    writer.record(make_round(0))
    writer.close()
    writer = LedgerWriter.open(writer.path)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "measure", lambda *_: 1 / 0)
        writer.record(make_round(1))
        with pytest.raises(LedgerError, match=r"write round 1, found: ZeroDivisionError"):
            writer.close()
    assert Ledger(writer.path).rounds == [0]


@pytest.mark.parametrize("numbers", [100_000, 300_000])  # measured by the writing thread, and by one beside it
def test_what_was_handed_over_is_committed_when_the_program_ends_without_closing(tmp_path, numbers):
    assert (4 * numbers < delivery.WORTH_A_THREAD) == (numbers == 100_000)
    program = """
import sys
import numpy as np
from fedlens.ledger import ClientPart, LedgerWriter, RoundRecord

weights = np.zeros(int(sys.argv[2]), np.float32)
writer = LedgerWriter.create(sys.argv[1], weights={"w": weights}, config={}, rounds=9)
for number in range(9):
    part = ClientPart(("ann",), np.array([0]), [weights[None] + number], np.array([1]), {})
    writer.record(RoundRecord(number, [weights], [part], {}, {}))
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "run"), str(numbers)], check=True, timeout=120)
    ledger = Ledger(tmp_path / "run")
    assert ledger.rounds == list(range(9))
    assert ledger.round(8)["ann"].weights["w"][0] == 8
    assert ledger.round(8)["ann"].update_norm == pytest.approx(8 * np.sqrt(numbers))


def test_a_disk_that_is_full_at_the_start(monkeypatch, tmp_path):
    refuse_writes_below(monkeypatch, tmp_path, "run.json", errno.ENOSPC)
    with pytest.raises(LedgerError, match="Expected to create a ledger, found: No space left"):
        LedgerWriter.create(tmp_path / "run", weights=SMALL, config={}, rounds=1)
    assert files_of(tmp_path) == {}


PART = ClientPart(("a", "b"), np.array([0, 1]), [np.zeros((2, 2), np.float32)], np.array([1, 2]), {"loss": np.ones(2)})
RECORD = RoundRecord(0, [SMALL], [PART], {}, {})


class OtherArray:
    """An array of a library whose dtypes have no name."""

    shape = (2, 2)

    dtype = type("DType", (), {"__repr__": lambda _: "other.float32"})()


def with_part(**changes: object) -> RoundRecord:
    return dataclasses.replace(RECORD, parts=[dataclasses.replace(PART, **changes)])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (with_part(ids=("a", "")), "non-empty text as client id, found ''"),
        (with_part(ids=("a", "a")), "each client once, found 'a' twice"),
        (with_part(ids=("a", 3)), "client id, found 3"),
        (with_part(ids=("a", "\ud800")), "valid Unicode text"),
        (with_part(ids=("a",)), r"Expected float32\[1, 2\], found float32\[2, 2\], in leaf 'weights' of part 0"),
        (with_part(weights=[np.zeros((2, 2))]), r"Expected float32\[2, 2\], found float64\[2, 2\]"),
        (with_part(weights=[]), "Expected 1 leaves, found 0, in part 0 of round 0"),
        (with_part(positions=np.array([0, 0])), "one client at each position, found several at 0"),
        (with_part(positions=np.array([-1, 0])), "positions from 0"),
        (with_part(positions=np.array([0.0, 1.0])), "positions from 0"),
        (with_part(positions=np.arange(3)), r"Expected 2 numbers, found shape \(3,\), in 'positions'"),
        (with_part(num_examples=np.array([1, -2])), "number of examples, found -2.0, in client 'b'"),
        (with_part(num_examples=np.array([1, 1.5])), "number of examples, found 1.5, in client 'b'"),
        (with_part(num_examples=np.array([np.nan, -1])), "number of examples, found nan, in client 'a'"),
        (with_part(weights=[OtherArray()]), r"Expected float32\[2, 2\], found other.float32\[2, 2\]"),
        (with_part(metrics={"Round": np.ones(2)}), "other than a ledger's own columns, found 'Round'"),
        (with_part(metrics={"leaves": np.ones(2)}), "found 'leaves'"),
        (with_part(metrics={"Loss": np.ones(2)}), "differ in more than case, found 'Loss'"),
        (with_part(metrics={"f1": np.ones(2), "F1": np.ones(2)}), "differ in more than case, found 'F1'"),
        (with_part(metrics={"name": np.array(["x", "y"])}), "Expected numbers, found <U1, in metric 'name'"),
        (with_part(metrics={"loss": np.ones((2, 1))}), r"Expected 2 numbers, found shape \(2, 1\), in 'loss'"),
        (dataclasses.replace(RECORD, parts=[PART, PART]), "each client once, found 'a' twice"),
        (dataclasses.replace(RECORD, global_weights=[np.zeros(3, np.float32)]), "of the global model of round 0"),
        (dataclasses.replace(RECORD, metrics={"loss": "low"}), "Expected a number, found 'low', in metric 'loss'"),
        (dataclasses.replace(RECORD, checkpoint={"state": np.array(["x"])}), "In 'state' of the checkpoint"),
        (dataclasses.replace(RECORD, checkpoint={"__metadata__": SMALL}), "found '__metadata__', in the checkpoint"),
    ],
)
def test_a_round_that_does_not_fit_is_refused_and_the_next_is_taken(tmp_path, record, message):
    with LedgerWriter.create(tmp_path / "run", weights=SMALL, config={}, rounds=1) as writer:
        with pytest.raises(LedgerError, match=message) as caught:
            writer.record(record)
        assert str(tmp_path / "run") in str(caught.value)
        writer.record(RECORD)
    assert Ledger(tmp_path / "run").rounds == [0]


def test_parts_with_different_metrics_are_refused(tmp_path):
    other = dataclasses.replace(PART, ids=("c", "d"), positions=np.array([2, 3]))
    for metrics, message in (({}, r"metrics \['loss'\]"), ({"loss": np.ones(2, int)}, "one dtype in all parts")):
        with LedgerWriter.create(tmp_path / message[:3], weights=SMALL, config={}, rounds=1) as writer:
            record = dataclasses.replace(RECORD, parts=[PART, dataclasses.replace(other, metrics=metrics)])
            with pytest.raises(LedgerError, match=message):
                writer.record(record)


def test_metrics_keep_their_kind(tmp_path):
    metrics = {
        "hits": np.array([2**60 + 1, 0]),
        "good": np.array([True, False]),
        "nan": np.array([np.nan, 1], np.float32),
    }
    record = dataclasses.replace(with_part(metrics=metrics), metrics={"loss": np.float32("inf"), "steps": 2**60 + 1})
    with LedgerWriter.create(tmp_path / "run", weights=SMALL, config={}, rounds=1) as writer:
        writer.record(record)
    stored = Ledger(tmp_path / "run").round(0)
    assert stored.metrics == {"loss": float("inf"), "steps": 2**60 + 1}
    assert stored["a"].metrics["hits"] == 2**60 + 1
    assert stored["a"].metrics["good"] is True
    assert np.isnan(stored["a"].metrics["nan"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {}}, "at least one leaf"),
        ({"weights": {"a/b": SMALL, "a": {"b": SMALL}}}, "one leaf of each name, found two, in leaf 'a/b'"),
        ({"weights": {"a": 1.0}}, "Expected arrays as leaves, found float, in leaf 'a'"),
        ({"weights": {"a": np.array(["x"])}}, "leaf 'a'"),
        ({"weights": {"__metadata__": SMALL}}, "found '__metadata__'"),
        ({"weights": {"\ud800": SMALL}}, "valid Unicode"),
        ({"rounds": 0}, "at least one planned round, found 0"),
        ({"rounds": 2.5}, "at least one planned round, found 2.5"),
        ({"config": {"a": {"b": [1, float("nan")]}}}, r"finite number, found nan, in config.a.b\[1\]"),
        ({"config": {1: 2}}, "strings as keys, found 1, in config"),
        ({"config": {"model": object()}}, "found object, in config.model"),
        ({"config": {"text": "\ud800"}}, "valid Unicode text.*config.text"),
    ],
)
def test_a_run_that_cannot_be_described_is_refused(tmp_path, changes, message):
    arguments = {"weights": SMALL, "config": {}, "rounds": 1} | changes
    with pytest.raises(LedgerError, match=message):
        LedgerWriter.create(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()
