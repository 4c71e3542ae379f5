"""What cannot travel, and bytes that were not made by `to_portable`, are refused."""

import jax
import numpy as np
import pytest
from federated_language.proto import computation_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

import fedlens as fed
from fedlens.errors import LanguageError, UnsupportedError
from fedlens.language.local_computation import abstract_value, from_proto
from fedlens.language.portable_payload import Payload, decode, encode

DOUBLE = fed.jax_computation(lambda x: x + x, np.int32)
PORTABLE_DOUBLE = fed.to_portable(DOUBLE).to_proto()
PAYLOAD = PORTABLE_DOUBLE.xla.hlo_module.value


def payload_of(computation):
    """The payload of a computation that is one local computation."""
    return decode(computation.to_proto().xla.hlo_module.value)


def doubling(payload):
    """The portable form of `DOUBLE` with other payload bytes, read as an engine reads it."""
    proto = computation_pb2.Computation()
    proto.CopyFrom(PORTABLE_DOUBLE)
    proto.xla.hlo_module.value = payload
    return from_proto(proto)


def test_what_calls_back_into_python_is_refused_by_name():
    def print_it(x):
        jax.debug.print("{}", x)
        return x

    def call_numpy(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), np.float32), x)

    for function, name in ((print_it, "print_it"), (call_numpy, "call_numpy")):
        with pytest.raises(UnsupportedError, match=rf"cpu and cuda, found '{name}'.*cannot travel"):
            fed.to_portable(fed.jax_computation(function, np.float32))


def test_python_and_undefined_dimensions_are_refused_by_name():
    @fed.python_computation(np.float32, np.float32)
    def median(x):
        return x

    @fed.federated_computation(fed.FederatedType(np.float32, fed.CLIENTS))
    def mean_of_medians(x):
        return fed.federated_mean(fed.federated_map(median, x))

    with pytest.raises(UnsupportedError, match="found the Python computation 'median'"):
        fed.to_portable(mean_of_medians)

    def total(x):
        return x.sum()

    with pytest.raises(UnsupportedError, match=r"known shape.*found float32\[\?,2\] in 'total'"):
        fed.to_portable(fed.jax_computation(total, fed.TensorType(np.float32, (None, 2))))


def test_a_computation_without_types_is_refused():
    with pytest.raises(LanguageError, match="concrete types, found PolymorphicComputation"):
        fed.to_portable(fed.jax_computation(lambda x: x))


@settings(max_examples=40)
@given(st.integers(0, len(PAYLOAD) - 1), st.integers(1, 255))
def test_any_changed_byte_is_found(position, change):
    damaged = bytearray(PAYLOAD)
    damaged[position] ^= change
    with pytest.raises(UnsupportedError, match="checksum differs"):
        doubling(bytes(damaged))


@settings(max_examples=40)
@given(st.binary(max_size=40) | st.integers(0, len(PAYLOAD) - 1).map(lambda end: PAYLOAD[:end]))
def test_foreign_and_cut_bytes_are_refused(value):
    with pytest.raises(UnsupportedError, match="checksum differs"):
        doubling(value)


def test_bytes_that_only_pass_the_checksum_are_refused():
    """A checksum can be made by anybody."""
    import hashlib

    for body in (b"", b"\xff\xff\xff\xff", b"\x02\x00\x00\x00[]", b'\x0a\x00\x00\x00{"format":', b"\x02\x00\x00\x00{}"):
        with pytest.raises(UnsupportedError, match="Expected the header of a portable computation"):
            doubling(hashlib.blake2b(body, digest_size=16).digest() + body)
    body = b'\x0c\x00\x00\x00{"format":2}'
    with pytest.raises(UnsupportedError, match=r"format 1, found format 2\. Update fedlens"):
        doubling(hashlib.blake2b(body, digest_size=16).digest() + body)


def test_a_program_of_another_jax_is_refused_with_both_versions(monkeypatch):
    garbage = encode(Payload("double", False, {"": b"not an exported program"}, "99.1"))
    with pytest.raises(UnsupportedError, match=rf"that JAX {jax.__version__} reads.*'double'.*JAX 99\.1.*Update JAX"):
        doubling(garbage)
    other = fed.jax_computation(lambda x: x + 17, np.int32)
    proto = fed.to_portable(other).to_proto()
    travelled = fed.framework.ConcreteComputation.from_proto(proto)
    monkeypatch.setattr(export, "maximum_supported_calling_convention_version", 1)
    with pytest.raises(UnsupportedError, match=r"calling convention \d+ is newer than 1"):
        travelled(4)


def test_a_program_that_does_not_fit_its_type_is_refused():
    of_floats = payload_of(fed.to_portable(fed.jax_computation(lambda x: x, np.float32)))
    with pytest.raises(UnsupportedError, match=r"\['int32\[\]'\].*found \['float32\[\]'\]"):
        doubling(encode(of_floats))
    with pytest.raises(UnsupportedError, match="Expected the portable computation 'double' to fit its type"):
        doubling(encode(Payload("double", False, {"rows": b""})))


def test_a_program_that_calls_python_through_a_custom_call_is_refused():
    target = "xla_ffi_python_cpu_callback"

    def call(x):
        return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((), np.int32))(x, index=np.uint64(0))

    exporting = export.export(
        jax.jit(call), platforms=["cpu"], disabled_checks=[export.DisabledSafetyCheck.custom_call(target)]
    )
    program = bytes(exporting(abstract_value(fed.TensorType(np.int32))).serialize())
    with pytest.raises(UnsupportedError, match=f"StableHLO alone, found 'double'.*{target}"):
        doubling(encode(Payload("double", False, {"": program})))
