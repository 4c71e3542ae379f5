"""`Ledger.prune`: what is removed is gone from every file, and what stays has the bits and checksums that it had."""

from __future__ import annotations

import hashlib
import json
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from fedlens.cli.app import app
from fedlens.errors import LedgerError
from fedlens.ledger import ClientPart, Keep, Ledger, LedgerWriter, NotInLedgerError

# Ids of which each appears nowhere by chance; and which a file system or a shell would not like.
IDS = ("person-4711-ann", "person-0815-bob/../..", "person-2718-名前\n", "person-3141-é", "person-1618-e")
SHAPES = {"kernel": (4, 3), "empty": (2, 0), "bias": (3,)}


def build_round(number, ids=IDS):
    """A round of three deliveries whose weights follow from the round alone."""
    rng = np.random.default_rng(number)
    deliveries = []
    for places in np.split(rng.permutation(len(ids)), [2, 3]):
        local = [rng.normal(size=(len(places), *shape)).astype(np.float32) for shape in SHAPES.values()]
        chosen = tuple(ids[place] for place in places)
        deliveries.append([ClientPart(chosen, places, local, places + 1, {"loss": rng.normal(size=len(places))})])
    return [rng.normal(size=shape).astype(np.float32) for shape in SHAPES.values()], deliveries


def write(path, rounds=6, planned=8, **options):
    weights = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    config = options.pop("config", {})
    with LedgerWriter.create(path, weights=weights, config=config, rounds=planned, **options) as writer:
        for number in range(rounds):
            commit(writer, number)
    return path


def commit(writer, number):
    global_weights, deliveries = build_round(number)
    writer.begin(number, global_weights)
    for parts in deliveries:
        writer.add(parts)
    writer.commit({"loss": number / 2}, {"key": np.array([number])})


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(path, number):
    """Client -> its row of the table, without where its weights lie."""
    rows = pq.read_table(path / f"rounds/{number:06d}.parquet").to_pylist()
    return {row["client"]: {name: row[name] for name in row if name not in ("part", "row")} for row in rows}


def plain_bytes(path):
    """The bytes of all files: as they are, and those of tables without compression and dictionaries too."""
    content = b"".join(files_of(path).values())
    for file in (path / "rounds").glob("*.parquet"):
        sink = pa.BufferOutputStream()
        pq.write_table(pq.read_table(file), sink, compression="none", use_dictionary=False)
        content += sink.getvalue().to_pybytes()
    return content


ENCODINGS = {"raw": None, "deltas": {"kernel": "int8-delta", "*": "bf16-delta"}}


@pytest.mark.parametrize("encodings", ENCODINGS.values(), ids=ENCODINGS)
@pytest.mark.parametrize("gone", [IDS[:1], IDS[1:3], IDS], ids=["one", "two", "all"])
def test_removed_clients_leave_no_byte_and_the_others_keep_theirs(tmp_path, encodings, gone, stored_models_of):
    path = write(tmp_path / "run", encodings=encodings)
    (path / "overview.png").write_bytes(b"a picture of everybody")
    before = {number: (stored_models_of(path, number), rows_of(path, number)) for number in range(6)}
    stored = {}  # the bytes of each client's kernel in the files
    for number in range(6):
        for row in pq.read_table(path / f"rounds/{number:06d}.parquet").to_pylist():
            part = f".{row['part']}" if row["part"] else ""
            data = (path / f"rounds/{number:06d}{part}.safetensors").read_bytes()
            length = int.from_bytes(data[:8], "little")
            entry = json.loads(data[8 : 8 + length])["local/kernel"]
            width = (entry["data_offsets"][1] - entry["data_offsets"][0]) // entry["shape"][0]
            start = 8 + length + entry["data_offsets"][0] + row["row"] * width
            stored[number, row["client"]] = data[start : start + width]
    assert all(client.encode() in plain_bytes(path) for client in IDS)
    pruned = Ledger(path).prune(drop_clients=gone)
    assert pruned.clients == {client: tuple(range(6)) for client in gone}
    content = plain_bytes(path)
    for client in IDS:
        assert (client.encode() in content) == (client not in gone)
        for number in range(6):
            assert (stored[number, client] in content) == (client not in gone)
    assert not (path / "overview.png").exists()
    for number, (models, rows) in before.items():
        assert rows_of(path, number) == {client: rows[client] for client in rows if client not in gone}
        left = stored_models_of(path, number)  # checks the checksums of the table
        assert list(left) == [client for client in models if client not in gone]
        for client, model in left.items():
            for leaf, value in model.items():
                assert value.tobytes() == models[client][leaf].tobytes()
    ledger = Ledger(path)
    assert ledger.verify() == []
    assert ledger.metrics() == [{"loss": number / 2, "round": number} for number in range(6)]
    assert all(client not in ledger.round(0) for client in gone)
    assert ledger.usage().total < 6 * 10_000


def test_the_removal_is_recorded_without_the_ids(tmp_path):
    path = write(tmp_path / "run")
    Ledger(path).prune(keep_every=4, drop_clients=[IDS[1], IDS[0]])
    lines = []
    for text in (path / "removals.jsonl").read_text().splitlines():
        lines.append(json.loads(text))
        checksum = lines[-1].pop("checksum")
        assert f"{zlib.crc32(text.replace(checksum, '0' * 8).encode()):08x}" == checksum
    digests = sorted(hashlib.sha256(client.encode()).hexdigest() for client in IDS[:2])
    assert lines == [
        {"kind": "rounds", "rounds": [1, 2, 3]},
        {"kind": "clients", "rounds": [0, 4, 5], "clients": digests},
    ]


def test_every_nth_round_stays_and_the_last_one(tmp_path):
    path = write(tmp_path / "run")
    before = files_of(path)
    pruned = Ledger(path).prune(keep_every=3)
    assert pruned.rounds == (1, 2, 4)
    after = files_of(path)
    assert {name for name in after if name != "removals.jsonl"} == {
        name for name in before if not name.startswith(("rounds/000001", "rounds/000002", "rounds/000004"))
    }
    assert all(before[name] == after[name] for name in after if name != "removals.jsonl")
    assert pruned.size_bytes == sum(len(before[name]) for name in before.keys() - after.keys())
    ledger = Ledger(path)
    assert ledger.rounds == [0, 3, 5]
    assert [row["round"] for row in ledger.metrics()] == [0, 3, 5]
    assert len(ledger.client(IDS[0])) == 3
    assert ledger.state == "interrupted"
    assert ledger.verify() == []
    with pytest.raises(NotInLedgerError, match="found rounds 0 to 5, for round 4"):
        ledger.round(4)


def test_a_pruned_ledger_is_continued_to_the_same_rounds(tmp_path):
    whole, path = write(tmp_path / "whole", rounds=8), write(tmp_path / "run")
    Ledger(path).prune(keep_every=5, drop_clients=IDS[:1])
    with LedgerWriter.open(path) as writer:
        assert writer.checkpoint()["key"] == 5
        for number in (6, 7):
            commit(writer, number)
    assert Ledger(path).state == "complete"
    assert IDS[0] in Ledger(path).round(7)
    for name in ("rounds/000006.parquet", "rounds/000007.2.safetensors", "checkpoints/000007.safetensors"):
        assert (path / name).read_bytes() == (whole / name).read_bytes()
    # What was removed before is not what is removed now: the client took part again.
    assert Ledger(path).prune().clients == {}
    assert IDS[0] in Ledger(path).round(7)
    assert Ledger(path).prune(drop_clients=IDS[:1]).clients == {IDS[0]: (6, 7)}
    assert IDS[0] not in Ledger(path).clients


def test_pruning_again_changes_nothing(tmp_path):
    path = write(tmp_path / "run")
    arguments = {"keep_every": 2, "drop_clients": IDS[:2]}
    Ledger(path).prune(**arguments)
    before = files_of(path)
    again = Ledger(path).prune(**arguments)
    assert (again.rounds, again.clients, again.size_bytes) == ((), {}, 0)
    assert files_of(path) == before


def test_clients_one_after_the_other_end_as_all_at_once_but_for_numbers_of_parts(tmp_path, stored_models_of):
    one, all_ = write(tmp_path / "one"), write(tmp_path / "all")
    for client in IDS[:3]:
        Ledger(one).prune(drop_clients=[client])
    Ledger(all_).prune(drop_clients=IDS[:3])
    for number in range(6):
        assert rows_of(one, number) == rows_of(all_, number)
        left, right = stored_models_of(one, number), stored_models_of(all_, number)
        assert {client: {leaf: value.tobytes() for leaf, value in model.items()} for client, model in left.items()} == {
            client: {leaf: value.tobytes() for leaf, value in model.items()} for client, model in right.items()
        }
    assert sum(map(len, files_of(one / "rounds").values())) <= 2 * sum(map(len, files_of(all_ / "rounds").values()))


def test_a_dry_run_says_the_same_and_changes_nothing(tmp_path):
    path = write(tmp_path / "run")
    before = files_of(path)
    planned = Ledger(path).prune(keep_every=2, drop_clients=IDS[:2], dry_run=True)
    assert files_of(path) == before
    assert Ledger(path).prune(keep_every=2, drop_clients=IDS[:2]) == planned
    assert planned.size_bytes > 0


@pytest.mark.parametrize(
    ("keep", "left"), [(Keep(clients=IDS[:3]), IDS[1:3]), (Keep(clients=IDS[0]), ()), (Keep(clients="*"), "*")]
)
def test_ids_go_from_what_the_run_keeps(tmp_path, keep, left):
    path = write(tmp_path / "run", keep=keep)
    ledger = Ledger(path)
    ledger.prune(drop_clients=[IDS[0]])
    assert ledger.run.keep.clients == left
    assert IDS[0].encode() not in plain_bytes(path)
    assert Ledger(path).verify() == []
    with LedgerWriter.open(path) as writer:
        commit(writer, 6)
    expected = () if left == () else IDS if left == "*" else left
    assert Ledger(path).round(6).kept_ids == tuple(expected)


def test_ids_in_the_config_are_pointed_out(tmp_path):
    path = write(tmp_path / "run", config={"watched": [IDS[1], IDS[0]], "weights": {IDS[0]: 2}, "name": "x" + IDS[0]})
    pruned = Ledger(path).prune(drop_clients=[IDS[0]])
    assert pruned.mentioned == ("config.watched[1]", f"config.weights.{IDS[0]}")


def test_an_unknown_client_is_refused_before_anything_is_removed(tmp_path):
    path = write(tmp_path / "run")
    before = files_of(path)
    with pytest.raises(NotInLedgerError, match=r"found 'person-4711-an', in .*Did you mean 'person-4711-ann'"):
        Ledger(path).prune(keep_every=2, drop_clients=[IDS[1], "person-4711-an"])
    assert files_of(path) == before


def test_wrong_arguments(tmp_path):
    path = write(tmp_path / "run", rounds=1)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(LedgerError, match="in keep_every"):
            Ledger(path).prune(keep_every=wrong)
    with pytest.raises(LedgerError, match="Expected a list of client ids, found the text 'person'"):
        Ledger(path).prune(drop_clients="person")


def test_a_writer_keeps_pruning_out(tmp_path):
    path = write(tmp_path / "run")
    with LedgerWriter.open(path), pytest.raises(LedgerError, match=r"a running writer \(this process\)"):
        Ledger(path).prune(keep_every=2)
    Ledger(path).prune(keep_every=2)
    LedgerWriter.open(path).close()


def test_a_damaged_round_is_refused_before_anything_is_removed(tmp_path):
    path = write(tmp_path / "run")
    file = path / "rounds/000003.1.safetensors"
    client = pq.read_table(path / "rounds/000003.parquet", filters=[("part", "==", 1)]).column("client")[0].as_py()
    file.write_bytes(file.read_bytes()[:-1])
    before = files_of(path)
    with pytest.raises(LedgerError, match=r"000003\.1\.safetensors"):
        Ledger(path).prune(drop_clients=[client])
    assert files_of(path) == before
    assert Ledger(path).prune(keep_every=2, drop_clients=[client]).rounds == (1, 3)
    assert Ledger(path).verify() == []


def test_a_list_of_removals_that_was_changed_removes_nothing(tmp_path):
    path = write(tmp_path / "run")
    Ledger(path).prune(keep_every=4)
    text = (path / "removals.jsonl").read_bytes()
    (path / "removals.jsonl").write_bytes(text.replace(b"3]", b"4]"))
    before = files_of(path)
    with pytest.raises(LedgerError, match=r"a line without its checksum.*removals\.jsonl"):
        Ledger(path).prune(keep_every=2)
    assert files_of(path) == before


def test_a_ledger_that_is_not_on_this_machine_is_not_pruned(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    path = write(tmp_path / "run")
    files = fsspec.filesystem("memory")
    try:
        files.put(str(path), "/pruned", recursive=True)
        ledger = Ledger("memory://pruned")
        assert ledger.verify() == []
        assert ledger.usage() == Ledger(path).usage()
        with pytest.raises(LedgerError, match="Copy it first"):
            ledger.prune(keep_every=2)
    finally:
        files.rm("/pruned", recursive=True)


def test_an_open_ledger_sees_the_removal(tmp_path):
    path = write(tmp_path / "run")
    ledger = Ledger(path)
    assert IDS[0] in ledger.clients
    Ledger(path).prune(keep_every=2, drop_clients=IDS[:1])
    assert ledger.rounds == [0, 2, 4, 5]
    assert IDS[0] not in ledger.clients
    assert ledger.round(2).leaf("kernel").shape == (4, 4, 3)


def test_a_ledger_without_a_plan(tmp_path):
    path = tmp_path / "run"
    with Ledger.create(path, weights=np.zeros(3, np.float32)) as recorder:
        for number in (0, 4, 7, 8, 10):
            for client in IDS:
                recorder.record(number, client, np.full(3, number, np.float32))
    Ledger(path).prune(keep_every=4, drop_clients=IDS[:1])
    assert Ledger(path).rounds == [0, 4, 8, 10]
    assert Ledger(path).verify() == []
    with Ledger.append(path) as recorder:
        recorder.record(11, IDS[0], np.zeros(3, np.float32))
    assert Ledger(path).rounds == [0, 4, 8, 10, 11]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="fedlens")


def test_the_command(tmp_path):
    path = write(tmp_path / "run", config={"watched": IDS[1]})
    before = files_of(path)
    dry = run("prune", path, "--keep-every", 2, "--drop-client", IDS[1], "--drop-client", IDS[4], "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert dry.stdout.splitlines()[:2] == [
        "Would remove 2 rounds: 1, 3.",
        f"Would remove client {IDS[1]!r} from 4 rounds that stay.",
    ]
    assert files_of(path) == before
    done = run("prune", path, "--keep-every", 2, "--drop-client", IDS[1], "--drop-client", IDS[4])
    assert done.stdout == dry.stdout.replace("Would remove", "Removed")
    assert done.stderr == f"Note: a removed client's id still stands in {path / 'run.json'}, at config.watched.\n"
    assert run("prune", path).stdout == "Nothing to remove.\n"
    unknown = run("prune", path, "--drop-client", "nobody")
    assert (unknown.exit_code, unknown.stdout) == (1, "")
    assert "found 'nobody'" in unknown.stderr
    assert run("prune", path, "--keep-every", 0).exit_code == 2
