"""`Ledger.verify` and `fedlens verify`: nothing is found in a whole ledger, each flipped byte under its own name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from fedlens.cli.app import app
from fedlens.errors import LedgerError
from fedlens.ledger import ClientPart, Keep, Ledger, LedgerWriter, RoundRecord
from fedlens.ledger.verify import Damage

SHAPES = {"a": (4, 3), "empty": (0, 2), "half": (5,), "scalar": ()}
DTYPES = {"a": np.float32, "empty": np.float32, "half": np.float16, "scalar": np.float64}
IDS = [f"client {number}" for number in range(7)]


def write(path, encodings=None, keep=None, rounds=2):
    """Two rounds, of three deliveries each."""
    rng = np.random.default_rng(0)
    weights = {name: np.zeros(SHAPES[name], DTYPES[name]) for name in SHAPES}
    with LedgerWriter.create(path, weights=weights, config={}, rounds=3, encodings=encodings, keep=keep) as writer:
        for number in range(rounds):
            writer.begin(number, [rng.normal(size=SHAPES[name]).astype(DTYPES[name]) for name in SHAPES])
            for places in np.split(rng.permutation(7), [3, 5]):
                local = [rng.normal(size=(len(places), *SHAPES[name])).astype(DTYPES[name]) for name in SHAPES]
                ids = tuple(IDS[place] for place in places)
                writer.add([ClientPart(ids, places, local, np.ones(len(places)), {})])
            writer.commit({}, {"key": rng.integers(0, 9, 4), "nothing": np.zeros(0)})
    return path


ENCODED = {"a": "int8-delta", "*": "bf16-delta"}


@pytest.fixture(params=[None, ENCODED], ids=["raw", "encoded"])
def whole(request, tmp_path):
    return write(tmp_path / "run", request.param)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def owners(path, number):
    """File -> for each byte behind the header whose it is, (client, leaf), after pyarrow and safetensors' headers."""
    rows = pq.read_table(path / f"rounds/{number:06d}.parquet").to_pylist()
    found = {}
    for file in sorted((path / "rounds").glob(f"{number:06d}*.safetensors")):
        part = int(file.name.split(".")[1]) if file.name.count(".") > 1 else 0
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        whose = [None] * (len(data) - 8 - length)
        for name, entry in header.items():
            kind, _, leaf = name.partition("/")
            start, end = entry["data_offsets"]
            if kind == "global":
                whose[start:end] = [(None, leaf)] * (end - start)
                continue
            for row in rows:
                if row["part"] == part:
                    width = (end - start) // entry["shape"][0]
                    place = start + row["row"] * width
                    whose[place : place + width] = [(row["client"], leaf)] * width
        found[file] = 8 + length, whose
    return found


def test_a_whole_ledger_has_no_damage(whole):
    seen = []
    assert Ledger(whole).verify(lambda done, total: seen.append((done, total))) == []
    stored = sum(file.stat().st_size for file in (whole / "rounds").glob("*.safetensors"))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {stored}


@pytest.mark.parametrize(
    "keep", [Keep(leaves="a"), Keep(every=2), Keep(clients=IDS[:2]), Keep(clients=[]), Keep(statistics_only=True)]
)
def test_what_was_not_kept_is_no_damage(tmp_path, keep):
    assert Ledger(write(tmp_path / "run", keep=keep)).verify() == []


def test_an_empty_ledger_and_an_empty_round_are_whole(tmp_path):
    assert Ledger(write(tmp_path / "none", rounds=0)).verify() == []
    with LedgerWriter.create(tmp_path / "run", weights=np.zeros(2), config={}, rounds=1) as writer:
        writer.record(RoundRecord(0, [np.zeros(2)], [], {}, {}))
    assert Ledger(tmp_path / "run").verify() == []


def test_every_byte_of_weights_belongs_to_the_client_and_leaf_that_are_named(whole):
    rng = np.random.default_rng(0)
    for file, (start, whose) in owners(whole, 1).items():
        before = file.read_bytes()
        for place in rng.choice(len(whose), 25, replace=False):
            flip(file, start + int(place))
            client, leaf = whose[place]
            expected = Damage(1, client, leaf, f"rounds/{file.name}", "other bytes than were written")
            assert Ledger(whole).verify() == [expected]
            file.write_bytes(before)
    assert Ledger(whole).verify() == []


def test_all_damage_is_named_and_not_the_first_alone(whole):
    flipped = set()
    for number in (0, 1):
        for file, (start, whose) in owners(whole, number).items():
            flip(file, start)
            flip(file, start + len(whose) - 1)
            flipped |= {(number, *whose[0]), (number, *whose[-1])}
    flip(whole / "checkpoints/000001.safetensors", -1)
    found = Ledger(whole).verify()
    assert {(each.round, each.client, each.leaf) for each in found if "checkpoints" not in each.file} == flipped
    (of_checkpoint,) = [each for each in found if "checkpoints" in each.file]
    assert of_checkpoint.found == "other bytes than were written, in array 'key'"


def test_headers_and_tables_are_checked_whole(whole):
    rng = np.random.default_rng(1)
    for file in sorted((whole / "rounds").iterdir()):
        before = file.read_bytes()
        length = int.from_bytes(before[:8], "little") + 8 if file.suffix == ".safetensors" else len(before)
        for place in rng.choice(length, 20, replace=False):
            flip(file, int(place))
            damage = Ledger(whole).verify()
            # The name of a table's own checksum is the one thing that no checksum covers.
            if file.suffix == ".safetensors" or not 0 <= place - before.rfind(b'"checksum": "') < 30:
                assert {each.round for each in damage} == {int(file.name[:6])}
            file.write_bytes(before)


@pytest.mark.parametrize("part", [0, 1])
def test_a_file_that_was_cut_or_is_gone_damages_everybody_in_it(whole, part):
    file = whole / (f"rounds/000000.{part}.safetensors" if part else "rounds/000000.safetensors")
    rows = pq.read_table(whole / "rounds/000000.parquet").to_pylist()
    inside = {row["client"] for row in rows if row["part"] == part} | ({None} if part == 0 else set())
    file.write_bytes(file.read_bytes()[:-1])
    cut = Ledger(whole).verify()
    assert {each.client for each in cut} == inside
    assert all("header describes" in each.found and each.leaf is None for each in cut)
    file.unlink()
    gone = Ledger(whole).verify()
    assert {each.client for each in gone} == inside
    assert all("No such file" in each.found for each in gone)


def test_a_lost_round_is_missed_in_a_run_with_a_plan(whole):
    (whole / "rounds/000000.parquet").unlink()
    (found,) = Ledger(whole).verify()
    assert (found.round, found.file) == (0, "rounds/000000.parquet")
    assert "lost" in found.found


def test_rounds_that_were_removed_are_not_missed(whole):
    Ledger(whole).prune(keep_every=5)
    with LedgerWriter.open(whole) as writer:
        weights = [np.zeros((1, *SHAPES[name]), DTYPES[name]) for name in SHAPES]
        part = ClientPart(("x",), np.array([0]), weights, np.array([1]), {})
        writer.record(RoundRecord(2, [leaf[0] for leaf in part.weights], [part], {}, {}))
    assert Ledger(whole).prune(keep_every=5).rounds == (1,)
    assert Ledger(whole).rounds == [0, 2]
    assert Ledger(whole).verify() == []


def test_a_lost_or_foreign_checkpoint(whole):
    file = whole / "checkpoints/000001.safetensors"
    shutil.copy(whole / "rounds/000001.1.safetensors", file)
    (found,) = Ledger(whole).verify()
    assert found.file == "checkpoints/000001.safetensors"
    file.unlink()
    (found,) = Ledger(whole).verify()
    assert "cannot be resumed" in found.found


def test_a_damaged_list_of_removals(whole):
    for text in ("{", "[]", '{"kind": "others", "rounds": []}', '{"kind": "rounds", "rounds": ["0"]}', "\x00"):
        (whole / "removals.jsonl").write_text(text)
        assert [each.file for each in Ledger(whole).verify()] == ["removals.jsonl"]
        with pytest.raises(LedgerError, match="list of removals"):
            Ledger(whole).prune()


def as_version_1(path):
    """Makes a ledger of one round, in one part and raw, into one of format version 1."""
    run = json.loads((path / "run.json").read_text())
    run = {name: run[name] for name in run if name not in ("encodings", "keep", "checksum")}
    run["leaves"] = [{name: leaf[name] for name in ("name", "shape", "dtype")} for leaf in run["leaves"]]
    (path / "run.json").write_text(json.dumps(run | {"format_version": 1, "encoding": "raw"}))
    file = path / "rounds/000000.parquet"
    table = pq.read_table(file)
    metadata = json.loads(table.schema.metadata[b"fedlens"])
    del metadata["checksum"]
    rows = table.column("leaves").to_pylist()
    struct = pa.struct(list(table.schema.field("leaves").type.value_type)[:3])  # without scale
    table = table.drop_columns(["dropped", "cosine", "leaves"])
    table = table.append_column("leaves", pa.array(rows, pa.list_(struct)))
    pq.write_table(table.replace_schema_metadata({"fedlens": json.dumps(metadata)}), file)


def test_version_1(tmp_path):
    path = write(tmp_path / "run", rounds=0)
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=SHAPES[name]).astype(DTYPES[name]) for name in SHAPES]
    part = ClientPart(("a", "b"), np.arange(2), [np.stack([leaf, leaf + 1]) for leaf in leaves], np.ones(2), {})
    with LedgerWriter.open(path) as writer:
        writer.record(RoundRecord(0, leaves, [part], {}, {}))
    as_version_1(path)
    assert Ledger(path).run.format_version == 1
    assert Ledger(path).verify() == []
    ((file, (start, whose)),) = owners(path, 0).items()
    for place in range(0, len(whose), 7):
        flip(file, start + place)
        assert [(each.client, each.leaf) for each in Ledger(path).verify()] == [whose[place]]
        flip(file, start + place)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="fedlens")


def test_the_command_names_the_damage_and_exits_with_1(whole):
    ok = run("verify", whole)
    assert (ok.exit_code, ok.stderr) == (0, "")
    assert "is whole: 2 rounds, 14 local models" in ok.stdout
    file, (start, whose) = list(owners(whole, 1).items())[1]
    flip(file, start)
    failed = run("verify", whole)
    assert failed.exit_code == 1
    for word in (whose[0][0], whose[0][1], file.name):
        assert word in failed.stdout
    as_json = run("verify", whole, "--json")
    assert as_json.exit_code == 1
    (damage,) = json.loads(as_json.stdout)["damage"]
    assert (damage["round"], damage["client"], damage["leaf"]) == (1, *whose[0])


def test_the_command_on_a_damaged_description_is_an_error(whole):
    flip(whole / "run.json", 100)
    failed = run("verify", whole)
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert "run.json" in failed.stderr
