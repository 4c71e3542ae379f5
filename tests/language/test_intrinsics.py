"""The two operators that fedlens widens."""

import numpy as np
import pytest

import fedlens as fed

AT_CLIENTS = fed.FederatedType(np.float32, fed.CLIENTS)
AT_SERVER = fed.FederatedType(np.float32, fed.SERVER)


@pytest.fixture(autouse=True)
def _on_every_engine(engine):
    with fed.use(engine):
        yield


def test_a_plain_function_is_mapped():
    @fed.federated_computation(AT_CLIENTS, AT_SERVER)
    def both(values, offset):
        return fed.federated_map(lambda x: x * 2, values), fed.federated_map(lambda x: x + 1, offset)

    doubled, more = both(fed.Cohort({"a": 1.0, "b": 2.5}), 4.0)
    assert dict(doubled.items()) == {"a": 2.0, "b": 5.0}
    assert more == 5.0


def test_a_function_of_two_arguments_is_mapped_over_a_pair():
    @fed.federated_computation(AT_CLIENTS, AT_CLIENTS)
    def difference(x, y):
        return fed.federated_map(lambda a, b: a - b, (x, y))

    assert list(difference([5.0, 7.0], [1.0, 2.0])) == [4.0, 5.0]


def test_computations_of_every_kind_are_mapped():
    concrete = fed.jax_computation(lambda x: x + 1, np.float32)
    polymorphic = fed.jax_computation(lambda x: x * 2)
    in_the_language = fed.federated_computation(lambda x: concrete(concrete(x)), np.float32)

    @fed.federated_computation(AT_CLIENTS)
    def mapped(values):
        return [fed.federated_map(function, values) for function in (concrete, polymorphic, in_the_language)]

    assert [list(values) for values in mapped([1.0])] == [[2.0], [2.0], [3.0]]


def test_zip_of_one_placement_is_one_federated_value():
    @fed.federated_computation(AT_CLIENTS, AT_CLIENTS)
    def zipped(x, y):
        return fed.federated_zip({"y": y, "x": x})

    assert str(zipped.type_signature.result) == "{<y=float32,x=float32>}@CLIENTS"
    assert zipped([1.0], [2.0])["0"] == {"y": 2.0, "x": 1.0}


def test_zip_of_several_placements_is_the_structure():
    @fed.federated_computation(AT_CLIENTS, AT_SERVER)
    def zipped(x, y):
        return fed.federated_zip({"clients": x, "server": [y, {"more": x}]})

    assert str(zipped.type_signature.result) == (
        "<clients={float32}@CLIENTS,server=<float32@SERVER,<more={float32}@CLIENTS>>>"
    )
    result = zipped([1.0, 3.0], 2.0)
    assert list(result["clients"]) == [1.0, 3.0]
    assert result["server"][0] == 2.0
    assert list(result["server"][1]["more"]) == [1.0, 3.0]


def test_what_is_no_function_is_refused():
    for wrong in (
        lambda x: fed.federated_map(3, x),
        lambda x: fed.federated_map(x, x),
        lambda x: fed.federated_zip(np.float32(3)),
    ):
        with pytest.raises((TypeError, ValueError), match="Expected"):
            fed.federated_computation(wrong, AT_CLIENTS)
