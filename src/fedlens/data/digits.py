"""Handwritten digits by form: 1,797 images of 8 by 8 pixels in 14 clients, with scikit-learn's `load_digits`.

The images are the test part of "Optical recognition of handwritten digits" (Alpaydin and Kaynak, UCI Machine Learning
Repository, 1998, doi:10.24432/C50P49, licence CC BY 4.0). UCI says that 13 people wrote this part and publishes no
writer ids. The labels, however, repeat one sequence of 130 digits 14 times with a few digits missing or changed: people
filled in the same printed form. A client here is one such form. **Client ids are inferred from the labels**: they name
forms, and which person wrote a form is not known.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from fedlens.data.federated_data import FederatedData
from fedlens.data.rows import offsets_of
from fedlens.errors import DataError

_FORMS = 14
_FORM = (  # the digits in the order in which most of the 14 repetitions have them
    "0123456789012345678901234567890955650989841773510022782012633733466649150952820017632174631391768431"
    "405369617544728225795488490898"
)


def digits() -> FederatedData:
    """Loads the 14 forms as clients "form-00" to "form-13", with 122 to 130 digits each.

    Returns:
      Columns `x` float32[8, 8, 1], ink from 0 to 1, and `y` int32, the digit. Hold out a part of every form with
      `split`.

    Raises:
      DataError: scikit-learn's copy of the data is not the one that this loader knows.

    Example:
      >>> train, test = digits().split(0.2, seed=0)
      >>> train
      FederatedData(14 clients, 1437 examples, x: float32[8,8,1], y: int32[])
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = np.asarray(bunch.target, dtype=np.int32)
    images = np.asarray(bunch.images, dtype=np.float32)[..., None] / np.float32(16)
    if images.shape != (1797, 8, 8, 1) or labels.shape != (1797,):
        raise DataError(
            f"Expected 1797 images of 8 by 8 pixels from sklearn.datasets.load_digits, found {images.shape[:3]}. "
            "Install the scikit-learn that fedlens's requirements name."
        )
    form = np.array([int(digit) for digit in _FORM])
    lengths = np.bincount(repetition_of(labels, form, _FORMS), minlength=_FORMS)
    ids = tuple(f"form-{number:02}" for number in range(_FORMS))
    return FederatedData({"x": images, "y": labels}, offsets_of(lengths), ids)


def repetition_of(
    labels: Int[np.ndarray, " rows"], form: Int[np.ndarray, " length"], repetitions: int
) -> Int[np.ndarray, " rows"]:
    """Which repetition of `form` each label belongs to, in the alignment with the fewest differences.

    `labels` is aligned with `repetitions` copies of `form` by edit distance (Wagner and Fischer, "The string-to-string
    correction problem", JACM 1974): a label may be changed, missing or surplus, each at a cost of one.

    Args:
      labels: the sequence found, in order.
      form: the sequence that it repeats.
      repetitions: how often.

    Returns:
      For each label the number of its repetition from 0, never decreasing.

    Example:
      >>> repetition_of(np.array([1, 2, 3, 1, 3, 1, 2, 3]), np.array([1, 2, 3]), 3)
      array([0, 0, 0, 1, 1, 2, 2, 2])
    """
    printed = np.tile(form, repetitions)
    places = np.arange(len(printed) + 1)
    cost = np.empty((len(labels) + 1, len(places)), np.int32)  # [row, place]: the first rows against the first places
    cost[0] = places
    for row, label in enumerate(labels, start=1):
        cost[row] = cost[row - 1] + 1
        np.minimum(cost[row, 1:], cost[row - 1, :-1] + (printed != label), out=cost[row, 1:])
        # Missing labels: the least of cost[row, earlier] + places in between, for all places in one scan.
        cost[row] = np.minimum.accumulate(cost[row] - places) + places
    found = np.empty(len(labels), np.int64)
    row, place = len(labels), len(printed)
    while row:
        if place and cost[row, place] == cost[row - 1, place - 1] + (printed[place - 1] != labels[row - 1]):
            row, place = row - 1, place - 1
            found[row] = place // len(form)
        elif cost[row, place] == cost[row - 1, place] + 1:
            row -= 1
            found[row] = max(place - 1, 0) // len(form)  # surplus: with the label before it
        else:
            place -= 1
    return found
