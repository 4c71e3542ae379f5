"""What TFF programs write and read: types, arguments, results with attributes, lists of client values."""

from __future__ import annotations

import collections
import subprocess
import sys
from typing import NamedTuple

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedlens as fed
import fedlens.compat.tff as tff
from fedlens.compat.tff.values import AttributeDict, ClientList, from_tff_form, in_tff_form
from fedlens.errors import StructureError

MODEL = tff.to_type(collections.OrderedDict(kernel=tff.TensorType(np.float32, [3, 2]), bias=(np.float32, [2])))


@tff.federated_computation(tff.FederatedType(MODEL, tff.CLIENTS))
def average_with_extraction(model_weights):
    return collections.OrderedDict(
        global_weights=tff.federated_average(model_weights),
        client_weights=tff.federated_map(tff.jax_computation(lambda weights: weights), model_weights),
    )


def clients(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        collections.OrderedDict(
            kernel=rng.normal(size=(3, 2)).astype(np.float32), bias=rng.normal(size=2).astype(np.float32)
        )
        for _ in range(count)
    ]


def test_results_have_attributes_and_keys():
    weights = clients(4)
    result = average_with_extraction(weights)
    expected = np.mean([each["kernel"] for each in weights], axis=0)
    np.testing.assert_allclose(result.global_weights.kernel, expected, rtol=1e-6)
    assert result["global_weights"]["kernel"] is result.global_weights.kernel
    assert list(result) == ["global_weights", "client_weights"]
    with pytest.raises(AttributeError, match="one of the fields global_weights, client_weights, found 'weights'"):
        _ = result.weights


def test_walking_over_the_returned_clients_yields_their_weights_in_order():
    weights = clients(5)
    result = average_with_extraction(weights)
    assert len(result.client_weights) == 5
    for number, found in enumerate(result.client_weights):
        np.testing.assert_array_equal(found.kernel, weights[number]["kernel"])
        np.testing.assert_array_equal(result.client_weights[number].bias, weights[number]["bias"])
    assert [found.bias[0] for found in result.client_weights[1:3]] == [each["bias"][0] for each in weights[1:3]]
    np.testing.assert_array_equal(result.client_weights[-1].bias, weights[-1]["bias"])
    with pytest.raises(IndexError):
        result.client_weights[5]


def test_clients_keep_their_ids():
    weights = clients(2)
    result = average_with_extraction(fed.Cohort(dict(zip(("alice", "bob"), weights, strict=True))))
    assert result.client_weights.ids == ("alice", "bob")
    np.testing.assert_array_equal(result.client_weights["bob"].kernel, weights[1]["kernel"])
    assert [client_id for client_id, _ in result.client_weights.items()] == ["alice", "bob"]
    assert result.client_weights.values.stacked["kernel"].shape == (2, 3, 2)


def test_returned_clients_are_an_argument_again_wherever_they_stand():
    weights = clients(3)
    once = average_with_extraction(weights)
    np.testing.assert_array_equal(
        average_with_extraction(once.client_weights).global_weights.kernel, once.global_weights.kernel
    )

    @tff.federated_computation([tff.type_at_clients(MODEL), tff.type_at_server(np.float32)])
    def first_bias(both):
        return tff.federated_mean(both[0]).bias

    np.testing.assert_allclose(first_bias([once.client_weights, 1.0]), once.global_weights.bias, rtol=1e-6)


def test_numbers_come_back_as_a_list_of_them():
    @tff.federated_computation(tff.type_at_clients(np.int32))
    def doubled(numbers):
        return tff.federated_map(tff.jax_computation(lambda number: 2 * number), numbers)

    assert doubled([1, 2, 3]) == [2, 4, 6]
    assert doubled([1, 2, 3]) != [2, 4]
    assert isinstance(doubled([1])[0], np.int32)


def test_leaves_are_numpy_s():
    result = average_with_extraction(clients(2))
    assert type(result.global_weights.kernel) is np.ndarray
    assert type(tff.jax_computation(lambda: jnp.float32(1))()) is np.float32


class Point(NamedTuple):
    x: object
    y: object


def test_other_containers_stay_as_they_are():
    @tff.jax_computation(Point(np.float32, np.float32))
    def swapped(point):
        return [Point(point.y, point.x), {"sum": point.x + point.y}]

    assert swapped(Point(1.0, 2.0)) == [Point(2.0, 1.0), {"sum": 3.0}]
    assert swapped(Point(1.0, 2.0))[1].sum == 3.0


trees_of_numbers = st.recursive(
    st.integers(-5, 5),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.sampled_from("abcd"), child, max_size=3),
    max_leaves=8,
)


@given(trees_of_numbers)
def test_the_forms_change_containers_and_no_value(tree):
    found = in_tff_form(tree)
    assert found == tree
    assert from_tff_form(found) == tree


@given(st.dictionaries(st.sampled_from("dbca"), st.integers(-5, 5), min_size=1))
def test_a_struct_is_a_pytree_in_the_order_of_its_fields(fields):
    struct = AttributeDict(fields)
    assert jax.tree.leaves(struct) == list(fields.values())
    doubled = jax.tree.map(lambda leaf: 2 * leaf, struct)
    assert isinstance(doubled, AttributeDict)
    assert doubled == {name: 2 * value for name, value in fields.items()}
    assert list(doubled) == list(fields)


def test_a_computation_stays_an_ordinary_one():
    assert isinstance(average_with_extraction, fed.framework.ConcreteComputation)
    assert "client_weights" in str(average_with_extraction.type_signature)

    @tff.federated_computation(tff.type_at_clients(MODEL))
    def nested(model_weights):
        return average_with_extraction(model_weights).global_weights

    weights = clients(3)
    np.testing.assert_array_equal(nested(weights).kernel, average_with_extraction(weights).global_weights.kernel)


def test_fedlens_s_own_tools_know_a_computation_of_tff():
    @tff.jax_computation
    def doubled(number):
        return 2 * number

    @tff.federated_computation(tff.type_at_clients(np.float32))
    def mean_of_doubles(numbers):
        return tff.federated_mean(tff.federated_map(doubled, numbers))

    name = next(tap.name for tap in fed.taps(mean_of_doubles) if tap.function == "doubled")
    original, tapped = fed.tap(mean_of_doubles, at=name)([1.0, 2.0, 6.0])
    assert float(original) == 6.0
    assert list(map(float, tapped)) == [2.0, 4.0, 12.0]
    again = type(mean_of_doubles).from_proto(fed.to_portable(mean_of_doubles).to_proto())
    assert float(again([1.0, 2.0, 6.0])) == 6.0


def test_decorators_take_types_a_function_or_both():
    def identity(value):
        return value

    type_ = tff.type_at_clients(np.float32)
    for computation in (tff.federated_computation(type_)(identity), tff.federated_computation(identity, type_)):
        assert computation([1.0, 2.0]) == [1.0, 2.0]

    @tff.federated_computation
    def nothing():
        return tff.federated_value(3, tff.SERVER)

    assert nothing() == 3

    @tff.jax_computation
    def total(x, y):
        return {"total": x + y}

    assert total(np.float32(1), np.float32(2)).total == 3
    assert total(np.ones(2, np.float32), np.ones(2, np.float32)).total.tolist() == [2, 2]


def test_old_names_are_the_new_ones():
    assert tff.federated_average is tff.federated_mean
    assert tff.type_at_clients is tff.types.at_clients
    assert tff.jax.computation is tff.jax_computation
    assert tff.tensorflow.computation is tff.tf_computation


def test_types_are_the_language_s():
    assert tff.TensorType(np.float32, [10]) == fl.TensorType(np.float32, (10,))
    assert tff.to_type((np.int32, [None])) == fl.TensorType(np.int32, (None,))
    assert tff.FederatedType([np.int32, np.bool_], tff.CLIENTS) == fl.FederatedType([np.int32, np.bool_], fl.CLIENTS)
    assert tff.types.at_server(np.int32) == fl.FederatedType(np.int32, fl.SERVER)
    assert tff.SequenceType(np.int32) == fl.SequenceType(np.int32)
    assert tff.StructType([("a", np.int32), ("b", (np.float32, [2]))])["b"] == fl.TensorType(np.float32, (2,))
    assert tff.FunctionType(None, np.int32) == fl.FunctionType(None, np.int32)


@pytest.mark.parametrize("kind", ["TensorType", "SequenceType", "StructType", "FederatedType", "FunctionType"])
def test_types_are_recognised_whoever_made_them(kind):
    made = {
        "TensorType": fl.TensorType(np.float32),
        "SequenceType": fl.SequenceType(np.float32),
        "StructType": fl.StructWithPythonType([np.float32], list),
        "FederatedType": fl.FederatedType(np.float32, fl.CLIENTS),
        "FunctionType": fl.FunctionType(None, np.float32),
    }
    for name, type_ in made.items():
        assert isinstance(type_, getattr(tff.types, name))
        assert isinstance(type_, getattr(tff, kind)) == (name == kind)
        assert isinstance(type_, tff.Type)


def test_what_is_no_type_is_refused():
    with pytest.raises(StructureError, match="Expected a type, a dtype"):
        tff.to_type(object())


def test_the_native_backend_is_fedlens_own_context():
    context = fed.framework.get_context_stack().current
    try:
        tff.backends.native.set_sync_local_cpp_execution_context()
        assert isinstance(fed.framework.get_context_stack().current, fed.runtime.Context)
        assert average_with_extraction(clients(2)).client_weights.ids == ("0", "1")
    finally:
        fed.framework.set_default_context(context)


def test_tensorflow_is_imported_by_who_uses_it_alone():
    code = (
        "import sys, fedlens; assert 'fedlens.compat' not in sys.modules\n"
        "import fedlens.compat.tff as tff; import numpy; tff.to_type((numpy.float32, [2]))\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_client_list_says_what_it_holds():
    assert repr(average_with_extraction(clients(2)).client_weights) == (
        "ClientList(2 clients: kernel float32[3,2], bias float32[2])"
    )
    assert isinstance(average_with_extraction(clients(2)).client_weights, ClientList)
