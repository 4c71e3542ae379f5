"""Portable computations: what runs from proto bytes alone equals the original; what cannot travel is refused."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated_language.proto import computation_pb2
from flax import linen as nn
from jax import export
from safetensors.numpy import load_file, save_file

import fedlens as fed
from fedlens.language.local_computation import from_proto
from fedlens.language.portable_payload import decode
from fedlens.language.sequence import Sequence, SequenceLayout
from fedlens.learning import build_weighted_fed_avg
from fedlens.learning.randomness import client_keys
from fedlens.runtime import Examples, Local, convolution

ELEMENT = fed.type_of({"x": np.zeros(4, np.float32), "y": np.int32(0)})
LENGTHS = np.array([7, 0, 4, 1, 11])
IDS = [f"client {number}" for number in range(len(LENGTHS))]
WEIGHTS = fed.type_of({"dense": {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}})


def from_bytes(data):
    return fed.framework.ConcreteComputation.from_proto(computation_pb2.Computation.FromString(data))


def to_bytes(computation):
    return computation.to_proto().SerializeToString(deterministic=True)


def portable(computation):
    """The computation as another process gets it: from bytes."""
    return from_bytes(to_bytes(fed.to_portable(computation)))


def payload_of(computation):
    """The payload of a computation that is one local computation."""
    return decode(computation.to_proto().xla.hlo_module.value)


def arrays():
    """All numbers that the computations below are called with, as named arrays."""
    random = np.random.default_rng(0)
    rows = int(LENGTHS.sum())
    return {
        "kernel": random.normal(size=(len(IDS), 3, 2)).astype(np.float32),
        "bias": random.normal(size=(len(IDS), 2)).astype(np.float32),
        "number": np.array([2**40, 3, -(2**50), 5, 7]),
        "x": random.normal(size=(rows, 4)).astype(np.float32),
        "y": random.integers(0, 3, rows).astype(np.int32),
        "lengths": LENGTHS,
    }


def argument_of(name, arrays, cohort_of, examples_of):
    """The arguments of one of the computations below; a child process has this function's source, and no other."""
    ids = [f"client {number}" for number in range(len(arrays["lengths"]))]
    if name == "mean of processed weights":
        pairs = zip(arrays["kernel"], arrays["bias"], strict=True)
        values = [{"dense": {"kernel": kernel, "bias": bias}} for kernel, bias in pairs]
        return [cohort_of(dict(zip(ids, values, strict=True)))]
    if name in ("int64", "two phases"):
        column = arrays["number"] if name == "int64" else arrays["kernel"]
        return [cohort_of(dict(zip(ids, column, strict=True)))]
    lengths = arrays["lengths"]
    cohort = examples_of(ids, {"x": arrays["x"], "y": arrays["y"]}, lengths.cumsum() - lengths, lengths)
    dense = [{"bias": arrays[f"{i}/bias"], "kernel": arrays[f"{i}/kernel"]} for i in range(2)]
    weights = {"Dense_0": dense[0], "Dense_1": dense[1]}
    state = {"weights": weights, "optimizer_state": ((), ()), "round": arrays["round"], "key": arrays["key"]}
    return [state, cohort_of(dict(zip(ids, arrays["keys"], strict=True))), cohort]


def examples_of(ids, columns, starts, lengths):
    return fed.Cohort.from_examples(ids, Examples(columns, starts, lengths))


CHILD = """
import pathlib, sys
import numpy as np
from federated_language.proto import computation_pb2
from safetensors.numpy import load_file, save_file
import fedlens as fed
from fedlens.runtime import Examples

def examples_of(ids, columns, starts, lengths):
    return fed.Cohort.from_examples(ids, Examples(columns, starts, lengths))

folder = pathlib.Path(sys.argv[1])
arrays = load_file(folder / "arguments.safetensors")
for path in sorted(folder.glob("*.pb")):
    computation = fed.framework.ConcreteComputation.from_proto(
        computation_pb2.Computation.FromString(path.read_bytes()))
    argument = argument_of(path.stem, arrays, fed.Cohort, examples_of)
    for engine in ("local", "debug") if path.stem != "fed avg" else ("local",):
        with fed.use(engine):
            result = computation(*argument)
        leaves = {name or "value": np.asarray(leaf) for name, leaf in fed.trees.items(result)}
        save_file(leaves, folder / f"{path.stem} {engine}.safetensors")
try:
    fed.framework.ConcreteComputation.from_proto(
        computation_pb2.Computation.FromString((folder / "original.bytes").read_bytes()))(4)
except fed.UnsupportedError as error:
    print(error)
"""


class TwoLayers(nn.Module):
    """A small network."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


def to_unit_norm(weights):
    norm = optax.tree.norm(weights)
    return jax.tree.map(lambda leaf: leaf / norm, weights)


def computations():
    """name -> computation, and what it needs beside `arrays`."""

    @fed.federated_computation(fed.FederatedType(WEIGHTS, fed.CLIENTS))
    def mean_of_processed(weights):
        return {"mean": fed.federated_mean(fed.federated_map(to_unit_norm, weights))}

    @fed.federated_computation(fed.FederatedType(np.int64, fed.CLIENTS))
    def int64(number):
        return fed.federated_sum(fed.federated_map(lambda value: value * 3 + 2**41, number))

    @fed.federated_computation(fed.FederatedType(fed.TensorType(np.float32, (3, 2)), fed.CLIENTS))
    def two_phases(kernel):
        center = fed.federated_broadcast(fed.federated_mean(kernel))
        square = fed.federated_map(lambda kernel, center: (kernel - center) ** 2, (kernel, center))
        return fed.federated_map(lambda mean: jnp.sqrt(mean), fed.federated_mean(square))

    model = fed.models.from_flax(TwoLayers(), inputs=ELEMENT, loss=fed.losses.cross_entropy)
    process = build_weighted_fed_avg(model, optax.sgd(0.1), batch_size=3, epochs=2)
    state = process.initialize(4)
    keys = client_keys(np.asarray(state.key), int(state.round), IDS)
    more = {"round": state.round, "key": state.key, "keys": keys}
    for number, layer in enumerate(("Dense_0", "Dense_1")):
        more |= {f"{number}/{name}": leaf for name, leaf in state.weights[layer].items()}
    return {
        "mean of processed weights": mean_of_processed,
        "int64": int64,
        "two phases": two_phases,
        "fed avg": process.next_computation,
    }, {name: np.asarray(leaf) for name, leaf in more.items()}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert (found[name].dtype, found[name].shape) == (leaf.dtype, leaf.shape), name
        if leaf.dtype.kind in "iub":
            np.testing.assert_array_equal(found[name], leaf)
        else:
            assert np.linalg.norm(found[name] - leaf) <= 1e-5 * np.linalg.norm(leaf), name


def leaves_of(result):
    return {name or "value": np.asarray(leaf) for name, leaf in fed.trees.items(result)}


def test_a_fresh_process_computes_the_same_from_bytes_alone(tmp_path):
    by_name, more = computations()
    values = arrays() | more
    save_file(values, tmp_path / "arguments.safetensors")
    for name, computation in by_name.items():
        (tmp_path / f"{name}.pb").write_bytes(to_bytes(fed.to_portable(computation)))
    (tmp_path / "original.bytes").write_bytes(to_bytes(fed.jax_computation(lambda x: x, np.int32)))
    script = inspect.getsource(argument_of) + CHILD
    child = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert "made in this process" in child.stdout
    assert "fed.to_portable" in child.stdout
    for name, computation in by_name.items():
        expected = leaves_of(computation(*argument_of(name, values, fed.Cohort, examples_of)))
        for engine in ("local", "debug") if name != "fed avg" else ("local",):  # each costs a second of compiling
            assert_close(load_file(tmp_path / f"{name} {engine}.safetensors"), expected)
    # And against NumPy, so that equal does not mean equally wrong.
    result = load_file(tmp_path / "int64 local.safetensors")["value"]
    assert int(result) == int((values["number"] * 3 + 2**41).sum())
    result = load_file(tmp_path / "two phases local.safetensors")["value"]
    np.testing.assert_allclose(result, values["kernel"].std(axis=0), rtol=1e-5)


def _ordered_sum(batches):
    """Depends on which rows there are, in which order, which of them fill up a batch, and on their batches."""
    shuffled = batches.shuffle(jax.random.key(5, impl="threefry2x32"))

    def step(state, batch):
        mask = batch.get("mask", jnp.ones(batch["y"].shape, bool))
        return state * np.uint32(31) + jnp.where(mask, batch["y"], 0).sum().astype(jnp.uint32)

    return shuffled.reduce(jnp.uint32(1), step), batches.num_batches


def _cohort(form, lengths):
    columns = {"y": np.arange(sum(lengths), dtype=np.int32)}
    if form == "rows":
        columns["mask"] = columns["y"] % 3 > 0
    ends = np.cumsum(lengths)
    if form == "batches":
        batch = {"y": np.arange(3, dtype=np.int32), "mask": np.array([True, True, False])}
        return fed.Cohort([[{**batch, "y": batch["y"] * k + n} for k in range(n)] for n in lengths])
    ids = [f"c{number}" for number in range(len(lengths))]
    return fed.Cohort.from_examples(ids, Examples(columns, ends - lengths, np.array(lengths)))


SEQUENCE = fed.SequenceType(fed.batch_type(fed.StructType([("y", np.int32)]), 3))


@pytest.fixture(scope="module")
def folds():
    """A fold over a client's batches that depends on all there is to a sequence, and its portable form."""

    @fed.federated_computation(fed.FederatedType(SEQUENCE, fed.CLIENTS))
    def fold(data):
        return fed.federated_map(_ordered_sum, data)

    return fold, portable(fold)


@pytest.mark.parametrize(
    ("form", "cohorts"),
    [
        ("masked rows", [[5, 0, 3, 1], [40, 2]]),
        ("rows", [[6, 0, 39]]),
        ("batches", [[2, 0, 9]]),
    ],
)
def test_one_program_serves_cohorts_of_any_size_in_every_form(two_devices, folds, form, cohorts):
    fold, travelled = folds
    for lengths in cohorts:
        cohort = _cohort(form, lengths)
        with fed.use(two_devices):
            found = [tuple(map(int, value)) for value in travelled(cohort)]
        with fed.use("debug"):
            assert found == [tuple(map(int, value)) for value in fold(cohort)]


def test_the_debug_engine_reads_sequences_too(folds):
    fold, travelled = folds
    with fed.use("debug"):
        cohort = _cohort("masked rows", [5, 0, 7])
        assert [jax.tree.map(int, value) for value in travelled(cohort)] == [
            jax.tree.map(int, value) for value in fold(cohort)
        ]


def test_two_sequences_of_different_forms(two_devices):
    def total(batches):
        return batches.reduce(jnp.int32(0), lambda state, batch: state + (batch["y"] * batch["mask"]).sum())

    @fed.federated_computation(fed.FederatedType(SEQUENCE, fed.CLIENTS), fed.FederatedType(SEQUENCE, fed.CLIENTS))
    def totals(first, second):
        return fed.federated_map(lambda first, second: (total(first), total(second)), (first, second))

    rows, batches = _cohort("masked rows", [5, 4]), _cohort("batches", [1, 2])
    with fed.use(two_devices):
        found = portable(totals)(rows, fed.Cohort(dict(zip(rows.ids, batches.source, strict=True))))
    # Rows are 0, 1, 2, ...; the two masked ones of three in a list's batch k of n are n and k + n.
    assert [jax.tree.map(int, value) for value in found] == [(0 + 1 + 2 + 3 + 4, 1 + 1), (5 + 6 + 7 + 8, 2 + 2 + 2 + 3)]


def test_functions_that_intrinsics_take_travel_too(two_devices):
    scale = fed.jax_computation(lambda value, key: value * key.astype(jnp.float32), [np.float32, np.int32])
    add = fed.jax_computation(lambda first, second: first + second, [np.float32, np.float32])
    fold = fed.jax_computation(
        lambda values: values.reduce(jnp.float32(0), lambda state, value: 2 * state + value),
        fed.SequenceType(np.float32),
    )

    @fed.federated_computation(
        fed.FederatedType(fed.TensorType(np.int32, (3,)), fed.CLIENTS),
        fed.FederatedType(np.int32, fed.SERVER),
        fed.FederatedType(np.float32, fed.SERVER),
    )
    def total(keys, max_key, value):
        folded = fed.federated_map(fold, fed.federated_select(keys, max_key, value, scale))
        return fed.federated_aggregate(folded, np.float32(0), add, add, fed.jax_computation(lambda x: -x, np.float32))

    keys = [np.array(of_client, np.int32) for of_client in ([1, 2, 0], [3, 3, 3], [0, 0, 1])]
    with fed.use(two_devices):
        found = portable(total)(fed.Cohort(keys), np.int32(4), np.float32(10))
    assert float(found) == -10 * sum(4 * a + 2 * b + c for a, b, c in keys)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_a_mapped_sequence_is_computed_before_the_program_reads_it(traced):
    element = fed.StructType([("y", fed.TensorType(np.int32, (3,)))])
    fold = fed.jax_computation(
        lambda batches: batches.reduce(jnp.int32(1), lambda state, batch: 7 * state + batch["y"].sum()),
        fed.SequenceType(element),
    )
    local = from_proto(fed.to_portable(fold).to_proto())
    rows = (jnp.arange(10, dtype=jnp.int32),)

    def run(start, num_rows):
        layout = SequenceLayout(element, rows_per_batch=3, masked=False, max_rows=7)
        sequence = Sequence(rows, start, num_rows, None, layout).map(lambda batch: {"y": batch["y"] ** 2})
        return local(sequence)

    found = jax.jit(run)(jnp.int32(2), jnp.int32(6)) if traced else run(2, 6)
    first, second = (sum(y**2 for y in ys) for ys in ((2, 3, 4), (5, 6, 7)))
    assert int(found) == 7 * (7 + first) + second


def test_clients_computed_side_by_side_give_the_same(folds):
    fold, travelled = folds
    cohort = _cohort("masked rows", [5, 0, 7])
    with fed.use(Local(jax.local_devices()[:1], clients_per_step=2)):
        found = [jax.tree.map(int, value) for value in travelled(cohort)]
    with fed.use("debug"):
        assert found == [jax.tree.map(int, value) for value in fold(cohort)]


DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES += ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]


@pytest.mark.parametrize("wide", [False, True])
def test_dtypes_and_64_bits_are_kept(engine, wide):
    names = [name for name in DTYPES if wide or jnp.dtype(name) not in map(np.dtype, "qQdD")]
    value = {name: np.array([[0, 1, 1]]).astype(jnp.dtype(name)) for name in names}
    if wide:
        value["int64"] += 2**60
    travelled = portable(
        fed.jax_computation(lambda tree: {name: tree[name].ravel() for name in tree}, fed.type_of(value))
    )
    with fed.use(engine):
        result = travelled(value)
    assert list(result) == names  # in the order of the type, in a dict
    for name in names:
        np.testing.assert_array_equal(np.asarray(result[name]), value[name].ravel(), strict=True)
    assert payload_of(travelled).wide == wide


def test_containers_stay_here_and_become_dicts_and_tuples_from_bytes():
    make = fed.jax_computation(lambda x: {"list": [x, x + 1], "nested": {"b": x, "a": (x,)}}, np.float32)
    assert fed.to_portable(make)(1.0) == {"list": [1, 2], "nested": {"b": 1, "a": (1,)}}
    assert portable(make)(1.0) == {"list": (1, 2), "nested": {"b": 1, "a": (1,)}}
    assert portable(fed.jax_computation(lambda: 3))() == 3


def test_what_is_portable_stays_as_it_is_and_is_read_once():
    double = fed.jax_computation(lambda x: x + x, np.int32)
    once = fed.to_portable(double)
    assert to_bytes(fed.to_portable(once)) == to_bytes(once)

    @fed.federated_computation(fed.FederatedType(np.int32, fed.CLIENTS))
    def quadruple(x):
        return fed.federated_map(double, fed.federated_map(once, x))

    twice = portable(quadruple)
    assert list(twice(fed.Cohort([np.int32(3)]))) == [12]
    assert to_bytes(fed.to_portable(twice)) == to_bytes(twice)
    assert from_proto(once.to_proto()) is from_proto(computation_pb2.Computation.FromString(to_bytes(once)))


def test_programs_are_for_the_platforms_asked_for_and_lowered_as_jax_does():
    convolution.install()
    images, kernel = fed.TensorType(np.float32, (1, 1, 6, 6)), fed.TensorType(np.float32, (2, 1, 3, 3))
    convolve = fed.jax_computation(lambda x, w: jax.lax.conv(x, w, (1, 1), "VALID"), [images, kernel])
    for options, platforms in (({}, ("cpu", "cuda")), ({"platforms": ["cpu"]}, ("cpu",))):
        program = export.deserialize(bytearray(payload_of(fed.to_portable(convolve, **options)).programs[""]))
        assert program.platforms == platforms
        assert "stablehlo.convolution" in program.mlir_module()
