"""Bad input: whatever stands in a ledger's files is read as it was written, or refused with `LedgerError`.

Meanwhile an audit hook of the interpreter watches: nothing but the ledger's own files is opened, nothing is unpickled,
executed or imported because of what a file says.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from damages import cuts, descriptions, flips, headers, removals, tables
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from watching import Watch

from fedlens.errors import LedgerError
from fedlens.ledger import ClientPart, Keep, Ledger, LedgerWriter
from fedlens.report import summaries

EMOJI = "🦊/../" + "\N{SNOWMAN}" * 3
IDS = ("ann", "../../etc/passwd", EMOJI, "x" * 10_000, "nul\x00byte\n", "/absolute", "null", "e\u0301")
LEAVES = {
    "dense/../kernel": np.zeros((3, 2), np.float32),
    "zero": np.zeros((0, 4), np.float32),
    "f8": np.zeros(5, ml_dtypes.float8_e4m3fn),
    "scalar": np.zeros((), np.int64),
    "名前": np.zeros(2, ml_dtypes.bfloat16),
}
KINDS = {
    "raw": {},
    "deltas": {"encodings": {"dense*": "int8-delta", "*": "bf16-delta"}},
    "kept": {"keep": Keep(leaves=["dense*", "f8"], clients=list(IDS[:3]), every=2), "encodings": "int8-delta"},
}


def write(path: Path, kind: str) -> None:
    """Two rounds in two parts each, of clients and leaves with names that nobody should take for paths."""
    rng = np.random.default_rng(0)
    with LedgerWriter.create(path, weights=LEAVES, config={"a": "../b"}, rounds=3, **KINDS[kind]) as writer:
        for number in range(2):
            leaves = [rng.integers(-8, 8, leaf.shape).astype(leaf.dtype) for leaf in LEAVES.values()]
            writer.begin(number, leaves)
            for places in np.split(rng.permutation(len(IDS)), [5]):
                local = [rng.integers(-8, 8, (len(places), *leaf.shape)).astype(leaf.dtype) for leaf in leaves]
                ids, loss = tuple(IDS[place] for place in places), rng.normal(size=len(places))
                writer.add([ClientPart(ids, places, local, places, {"loss": loss, "accuracy": loss})])
            writer.commit({"loss": 0.5, "odd": float("nan")}, {"key": np.arange(3)})
    Ledger(path).prune(drop_clients=IDS[-1:])


def content(path: Path) -> dict[str, object]:
    """All that a reader can ask of a ledger, as plain values."""
    ledger = Ledger(path)
    found: dict[str, object] = {"run": repr(ledger.run), "rounds": ledger.rounds, "metrics": repr(ledger.metrics())}
    for number in ledger.rounds:
        stored = ledger.round(number)
        found[f"table {number}"] = repr(stored.table().to_pylist())
        for leaf in ledger.leaf_names:
            found[f"global {number} {leaf}"] = stored.global_leaf(leaf).tobytes()
        for client in stored.kept_ids:
            for leaf, value in stored[client].leaves.items():
                found[f"local {number} {client} {leaf}"] = value.tobytes()
            summaries.finite(summaries.summarize_local_model(stored, client))
        summaries.finite(summaries.summarize_round(stored))
    summaries.finite(summaries.summarize_run(ledger))
    found["clients"] = [ledger.client(client) and client for client in ledger.clients]
    return found


class Whole(dict[str, tuple[dict[str, bytes], dict[str, object]]]):
    """Kind -> the files of a ledger, and what is read from it."""

    def __repr__(self) -> str:
        return "Whole()"  # all of it is longer than hypothesis prints, which would hide the case that it found


def questions(path: Path, slow: bool) -> Iterator[Callable[[], object]]:
    """What else can be asked of it, with what takes long or without: each is answered or refused on its own."""
    ledger = Ledger(path)
    yield lambda: (repr(ledger), ledger.state, ledger.config, ledger.table())
    if slow:
        yield lambda: ledger.sql("select client, round, avg(norm) from local_models group by all order by all")
        yield lambda: ledger.sql("from clients").rows()
    yield ledger.to_xarray
    for number in ledger.rounds:
        stored = ledger.round(number)
        yield lambda stored=stored: (repr(stored), stored.global_weights)
        for leaf in ledger.leaf_names:
            yield lambda stored=stored, leaf=leaf: stored.leaf(leaf)
            yield lambda stored=stored, leaf=leaf: stored.leaf(leaf, stored.kept_ids)
        for model in stored.values():
            yield lambda model=model: (repr(model), model.update, model.weights)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    found = Whole()
    for kind in KINDS:
        path = tmp_path_factory.mktemp(kind) / "run"
        write(path, kind)
        files = {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
        found[kind] = files, content(path)
        assert Ledger(path).verify() == []
    return found


WATCH = Watch()


def attempt(path: Path, slow: bool = True) -> dict[str, object] | None:
    """What is read, or None when that is refused; whatever happens is a `LedgerError`, and nobody is left waiting."""
    found = None
    with contextlib.suppress(LedgerError):
        found = content(path)
    damage = None
    with contextlib.suppress(LedgerError):
        damage = Ledger(path).verify()
        Ledger(path).usage()
    if found is None:
        assert damage != []
    with contextlib.suppress(LedgerError):
        for question in questions(path, slow):
            with contextlib.suppress(LedgerError):
                question()
    with contextlib.suppress(LedgerError):
        Ledger(path).prune(keep_every=2, drop_clients=[IDS[1]])
    with contextlib.suppress(LedgerError), LedgerWriter.open(path) as writer:
        writer.checkpoint()
    return found


def place(root: Path, files: dict[str, bytes | None]) -> Path:
    """A ledger of these files in a folder of its own, beside something that is none of its business."""
    path = root / "ledger"
    for folder in ("rounds", "checkpoints"):
        (path / folder).mkdir(parents=True, exist_ok=True)
        for file in (path / folder).iterdir():
            file.unlink()
    for file in path.iterdir():
        if file.is_file():
            file.unlink()
    for name, data in files.items():
        if data is not None:
            (path / name).write_bytes(data)
    return path


def surroundings(root: Path) -> dict[str, tuple[int, int]]:
    return {
        str(file): (file.stat().st_mtime_ns, file.stat().st_size)
        for file in sorted(root.rglob("*"))
        if root / "ledger" not in (file, *file.parents)
    }


# Damage that may not be seen as anything else than what was written, and changes whose checksum was taken away.
ACCIDENTS, LIES = (flips, cuts), (descriptions, headers, tables, removals)


def check(whole, root: Path, data, makers, slow) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    files, expected = whole[kind]
    change = data.draw(st.one_of([maker(files) for maker in makers]))
    path = place(root, files | change)
    before = surroundings(root)
    with WATCH.on(path):
        found = attempt(path, slow)
    assert surroundings(root) == before
    if makers is ACCIDENTS and found is not None:
        whole_rounds = {name: value for name, value in expected.items() if name in found}
        if None not in change.values():  # a table that is gone is a round that is gone
            whole_rounds = expected
        lost = {"rounds", "metrics", "clients"} if None in change.values() else set()
        assert {name: found[name] for name in whole_rounds if name not in lost} == {
            name: value for name, value in whole_rounds.items() if name not in lost
        }


def fuzz(makers, examples, soak=False):
    """A test with so many cases: the same every time, or others every time, of which more is asked."""

    @settings(
        max_examples=examples,
        derandomize=not soak,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def test(whole, root, data):
        check(whole, root, data, makers, slow=soak)

    return test


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, whole) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("surroundings")
    for name in ("neighbour", "etc/passwd", "ledger.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("not yours")
    # Whatever is imported on the first error or the first encoding is imported now.
    for kind in KINDS:
        for name in whole[kind][0]:
            for data in (b"", b"{", None):
                attempt(place(root, whole[kind][0] | {name: data}), slow=False)
        attempt(place(root, whole[kind][0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # no machine dies here
        yield root


test_accidents = fuzz(ACCIDENTS, 150)
test_lies = fuzz(LIES, 150)
test_many_accidents = pytest.mark.soak(fuzz(ACCIDENTS, 6000, soak=True))
test_many_lies = pytest.mark.soak(fuzz(LIES, 6000, soak=True))


def test_the_watch_sees_what_it_should(root, tmp_path):
    """The hook is no decoration: each of these would fail a case."""
    import pickle

    for act in (
        lambda: (root / "neighbour").read_text(),
        lambda: pickle.loads(pickle.dumps(Path)),
        lambda: exec("1"),
        lambda: os.mkdir(root / "new"),
    ):
        with pytest.raises(AssertionError), WATCH.on(tmp_path):
            act()


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    ids=st.lists(st.text(min_size=1, max_size=12) | st.sampled_from(IDS), min_size=1, max_size=5, unique=True),
    name=st.text(max_size=8).filter(lambda name: name != "__metadata__"),
    data=st.data(),
)
def test_any_text_is_a_name_and_comes_back(tmp_path_factory, ids, name, data):
    path = tmp_path_factory.mktemp("any") / "run"
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = data.draw(st.sampled_from([np.float32, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn, np.bool_, np.int64]))
    before = {str(file) for file in path.parent.parent.iterdir()}
    with LedgerWriter.create(path, weights={name: np.zeros(shape, dtype)}, config={}, rounds=1) as writer:
        writer.begin(0, [np.zeros(shape, dtype)])
        local = np.arange(len(ids) * int(np.prod(shape))).reshape(len(ids), *shape).astype(dtype)
        writer.add([ClientPart(tuple(ids), np.arange(len(ids)), [local], np.ones(len(ids)), {})])
        writer.commit({}, {})
    ledger = Ledger(path)
    assert ledger.verify() == []
    assert ledger.round(0).ids == tuple(ids)
    for client, value in zip(ids, local, strict=True):
        (stored,) = ledger.round(0)[client].leaves.values()
        assert stored.tobytes() == value.tobytes()
        assert (stored.shape, stored.dtype) == (tuple(shape), np.dtype(dtype))
    ledger.prune(drop_clients=[ids[0]])
    assert ledger.round(0).ids == tuple(ids[1:])
    assert {str(file) for file in path.parent.parent.iterdir()} == before
