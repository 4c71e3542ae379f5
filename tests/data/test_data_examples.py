"""The examples in the docstrings of `fedlens.data` give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import fedlens.data

MODULES = [module.name for module in pkgutil.iter_modules(fedlens.data.__path__, "fedlens.data.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
