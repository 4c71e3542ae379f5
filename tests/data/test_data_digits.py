"""The digits by form: facts about scikit-learn's copy, and the alignment that finds the forms."""

import difflib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import datasets

from fedlens import data as fed_data
from fedlens.data.digits import repetition_of
from fedlens.errors import DataError


@pytest.fixture(scope="module")
def digits():
    return fed_data.digits()


def test_fourteen_forms_hold_all_images(digits):
    assert digits.ids == tuple(f"form-{number:02}" for number in range(14))
    assert np.diff(digits.offsets).tolist() == [130, 126, 130, 130, 130, 130, 130, 123, 128, 130, 128, 130, 122, 130]
    assert repr(digits) == "FederatedData(14 clients, 1797 examples, x: float32[8,8,1], y: int32[])"


def test_images_are_those_of_scikit_learn_in_order(digits):
    bunch = datasets.load_digits()
    np.testing.assert_array_equal(digits.columns["x"][..., 0] * 16, bunch.images)
    np.testing.assert_array_equal(digits.columns["y"], bunch.target)
    assert digits.columns["x"].min() == 0
    assert digits.columns["x"].max() == 1


def test_every_form_reads_like_the_first(digits):
    first = digits.client("form-00")["y"]
    for client_id in digits:
        labels = digits.client(client_id)["y"]
        # Nine tenths in common and in order, and the same beginning up to a lost digit: cut anywhere else, both fail.
        assert difflib.SequenceMatcher(None, first, labels, autojunk=False).ratio() > 0.9
        assert "".join(map(str, labels[:16])) in "01234567890123456"


def test_split_holds_out_a_fifth_of_every_form(digits):
    train, test = digits.split(0.2, seed=0)
    assert (train.num_examples, test.num_examples) == (1437, 360)
    assert np.all((np.diff(test.offsets) >= 24) & (np.diff(test.offsets) <= 26))


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 5), st.data())
def test_missing_labels_do_not_move_the_cuts(repetitions, draws):
    # All labels of a form differ, so that which label is missing, and from which repetition, is beyond doubt.
    form = np.arange(12)
    missing = draws.draw(st.lists(st.integers(1, 10), min_size=repetitions, max_size=repetitions))
    kept = [np.delete(form, place) for place in missing]
    expected = np.repeat(np.arange(repetitions), [len(labels) for labels in kept])
    np.testing.assert_array_equal(repetition_of(np.concatenate(kept), form, repetitions), expected)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_repetitions_never_decrease(labels, form):
    found = repetition_of(np.array(labels, int), np.array(form), 3)
    assert len(found) == len(labels)
    assert np.all(np.diff(found, prepend=0) >= 0)
    assert np.all(found < 3)


def test_a_changed_and_a_surplus_label_stay_in_their_form():
    form = np.arange(6)
    labels = np.array([0, 1, 9, 3, 4, 5, 0, 1, 2, 9, 3, 4, 5, 0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(repetition_of(labels, form, 3), np.repeat([0, 1, 2], [6, 7, 6]))


def test_another_copy_of_the_data_is_refused(monkeypatch):
    bunch = datasets.load_digits()
    bunch.images, bunch.target = bunch.images[:-1], bunch.target[:-1]
    monkeypatch.setattr(datasets, "load_digits", lambda: bunch)
    with pytest.raises(DataError, match=r"Expected 1797 images of 8 by 8 pixels .*, found \(1796, 8, 8\)"):
        fed_data.digits()
