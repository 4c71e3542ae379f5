"""Encodings: how far what comes back is from what was stored, how many bytes that took, and what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedlens.errors import LedgerError
from fedlens.ledger import ClientPart, LedgerWriter, RoundRecord, encodings

FLOATS = ["float16", "bfloat16", "float32", "float64"]
# Half a step of bfloat16's 8 bits, relative; a last place of each dtype, relative.
BF16 = 2.0**-8
LAST = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


def dtype_of(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def leaves(name: str) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    """Some clients' leaf and the global one, of ordinary size."""
    numbers = st.floats(-1e4, 1e4, width=16)

    def pair(sizes: tuple[int, int]) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
        clients, size = sizes
        return st.tuples(
            hnp.arrays(np.float64, (clients, size), elements=numbers), hnp.arrays(np.float64, size, elements=numbers)
        ).map(lambda both: tuple(array.astype(dtype_of(name)) for array in both))

    return st.tuples(st.integers(1, 3), st.integers(0, 6)).flatmap(pair)


@pytest.mark.parametrize("name", FLOATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bf16_delta_is_within_what_it_says(name, data):
    local, reference = data.draw(leaves(name))
    stored, scales = encodings.encode(local, reference, "bf16-delta")
    assert (stored.dtype, stored.shape, scales) == (dtype_of("bfloat16"), local.shape, None)
    found = encodings.decode(stored, reference, "bf16-delta")
    assert (found.dtype, found.shape) == (local.dtype, local.shape)
    delta = np.abs(local.astype(np.float64) - reference.astype(np.float64))
    rounding = 2 * max(LAST[name], LAST["float32"] if name != "float64" else 0) * (np.abs(found.astype(np.float64)))
    # float32 rounds the difference before bfloat16 does
    bound = delta * (BF16 + 2.0**-23) + rounding + 2.0**-133
    assert (np.abs(found.astype(np.float64) - local.astype(np.float64)) <= bound).all()


@pytest.mark.parametrize("name", FLOATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_int8_delta_is_within_what_it_says(name, data):
    local, reference = data.draw(leaves(name))
    stored, scales = encodings.encode(local, reference, "int8-delta")
    assert (stored.dtype, stored.shape, scales.shape) == (np.dtype(np.int8), local.shape, (len(local),))
    found = encodings.decode(stored, reference, "int8-delta", scales)
    assert (found.dtype, found.shape) == (local.dtype, local.shape)
    delta = np.abs(local.astype(np.float64) - reference.astype(np.float64))
    largest = delta.max(axis=1, initial=0.0, keepdims=True)
    bound = largest / 254 * (1 + 1e-9) + 2 * LAST[name] * np.abs(found.astype(np.float64)) + 1e-300
    assert (np.abs(found.astype(np.float64) - local.astype(np.float64)) <= bound).all()
    for row in range(len(local)):
        alone = encodings.decode(stored[row], reference, "int8-delta", scales[row])
        assert alone.tobytes() == found[row].tobytes()


@pytest.mark.parametrize("encoding", ["bf16-delta", "int8-delta"])
def test_a_client_that_did_not_move_comes_back_bit_by_bit(encoding):
    reference = np.random.default_rng(0).normal(size=100).astype(np.float32)
    stored, scales = encodings.encode(reference[None], reference, encoding)
    assert encodings.decode(stored, reference, encoding, scales)[0].tobytes() == reference.tobytes()


def test_raw_is_the_same_bits():
    local = np.frombuffer(np.random.default_rng(0).bytes(400), np.float32).reshape(4, 25)
    stored, scales = encodings.encode(local, local[0], "raw")
    assert scales is None
    assert encodings.decode(stored, local[0], "raw").tobytes() == local.tobytes()


def test_the_error_of_random_updates_is_as_documented():
    # Uniform rounding: an eighth of a bit pattern's step, 1 / (254 sqrt(3)) of the largest; measured over the norm.
    rng = np.random.default_rng(1)
    reference = rng.normal(size=100_000)
    local = (reference + 1e-3 * rng.normal(size=reference.shape))[None]
    for encoding, expected in (("bf16-delta", 1.7e-3), ("int8-delta", np.abs(local - reference).max() / 254 / 3**0.5)):
        stored, scales = encodings.encode(local, reference, encoding)
        error = np.linalg.norm(encodings.decode(stored, reference, encoding, scales) - local)
        size = np.linalg.norm(local - reference) if encoding == "bf16-delta" else reference.size**0.5
        assert error / size == pytest.approx(expected, rel=0.1)


def test_values_that_are_not_finite_come_back_as_such():
    reference = np.zeros(3, np.float32)
    local = np.array([[np.nan, np.inf, 1.0], [-np.inf, 2.0, 3.0], [1.0, 2.0, 4.0]], np.float32)
    stored, _ = encodings.encode(local, reference, "bf16-delta")
    np.testing.assert_array_equal(encodings.decode(stored, reference, "bf16-delta"), local)
    stored, scales = encodings.encode(local, reference, "int8-delta")
    found = encodings.decode(stored, reference, "int8-delta", scales)
    assert np.isnan(found[:2]).all()
    np.testing.assert_allclose(found[2], local[2], atol=4 / 254)


def test_the_largest_floats():
    largest = np.finfo(np.float32).max
    reference = np.array([0.0, -largest], np.float32)
    stored, _ = encodings.encode(np.array([[largest, -largest]], np.float32), reference, "bf16-delta")
    found = encodings.decode(stored, reference, "bf16-delta")
    assert found[0, 0] == pytest.approx(largest, rel=2 * BF16)
    with pytest.raises(encodings.EncodingError, match=r"float32 can hold, found a larger one. Store the leaf raw"):
        encodings.encode(np.array([[0.0, largest]], np.float32), reference, "bf16-delta")
    stored, scales = encodings.encode(np.array([[0.0, largest]], np.float32), reference, "int8-delta")
    np.testing.assert_allclose(encodings.decode(stored, reference, "int8-delta", scales)[0], [0, largest], rtol=1e-6)


def test_the_smallest_floats_do_not_wrap_around():
    reference = np.zeros(2)
    stored, scales = encodings.encode(np.array([[5e-324, -5e-324]]), reference, "int8-delta")
    found = encodings.decode(stored, reference, "int8-delta", scales)
    assert np.abs(found).max() <= 1e-321


@pytest.mark.parametrize(
    ("rules", "leaf", "dtype", "expected"),
    [
        ({"dense/*": "int8-delta", "*": "bf16-delta"}, "dense/kernel", "float32", "int8-delta"),
        ({"dense/*": "int8-delta", "*": "bf16-delta"}, "conv/kernel", "float32", "bf16-delta"),
        ({"*": "bf16-delta", "dense/*": "int8-delta"}, "dense/kernel", "float32", "bf16-delta"),
        ({"dense/*": "int8-delta"}, "conv/kernel", "float32", "raw"),
        ("bf16-delta", "steps", "int32", "raw"),
        ("bf16-delta", "phase", "complex64", "raw"),
        ("int8-delta", "table", "float8_e5m2", "raw"),
        (None, "dense/kernel", "float32", "raw"),
    ],
)
def test_the_first_pattern_that_matches_decides(rules, leaf, dtype, expected):
    assert encodings.resolve(encodings.rules_of(rules), leaf, dtype) == expected


WEIGHTS = {"dense": {"kernel": np.zeros((40, 30), np.float32), "bias": np.zeros(30, np.float32)}, "steps": np.int32(0)}


def make_record(delta: float = 0.01) -> RoundRecord:
    rng = np.random.default_rng(2)
    reference = [rng.normal(size=leaf.shape).astype(leaf.dtype) for leaf in (*WEIGHTS["dense"].values(), np.int32(0))]
    local = [leaf + delta * rng.normal(size=(6, *leaf.shape)).astype(leaf.dtype) for leaf in reference[:2]]
    steps = np.arange(6, dtype=np.int32)
    parts = [
        ClientPart(("a", "b"), np.array([0, 1]), [*(leaf[:2] for leaf in local), steps[:2]], np.ones(2), {}),
        ClientPart(("c", "d", "e", "f"), np.arange(2, 6), [*(leaf[2:] for leaf in local), steps[2:]], np.ones(4), {}),
    ]
    return RoundRecord(0, reference, parts, {}, {})


@pytest.mark.parametrize(("encoding", "size"), [("raw", 4), ("bf16-delta", 2), ("int8-delta", 1)])
def test_a_ledger_takes_as_many_bytes_as_it_says(tmp_path, stored_models_of, encoding, size):
    record = make_record()
    path = tmp_path / "run"
    with LedgerWriter.create(path, weights=WEIGHTS, config={}, rounds=1, encodings=encoding) as writer:
        writer.record(record)
    scalars = 40 * 30 + 30
    header = 8 + int.from_bytes((path / "rounds/000000.safetensors").read_bytes()[:8], "little")
    expected = header + 4 * (scalars + 1) + 6 * (size * scalars + 4)
    assert (path / "rounds/000000.safetensors").stat().st_size == expected
    models = stored_models_of(path, 0)
    assert list(models) == ["a", "b", "c", "d", "e", "f"]
    for client, model in models.items():
        part = record.parts[client not in ("a", "b")]
        row = part.ids.index(client)
        assert model["steps"] == part.weights[2][row]
        for leaf, reference, weights in zip(
            ("dense/kernel", "dense/bias"), record.global_weights, part.weights, strict=False
        ):
            largest = np.abs(weights[row] - reference).max()
            error = {"raw": 0.0, "bf16-delta": largest * BF16 + 1e-6, "int8-delta": largest / 254 + 1e-6}[encoding]
            np.testing.assert_allclose(model[leaf], weights[row], rtol=0, atol=error)


def test_encodings_by_pattern_stand_in_run_json(tmp_path, stored_models_of):
    rules = {"*/kernel": "int8-delta", "dense/*": "bf16-delta"}
    with LedgerWriter.create(tmp_path / "run", weights=WEIGHTS, config={}, rounds=1, encodings=rules) as writer:
        writer.record(make_record())
    with LedgerWriter.open(tmp_path / "run") as writer:
        assert writer.run.encodings == tuple(rules.items())
        assert [leaf.encoding for leaf in writer.run.leaves] == ["int8-delta", "bf16-delta", "raw"]
    assert set(stored_models_of(tmp_path / "run", 0)["f"]) == {"dense/kernel", "dense/bias", "steps"}


def test_what_an_encoding_cannot_hold_is_named(tmp_path):
    record = make_record()
    record.global_weights[1][:] = -3e38
    record.parts[1].weights[1][3, 7] = 3e38
    writer = LedgerWriter.create(tmp_path / "run", weights=WEIGHTS, config={}, rounds=1, encodings="bf16-delta")
    writer.record(record)
    with pytest.raises(LedgerError, match=r"found a larger one.*In leaf 'dense/bias' of client"):
        writer.close()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("gzip", "one of the encodings raw, bf16-delta, int8-delta, found 'gzip', for leaves '\\*'"),
        ({"dense/*": "int4"}, "found 'int4', for leaves 'dense/\\*'"),
        ({"dens/*": "raw"}, "a pattern that matches a leaf, found 'dens/\\*', in encodings"),
    ],
)
def test_encodings_that_mean_nothing_are_refused(tmp_path, rules, message):
    with pytest.raises(LedgerError, match=message):
        LedgerWriter.create(tmp_path / "run", weights=WEIGHTS, config={}, rounds=1, encodings=rules)
    assert not (tmp_path / "run").exists()
