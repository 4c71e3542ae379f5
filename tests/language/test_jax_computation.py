"""Local computations: typed by abstract evaluation, called at the top or inside of federated computations."""

import collections
import threading
from typing import Any, NamedTuple

import federated_language as fl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated_language import framework

import fedlens as fed
from fedlens import trees
from fedlens.errors import LanguageError, StructureError, UnsupportedError

VECTOR = fed.TensorType(np.float32, (3,))


class Pair(NamedTuple):
    left: Any
    right: Any


@pytest.fixture(autouse=True)
def _on_every_engine(engine):
    with fed.use(engine):
        yield


def test_with_types_it_is_concrete():
    @fed.jax_computation(VECTOR)
    def norm(vector):
        return jnp.linalg.norm(vector)

    assert str(norm.type_signature) == "(float32[3] -> float32)"
    np.testing.assert_allclose(norm(np.array([2, 3, 6], np.float32)), 7.0, rtol=1e-6)


def test_several_arguments_are_passed_by_position_or_by_name():
    @fed.jax_computation(VECTOR, np.float32)
    def scaled(vector, factor):
        return vector * factor

    assert str(scaled.type_signature) == "(<vector=float32[3],factor=float32> -> float32[3])"
    vector = np.array([1, 2, 3], np.float32)
    for result in (scaled(vector, 2.0), scaled(vector, factor=2.0), scaled(factor=2.0, vector=vector)):
        np.testing.assert_array_equal(result, [2, 4, 6])


def test_without_types_it_is_polymorphic():
    @fed.jax_computation
    def doubled(tree):
        return trees.map(lambda leaf: leaf + leaf, tree)

    assert isinstance(doubled, framework.PolymorphicComputation)
    assert doubled(3) == 6
    assert doubled(jnp.float32(0.5)) == 1.0
    np.testing.assert_array_equal(doubled({"z": np.ones(2, np.float32), "a": 1})["z"], [2, 2])
    assert list(doubled({"z": 1, "a": 2})) == ["z", "a"]
    assert doubled(np.int64(2**40)) == 2**41


def test_one_argument_takes_several_types_as_a_tuple():
    difference = fed.jax_computation(lambda pair: pair[0] - pair[1], [np.float32, np.float32])
    assert difference(3.0, 1.0) == 2.0


def test_without_arguments():
    @fed.jax_computation
    def answer():
        return Pair(42, {"z": 0.5, "a": jnp.ones(2)})

    assert str(answer.type_signature) == "( -> <left=int32,right=<z=float32,a=float32[2]>>)"
    result = answer()
    assert isinstance(result, Pair)
    assert result.left == 42
    assert list(result.right) == ["z", "a"]
    np.testing.assert_array_equal(result.right["a"], [1, 1])


def test_the_function_sees_its_containers():
    seen = []

    @fed.jax_computation
    def swap(pair):
        seen.append(type(pair))
        return collections.OrderedDict(z=pair.right, a=pair.left)

    result = swap(Pair(1.0, np.arange(2)))
    assert set(seen) == {Pair}
    assert type(result) is collections.OrderedDict
    assert list(result) == ["z", "a"]
    np.testing.assert_array_equal(result["z"], [0, 1])


def test_arguments_are_jax_arrays_on_every_engine():
    @fed.jax_computation
    def first_replaced(vector):
        return vector.at[0].set(9.0)

    np.testing.assert_array_equal(first_replaced(np.zeros(2, np.float32)), [9.0, 0.0])


def test_64_bit_arguments_are_exact_and_others_stay_narrow():
    @fed.jax_computation(np.int64, np.float64)
    def wide(count, ratio):
        return count * count, ratio / 3, jnp.float32(1)

    count, third, narrow = wide(2**31 - 1, 1.0)
    assert (count, third) == ((2**31 - 1) ** 2, 1 / 3)
    assert narrow.dtype == np.float32
    narrow_computation = fed.jax_computation(lambda x: jnp.arange(3) + x, np.int32)
    assert str(narrow_computation.type_signature) == "(int32 -> int32[3])"
    assert not jax.config.jax_enable_x64


def test_64_bit_constants_are_exact():
    assert fed.jax_computation(lambda: 2**40)() == 2**40
    assert fed.jax_computation(lambda: -(2**40))() == -(2**40)
    assert fed.jax_computation(lambda x: (x, np.int64(2**40)), np.int32)(1)[1] == 2**40
    assert fed.jax_computation(lambda: np.float64(0.1))() == 0.1


def test_complex_and_16_bit_numbers():
    assert fed.jax_computation(lambda z: z * z, np.complex64)(1j) == -1
    half = fed.jax_computation(lambda x: x + x, np.float16)(np.float16(0.25))
    assert (half, half.dtype) == (0.5, np.float16)


def test_it_can_be_called_inside_a_federated_computation():
    add = fed.jax_computation(lambda x, y: x + y, np.int32, np.int32)

    @fed.federated_computation(np.int32)
    def thrice(x):
        return add(add(x, x), x)

    assert thrice(5) == 15


def test_it_can_be_called_from_any_thread():
    results = []
    double = fed.jax_computation(lambda x: x + x, np.int32)
    thread = threading.Thread(target=lambda: results.append(int(double(4))))
    thread.start()
    thread.join()
    assert results == [8]


def test_a_computation_from_proto_bytes_of_this_process_runs():
    double = fed.jax_computation(lambda x: x + x, np.int32)
    proto = type(double.to_proto()).FromString(double.to_proto().SerializeToString())
    assert framework.ConcreteComputation.from_proto(proto)(4) == 8


def test_a_payload_of_another_process_is_refused():
    proto = fed.jax_computation(lambda x: x, np.int32).to_proto()
    other = type(proto)()
    other.CopyFrom(proto)
    other.xla.hlo_module.value = b"f-123456789"
    with pytest.raises(UnsupportedError, match=r"'f-123456789'.*Build the computation again"):
        framework.ConcreteComputation.from_proto(other)(4)


def test_a_payload_of_another_runtime_is_refused():
    proto = fed.jax_computation(lambda x: x, np.int32).to_proto()
    other = type(proto)(type=proto.type)
    other.xla.hlo_module.type_url = "type.googleapis.com/xla.HloModuleProto"
    with pytest.raises(UnsupportedError, match="found a payload of kind 'xla'"):
        framework.ConcreteComputation.from_proto(other)(4)


def test_a_wrong_argument_is_refused_with_its_path():
    total = fed.jax_computation(lambda tree: tree["w"], [("w", VECTOR)])
    with pytest.raises(StructureError, match=r"float32\[3\] at 'w', found float32\[2\], in the argument arg"):
        total({"w": np.zeros(2, np.float32)})


@pytest.mark.parametrize("nothing", [lambda: None, dict, lambda: {"a": None}])
def test_a_computation_returns_an_array(nothing):
    with pytest.raises(LanguageError, match="at least one array"):
        fed.jax_computation(lambda: nothing())


def test_a_result_that_is_no_array_is_refused():
    with pytest.raises(StructureError, match="found object"):
        fed.jax_computation(lambda: object())


def test_a_sequence_is_not_returned():
    for function in (lambda batches: batches, lambda batches: {"a": [batches.sum(), batches]}):
        with pytest.raises(LanguageError, match=r"Fold it with sequence\.reduce"):
            fed.jax_computation(function, fed.SequenceType(np.float32))


def test_results_of_unknown_size_are_refused():
    with pytest.raises(fed.LanguageError, match=r"Expected 'f' .* undefined dimensions .*float32\[\?,2\], found"):

        @fed.jax_computation(fed.TensorType(np.float32, (None, 2)))
        def f(x):
            return x


def test_strings_are_refused():
    with pytest.raises(UnsupportedError, match=r"numbers as arguments .* found str"):
        fed.jax_computation(lambda x: x, fl.TensorType(np.str_))


def test_an_error_of_the_function_is_the_users_own():
    def broken(x):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        fed.jax_computation(broken, np.int32)


def test_too_few_fields_for_the_arguments():
    with pytest.raises(TypeError, match="parameter"):
        fed.jax_computation(lambda x, y: x, [np.int32, np.int32, np.int32])


def test_batch_type_adds_a_leading_dimension_and_a_mask():
    element = fed.type_of({"x": np.zeros(4, np.float32), "y": 1})
    assert str(fed.batch_type(element, 20)) == "<x=float32[20,4],y=int32[20],mask=bool[20]>"
    with pytest.raises(LanguageError, match="at least 1, found 0"):
        fed.batch_type(element, 0)
