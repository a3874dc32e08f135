"""Seconds of one Frank-Wolfe iteration, against the all-pairs formulas and against the gradient's own products."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from automerge._polynomial import maximise_polynomial
from automerge._state import State
from automerge.blocks import Blocks, decompose
from automerge.matchers import FrankWolfe, match
from automerge.matchers._starts import vertices
from automerge.objective import Objective
from tests import _symmetries as hand
from tests._all_pairs import AllPairs

torch.set_num_threads(1)

SIZES = (64, 256, 256, 256, 10)


def problem(count: int) -> tuple[Blocks, list[dict[str, torch.Tensor]]]:
    symmetry = hand.mlp(SIZES)
    return decompose(symmetry), [hand.weights(symmetry, i, torch.float32) for i in range(count)]


def iterate(state: State, cyclic: bool) -> None:
    count = state.objective.count
    for models in [slice(m, m + 1) for m in range(count)] if cyclic else [slice(None)]:
        segment = state.segment(vertices(state.objective, state.gradient(models))[0], models)
        state.advance(segment, maximise_polynomial(segment.coefficients)[0])


def products(objective: Objective) -> float:
    """Seconds for the gradient contractions alone, as plain matrix products."""
    total = 0.0
    for bundle in objective.bundles:
        for dim in bundle.dims:
            n = bundle.weights.shape[dim]
            a = torch.randn(n, bundle.weights[0].numel() // n)
            torch.mm(a, a.T)
            begin = time.perf_counter()
            torch.mm(a, a.T)
            total += time.perf_counter() - begin
    return total * objective.count


@pytest.mark.parametrize("cyclic", [True, False])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_one_iteration(benchmark: Any, count: int, cyclic: bool) -> None:
    blocks, models = problem(count)
    objective = Objective(blocks, models)
    state = State.at(objective, objective.identity())
    benchmark.pedantic(iterate, args=(state, cyclic), rounds=5, warmup_rounds=1)
    begin = time.perf_counter()
    iterate(State.at(objective, objective.identity()), cyclic)
    ours = time.perf_counter() - begin
    oracle = AllPairs(blocks, models, torch.float32)
    begin = time.perf_counter()
    oracle.iterate(1)
    theirs = time.perf_counter() - begin
    flops = products(objective)
    benchmark.extra_info |= {"all_pairs_over_ours": theirs / ours, "ours_over_products": ours / flops}
    name = "cyclic" if cyclic else "simultaneous"
    print(f"\nN={count} {name}: {ours:.4f} s, all pairs {theirs / ours:.1f} x, products {ours / flops:.1f} x")
    assert count < 8 or ours < theirs  # 12 times faster; a busy machine blurs the smaller ones


def test_whole_match(benchmark: Any) -> None:
    symmetry = hand.mlp(SIZES)
    models = [hand.weights(symmetry, i, torch.float32) for i in range(3)]
    result = benchmark.pedantic(match, args=(models, symmetry, FrankWolfe()), rounds=1)
    assert result.stats["objective"] > result.stats["start_objective"]
