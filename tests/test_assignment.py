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
from automerge._assignment import assign, potentials


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


KINDS = {
    "noise": lambda rng, n: rng.normal(size=(n, n)),
    "low rank": lambda rng, n: rng.normal(size=(n, 3)) @ rng.normal(size=(3, n)),
    "rows alike": lambda rng, n: np.repeat(rng.normal(size=(1, n)), n, axis=0) + 1e-3 * rng.normal(size=(n, n)),
    "dead units": lambda rng, n: rng.normal(size=(n, n)) * (rng.random(n) < 0.5) * (rng.random((n, 1)) < 0.5),
    "constant": lambda rng, n: np.full((n, n), rng.normal()),
    "few values": lambda rng, n: rng.integers(0, 3, (n, n)).astype(float),
    "heavy tails": lambda rng, n: rng.standard_cauchy((n, n)),
}


@given(
    seed=st.integers(0, 2**30),
    n=st.integers(64, 150),
    kind=st.sampled_from(sorted(KINDS)),
    scale=st.sampled_from([1.0, 1e-20, 1e20]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@settings(max_examples=60, deadline=None)
def test_the_optimum_is_scipys_with_whatever_is_installed(
    seed: int, n: int, kind: str, scale: float, dtype: type
) -> None:
    gain = (KINDS[kind](np.random.default_rng(seed), n) * scale).astype(dtype)
    rows, columns = linear_sum_assignment(gain.astype(np.float64), maximize=True)
    before = gain.copy()
    found = assign(gain)
    assert np.array_equal(gain, before)
    assert sorted(found) == list(range(n))
    best = gain[rows, columns].sum(dtype=float)
    assert gain[rows, found].sum(dtype=float) == pytest.approx(best, abs=1e-12 * n * float(np.abs(gain).max()), rel=0)


def test_whole_numbers() -> None:
    gain = np.random.default_rng(0).integers(0, 1000, (150, 150))
    rows, columns = linear_sum_assignment(gain, maximize=True)
    assert gain[np.arange(150), assign(gain)].sum() == gain[rows, columns].sum()


def test_potentials_spread_what_the_rows_want() -> None:
    """All rows want the same few columns; after the potentials most have one of their own."""
    rng = np.random.default_rng(0)
    gain = (rng.normal(size=(200, 200)) + 5 * rng.normal(size=200)).astype(np.float32)
    wanted = [np.unique((gain - price).argmax(axis=1)).size for price in (0, potentials(gain))]
    assert wanted[0] < 20
    assert wanted[1] > 120
    assert not potentials(np.ones((5, 5))).any()


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
