"""What every engine computes, against NumPy in float64: with any chunk size, again and again, for any client order."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fedlens as fed
from fedlens.errors import NonFiniteError
from fedlens.runtime import Context


class Layer(NamedTuple):
    kernel: Any
    bias: Any


CLIENTS = 7
rng = np.random.default_rng(7)
WEIGHTS = [
    {
        "dense": Layer(rng.normal(size=(3, 2)).astype(np.float32), rng.normal(size=2).astype(np.float32)),
        "a": [i, 0.5 * i],
    }
    for i in range(CLIENTS)
]
MODEL = fed.type_of({"dense": Layer(WEIGHTS[0]["dense"].kernel, WEIGHTS[0]["dense"].bias), "a": [0.5]})
MODELS = [{"dense": each["dense"], "a": [each["a"][1]]} for each in WEIGHTS]
IDS = [f"client {i}" for i in range(CLIENTS)]
KERNELS = np.stack([each["dense"].kernel for each in MODELS]).astype(np.float64)
NUMBERS = np.array([3, 0, 1, 2_000_000_000, 2_000_000_000, 5, 2_000_000_000])  # their sum overflows int32

AT_CLIENTS = fed.FederatedType(np.float32, fed.CLIENTS)
MODELS_AT_CLIENTS = fed.FederatedType(MODEL, fed.CLIENTS)


@pytest.fixture(params=[None, 1, 3], ids="chunks of {}".format)
def chunk_size(request):
    return request.param


@pytest.fixture(autouse=True)
def _on_every_engine(engine):
    with fed.use(engine):
        yield


def assert_close(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.fixture
def models(chunk_size):
    return fed.Cohort(dict(zip(IDS, MODELS, strict=True)), chunk_size=chunk_size)


@fed.federated_computation(fed.FederatedType(fed.type_of(WEIGHTS[0]), fed.CLIENTS))
def sum_of(values):
    return fed.federated_sum(values)


@fed.federated_computation(MODELS_AT_CLIENTS)
def mean_of(values):
    return fed.federated_mean(values)


@fed.federated_computation(MODELS_AT_CLIENTS, fed.FederatedType(np.int32, fed.CLIENTS))
def mean_by_count(values, counts):
    return fed.federated_mean(values, counts)


@fed.federated_computation(MODELS_AT_CLIENTS, AT_CLIENTS)
def mean_by_weight(values, weights):
    return fed.federated_mean(values, weights)


@fed.federated_computation(AT_CLIENTS)
def mean_and_distances(values):
    mean = fed.federated_mean(values)
    distances = fed.federated_map(lambda x, m: x - m, (values, fed.federated_broadcast(mean)))
    variance = fed.federated_mean(fed.federated_map(lambda d: d * d, distances))
    return {"variance": variance, "mean": mean, "distances": distances}


@fed.federated_computation(MODELS_AT_CLIENTS, fed.FederatedType(fed.TensorType(np.float32, (2,)), fed.SERVER))
def trained(values, offset):
    """Something nonlinear with a broadcast, returned and averaged."""

    @fed.jax_computation
    def work(model, offset):
        hidden = jnp.tanh(model["dense"].kernel * offset + model["dense"].bias)
        return {"z": hidden @ hidden.T, "a": jnp.exp(model["a"][0] - 3)}

    results = fed.federated_map(work, (values, fed.federated_broadcast(offset)))
    return results, fed.federated_mean(results)


OFFSET = np.array([0.5, -2], np.float32)


def test_sum(chunk_size):
    result = sum_of(fed.Cohort(WEIGHTS, chunk_size=chunk_size))
    assert isinstance(result["dense"], Layer)
    assert_close(result["dense"].kernel, KERNELS.sum(0))
    assert_close(result["dense"].bias, np.sum([each["dense"].bias for each in MODELS], axis=0))
    assert result["a"] == [21, 10.5]
    assert [leaf.dtype for leaf in result["a"]] == [np.int32, np.float32]


def test_mean(models):
    result = mean_of(models)
    assert list(result) == ["dense", "a"]
    assert_close(result["dense"].kernel, KERNELS.mean(0))
    assert_close(result["a"][0], 1.5)


def test_mean_weighted_by_counts(models):
    small = np.array([1, 0, 2, 3, 4, 5, 6])
    result = mean_by_count(models, fed.Cohort(dict(zip(IDS, small.astype(np.int32), strict=True))))
    assert_close(result["dense"].kernel, np.average(KERNELS, axis=0, weights=small))


def test_counts_whose_sum_overflows_32_bits(models):
    result = mean_by_count(models, fed.Cohort(dict(zip(IDS, NUMBERS.astype(np.int32), strict=True))))
    assert_close(result["dense"].kernel, np.average(KERNELS, axis=0, weights=NUMBERS))


def test_mean_by_fractional_weights(models):
    weights = rng.uniform(size=CLIENTS).astype(np.float32)
    result = mean_by_weight(models, fed.Cohort(dict(zip(IDS, weights, strict=True))))
    assert_close(result["dense"].kernel, np.average(KERNELS, axis=0, weights=weights))


def test_a_total_weight_of_zero_is_nan(models):
    result = mean_by_weight(models, fed.Cohort(dict.fromkeys(IDS, 0.0)))
    assert np.isnan(result["dense"].kernel).all()


def test_what_clients_computed_comes_back_by_id(models):
    results, mean = trained(models, OFFSET)
    assert results.ids == tuple(IDS)
    for client_id, model in zip(IDS, MODELS, strict=True):
        hidden = np.tanh(model["dense"].kernel.astype(np.float64) * OFFSET + model["dense"].bias)
        assert_close(results[client_id]["z"], hidden @ hidden.T)
        assert_close(results[client_id]["a"], np.exp(model["a"][0] - 3))
    assert list(results[IDS[0]]) == ["z", "a"]
    assert_close(mean["z"], np.mean([result["z"] for result in results], axis=0))
    assert_close(results.stacked["a"], np.exp(0.5 * np.arange(CLIENTS) - 3))


def test_two_phases(chunk_size):
    values = np.array([1, 4, -2, 8, 0.5], np.float32)
    result = mean_and_distances(fed.Cohort(values.tolist(), chunk_size=chunk_size))
    assert_close(result["mean"], values.mean())
    assert_close(result["distances"].stacked, values - values.mean())
    assert_close(result["variance"], values.var())


def test_engines_agree(models):
    results, mean = trained(models, OFFSET)
    with fed.use("debug"):
        expected, expected_mean = trained(fed.Cohort(dict(zip(IDS, MODELS, strict=True))), OFFSET)
    for name in ("z", "a"):
        assert_close(results.stacked[name], expected.stacked[name])
        assert_close(mean[name], expected_mean[name])


def test_repetitions_are_bit_identical(models):
    first, again = (trained(models, OFFSET) for _ in range(2))
    for name in ("z", "a"):
        assert first[0].stacked[name].tobytes() == again[0].stacked[name].tobytes()
        assert np.asarray(first[1][name]).tobytes() == np.asarray(again[1][name]).tobytes()


def test_a_clients_result_does_not_depend_on_its_place(models):
    there = trained(models, OFFSET)[0]
    back = trained(fed.Cohort(dict(zip(IDS[::-1], MODELS[::-1], strict=True)), chunk_size=models.chunk_size), OFFSET)[0]
    alone = trained(fed.Cohort({IDS[2]: MODELS[2]}), OFFSET)[0]
    assert back.ids == tuple(IDS[::-1])
    for client_id in IDS:
        assert there[client_id]["z"].tobytes() == back[client_id]["z"].tobytes()
    assert there[IDS[2]]["z"].tobytes() == alone[IDS[2]]["z"].tobytes()


SPECIAL = {  # bits that arithmetic would not keep
    "float32": np.array([0x7FC12345, 0xFF812345, 0x80000000, 1], np.uint32).view(np.float32),
    "float16": np.array([0x7E12, 0xFC01, 0x8000, 1], np.uint16).view(np.float16),
    # XLA of JAX 0.10 moves bfloat16 as float32 and back, which makes one NaN of all: no payload here.
    "bfloat16": np.array([0x7FC0, 0xFF80, 0x8000, 1], np.uint16).view(ml_dtypes.bfloat16),
    "float64": np.array([0x7FF8000000012345, 0x8000000000000000, 1, 0], np.uint64).view(np.float64),
    "int64": np.array([2**63 - 1, -(2**63), -1, 2**40]),
    "uint8": np.array([0, 255, 1, 128], np.uint8),
    "bool": np.array([True, False, False, True]),
    "complex64": np.array([0x7FC1234580000000, 1], np.uint64).view(np.complex64),
}


def test_the_identity_keeps_every_bit(chunk_size):
    @fed.federated_computation(fed.FederatedType(fed.type_of(SPECIAL), fed.CLIENTS))
    def identity(values):
        return values, fed.federated_map(lambda value: value, values)

    cohort = fed.Cohort(
        {"a": SPECIAL, "b": {name: leaf[::-1] for name, leaf in SPECIAL.items()}}, chunk_size=chunk_size
    )
    for values in identity(cohort):
        for client_id, value in zip(cohort.ids, cohort.source, strict=True):
            assert list(values[client_id]) == list(SPECIAL)
            for name, leaf in value.items():
                assert values[client_id][name].dtype == leaf.dtype
                assert values[client_id][name].tobytes() == np.ascontiguousarray(leaf).tobytes()


def test_64_bit_numbers_are_exact(chunk_size):
    @fed.federated_computation(fed.FederatedType([("n", np.int64), ("x", np.float64)], fed.CLIENTS))
    def exact(values):
        return fed.federated_sum(values), fed.federated_mean(values.x), fed.federated_map(lambda v: v["n"] + 1, values)

    big = [{"n": np.int64(2**40 + i), "x": 1 + 2.0**-45 * i} for i in range(5)]
    total, mean, more = exact(fed.Cohort(big, chunk_size=chunk_size))
    assert (int(total["n"]), float(total["x"])) == (5 * 2**40 + 10, 5 + 10 * 2.0**-45)
    assert float(mean) == 1 + 2.0**-44
    assert [int(value) for value in more] == [2**40 + 1 + i for i in range(5)]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_floats_accumulate_in_32_bits(dtype, chunk_size):
    total = fed.federated_computation(lambda x: fed.federated_sum(x), fed.FederatedType(dtype, fed.CLIENTS))
    # Added up in 16 bits, 2048 + 1 is 2048 (float16), 256 + 1 is 256 (bfloat16).
    values = [dtype(2048)] + [dtype(1)] * 64
    result = total(fed.Cohort(values, chunk_size=chunk_size and 16 * chunk_size))
    assert (float(result), result.dtype) == (2112.0, dtype)
    if dtype is np.float16:  # the language refuses a mean of bfloat16
        mean = fed.federated_computation(lambda x: fed.federated_mean(x), fed.FederatedType(dtype, fed.CLIENTS))
        assert float(mean(fed.Cohort([dtype(60000)] * 4, chunk_size=chunk_size))) == 59999.0 // 32 * 32 + 32


def test_at_the_server():
    @fed.federated_computation(
        fed.FederatedType(MODEL, fed.SERVER), fed.FederatedType(np.float32, fed.SERVER), np.int32
    )
    def at_server(model, factor, unplaced):
        scaled = fed.federated_map(lambda m, f: {"z": m["dense"].kernel * f, "a": m["a"]}, (model, factor))
        return {
            "scaled": scaled,
            "constant": fed.federated_value(np.float32(2.5), fed.SERVER),
            "evaluated": fed.federated_eval(fed.jax_computation(lambda: jnp.arange(3)), fed.SERVER),
            "unplaced": unplaced,
        }

    result = at_server(MODELS[1], 2.0, 3)
    assert list(result) == ["scaled", "constant", "evaluated", "unplaced"]
    assert_close(result["scaled"]["z"], 2 * KERNELS[1])
    assert (result["scaled"]["a"], result["constant"], result["unplaced"]) == ([0.5], 2.5, 3)
    np.testing.assert_array_equal(result["evaluated"], [0, 1, 2])


def test_values_that_all_clients_share(chunk_size):
    @fed.federated_computation(AT_CLIENTS, fed.FederatedType(np.float32, fed.SERVER))
    def shared(values, at_server):
        ones = fed.federated_eval(fed.jax_computation(lambda: jnp.float32(1)), fed.CLIENTS)
        constant = fed.federated_value(np.float32(10), fed.CLIENTS)
        sent = fed.federated_broadcast(at_server)
        return {
            "clients": fed.federated_sum(ones),
            "sum of a constant": fed.federated_sum(constant),
            "mean of what was sent": fed.federated_mean(sent, values),
            "constant": constant,
            "sent": sent,
            "ones": ones,
            "mapped": fed.federated_map(lambda x: x + 1, sent),
        }

    result = shared(fed.Cohort([1.0, 2.0, 3.0, 4.0], chunk_size=chunk_size), 7.0)
    assert (result["clients"], result["sum of a constant"], result["mean of what was sent"]) == (4, 40, 7)
    assert (result["constant"], result["sent"]) == (10, 7)  # equal at all clients: one value
    assert list(result["ones"]) == [1] * 4
    assert list(result["mapped"]) == [8] * 4


def test_a_cohort_that_nothing_reads_still_says_who_takes_part(chunk_size):
    @fed.federated_computation(AT_CLIENTS)
    def count(values):
        return fed.federated_sum(fed.federated_eval(fed.jax_computation(lambda: jnp.int32(1)), fed.CLIENTS))

    assert count(fed.Cohort([0.5] * 5, chunk_size=chunk_size)) == 5


def argument(chunk_size):
    bad = {**MODELS[2], "dense": Layer(MODELS[2]["dense"].kernel * np.float32(np.nan), MODELS[2]["dense"].bias)}
    worse = {**MODELS[5], "a": [float("inf")]}
    values = [*MODELS[:2], bad, *MODELS[3:5], worse, MODELS[6]]
    return fed.Cohort(dict(zip(IDS, values, strict=True)), chunk_size=chunk_size)


def test_a_client_that_is_not_finite_is_named(engine, chunk_size):
    with pytest.raises(NonFiniteError, match=r"in client 'client 2', leaf 'dense/kernel', client stage 0"):
        Context(engine).run(mean_of, argument(chunk_size), on_nonfinite="raise")


def test_clients_that_are_not_finite_are_left_out_and_counted(engine, chunk_size):
    outcome = Context(engine).run(mean_of, argument(chunk_size), on_nonfinite="drop")
    assert outcome.dropped == ("client 2", "client 5")
    assert_close(outcome.value["dense"].kernel, KERNELS[[0, 1, 3, 4, 6]].mean(0))
    assert_close(outcome.value["a"][0], np.mean([0, 0.5, 1.5, 2, 3]))


def test_infinities_pass_unless_they_are_looked_for(engine, chunk_size):
    outcome = Context(engine).run(mean_of, argument(chunk_size), on_nonfinite="ignore")
    assert outcome.dropped == ()
    assert np.isnan(outcome.value["dense"].kernel).all()
    assert np.isinf(outcome.value["a"][0])
    assert_close(outcome.value["dense"].bias, np.mean([each["dense"].bias for each in MODELS], axis=0))
