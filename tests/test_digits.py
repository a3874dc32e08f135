"""Real networks: what aligned, repaired and fitted merges of digits classifiers reach."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from automerge import (
    CCA,
    ActivationMatching,
    Comparison,
    FrankWolfe,
    GaussianRepair,
    LeastSquares,
    Repair,
    compare,
    evaluate,
    infer,
    merge,
)
from zoo.data import Dataset, load
from zoo.models.mlp import MLP
from zoo.train import Recipe, train

torch.set_num_threads(1)
SHAPES = {"three of 64": ((64, 64, 64, 64, 10), 5), "six of 48": ((64, *[48] * 6, 10), 8)}


@cache
def trained(name: str, first: int = 0) -> tuple[list[MLP], Dataset]:
    sizes, count = SHAPES[name]
    data = load("digits")
    nets = []
    for seed in range(first, first + count):
        net = MLP(sizes)
        net.load_state_dict(train(lambda: MLP(sizes), data, Recipe(epochs=30), seed).state_dict)
        nets.append(net.eval())
    return nets, data


@cache
def compared(name: str) -> Comparison:
    """400 training images calibrate, 400 others select, and the test set is reported."""
    nets, data = trained(name)
    x, y = data.x_train, data.y_train
    return compare(
        nets,
        x[:1],
        [(x[:400], y[:400])],
        select=[(x[400:800], y[400:800])],
        report=[(data.x_test, data.y_test)],
        matchers={"frank-wolfe": FrankWolfe(), "activations": ActivationMatching(), "cca": CCA()},
        repairs={
            "none": "none",
            "repair": Repair(),
            "gaussian": GaussianRepair(),
            "least squares": LeastSquares(),
        },
    )


def accuracies(name: str) -> dict[str, float]:
    return {r.name: r.report.accuracy for r in compared(name).rows if r.report and r.report.accuracy is not None}


def test_wide_networks_merge_to_97_percent() -> None:
    nets, data = trained("three of 64")
    single = [evaluate(net, [(data.x_test, data.y_test)]).accuracy for net in nets]
    assert all(s is not None and s > 0.965 for s in single)
    found = accuracies("three of 64")
    assert found["identity + none"] < 0.2, "the plain average is at chance"
    assert max(v for n, v in found.items() if "least squares" not in n) >= 0.95, "data-driven, without fitting"
    assert found["activations + least squares"] >= 0.97


@pytest.mark.parametrize("first", [5, 10, 15, 20])
def test_fitting_merges_every_other_set_of_seeds_to_97_percent(first: int) -> None:
    """Sets that nothing was chosen on; the defaults, and 400 training images without labels."""
    nets, data = trained("three of 64", first)
    x = data.x_train[:400]
    symmetry = infer(nets[0], x[:1])
    for matcher in (FrankWolfe(), ActivationMatching()):
        merged = merge(nets, x[:1], matcher=matcher, data=[x], symmetry=symmetry, repair=LeastSquares())
        found = evaluate((nets[0], merged.state_dict), [(data.x_test, data.y_test)]).accuracy
        assert found is not None
        assert found >= 0.97, type(matcher).__name__
    assert merged.repair.mode == "fit", "and it says that this is fitting"


def test_deep_narrow_networks() -> None:
    found = accuracies("six of 48")
    assert found["identity + none"] < 0.2
    assert found["frank-wolfe + repair"] >= 0.59
    assert found["activations + repair"] >= 0.59
    assert found["activations + least squares"] >= 0.95


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_is_silently_worse_than_the_plain_average(name: str) -> None:
    table = compared(name)
    naive = next(r.report for r in table.rows if r.name == "identity + none")
    assert naive is not None
    for row in table.rows:
        assert row.report is not None
        assert row.worse_than_naive == row.report.worse_than(naive)
        assert (" !" in "".join(row.cells())) == row.worse_than_naive
    assert any(r.worse_than_naive for r in table.rows), "here some are (the loss of rescaled plain averages)"
