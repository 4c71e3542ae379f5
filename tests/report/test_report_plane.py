"""The plane is the one of principal component analysis, and its memory does not grow with the model."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fedlens.errors import LedgerError
from fedlens.ledger import Keep, tensorfile
from fedlens.report import plane as planes
from fedlens.report.plane import compute_plane


def points_of(plane) -> np.ndarray:
    found = [point for drawn in plane.rounds for point in (drawn.start, *drawn.local_models.values())]
    return np.array(found + ([] if plane.end is None else [plane.end]))


def weights_of(ledger, plane) -> np.ndarray:
    """The models that the plane shows, as the ledger's reader gives them, one row a model."""
    rows = []
    for drawn in plane.rounds:
        stored = ledger.round(drawn.number)
        rows.append([stored.global_leaf(name) for name in ledger.leaf_names])
        rows += [list(stored[client].leaves.values()) for client in drawn.local_models]
    if plane.end is not None:
        (checkpoint,) = (ledger.path / "checkpoints").iterdir()
        arrays = tensorfile.read_all(checkpoint)
        rows.append([arrays[f"weights/{name}"] for name in ledger.leaf_names])
    return np.array([np.concatenate([leaf.ravel() for leaf in row]) for row in rows], float)


@pytest.mark.parametrize("block", [planes._BLOCK, 1000])  # everything at once, or a few columns at a time
def test_the_plane_is_that_of_a_singular_value_decomposition(make_ledger, monkeypatch, block):
    monkeypatch.setattr(planes, "_BLOCK", block)
    ledger = make_ledger()
    plane = compute_plane(ledger)
    assert [drawn.number for drawn in plane.rounds] == [0, 1, 2, 3]
    assert all(list(drawn.local_models) == ["ann", "bob", "cleo"] for drawn in plane.rounds)
    assert not plane.left_out
    weights = weights_of(ledger, plane)
    left, strengths, _ = np.linalg.svd(weights - weights.mean(axis=0), full_matrices=False)
    expected = left[:, :2] * strengths[:2]
    found = points_of(plane)
    for axis in (0, 1):
        sign = np.sign(found[:, axis] @ expected[:, axis])
        np.testing.assert_allclose(found[:, axis], sign * expected[:, axis], atol=1e-9)
    np.testing.assert_allclose(plane.explained, (strengths**2 / np.sum(strengths**2))[:2])


def test_the_run_goes_to_the_right_and_not_down(make_ledger):
    plane = compute_plane(make_ledger())
    assert plane.end is not None
    assert np.all(plane.end >= plane.rounds[0].start)


def test_a_larger_run_is_thinned_out_evenly_with_its_first_and_last_round(make_ledger):
    plane = compute_plane(make_ledger(rounds=31), points=45)
    numbers = [drawn.number for drawn in plane.rounds]
    assert (numbers[0], numbers[-1]) == (0, 30)
    assert set(np.diff(numbers)) <= {1, 2}
    assert plane.left_out
    assert len(points_of(plane)) <= 45 + 1


def test_a_large_cohort_is_thinned_out(make_ledger):
    plane = compute_plane(make_ledger(rounds=3, ids=tuple(f"c{number}" for number in range(60))), points=30)
    assert [drawn.number for drawn in plane.rounds] == [0, 1, 2]
    assert {len(drawn.local_models) for drawn in plane.rounds} == {9}
    assert plane.left_out


def test_a_model_with_infinities_is_left_out(make_ledger):
    def spoil(number, stacks):
        if number == 2:
            stacks[0][1, 0, 0] = np.inf

    plane = compute_plane(make_ledger(change=spoil))
    assert list(plane.rounds[2].local_models) == ["ann", "cleo"]
    assert np.isfinite(points_of(plane)).all()


@pytest.mark.parametrize("encoding", ["bf16-delta", "int8-delta"])
def test_encoded_weights_are_drawn_as_the_reader_gives_them(make_ledger, monkeypatch, encoding):
    monkeypatch.setattr(planes, "_BLOCK", 1000)
    ledger = make_ledger(encodings=encoding)
    plane = compute_plane(ledger)
    weights = weights_of(ledger, plane)
    left, strengths, _ = np.linalg.svd(weights - weights.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(points_of(plane)), np.abs(left[:, :2] * strengths[:2]), atol=1e-6)


def test_what_was_not_kept_is_left_out(make_ledger):
    ledger = make_ledger(keep=Keep(leaves="bias", every=2, clients=["bob", "ann"]))
    plane = compute_plane(ledger)
    assert [(drawn.number, list(drawn.local_models)) for drawn in plane.rounds] == [(n, ["ann", "bob"]) for n in (0, 2)]
    biases = [
        bias
        for number in (0, 2)
        for bias in (ledger.round(number).global_leaf("bias"), *ledger.round(number).leaf("bias", ["ann", "bob"]))
    ]
    end = tensorfile.read_all(ledger.path / "checkpoints" / "000003.safetensors")["weights/bias"]
    weights = np.array([*biases, end], float)
    left, strengths, _ = np.linalg.svd(weights - weights.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(points_of(plane)), np.abs(left[:, :2] * strengths[:2]), atol=1e-6)
    with pytest.raises(LedgerError, match="none were kept"):
        compute_plane(make_ledger(keep=Keep(statistics_only=True)))


def test_a_run_of_nothing_but_infinities(make_ledger):
    with pytest.raises(LedgerError, match="found only infinities and NaNs"):
        compute_plane(make_ledger(change=lambda _, stacks: stacks[0].fill(np.nan)))


def test_without_a_checkpoint_of_weights_the_path_ends_before_the_last_round(make_ledger):
    assert compute_plane(make_ledger(checkpoint=False)).end is None


def test_a_run_that_moves_nowhere(make_ledger):
    ledger = make_ledger(rounds=1, ids=("ann",), shapes={"w": ()}, checkpoint=False, change=lambda _, s: s[0].fill(0))
    plane = compute_plane(ledger)
    assert np.isfinite(points_of(plane)).all()
    assert plane.explained[0] == pytest.approx(1)


def test_no_round_no_plane(make_ledger):
    with pytest.raises(LedgerError, match="Expected a committed round to draw, found none"):
        compute_plane(make_ledger(rounds=0, planned=1))


def test_memory_stays_at_one_block(make_ledger, monkeypatch):
    monkeypatch.setattr(planes, "_BLOCK", 1 << 20)
    ledger = make_ledger(rounds=5, shapes={"w": (300_000,)})  # 21 models of 1.2 MB each
    tracemalloc.start()
    compute_plane(ledger)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
