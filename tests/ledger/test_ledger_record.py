"""`Ledger.create` and `record`: any loop writes a ledger, client by client, from several threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

import fedlens as fed
from fedlens.errors import LedgerError
from fedlens.ledger import recorder

START = OrderedDict([("0.weight", np.zeros((2, 3), np.float32)), ("0.bias", np.zeros(2, np.float32))])


def trained(number: int, client: int) -> OrderedDict[str, np.ndarray]:
    rng = np.random.default_rng([number, client])
    return OrderedDict((name, rng.normal(size=leaf.shape).astype(np.float32)) for name, leaf in START.items())


def table_of(path, number):
    return pq.read_table(path / "rounds" / f"{number:06d}.parquet")


def test_a_loop_writes_a_ledger(tmp_path, stored_models_of):
    model = START
    with fed.Ledger.create(tmp_path / "run", weights=START, config={"lr": 0.1}) as ledger:
        for number in range(3):
            local = [trained(number, client) for client in range(4)]
            for client, weights in enumerate(local):
                ledger.record(number, f"c{client}", weights, num_examples=client + 1, loss=client / 4)
            model = {name: np.mean([weights[name] for weights in local], axis=0) for name in START}
            ledger.finish_round(number, global_weights=model, metrics={"accuracy": number / 2})
    stored = fed.Ledger(tmp_path / "run")
    assert (stored.rounds, stored.state, stored.config) == ([0, 1, 2], "complete", {"lr": 0.1})
    assert stored.metrics()[2] == {"round": 2, "accuracy": 1.0}
    for number in range(3):
        for client, weights in stored_models_of(tmp_path / "run", number).items():
            for name, leaf in trained(number, int(client[1:])).items():
                np.testing.assert_array_equal(weights[name], leaf)
    after = load_file(tmp_path / "run/rounds/000002.safetensors")["global/0.bias"]
    np.testing.assert_array_equal(after, np.mean([trained(1, client)["0.bias"] for client in range(4)], axis=0))
    rows = table_of(tmp_path / "run", 0).to_pydict()
    assert (rows["num_examples"], rows["loss"]) == ([1, 2, 3, 4], [0.0, 0.25, 0.5, 0.75])
    assert stored.round(1)["c2"].weights["0.weight"].tobytes() == trained(1, 2)["0.weight"].tobytes()


def test_without_a_word_about_the_global_model_it_is_the_weighted_mean(tmp_path):
    with fed.Ledger.create(tmp_path / "run", weights=START) as ledger:
        for number in range(3):
            for client in range(3):
                ledger.record(number, f"c{client}", trained(number, client), num_examples=client + 1)
    assert fed.Ledger(tmp_path / "run").rounds == [0, 1, 2]
    for number in (1, 2):
        found = load_file(tmp_path / "run" / "rounds" / f"{number:06d}.safetensors")
        for name in START:
            leaves = np.array([trained(number - 1, client)[name] for client in range(3)], np.float64)
            np.testing.assert_allclose(found["global/" + name], np.average(leaves, axis=0, weights=[1, 2, 3]), 1e-5)


def test_threads_record_at_the_same_time(tmp_path, stored_models_of, monkeypatch):
    monkeypatch.setattr(recorder, "_DELIVERY", 7 * 32)  # bytes: seven clients
    together = threading.Barrier(4)

    def record(worker: int) -> None:
        together.wait(30)
        for client in range(worker, 60, 4):
            ledger.record(0, f"c{client}", trained(0, client), num_examples=client, loss=client / 8)

    with fed.Ledger.create(tmp_path / "run", weights=START) as ledger, ThreadPoolExecutor(4) as workers:
        for done in [workers.submit(record, worker) for worker in range(4)]:
            done.result(60)
        ledger.finish_round(0)
    rows = table_of(tmp_path / "run", 0).to_pydict()
    assert set(rows["part"]) == set(range(9))
    assert sorted(rows["client"]) == sorted(f"c{client}" for client in range(60))
    assert [f"c{count}" for count in rows["num_examples"]] == rows["client"]
    assert [loss * 8 for loss in rows["loss"]] == rows["num_examples"]
    for client, weights in stored_models_of(tmp_path / "run", 0).items():
        for name, leaf in trained(0, int(client[1:])).items():
            np.testing.assert_array_equal(weights[name], leaf)


def test_what_was_recorded_does_not_change_when_the_loop_goes_on_in_the_same_arrays(tmp_path, stored_models_of):
    weights = trained(0, 0)
    with fed.Ledger.create(tmp_path / "run", weights=weights) as ledger:
        for client in range(3):
            weights["0.bias"][:] = client
            ledger.record(0, f"c{client}", weights)
        weights["0.bias"][:] = 100
    biases = [weights["0.bias"].tolist() for weights in stored_models_of(tmp_path / "run", 0).values()]
    assert biases == [[0, 0], [1, 1], [2, 2]]


def test_the_global_model_may_be_averaged_into_the_same_arrays(tmp_path):
    model, momentum = {"w": np.zeros(3, np.float32)}, np.zeros(2)
    with fed.Ledger.create(tmp_path / "run", weights=model) as ledger:
        for number in range(4):
            ledger.record(number, "a", model)
            model["w"][:] = momentum[:] = number + 1
            ledger.finish_round(number, global_weights=model, checkpoint={"momentum": momentum})
            model["w"][:] = momentum[:] = -1
            model["w"][:] = number + 1
        momentum[:] = -1
    for number in range(4):
        stored = load_file(tmp_path / "run" / "rounds" / f"{number:06d}.safetensors")
        np.testing.assert_array_equal(stored["global/w"], [number] * 3)
        np.testing.assert_array_equal(stored["local/w"], [[number] * 3])
    with fed.Ledger.append(tmp_path / "run") as ledger:
        np.testing.assert_array_equal(ledger.checkpoint()["momentum"], [4, 4])
        np.testing.assert_array_equal(ledger.global_weights()["w"], [4] * 3)


def test_an_exception_forgets_the_round_that_was_not_finished(tmp_path):
    with pytest.raises(ZeroDivisionError), fed.Ledger.create(tmp_path / "run", weights=START) as ledger:  # noqa: PT012
        ledger.record(0, "a", trained(0, 0))
        ledger.finish_round(0, global_weights=START)
        ledger.record(1, "a", trained(1, 0))
        raise ZeroDivisionError
    assert fed.Ledger(tmp_path / "run").rounds == [0]
    assert not list((tmp_path / "run/rounds").glob("000001*"))


def test_a_ledger_is_continued_where_it_ended(tmp_path):
    path = tmp_path / "run"
    with fed.Ledger.create(path, weights=START) as ledger:
        ledger.record(0, "a", trained(0, 0))
        ledger.finish_round(0, global_weights=trained(9, 9), checkpoint={"momentum": np.arange(3)})
    with fed.Ledger.append(path) as ledger:
        assert ledger.last_round == 0
        np.testing.assert_array_equal(ledger.checkpoint()["momentum"], np.arange(3))
        np.testing.assert_array_equal(ledger.global_weights()["0.bias"], trained(9, 9)["0.bias"])
        ledger.record(5, "a", trained(5, 0))
    assert fed.Ledger(path).rounds == [0, 5]
    np.testing.assert_array_equal(
        load_file(path / "rounds/000005.safetensors")["global/0.weight"], trained(9, 9)["0.weight"]
    )


def test_encodings_and_keep_are_taken(tmp_path, stored_models_of):
    with fed.Ledger.create(
        tmp_path / "run", weights=START, rounds=1, encodings={"*weight": "int8-delta"}, keep=fed.Keep(clients="a")
    ) as ledger:
        ledger.record(0, "a", trained(0, 0))
        ledger.record(0, "b", trained(0, 1), dropped=True)
    models = stored_models_of(tmp_path / "run", 0)
    np.testing.assert_allclose(models["a"]["0.weight"], trained(0, 0)["0.weight"], atol=3 / 254)
    assert models["b"] == {}
    assert table_of(tmp_path / "run", 0).column("dropped").to_pylist() == [False, True]
    assert fed.Ledger(tmp_path / "run").state == "complete"


class Tensor:
    """What PyTorch's tensors have: an array only on the host and outside of the gradient's tape."""

    def __init__(self, array: np.ndarray, state: str = "on the device, on the tape"):
        self.array, self.state = array, state

    def detach(self) -> Tensor:
        return Tensor(self.array, self.state.replace(", on the tape", ""))

    def cpu(self) -> Tensor:
        return Tensor(self.array, self.state.replace("on the device", "on the host"))

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        if self.state != "on the host":
            raise RuntimeError(self.state)
        return self.array


def test_tensors_are_brought_to_the_host(tmp_path, stored_models_of):
    with fed.Ledger.create(tmp_path / "run", weights={"w": Tensor(np.zeros(2, np.float32))}) as ledger:
        ledger.record(0, "a", {"w": Tensor(np.array([1, 2], np.float32))})
    np.testing.assert_array_equal(stored_models_of(tmp_path / "run", 0)["a"]["w"], [1, 2])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, "a", trained(0, 0)), {"loss": 1.0}, r"each client once, found 'a' twice.*In client 'a' of round 0"),
        ((0, "", trained(0, 0)), {"loss": 1.0}, r"non-empty text as client id, found ''"),
        ((0, 3, trained(0, 0)), {"loss": 1.0}, r"client id, found 3"),
        ((0, "\ud800", trained(0, 0)), {"loss": 1.0}, r"valid Unicode"),
        ((0, "b", trained(0, 0)), {}, r"metrics \['loss'\].*found \[\].*In client 'b'"),
        ((0, "b", trained(0, 0)), {"loss": "low"}, r"numbers as metrics.*in client 'b' of round 0"),
        ((0, "b", trained(0, 0)), {"loss": 1.0, "num_examples": -1}, r"number of examples, found -1.0, in client 'b'"),
        ((0, "b", {"0.weight": np.zeros((2, 3), np.float32)}), {"loss": 1.0}, r"found none, in leaf '0.bias'"),
        (
            (0, "b", START | {"1.bias": 0}),
            {"loss": 1.0},
            r"found '1.bias', in client 'b' of round 0. Did you mean '0.b",
        ),
        (
            (0, "b", START | {"0.bias": np.zeros(2)}),
            {"loss": 1.0},
            r"Expected float32\[2\], found float64\[2\], in leaf '0.bias' of client 'b'",
        ),
        ((0, "b", START | {"0.bias": {1: 2}}), {"loss": 1.0}, r"keys of a mapping to be strings, found 1"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_next_is_taken(tmp_path, arguments, options, message):
    with fed.Ledger.create(tmp_path / "run", weights=START) as ledger:
        ledger.record(0, "a", trained(0, 0), loss=0.5)
        with pytest.raises(LedgerError, match=message):
            ledger.record(*arguments, **options)
        ledger.record(0, "c", trained(0, 2), loss=0.25)
    assert table_of(tmp_path / "run", 0).column("client").to_pylist() == ["a", "c"]


def test_rounds_go_forward(tmp_path):
    with fed.Ledger.create(tmp_path / "run", weights=START) as ledger:
        ledger.record(3, "a", trained(0, 0))
        with pytest.raises(LedgerError, match="Expected round 3 or a later one, found round 2"):
            ledger.record(2, "a", trained(0, 0))
        ledger.finish_round(3)
        with pytest.raises(LedgerError, match="Expected round 4 or a later one, found 3"):
            ledger.record(3, "b", trained(0, 0))
        ledger.finish_round(4)
    assert fed.Ledger(tmp_path / "run").rounds == [3, 4]
    assert len(fed.Ledger(tmp_path / "run").round(4)) == 0


def test_a_ledger_of_a_run_is_not_continued_by_hand(tmp_path, ledger_path):
    with pytest.raises(LedgerError, match=r"Expected a ledger that record wrote.*fed.resume continues it"):
        fed.Ledger.append(ledger_path)
    with pytest.raises(LedgerError, match="Expected a committed round, found none"):
        fed.Ledger.create(tmp_path / "new", weights=START).close() or fed.Ledger.append(tmp_path / "new")


def test_weights_that_are_no_arrays_are_refused(tmp_path):
    class Sparse:
        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            raise TypeError("not dense")

    with pytest.raises(LedgerError, match=r"Expected arrays as weights, found Sparse \(not dense\)"):
        fed.Ledger.create(tmp_path / "run", weights={"w": Sparse()})
    assert not (tmp_path / "run").exists()
