"""Cohorts: ids in order, each once; what a call makes of them."""

import numpy as np
import pytest

import fedlens as fed
from fedlens.errors import CohortError, FedlensError, StructureError
from fedlens.runtime import Examples

AT_CLIENTS = fed.FederatedType(np.float32, fed.CLIENTS)
MODEL = fed.type_of({"w": np.zeros(2, np.float32), "layers": [{"b": 0.5}]})


@fed.federated_computation(AT_CLIENTS, AT_CLIENTS)
def difference(x, y):
    return fed.federated_map(lambda a, b: a - b, (x, y))


@fed.federated_computation(fed.FederatedType(MODEL, fed.CLIENTS), fed.FederatedType(MODEL, fed.SERVER))
def models(clients, server):
    return clients, server


def good():
    return {"w": np.zeros(2, np.float32), "layers": [{"b": 0.5}]}


@pytest.fixture(autouse=True)
def _on_every_engine(engine):
    with fed.use(engine):
        yield


def test_ids_stay_in_order():
    cohort = fed.Cohort({"z": 1.0, "a": 2.0, "m": 3.0})
    assert cohort.ids == ("z", "a", "m")
    assert len(cohort) == 3
    assert repr(cohort) == "Cohort(3 clients: z, a, m)"
    assert repr(fed.Cohort(range(5))) == "Cohort(5 clients: 0, 1, 2, ...)"


def test_values_alone_are_numbered():
    assert fed.Cohort([5.0, 6.0]).ids == ("0", "1")
    assert fed.Cohort(value for value in (5.0, 6.0, 7.0)).ids == ("0", "1", "2")
    assert difference([5.0, 6.0], (1.0, 2.0)).ids == ("0", "1")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "at least one client, found none"),
        (["a", ""], 'non-empty strings, found ""'),
        (["a", 3], "strings, found 3 of type int"),
        (["a", None], "strings, found None of type NoneType"),
        (["a", "b", "c", "b"], "each client once in a cohort, found client 'b' twice"),
    ],
)
def test_unusable_ids_are_refused(ids, message):
    examples = Examples({"x": np.zeros(0)}, np.zeros(len(ids), int), np.zeros(len(ids), int))
    with pytest.raises(CohortError, match=message):
        fed.Cohort.from_examples(ids, examples)
    if len(set(ids)) == len(ids):
        with pytest.raises(CohortError, match=message):
            fed.Cohort(dict.fromkeys(ids, 1.0))


def test_a_chunk_holds_a_client():
    with pytest.raises(CohortError, match="chunk size of at least 1, found 0"):
        fed.Cohort([1.0], chunk_size=0)


def test_as_many_runs_of_rows_as_ids():
    examples = Examples({"x": np.zeros(4)}, np.array([0, 2]), np.array([2, 2]))
    with pytest.raises(CohortError, match="each of 3 client ids, found 2 starts and 2 lengths"):
        fed.Cohort.from_examples(["a", "b", "c"], examples)
    assert fed.Cohort.from_examples(["a", "b"], examples).examples is examples
    with pytest.raises(CohortError, match="found one of single values"):
        fed.Cohort([1.0]).examples  # noqa: B018


def test_cohorts_of_a_call_join_by_id_in_the_order_of_the_first():
    x = fed.Cohort({"a": 10.0, "b": 20.0, "c": 30.0})
    y = fed.Cohort({"c": 3.0, "a": 1.0, "b": 2.0})
    assert dict(difference(x, y).items()) == {"a": 9.0, "b": 18.0, "c": 27.0}
    assert difference(x, y).ids == ("a", "b", "c")
    assert difference(y, x).ids == ("c", "a", "b")


def test_the_first_argument_gives_the_order_whatever_the_computation_reads_first():
    @fed.federated_computation(AT_CLIENTS, AT_CLIENTS)
    def backwards(x, y):
        return fed.federated_map(lambda b, a: a - b, (y, x))

    values = backwards(fed.Cohort({"a": 10.0, "b": 20.0}), fed.Cohort({"b": 2.0, "a": 1.0}))
    assert list(values.items()) == [("a", 9.0), ("b", 18.0)]


def test_examples_and_values_join_by_id():
    type_ = fed.SequenceType(fed.batch_type(fed.type_of({"x": 0.5}), 2))

    @fed.federated_computation(fed.FederatedType(type_, fed.CLIENTS), AT_CLIENTS)
    def scaled(data, factor):
        def total(batches, factor):
            return factor * batches.map(lambda batch: (batch["x"] * batch["mask"]).sum()).sum()

        return fed.federated_map(total, (data, factor))

    examples = Examples({"x": np.arange(6, dtype=np.float32)}, np.array([0, 3]), np.array([3, 2]))
    data = fed.Cohort.from_examples(["a", "b"], examples)
    factors = fed.Cohort({"b": 10.0, "a": 1.0})
    assert dict(scaled(data, factors).items()) == {"a": 3.0, "b": 70.0}

    @fed.federated_computation(AT_CLIENTS, fed.FederatedType(type_, fed.CLIENTS))
    def other_way_round(factor, data):
        return fed.federated_map(lambda f, batches: f + batches.num_batches, (factor, data))

    assert list(other_way_round(factors, data).items()) == [("b", 11.0), ("a", 3.0)]


def test_different_clients_are_refused():
    with pytest.raises(CohortError, match=r"client 'b' only in arg\[0\] \(2 clients in arg\[0\], 1 in arg\[1\]\)"):
        difference(fed.Cohort({"a": 1.0, "b": 2.0}), fed.Cohort({"a": 1.0}))
    with pytest.raises(CohortError, match=r"client 'c' only in arg\[1\]"):
        difference(fed.Cohort({"a": 1.0}), fed.Cohort({"a": 1.0, "c": 2.0}))
    with pytest.raises(CohortError, match="same clients"):
        difference([1.0, 2.0], [1.0])


def test_values_of_an_earlier_call_are_a_cohort():
    first = difference(
        fed.Cohort({"a": 5.0, "b": 6.0, "c": 7.0}, chunk_size=2), fed.Cohort({"c": 1.0, "b": 2.0, "a": 3.0})
    )
    again = difference(first, fed.Cohort({"b": 1.0, "c": 2.0, "a": 3.0}))
    assert dict(again.items()) == {"a": -1.0, "b": 3.0, "c": 4.0}
    assert difference(fed.Cohort({"c": 1.0, "b": 2.0, "a": 3.0}), first).ids == ("c", "b", "a")
    smaller = fed.Cohort.from_client_values(first, chunk_size=1)
    assert list(difference(smaller, smaller)) == [0, 0, 0]
    with pytest.raises(CohortError, match=r"client values of type <w=float32\[2\].*found float32"):
        models(first, good())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"w": np.zeros(3, np.float32), "layers": [{"b": 0.5}]}, r"float32\[2\] at 'w', found float32\[3\]"),
        ({"w": np.zeros(2), "layers": [{"b": 0.5}]}, r"float32\[2\] at 'w', found float64\[2\]"),
        ({"w": np.zeros(2, np.float32), "layers": [{"b": "x"}]}, "float32 at 'layers/0/b', found str"),
        ({"w": np.zeros(2, np.float32), "layers": [{"c": 0.5}]}, "field 'b' at 'layers/0', found fields c"),
        ({"w": np.zeros(2, np.float32), "layers": []}, "fields 0 at 'layers', found no fields"),
        ({"w": np.zeros(2, np.float32)}, "fields w, layers, found fields w"),
        (3.0, "found float"),
        (None, "found no fields"),
    ],
)
def test_a_wrong_value_names_its_client_or_argument_and_leaf(value, message):
    with pytest.raises(CohortError, match=f"^Expected .*{message}.*, in client 'bob'"):
        models(fed.Cohort({"ann": good(), "bob": value, "eve": good()}), good())
    with pytest.raises(StructureError, match=rf"^Expected .*{message}.*, in the argument arg\[1\]"):
        models([good()], value)


def test_what_is_no_cohort_is_refused():
    with pytest.raises(CohortError, match=r"arg\[0\], found dict with fields a\. Wrap the mapping: fed\.Cohort"):
        difference({"a": 1.0}, [1.0])
    with pytest.raises(CohortError, match=r"arg\[1\], found float64\[2\]"):
        difference([1.0, 2.0], np.zeros(2))
    assert issubclass(CohortError, FedlensError)
    assert issubclass(CohortError, ValueError)


def test_fields_of_an_argument_are_found_by_name():
    @fed.federated_computation(
        [("x", AT_CLIENTS), ("more", [("y", AT_CLIENTS), ("z", fed.FederatedType(np.int32, fed.SERVER))])]
    )
    def named(argument):
        return argument.x, argument.more.y, argument.more.z

    x, y, z = named({"more": {"z": 3, "y": [2.0]}, "x": [1.0]})
    assert (list(x), list(y), z) == ([1.0], [2.0], 3)
    assert [list(values) for values in named(([1.0], ([2.0], 3)))[:2]] == [[1.0], [2.0]]
    with pytest.raises(StructureError, match=r"a field 'x' at 'arg', found fields more, w"):
        named({"more": {"z": 3, "y": [2.0]}, "w": [1.0]})
    with pytest.raises(StructureError, match=r"fields y, z at 'arg\[1\]', found fields y"):
        named({"more": {"y": [2.0]}, "x": [1.0]})
    with pytest.raises(StructureError, match=r"a container .* at 'arg', found float"):
        named(3.0)
