"""Ledgers that lie elsewhere than in a local folder: read in place, by ranges of bytes, from a real S3 server too."""

from __future__ import annotations

import re
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fedlens.errors import LedgerError
from fedlens.ledger import ClientPart, Ledger, LedgerWriter, NotInLedgerError

pytest.importorskip("fsspec")

BUCKET = "studies"
LEAVES = {"embedding": np.zeros((256, 64), np.float32), "bias": np.zeros(16, np.float32)}
CLIENTS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two rounds of 12 clients in three files each, 790 kB of weights a round."""
    path = tmp_path_factory.mktemp("storage") / "run"
    rng = np.random.default_rng(0)
    with LedgerWriter.create(path, weights=LEAVES, config={"lr": 0.1}, rounds=3) as writer:
        for number in range(2):
            writer.begin(number, [rng.normal(size=leaf.shape).astype(np.float32) for leaf in LEAVES.values()])
            for positions in np.array_split(np.arange(CLIENTS), 3):
                weights = [
                    rng.normal(size=(len(positions), *leaf.shape)).astype(np.float32) for leaf in LEAVES.values()
                ]
                ids = tuple(f"client {position}" for position in positions)
                loss = {"loss": rng.random(len(positions))}
                writer.add([ClientPart(ids, positions, weights, np.ones(len(positions), np.int64), loss)])
            writer.commit({"loss": 1.0}, {"key": np.uint32(number)})
    return path


class Requests:
    """Every request that a server answered: method, path, and how many bytes its body had."""

    def __init__(self, application):
        self.application = application
        self.seen: list[tuple[str, str, int]] = []

    def __call__(self, environ, start_response):
        body = b"".join(self.application(environ, start_response))
        self.seen.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], len(body)))
        return [body]

    def bytes_of(self, ending: str) -> int:
        return sum(size for method, path, size in self.seen if method == "GET" and path.endswith(ending))


@pytest.fixture(scope="module")
def server():
    """moto's S3 server on a free port of this machine, with every request counted."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    counted = Requests(DomainDispatcherApplication(create_backend_app))
    with make_server("127.0.0.1", 0, counted, threaded=True) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield http, counted
        http.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def options(server):
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    return {"key": "k", "secret": "s", "endpoint_url": f"http://127.0.0.1:{server[0].port}"}


@pytest.fixture(scope="module")
def on_s3(run, options):
    """The ledger's URL, after it was copied into a bucket; and the options to read it with."""
    import s3fs

    files = s3fs.S3FileSystem(**options)
    files.mkdir(BUCKET)
    files.put(str(run), f"{BUCKET}/run", recursive=True)
    return f"s3://{BUCKET}/run", options


def test_s3_gives_what_the_folder_gives(run, on_s3):
    url, options = on_s3
    remote, local = Ledger(url, storage_options=options), Ledger(run)
    assert (remote.rounds, remote.clients, remote.config) == (local.rounds, local.clients, local.config)
    assert remote.table().equals(local.table())
    assert remote.metrics() == local.metrics()
    assert remote.client("client 3") == local.client("client 3")
    assert remote.size_bytes == local.size_bytes
    assert (remote.state, remote.location) == ("interrupted", url)
    assert repr(remote) == f"Ledger({url!r}, 2 of 3 rounds, interrupted)"
    for name in LEAVES:
        np.testing.assert_array_equal(remote.round(1).leaf(name), local.round(1).leaf(name))
        np.testing.assert_array_equal(remote.round(0).global_leaf(name), local.round(0).global_leaf(name))
    for client, model in local.round(1).items():
        np.testing.assert_array_equal(remote.round(1)[client].weights["bias"], model.weights["bias"])


def test_s3_sends_the_ranges_that_are_asked_for_and_no_more(on_s3, server):
    url, options = on_s3
    requests = server[1]
    stored = Ledger(url, storage_options=options).round(1)
    requests.seen.clear()
    stored.leaf("bias")
    leaf = sum(
        requests.bytes_of(ending) for ending in ("000001.safetensors", "000001.1.safetensors", "000001.2.safetensors")
    )
    header = 3 * 512  # of each file less than that
    assert CLIENTS * 64 < leaf < CLIENTS * 64 + header
    requests.seen.clear()
    assert stored["client 5"].weights
    model = 256 * 64 * 4 + 64
    assert requests.bytes_of("000001.1.safetensors") == model  # the header is known from before
    assert len(requests.seen) == 2  # one a leaf
    requests.seen.clear()
    assert Ledger(url, storage_options=options).round(0)["client 0"].num_examples == 1
    assert requests.bytes_of("safetensors") == 0


def test_s3_shows_rounds_as_they_come(run, on_s3, options):
    """A listing that was seen before is not taken for the present one."""
    import s3fs

    files = s3fs.S3FileSystem(**options)
    url = f"s3://{BUCKET}/growing"
    for name in ("run.json", "rounds/000000.safetensors", "rounds/000000.parquet"):
        files.put(str(run / name), f"{BUCKET}/growing/{name}")
    ledger = Ledger(url, storage_options=options)
    assert ledger.rounds == [0]
    with pytest.raises(NotInLedgerError, match="rounds 0 to 0, for round 1"):
        ledger.round(1)
    for path in sorted((run / "rounds").glob("000001.*safetensors")):
        files.put(str(path), f"{BUCKET}/growing/rounds/{path.name}")
    with pytest.raises(NotInLedgerError, match="interrupted before its commit"):
        ledger.round(1)
    files.put(str(run / "rounds/000001.parquet"), f"{BUCKET}/growing/rounds/000001.parquet")
    assert ledger.rounds == [0, 1]
    assert len(ledger.round(1)) == CLIENTS


def test_what_is_not_there_on_s3(on_s3, options):
    with pytest.raises(LedgerError, match=r"Expected a ledger.*s3://studies/nothing"):
        Ledger(f"s3://{BUCKET}/nothing", storage_options=options)
    with pytest.raises(LedgerError, match=r"s3://nobucket/run"):
        Ledger("s3://nobucket/run", storage_options=options)
    with pytest.raises(LedgerError, match="in a local folder, found one at s3://studies/run"):
        Ledger(on_s3[0], storage_options=options).path  # noqa: B018


def test_a_file_that_vanished_or_was_cut_on_s3(run, options):
    import s3fs

    files = s3fs.S3FileSystem(**options)
    files.put(str(run), f"{BUCKET}/hurt", recursive=True)
    files.rm(f"{BUCKET}/hurt/rounds/000000.1.safetensors")
    files.pipe(f"{BUCKET}/hurt/rounds/000001.safetensors", (run / "rounds/000001.safetensors").read_bytes()[:-1])
    ledger = Ledger(f"s3://{BUCKET}/hurt", storage_options=options)
    with pytest.raises(LedgerError, match=r"Round 0: .*s3://studies/hurt/rounds/000000\.1\.safetensors"):
        ledger.round(0).leaf("bias")
    with pytest.raises(LedgerError, match=r"Round 1: .*header describes.*|Round 1: .*000001\.safetensors"):
        ledger.round(1).leaf("bias")


@pytest.fixture
def in_memory(run):
    import fsspec

    files = fsspec.filesystem("memory")
    files.put(str(run), "/kept/run", recursive=True)
    yield "memory://kept/run"
    files.rm("/kept", recursive=True)


def test_memory_and_file_urls(run, in_memory):
    for url in (in_memory, in_memory + "/", run.as_uri()):
        ledger = Ledger(url)
        assert ledger.table().equals(Ledger(run).table())
        np.testing.assert_array_equal(ledger.round(1).leaf("bias"), Ledger(run).round(1).leaf("bias"))
    assert Ledger(run.as_uri()).path == run
    with LedgerWriter.open(run):  # what a URL of this machine names is the folder itself, with its lock
        assert Ledger(run.as_uri()).state == "running"


def test_a_cut_range(run, in_memory):
    """A file that becomes shorter between its header and its tensors."""
    import fsspec

    stored = Ledger(in_memory).round(0)
    assert stored.leaf("bias").shape == (CLIENTS, 16)
    files = fsspec.filesystem("memory")
    files.pipe("/kept/run/rounds/000000.2.safetensors", b"short")
    with pytest.raises(
        LedgerError, match=r"its end \d+ bytes early, in memory://kept/run/rounds/000000\.2\.safetensors"
    ):
        stored.leaf("embedding")


def test_a_folder_that_shrinks(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    stored = Ledger(tmp_path / "copy").round(0)
    stored.leaf("bias")
    (tmp_path / "copy/rounds/000000.2.safetensors").write_bytes(b"short")
    with pytest.raises(LedgerError, match=r"Round 0: .*end \d+ bytes early"):
        stored.leaf("embedding")


def test_urls_that_cannot_be_read(tmp_path):
    with pytest.raises(LedgerError, match=r"Expected a URL that fsspec opens, found: .*nonsense"):
        Ledger("nonsense://x/run")
    with pytest.raises(LedgerError, match="storage_options with a URL"):
        Ledger(tmp_path, storage_options={"anon": True})
    with pytest.raises(LedgerError, match=re.escape("a folder with run.json, found: No such file")):
        Ledger("memory://x/run")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LedgerError, match="file"):
        Ledger(tmp_path / "file")


def test_without_fsspec(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(LedgerError, match=r"Expected the package fsspec.*pip install"):
        Ledger("s3://bucket/run")
