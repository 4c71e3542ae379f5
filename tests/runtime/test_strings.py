"""Strings are values of the language: they come back as they were, pass through Python, and no trace touches them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedlens as fed

NAMES = fed.TensorType(np.str_, (2,))
CLIENT_STRING = fed.FederatedType(np.str_, fed.CLIENTS)
STRINGS = st.text(max_size=8) | st.binary(max_size=8)


@pytest.fixture
def in_engine(engine):
    with fed.use(engine):
        yield


@fed.federated_computation(
    CLIENT_STRING, fed.FederatedType(NAMES, fed.CLIENTS), fed.FederatedType(np.str_, fed.SERVER), NAMES
)
def returned(of_client, names, at_server, unplaced):
    return of_client, names, at_server, unplaced


@given(st.lists(STRINGS, min_size=1, max_size=3), STRINGS, st.tuples(STRINGS, STRINGS))
def test_what_goes_in_comes_back(of_clients, at_server, pair):
    array = np.empty(2, np.object_)
    array[:] = pair
    found, names, server, unplaced = returned(of_clients, [array] * len(of_clients), at_server, array)
    assert list(found) == of_clients
    assert [list(row) for row in names] == [list(pair)] * len(of_clients)
    assert server == at_server
    assert list(unplaced) == list(pair)


def test_on_every_engine_by_client_id_and_stacked(in_engine):
    names = {"a": np.array(["x", "longer"]), "b": np.array([b"y\0", b"z"], np.object_)}
    found, rows, _, _ = returned(fed.Cohort({"a": "one", "b": b"two\0"}), fed.Cohort(names), "s", np.array(["p", "q"]))
    assert dict(found.items()) == {"a": "one", "b": b"two\0"}
    assert {client_id: list(row) for client_id, row in rows.items()} == {"a": ["x", "longer"], "b": [b"y\0", b"z"]}
    assert rows.stacked.shape == (2, 2)
    again = returned(found, rows, "s", np.array(["p", "q"]))[0]
    assert list(again) == ["one", b"two\0"]


def test_python_computations_take_and_return_them(in_engine):
    kind = {"text": np.str_, "count": np.int32, "words": NAMES}

    @fed.python_computation(kind, kind)
    def shout(value):
        words = np.array([word.upper() for word in value["words"]])
        return {"text": value["text"].upper(), "count": len(value["text"]), "words": words}

    @fed.federated_computation(fed.FederatedType(shout.type_signature.parameter, fed.CLIENTS))
    def shouted(values):
        loud = fed.federated_map(shout, values)
        return loud, fed.federated_sum(loud.count)

    value = {"text": "hello", "count": 0, "words": np.array(["to", "you"])}
    loud, total = shouted(fed.Cohort({"a": value, "b": value | {"text": "bye"}}))
    assert [each["text"] for each in loud] == ["HELLO", "BYE"]
    assert list(loud["b"]["words"]) == ["TO", "YOU"]
    assert total == 8
    assert shout(value)["text"] == "HELLO"


def test_numbers_beside_strings_reach_programs(in_engine):
    @fed.jax_computation(np.float32)
    def square(number):
        return number * number

    @fed.federated_computation(fed.FederatedType({"name": np.str_, "size": np.float32}, fed.CLIENTS))
    def squares(values):
        return values.name, fed.federated_sum(fed.federated_map(square, values.size))

    cohort = fed.Cohort([{"name": name, "size": size} for name, size in (("x", 2.0), ("y", 3.0))])
    names, total = squares(cohort)
    assert list(names) == ["x", "y"]
    assert total == 13


def test_literals_are_bytes(in_engine):
    measure = fed.python_computation((np.str_, np.str_), np.int32)(lambda text, literal: len(text) + len(literal))

    @fed.federated_computation(CLIENT_STRING)
    def with_literals(texts):
        literal = fed.federated_value("abc", fed.CLIENTS)
        return (
            fed.federated_value("é", fed.SERVER),
            fed.federated_value(b"\xff\0", fed.SERVER),
            fed.federated_map(measure, (texts, literal)),
        )

    text, raw, lengths = with_literals(["", "de"])
    assert text == "é".encode()
    assert raw == b"\xff\0"
    assert list(lengths) == [3, 5]


def test_sequences_of_strings(in_engine):
    rows = fed.SequenceType({"word": np.str_, "weight": np.int32})

    @fed.python_computation(rows, np.str_)
    def repeated(sequence):
        return " ".join(row["word"] * row["weight"] for row in sequence)

    @fed.federated_computation(fed.FederatedType(rows, fed.CLIENTS))
    def of_clients(sequences):
        return fed.federated_map(repeated, sequences)

    data = {"a": [{"word": "ab", "weight": np.int32(2)}, {"word": "c", "weight": np.int32(3)}], "b": []}
    assert list(of_clients(fed.Cohort(data))) == ["abab ccc", ""]


def test_examples_of_a_data_set_may_be_strings(in_engine):
    rows = fed.SequenceType([("word", fed.TensorType(np.str_, (2,))), ("mask", fed.TensorType(np.bool_, (2,)))])
    longest = fed.python_computation(rows, np.int32)(
        lambda sequence: max(len(word) for batch in sequence for word in batch["word"][batch["mask"]])
    )

    @fed.federated_computation(fed.FederatedType(rows, fed.CLIENTS))
    def of_clients(sequences):
        return fed.federated_map(longest, sequences)

    words = np.array(["a", "to", "four", "five5", "xx"])
    examples = fed.runtime.Examples({"word": words}, np.array([0, 3]), np.array([3, 2]))
    assert list(of_clients(fed.Cohort.from_examples(["p", "q"], examples))) == [4, 5]


@pytest.mark.parametrize("value", [1, np.float32(1), np.array([1, 2], np.int32), np.array([None, 1], np.object_)])
def test_what_is_no_string_is_refused(value):
    with pytest.raises(fed.CohortError, match=r"Expected str.*, in client 'a'"):
        returned(fed.Cohort({"a": value}), fed.Cohort({"a": np.array(["x", "y"])}), "s", np.array(["p", "q"]))


def test_an_array_of_strings_has_a_shape():
    with pytest.raises(fed.CohortError, match=r"Expected str\[2\], found .*\[3\], in client 'a'"):
        returned(fed.Cohort({"a": "x"}), fed.Cohort({"a": np.array(["x", "y", "z"])}), "s", np.array(["p", "q"]))


def test_a_traced_function_of_strings_is_refused():
    message = "Expected numbers as arguments of a JAX computation, found strings .* Use fed.python_computation"
    with pytest.raises(fed.UnsupportedError, match=message):
        fed.jax_computation(lambda text: 1, np.str_)
    with pytest.raises(fed.UnsupportedError, match=message):
        fed.jax_computation(lambda text: 1)("abc")


def test_strings_have_a_type():
    assert fed.type_of("abc") == fed.TensorType(np.str_)
    assert fed.type_of([np.array(["a", "b"]), np.array([b"a", "b"], np.object_)])[1] == fed.TensorType(np.str_, (2,))
    with pytest.raises(fed.StructureError, match="Expected a dtype"):
        fed.type_of(np.array(["a", None], np.object_))
