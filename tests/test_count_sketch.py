"""Sketches of activations: exact for few samples, unbiased for many, whatever the order of units and the sizes of batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge._count_sketch import CountSketch
from automerge._moments import CrossMoments

torch.set_num_threads(1)
F64 = torch.float64


def rows(count: int, seed: int = 0, models: int = 2, n: int = 4) -> torch.Tensor:
    """Samples of units that have something in common, far from zero, ``(models, count, n)``."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(count, 3, dtype=F64, generator=generator)
    maps = torch.randn(models, 3, n, dtype=F64, generator=generator)
    return common @ maps + torch.randn(models, count, n, dtype=F64, generator=generator) + 50


def filled(sketch: CountSketch | CrossMoments, x: torch.Tensor, sizes: list[int]) -> None:
    for part in x.split(sizes, dim=1):
        sketch.update(list(part))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 64))
def test_means_variances_and_few_samples_are_exact(seed: int, sizes: list[int], buckets: int) -> None:
    x = rows(sum(sizes), seed)
    ours, exact = CountSketch(buckets, seed), CrossMoments()
    filled(ours, x, sizes)
    filled(exact, x, sizes)
    assert ours.count == exact.count == sum(sizes)
    if not sum(sizes):
        return
    assert torch.allclose(ours.means, exact.means, rtol=1e-12)
    assert torch.allclose(ours.variances(), exact.variances(), atol=1e-10)
    if sum(sizes) <= buckets:
        for a, b in ((0, 0), (0, 1), (1, 0)):
            assert torch.allclose(ours.covariance(a, b), exact.covariance(a, b), atol=1e-10)
        root = ours.root(centred=False)
        assert torch.allclose(root[0] @ root[1].T, x[0].T @ x[1] / sum(sizes), rtol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 40), min_size=2, max_size=6))
def test_batches_and_the_order_of_units_change_nothing(seed: int, sizes: list[int]) -> None:
    x = rows(sum(sizes), seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    moved = x.clone()
    moved[1] = x[1][:, order]
    whole, parts = CountSketch(8, 5), CountSketch(8, 5)
    filled(whole, x, [sum(sizes)])
    filled(parts, moved, sizes)
    for centred in (False, True):
        one, two = whole.root(centred=centred), parts.root(centred=centred)
        assert torch.allclose(one[0], two[0], atol=1e-9)
        assert torch.allclose(one[1][order], two[1], atol=1e-9)


def test_products_keep_their_expectation_and_deviate_as_the_sketch_says() -> None:
    """Over many seeds; the standard deviation of a product of columns is at most about |x| |y| sqrt(2 / buckets)."""
    x, buckets, seeds = rows(400), 64, 300
    exact = CrossMoments()
    filled(exact, x, [400])
    found = []
    for seed in range(seeds):
        sketch = CountSketch(buckets, seed)
        filled(sketch, x, [150, 250])
        found.append(sketch.covariance(0, 1))
    spread = exact.variances().sqrt()
    level = spread[0][:, None] * spread[1] / buckets**0.5
    deviations = (torch.stack(found) - exact.covariance(0, 1)) / level
    assert deviations.mean(0).abs().max() < 5 * 2**0.5 / seeds**0.5
    assert 0.3 < deviations.std(0).min() <= deviations.std(0).max() < 1.3 * 2**0.5


def test_other_seeds_give_other_signs() -> None:
    x = rows(50)
    one, two = CountSketch(8, 1), CountSketch(8, 2)
    filled(one, x, [50])
    filled(two, x, [50])
    assert not np.allclose(one.root(centred=True), two.root(centred=True))


@pytest.mark.parametrize("count", [1, 3])
def test_a_constant_unit_has_no_variance(count: int) -> None:
    sketch = CountSketch(2)
    filled(sketch, torch.full((2, count, 4), 7.0, dtype=F64), [1] * count)
    assert not sketch.variances().any()
    assert not sketch.root(centred=True).any()
