"""Rounds to store: a model with two leaves, clients whose weights follow from the round alone."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from dying import Server
from safetensors.numpy import load_file

from fedlens.ledger import ClientPart, LedgerWriter, RoundRecord

WEIGHTS = {"dense": {"kernel": np.zeros((4, 3), np.float32), "bias": np.zeros(3, np.float32)}}
IDS = ("ann", "bob", "form-03", "名前/..\n", "e")


def build_round(number: int, ids: tuple[str, ...] = IDS, parts: int = 2) -> RoundRecord:
    rng = np.random.default_rng(number)
    shapes = [(4, 3), (3,)]
    places = np.array_split(rng.permutation(len(ids)), parts)
    return RoundRecord(
        round=number,
        global_weights=[rng.normal(size=shape).astype(np.float32) for shape in shapes],
        parts=[
            ClientPart(
                ids=tuple(ids[place] for place in chosen),
                positions=chosen,
                weights=[rng.normal(size=(len(chosen), *shape)).astype(np.float32) for shape in shapes],
                num_examples=chosen * 10,
                metrics={"accuracy": chosen / 8, "loss": rng.normal(size=len(chosen)).astype(np.float32)},
            )
            for chosen in places
        ],
        metrics={"loss": 1.0 / (number + 1), "clients": len(ids)},
        checkpoint={"state/key": rng.integers(0, 2**32, 2, np.uint32), "round": np.int64(number)},
    )


@pytest.fixture
def make_round() -> Callable[..., RoundRecord]:
    return build_round


@pytest.fixture
def make_writer(tmp_path: Path) -> Callable[..., LedgerWriter]:
    def make(name: str = "run", rounds: int = 3) -> LedgerWriter:
        config = {"learning_rate": 0.1, "optimizer": {"name": "sgd"}}
        return LedgerWriter.create(tmp_path / name, weights=WEIGHTS, config=config, rounds=rounds)

    return make


@pytest.fixture
def ledger_path(make_writer: Callable[..., LedgerWriter]) -> Path:
    """A ledger of three planned rounds, two of them committed."""
    with make_writer() as writer:
        for number in range(2):
            writer.record(build_round(number))
    return writer.path


def local_model(record: RoundRecord, client: str) -> list[np.ndarray]:
    """One client's leaves, straight from the record."""
    for part in record.parts:
        if client in part.ids:
            return [leaf[part.ids.index(client)] for leaf in part.weights]
    raise KeyError(client)


@pytest.fixture
def local_model_of() -> Callable[[RoundRecord, str], list[np.ndarray]]:
    return local_model


def stored_models(path: Path, number: int) -> dict[str, dict[str, np.ndarray]]:
    """Client id -> leaf -> weights of a round, as docs/ledger-format.md says, with safetensors and pyarrow alone."""
    encodings = {leaf["name"]: leaf["encoding"] for leaf in json.loads((path / "run.json").read_text())["leaves"]}
    rows = pq.read_table(path / "rounds" / f"{number:06d}.parquet").to_pylist()
    numbers = sorted({row["part"] for row in rows} - {-1} | {0})
    files = {
        part: load_file(path / "rounds" / (f"{number:06d}.{part}.safetensors" if part else f"{number:06d}.safetensors"))
        for part in numbers
    }
    models: dict[str, dict[str, np.ndarray]] = {}
    for row in rows:
        models[row["client"]] = {}
        for leaf in row["leaves"]:
            if leaf["checksum"] is None:
                continue
            stored = files[row["part"]]["local/" + leaf["leaf"]][row["row"]]
            assert leaf["checksum"] == zlib.crc32(stored.tobytes())
            reference = files[0]["global/" + leaf["leaf"]]
            if encodings[leaf["leaf"]] == "bf16-delta":
                stored = reference + stored.astype(np.float32)
            elif encodings[leaf["leaf"]] == "int8-delta":
                stored = (reference + leaf["scale"] * stored.astype(np.float64)).astype(reference.dtype)
            models[row["client"]][leaf["leaf"]] = stored
    return models


@pytest.fixture
def stored_models_of() -> Callable[[Path, int], dict[str, dict[str, np.ndarray]]]:
    return stored_models


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait(30)
    server.process.stdout.close()
