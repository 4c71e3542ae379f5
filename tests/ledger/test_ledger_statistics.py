"""Norms and cosines of the table, against NumPy in float64; from memory, from the files, and from scratch files."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fedlens as fed
from fedlens.ledger import ClientPart, LedgerWriter, RoundRecord, commit, delivery, measure


def expected(reference, local, examples):
    """Norms and cosines of clients' updates, given leaf by leaf."""
    flat = np.concatenate(
        [
            leaf.astype(np.complex128).reshape(len(leaf), -1) - start.astype(np.complex128).reshape(-1)
            for leaf, start in zip(local, reference, strict=True)
        ],
        axis=1,
    )
    updates = np.concatenate([flat.real, flat.imag], axis=1)
    norms = np.linalg.norm(updates, axis=1)
    finite = np.isfinite(norms)
    mean = examples[finite] @ updates[finite] / max(examples[finite].sum(), 1)
    with np.errstate(all="ignore"):
        cosines = updates @ mean / norms / np.linalg.norm(mean)
    return norms, np.where((norms > 0) & finite & (np.linalg.norm(mean) > 0), cosines, np.nan)


def write(path, reference, parts, examples, together=False, **options):
    """A round of a model whose leaves are a list; returns the norms and cosines of its table.

    Each part is a delivery of its own, unless they come `together` in one.
    """
    starts = np.cumsum([0, *(len(part[0]) for part in parts)])
    clients = [
        ClientPart(tuple(f"c{place}" for place in range(a, b)), np.arange(a, b), part, examples[a:b], {})
        for part, a, b in zip(parts, starts, starts[1:], strict=False)
    ]
    with LedgerWriter.create(path, weights=reference, config={}, rounds=1, **options) as writer:
        writer.begin(0, reference)
        for delivery in [clients] if together else [[part] for part in clients]:
            writer.add(delivery)
        writer.commit({}, {})
    table = pq.read_table(path / "rounds/000000.parquet")
    return table.column("update_norm").to_numpy(), np.array(table.column("cosine").to_pylist(), float)


def make(seed=0, clients=23):
    rng = np.random.default_rng(seed)
    reference = [
        rng.normal(size=(90, 60)).astype(np.float32),
        rng.normal(size=7),
        rng.normal(size=()).astype(np.float16),
        (rng.normal(size=5) + 1j * rng.normal(size=5)).astype(np.complex64),
        rng.integers(0, 200, 6).astype(np.uint8),
        rng.normal(size=4).astype(ml_dtypes.bfloat16),
    ]
    local = []
    for leaf in reference:
        noise = 0.1 * rng.normal(size=(clients, *leaf.shape))
        if leaf.dtype.kind == "c":
            noise = noise * (1 + 1j)
        local.append(
            rng.integers(0, 200, (clients, 6)).astype(np.uint8) / 1
            if leaf.dtype.kind == "u"
            else leaf.astype(noise.dtype) + noise + 0.05
        )
    local = [array.astype(leaf.dtype) for array, leaf in zip(local, reference, strict=True)]
    return reference, local, rng.integers(1, 50, clients)


def split(local, at):
    return [[leaf[a:b] for leaf in local] for a, b in zip([0, *at], [*at, None], strict=True)]


@pytest.mark.parametrize(
    ("held", "options"),
    [
        (commit.HELD, {}),
        (0, {}),
        (0, {"keep": fed.Keep(statistics_only=True)}),
        (0, {"encodings": "int8-delta"}),
        (90_000, {"keep": fed.Keep(clients="c1*")}),
    ],
    ids=["memory", "files", "scratch", "encoded", "some of each"],
)
def test_norms_and_cosines_are_numpys_wherever_the_weights_wait(tmp_path, monkeypatch, held, options):
    monkeypatch.setattr(commit, "HELD", held)
    reference, local, examples = make()
    norms, cosines = write(tmp_path / "run", reference, split(local, [4, 21]), examples, **options)
    wanted = expected(reference, local, examples)
    np.testing.assert_allclose(norms, wanted[0], rtol=1e-6)
    np.testing.assert_allclose(cosines, wanted[1], rtol=0, atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "run/rounds").iterdir()) == [
        "000000.1.safetensors",
        "000000.2.safetensors",
        "000000.parquet",
        "000000.safetensors",
    ]


@pytest.mark.parametrize("clients", [23, 150])
@pytest.mark.parametrize("most", [measure.TOGETHER, 8])
@pytest.mark.parametrize("bad", [[], [3, 20]])
def test_one_delivery_of_several_parts(tmp_path, monkeypatch, clients, most, bad):
    monkeypatch.setattr(measure, "TOGETHER", most)
    monkeypatch.setattr(delivery, "WORTH_A_THREAD", 0)
    reference, local, examples = make(clients=clients)
    for place in bad:
        local[0][place, 89, 59] = np.nan
    local[0][5] = reference[0]  # this one did not move there
    norms, cosines = write(tmp_path / "run", reference, split(local, [4, 4, 18]), examples, together=True)
    wanted = expected(reference, local, examples)
    np.testing.assert_allclose(norms, wanted[0], rtol=1e-6)
    np.testing.assert_allclose(cosines, wanted[1], rtol=0, atol=1e-6)
    assert np.flatnonzero(np.isnan(cosines)).tolist() == bad


def test_a_mean_of_almost_nothing_has_a_direction(tmp_path):
    rng = np.random.default_rng(0)
    reference = [np.zeros(9000, np.float32)]
    one = rng.normal(size=9000).astype(np.float32)
    # The first two take each other back but for a step of float32, tile by tile; the third hardly counts.
    local = np.stack([one, -one, np.float32(1e-17) * rng.normal(size=9000).astype(np.float32)])
    cosines = write(tmp_path / "run", reference, [[local]], np.array([7, 7, 7]), together=True)[1]
    wanted = expected(reference, [local], np.array([7, 7, 7]))[1]
    np.testing.assert_allclose(cosines[2], wanted[2], rtol=0, atol=1e-6)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), exponent=st.integers(-30, 30))
def test_norms_and_inner_products_of_any_magnitude(data, exponent):
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    numbers = st.floats(-1, 1, width=16)
    reference = (data.draw(hnp.arrays(np.float64, shape[1], elements=numbers)) * 10.0**exponent).astype(np.float32)
    local = (data.draw(hnp.arrays(np.float64, shape, elements=numbers)) * 10.0**exponent).astype(np.float32)
    shares = data.draw(hnp.arrays(np.float64, shape[0], elements=st.integers(0, 128))) / 128
    updates = local.astype(np.float64) - reference.astype(np.float64)
    squares, sums, together = np.zeros(shape[0]), measure.Total(reference), np.zeros(shape[0])
    measure.measure([local], reference, shares, squares, sums, together)
    total = sums.sum.astype(np.float64)
    # float32 rounds each difference to 2**-24 of itself, or to a step of its subnormal numbers
    np.testing.assert_allclose(np.sqrt(squares), np.linalg.norm(updates, axis=1), rtol=1e-6, atol=1e-44)
    np.testing.assert_allclose(
        total, shares @ updates, rtol=0, atol=1e-6 * np.abs(shares @ np.abs(updates)).max() + 1e-42
    )
    np.testing.assert_allclose(sums.squared_norm(), total @ total, rtol=1e-6, atol=1e-88)
    products = measure.projections(local, reference, total)
    bound = 1e-6 * np.linalg.norm(updates, axis=1) * np.linalg.norm(total) + 1e-80
    assert (np.abs(products - updates @ total) <= bound).all()
    assert (np.abs(together - updates @ total) <= bound).all()


def test_a_client_alone_points_where_the_mean_does(tmp_path):
    reference, local, examples = make(clients=1)
    _, cosines = write(tmp_path / "run", reference, [local], examples)
    np.testing.assert_allclose(cosines, [1.0], atol=1e-6)


def test_where_there_is_no_direction_there_is_no_cosine(tmp_path):
    zero = [np.zeros(2, np.float32)]
    still = write(tmp_path / "still", zero, [[np.array([[0, 0], [1, 0]], np.float32)]], np.array([5, 1]))
    np.testing.assert_array_equal(still[1], [np.nan, 1.0])
    opposed = write(tmp_path / "opposed", zero, [[np.array([[1, 2], [-1, -2]], np.float32)]], np.array([3, 3]))
    assert np.isnan(opposed[1]).all()
    nobody = write(tmp_path / "nobody", zero, [[np.array([[1, 2]], np.float32)]], np.array([0]))
    assert np.isnan(nobody[1]).all()


@pytest.mark.parametrize("held", [0, commit.HELD])
def test_who_is_not_finite_is_no_part_of_the_mean(tmp_path, monkeypatch, held):
    monkeypatch.setattr(commit, "HELD", held)
    reference, local, examples = make()
    local[0][3, 89, 59] = np.nan
    local[1][20, 2] = np.inf
    local[2][7] = -np.inf
    norms, cosines = write(tmp_path / "run", reference, split(local, [4, 18]), examples)
    bad = [3, 7, 20]
    assert np.isnan(cosines[bad]).all()
    assert not np.isfinite(norms[bad]).any()
    wanted = expected(reference, local, examples)[1]
    np.testing.assert_allclose(cosines, wanted, rtol=0, atol=1e-6)
    assert np.isnan(wanted).sum() == len(bad)


def test_who_was_dropped_is_marked(tmp_path):
    zero = [np.zeros(1, np.float32)]
    part = ClientPart(("a", "b"), np.arange(2), [np.array([[1], [np.nan]], np.float32)], np.ones(2), {})
    with LedgerWriter.create(tmp_path / "run", weights=zero, config={}, rounds=1) as writer:
        writer.record(RoundRecord(0, zero, [part], {}, {}, dropped=["b"]))
    assert pq.read_table(tmp_path / "run/rounds/000000.parquet").column("dropped").to_pylist() == [False, True]
