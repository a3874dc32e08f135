"""The examples in the docstrings run and give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import automerge

torch.set_num_threads(1)
MODULES = sorted(m.name for m in pkgutil.walk_packages(automerge.__path__, "automerge.") if "__main__" not in m.name)


@pytest.mark.parametrize("name", ["automerge", *MODULES])
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    with torch.random.fork_rng():
        found = doctest.testmod(module)
    assert found.failed == 0, f"{found.failed} of {found.attempted} examples"


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    assert sum(bool(t.examples) for n in MODULES for t in finder.find(importlib.import_module(n))) > 50
