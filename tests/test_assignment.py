"""The assignment against brute force, scipy, and whatever answers to the name ``lap``."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from automerge import _assignment
from automerge._assignment import assign


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    _assignment.lapx_solver.cache_clear()
    yield
    _assignment.lapx_solver.cache_clear()


@given(seed=st.integers(0, 2**30), n=st.integers(1, 6), ties=st.booleans())
@settings(max_examples=60, deadline=None)
def test_brute_force(seed: int, n: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    gain = rng.integers(-2, 3, (n, n)).astype(float) if ties else rng.normal(size=(n, n))
    best = max(sum(gain[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n)))
    found = assign(gain)
    assert sorted(found) == list(range(n))
    assert gain[np.arange(n), found].sum() == pytest.approx(best, abs=1e-12)


@given(seed=st.integers(0, 2**30), n=st.integers(64, 90), low_rank=st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_optimum_is_scipys_with_whatever_is_installed(seed: int, n: int, low_rank: bool) -> None:
    rng = np.random.default_rng(seed)
    gain = rng.normal(size=(n, 3)) @ rng.normal(size=(3, n)) if low_rank else rng.normal(size=(n, n))
    rows, columns = linear_sum_assignment(gain, maximize=True)
    found = assign(gain)
    assert sorted(found) == list(range(n))
    assert gain[np.arange(n), found].sum() == pytest.approx(gain[rows, columns].sum(), rel=1e-12)


def test_another_package_of_that_name_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lap", types.ModuleType("lap"))
    assert _assignment.lapx_solver() is None
    assert sorted(assign(np.random.default_rng(0).normal(size=(80, 80)))) == list(range(80))


def test_lapx_is_used_where_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with the signature of lapx's solver is called for large problems, with costs, and its columns taken."""
    calls = []
    module = types.ModuleType("lap")

    def lapjvr(cost: np.ndarray, *, return_cost: bool) -> tuple[np.ndarray, np.ndarray]:
        assert not return_cost
        assert cost.min() >= 0
        calls.append(cost.shape)
        return linear_sum_assignment(cost)

    monkeypatch.setattr(module, "lapjvr", lapjvr, raising=False)
    monkeypatch.setitem(sys.modules, "lap", module)
    gain = np.random.default_rng(1).normal(size=(70, 70))
    assert np.array_equal(assign(gain), linear_sum_assignment(gain, maximize=True)[1])
    assign(gain[:10, :10])
    assert calls == [(70, 70)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_package_itself_finds_the_same_optimum(dtype: type) -> None:
    lap = pytest.importorskip("lap", reason="lapx is not installed")
    if _assignment.lapx_solver() is None:
        pytest.skip(f"{lap.__name__} is another package of that name")
    for n in (64, 301):
        gain = np.random.default_rng(n).normal(size=(n, n)).astype(dtype)
        found = assign(gain)
        assert sorted(found) == list(range(n))
        _, columns = linear_sum_assignment(gain, maximize=True)
        rows = np.arange(n)
        assert gain[rows, found].sum(dtype=float) == pytest.approx(gain[rows, columns].sum(dtype=float), rel=1e-12)
