"""What tests of `benchmarks` share."""

import importlib
import sys

import pytest

from pipelines.__main__ import ROOT


@pytest.fixture
def script(monkeypatch):
    """Imports a module of `benchmarks` by its name, as where it runs."""
    folder = str(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:  # their names are common words
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
            del sys.modules[name]
