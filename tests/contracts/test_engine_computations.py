"""How computations are put together: nested, called several times, read from protos, in several phases."""

import jax.numpy as jnp
import numpy as np
import pytest
from federated_language import framework

import fedlens as fed
from fedlens.errors import CohortError, UnsupportedError

VALUES = np.array([3, 1, -4, 1.5, 9], np.float32)
AT_CLIENTS = fed.FederatedType(np.float32, fed.CLIENTS)
AT_SERVER = fed.FederatedType(np.float32, fed.SERVER)
COHORT = fed.Cohort({f"client {i}": value for i, value in enumerate(VALUES)}, chunk_size=2)

add = fed.jax_computation(lambda a, b: a + b, np.float32, np.float32)
double = fed.jax_computation(lambda x: 2 * x, np.float32)
identity = fed.jax_computation(lambda x: x, np.float32)


@pytest.fixture(autouse=True)
def _on_every_engine(engine):
    with fed.use(engine):
        yield


def again(computation):
    """The computation as a reader of its bytes gets it."""
    proto = computation.to_proto()
    return framework.ConcreteComputation.from_proto(type(proto).FromString(proto.SerializeToString()))


@fed.federated_computation(AT_CLIENTS)
def three_phases(values):
    """Aggregate, broadcast, map, aggregate, and once more."""
    total = fed.federated_aggregate(values, np.float32(0), add, add, double)
    shifted = fed.federated_map(add, (values, fed.federated_broadcast(total)))
    smallest = fed.federated_min(shifted)
    distances = fed.federated_map(
        fed.jax_computation(lambda x, low: x - low, np.float32, np.float32),
        (shifted, fed.federated_broadcast(smallest)),
    )
    return {"total": total, "smallest": smallest, "mean": fed.federated_mean(distances), "distances": distances}


@pytest.mark.parametrize("read", [lambda computation: computation, again], ids=["as built", "from a proto"])
def test_several_phases(read):
    result = read(three_phases)(COHORT)
    shifted = VALUES + 2 * VALUES.sum()
    assert float(result["total"]) == 2 * VALUES.sum()
    assert float(result["smallest"]) == shifted.min()
    np.testing.assert_array_equal(result["distances"].stacked, shifted - shifted.min())
    np.testing.assert_allclose(result["mean"], np.mean(shifted - shifted.min()), rtol=1e-6)


@fed.federated_computation(AT_CLIENTS, AT_SERVER)
def nested(values, offset):
    @fed.federated_computation(AT_CLIENTS, AT_SERVER)
    def shift(inner_values, inner_offset):
        return {
            "values": fed.federated_map(add, (inner_values, fed.federated_broadcast(inner_offset))),
            "offset": fed.federated_map(double, inner_offset),
        }

    @fed.federated_computation(np.float32)
    def four_times(x):
        return double(double(x))

    once = shift(values, offset)
    twice = shift(once["values"], once.offset)  # by name, and as an attribute
    return fed.federated_sum(twice[0]), fed.federated_map(four_times, twice[1]), fed.federated_map(four_times, values)


@pytest.mark.parametrize("read", [lambda computation: computation, again], ids=["as built", "from a proto"])
def test_computations_that_are_nested_and_called_several_times(read):
    total, offset, values = read(nested)(COHORT, 5.0)
    assert float(total) == VALUES.sum() + len(VALUES) * 15
    assert float(offset) == 80
    np.testing.assert_array_equal(values.stacked, 4 * VALUES)


def test_functions_capture_values_from_around_them():
    @fed.federated_computation(AT_CLIENTS, np.float32, np.int32)
    def capturing(values, unplaced, count):
        start = double(unplaced)
        halved = fed.jax_computation(lambda total, n: total / n, np.float32, np.int32)
        return (
            fed.federated_map(fed.federated_computation(lambda x: add(x, start), np.float32), values),
            fed.federated_aggregate(
                values,
                np.float32(0),
                add,
                add,
                fed.federated_computation(lambda total: halved(add(total, start), count), np.float32),
            ),
        )

    for computation in (capturing, again(capturing)):
        shifted, total = computation(COHORT, 3.0, 4)
        np.testing.assert_array_equal(shifted.stacked, VALUES + 6)
        assert float(total) == (VALUES.sum() + 6) / 4


def test_fields_of_federated_structs_by_name_and_by_position():
    type_ = fed.to_type([("x", np.float32), ("inner", [("n", np.int32), ("pair", (np.float32, np.float32))])])

    @fed.federated_computation(fed.FederatedType(type_, fed.CLIENTS))
    def fields(values):
        return {
            "n": fed.federated_sum(values.inner.n),
            "second": fed.federated_max(values["inner"]["pair"][1]),
            "sums": fed.federated_sum(values[1]),
        }

    values = [{"x": np.float32(i), "inner": {"n": i, "pair": (0.5, float(-i))}} for i in range(4)]
    result = fields(fed.Cohort(values, chunk_size=2))
    assert (int(result["n"]), float(result["second"])) == (6, 0)
    assert (int(result["sums"]["n"]), [float(x) for x in result["sums"]["pair"]]) == (6, [2, -6])


def test_without_arguments():
    @fed.federated_computation
    def constants():
        there = fed.federated_eval(fed.jax_computation(lambda: jnp.arange(3, dtype=jnp.float32)), fed.SERVER)
        return {
            "value": fed.federated_value(np.int8(-3), fed.SERVER),
            "mapped": fed.federated_map(fed.jax_computation(lambda x: x.sum(), (np.float32, (3,))), there),
            "everywhere": fed.federated_value(2.5, fed.CLIENTS),
            "unplaced": double(np.float32(2)),
        }

    for computation in (constants, again(constants)):
        result = computation()
        assert (int(result["value"]), result["value"].dtype) == (-3, np.int8)
        assert [float(result[name]) for name in ("mapped", "everywhere", "unplaced")] == [3, 2.5, 4]
    assert float(fed.jax_computation(lambda: jnp.float32(7))()) == 7


def test_clients_without_a_cohort_are_asked_for():
    @fed.federated_computation
    def count():
        return fed.federated_sum(fed.federated_eval(fed.jax_computation(lambda: jnp.int32(1)), fed.CLIENTS))

    with pytest.raises(CohortError, match=r"Add a parameter of type fed.FederatedType\(..., fed.CLIENTS\)"):
        count()


def test_what_is_equal_at_all_clients_is_computed_once():
    """`federated_map_all_equal`, which Python's operators never emit."""
    parameter = framework.Reference("x", AT_SERVER)
    function = framework.ComputationBuildingBlock.from_proto(double.to_proto())
    mapped = framework.create_federated_map_all_equal(function, framework.create_federated_broadcast(parameter))
    computation = framework.ConcreteComputation.from_building_block(framework.Lambda("x", AT_SERVER, mapped))
    assert computation.type_signature.result.all_equal
    assert float(computation(np.float32(4))) == 8  # one value, and no cohort is needed


def test_every_reduction_of_what_all_clients_share():
    @fed.federated_computation(AT_CLIENTS)
    def shared(values):
        constant = fed.federated_value(np.int32(3), fed.CLIENTS)
        mean = fed.federated_broadcast(fed.federated_mean(values))
        return {
            "secure": fed.federated_secure_sum(constant, 3),
            "largest": fed.federated_max(mean),
            "aggregate": fed.federated_aggregate(mean, np.float32(0), add, add, identity),
        }

    result = shared(COHORT)
    assert int(result["secure"]) == 3 * len(VALUES)
    np.testing.assert_allclose(float(result["largest"]), VALUES.mean(), rtol=1e-6)
    np.testing.assert_allclose(float(result["aggregate"]), VALUES.sum(), rtol=1e-6)


def test_an_intrinsic_that_no_one_knows_is_refused_by_name():
    parameter = framework.Reference("x", AT_CLIENTS)
    unknown = framework.Intrinsic("federated_median", fed.FunctionType(AT_CLIENTS, AT_SERVER))
    computation = framework.ConcreteComputation.from_building_block(
        framework.Lambda("x", AT_CLIENTS, framework.Call(unknown, parameter))
    )
    with pytest.raises(UnsupportedError, match="an intrinsic that fedlens executes, found 'federated_median'"):
        computation(COHORT)
