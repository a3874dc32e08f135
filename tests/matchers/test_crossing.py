"""Blocks of rows that cross blocks of columns, with units in every cell: searched by turns, and recovered exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from automerge import FrankWolfe, WeightMatching, infer, match, merge
from automerge._ranks import ALONE
from automerge._tree import crossing
from automerge.matchers import Identity, MergeMany, PairwiseFrankWolfe, Synchronised
from automerge.matchers._crossing import Crossing, _Turns
from automerge.symmetry import Symmetry

torch.set_num_threads(1)


class Monarch(nn.Module):
    """A block-diagonal matrix, a transposition, and another one: (M2-BERT)."""

    def __init__(self, blocks: int = 2, size: int = 4) -> None:
        super().__init__()
        n = blocks * size
        self.up, self.down = nn.Linear(5, n), nn.Linear(n, 2)
        self.one = nn.Parameter(torch.randn(blocks, size, size))
        self.two = nn.Parameter(torch.randn(blocks, size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("bgi,goi->bgo", self.up(x).view(len(x), *self.one.shape[:2]), self.one)
        y = y.transpose(1, 2).reshape(len(x), *self.two.shape[:2])
        y = torch.einsum("bgi,goi->bgo", y, self.two).transpose(1, 2).reshape(len(x), -1)
        return self.down(y.relu())


class Layers(nn.Module):
    """Two layers of one weight and other biases: their units cross with the layers, and every entry is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(12, 2)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.one(x), self.two(x)], -1).tanh()
        return self.out(torch.cat([x, x], -1))


def states_of(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return Monarch().state_dict()


def agreement(symmetry: Symmetry, states: Any, weights: Any = "uniform") -> float:
    """The sum of the inner products of all pairs."""
    parts = Crossing.of(symmetry)
    assert parts is not None
    turns = _Turns(parts, FrankWolfe(block_weights=weights), states, range(len(states)), None, ALONE)
    return turns.agreement(states)


def planted(
    model: nn.Module, x: torch.Tensor, count: int = 3
) -> tuple[Symmetry, list[Any], list[dict[str, torch.Tensor]]]:
    symmetry = infer(model, x)
    generator = torch.Generator().manual_seed(0)
    names = symmetry.shapes
    base = {n: torch.randn(names[n], dtype=torch.float64, generator=generator) for n in names}
    base |= {alias: base[name] for alias, name in symmetry.aliases.items()}
    elements = [symmetry.identity(), *(symmetry.random_element(seed) for seed in range(1, count))]
    return symmetry, elements, [symmetry.apply(base, e) for e in elements]


NETWORKS = {
    "2 blocks of 4": (Monarch, torch.randn(7, 5)),
    "3 blocks of 6": (lambda: Monarch(3, 6), torch.randn(7, 5)),
    "tied layers": (Layers, torch.randn(5, 3)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "matcher",
    [
        FrankWolfe(),
        FrankWolfe(anchor=1),
        MergeMany(),
        WeightMatching(reference=2),
        PairwiseFrankWolfe(),
        Synchronised(PairwiseFrankWolfe()),
    ],
    ids=lambda m: type(m).__name__,
)
def test_planted_elements_are_recovered(name: str, matcher: Any) -> None:
    torch.manual_seed(0)
    factory, x = NETWORKS[name]
    symmetry, _, models = planted(factory(), x)
    assert crossing(symmetry.stacked.generators())
    found = match(models, symmetry, matcher)
    assert found.cycle_error() == 0
    for i in (1, 2):
        moved = symmetry.apply(models[0], found.between(0, i))
        assert all(torch.equal(moved[n], models[i][n]) for n in moved)
    still = getattr(matcher, "anchor", None)
    assert still is None or found.to_universe[still].is_identity()
    assert any("cross those of others" in remark for remark in found.remarks())
    assert not found.stats.get("left_out_generators")


def test_the_objective_is_never_below_that_of_one_part() -> None:
    """Of networks that have nothing in common; and the answer's own figure is what its maps give."""
    torch.manual_seed(0)
    nets = [Monarch(3, 6) for _ in range(3)]
    symmetry = infer(nets[0], torch.randn(7, 5))
    states = [n.state_dict() for n in nets]
    found = match(nets, symmetry, FrankWolfe())
    assert found.stats["objective"] == pytest.approx(agreement(symmetry, found.apply(nets)), rel=1e-9)
    assert found.stats["start_objective"] == pytest.approx(agreement(symmetry, states), rel=1e-9)
    parts = Crossing.of(symmetry)
    assert parts is not None
    for part in (*parts.parts, symmetry):
        one = FrankWolfe().match(states, part)
        assert agreement(symmetry, one.apply(states)) <= found.stats["objective"] * (1 + 1e-6)


def test_block_weights_decide_between_ends() -> None:
    """The figure is the matcher's own, where one parameter does not count."""
    torch.manual_seed(0)
    nets = [Monarch() for _ in range(2)]
    symmetry = infer(nets[0], torch.randn(7, 5))
    weights = {"one": 0.0, "up.weight": 2.0}
    found = match(nets, symmetry, FrankWolfe(block_weights=weights))
    a, b = found.apply(nets)
    names = symmetry.moved
    expected = sum(weights.get(n, 1.0) * float((a[n].double() * b[n].double()).sum()) for n in names)
    assert found.stats["objective"] == pytest.approx(expected, rel=1e-9)
    assert found.stats["objective"] >= agreement(symmetry, [n.state_dict() for n in nets], weights)


def test_moved_models_are_held_in_files(tmp_path: Path) -> None:
    symmetry, models = infer(Monarch(), torch.randn(3, 5)), [states_of(m) for m in range(3)]
    here = match(models, symmetry)
    there = match(models, symmetry, FrankWolfe(offload=tmp_path))
    assert here.to_universe == there.to_universe
    assert here.stats["objective"] == there.stats["objective"]
    assert any("cross those of others" in remark for remark in there.remarks())
    assert not list(tmp_path.iterdir())


def test_a_search_goes_on_from_an_answer() -> None:
    torch.manual_seed(0)
    nets = [Monarch() for _ in range(3)]
    symmetry = infer(nets[0], torch.randn(7, 5))
    first = match(nets, symmetry, WeightMatching())
    again = match(nets, symmetry, FrankWolfe(resume=first))
    assert again.stats["objective"] >= agreement(symmetry, first.apply(nets)) * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_identity_stays_identity(seed: int) -> None:
    torch.manual_seed(seed)
    nets = [Monarch() for _ in range(2)]
    symmetry = infer(nets[0], torch.randn(7, 5), verify=False)
    assert all(e.is_identity() for e in match(nets, symmetry, Identity()).to_universe)


def test_merged_copies_are_the_network() -> None:
    torch.manual_seed(0)
    net, x = Monarch().double(), torch.randn(7, 5, dtype=torch.float64)
    symmetry = infer(net, x)
    copies = [symmetry.apply(net.state_dict(), symmetry.random_element(seed)) for seed in range(3)]
    merged = merge(copies, x, architecture=net, repair="none").load_into(Monarch().double())
    assert torch.allclose(merged(x), net(x), atol=1e-10)


def test_what_does_not_cross_is_searched_at_once() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    assert Crossing.of(infer(net, torch.randn(2, 3))) is None
