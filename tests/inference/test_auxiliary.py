"""Auxiliary heads: what a model reads only while it is trained moves with the units that it reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from automerge import ActivationMatching, infer, match, merge
from automerge.symmetry import Symmetry

torch.set_num_threads(1)
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Supervised(nn.Module):
    """A stem, a body and a head; in training a second head reads the stem, through what ``path`` makes of it."""

    def __init__(self, path: Any = lambda self, h: self.aux(h)) -> None:
        super().__init__()
        self.path = path
        self.stem = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.body, self.head = nn.Linear(8, 7), nn.Linear(7, 3)
        self.aux = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        h = self.stem(x)
        out = self.head(self.body(h).relu())
        return (out, self.path(self, h)) if self.training else out


def network(*path: Any) -> Supervised:
    torch.manual_seed(0)
    net = Supervised(*path)
    nn.init.normal_(net.stem[1].running_mean)
    return net.eval()


def sizes(symmetry: Symmetry) -> list[int]:
    return sorted(g.size for g in symmetry.sets)


@torch.no_grad()
def of_training(net: nn.Module, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both outputs, with layers in eval mode."""
    twin = copy.deepcopy(net)
    twin.load_state_dict(state)
    twin.double().eval().training = True
    return twin(X.double())


@pytest.mark.parametrize("verify", [True, False])
def test_units_of_an_auxiliary_head_and_its_inputs_move(verify: bool) -> None:
    net = network()
    symmetry = infer(net, X, verify=verify)
    assert sizes(symmetry) == [5, 7, 8]
    assert ("aux.0.weight", 1) in {(s.param, s.axis) for g in symmetry.sets if g.size == 8 for s in g.slots}
    assert any("only training reads aux.0.bias and 3 more" in n for n in symmetry.notes)
    assert not any("does not depend" in n for n in symmetry.notes)
    state = net.state_dict()
    moved = symmetry.apply(state, symmetry.random_element(0))
    for one, two in zip(of_training(net, state), of_training(net, moved), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    net = network()
    net.aux.train()
    modes = [m.training for m in net.modules()]
    infer(net, X)
    assert type(net) is Supervised
    assert [m.training for m in net.modules()] == modes


def test_merged_copies_compute_the_same_in_training() -> None:
    net = network()
    symmetry = infer(net, X)
    other = copy.deepcopy(net)
    other.load_state_dict(symmetry.apply(net.state_dict(), symmetry.random_element(1)))
    result = merge([net, other], X, data=[X], repair="none")
    for one, two in zip(of_training(net, net.state_dict()), of_training(net, result.state_dict), strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_activations_are_observed_where_a_head_reads_them_only_in_training() -> None:
    net = network()
    symmetry = infer(net, X)
    planted = symmetry.random_element(2)
    other = copy.deepcopy(net)
    other.load_state_dict(symmetry.apply(net.state_dict(), planted))
    result = match([net, other], symmetry, ActivationMatching(), data=[torch.randn(200, 4)])
    assert len(result.stats["not_observed"]) == 1  # the head's own units
    assert result.between(0, 1) == planted


def cumulated(self: Supervised, h: torch.Tensor) -> torch.Tensor:
    return self.aux(h.cumsum(-1))


def refused(self: Supervised, h: torch.Tensor) -> torch.Tensor:
    raise ValueError("in training mode, targets should be passed")


def dropped(self: Supervised, h: torch.Tensor) -> torch.Tensor:
    return self.aux(functional.dropout(h, 0.5, self.training))


@pytest.mark.parametrize("path", [cumulated, refused])
@pytest.mark.parametrize("verify", [True, False])
def test_nothing_is_lost_by_a_pass_that_pins_or_fails(path: Any, verify: bool) -> None:
    """Units whose order training needs stay free, as evaluation has them; what is not read is said."""
    symmetry = infer(network(path), X, verify=verify)
    assert sizes(symmetry) == [7, 8]
    assert any("does not depend on aux.0.weight" in n for n in symmetry.notes)


def test_a_pass_that_drops_units_at_random_ends_in_no_error() -> None:
    net = network(dropped)
    symmetry = infer(net, X)
    moved = symmetry.apply(net.state_dict(), symmetry.random_element(3))
    one, two = (of_training(net, s)[0] for s in (net.state_dict(), moved))
    assert torch.allclose(one, two, atol=1e-6)
    assert sizes(symmetry) in ([7, 8], [5, 7, 8])


def test_a_model_that_reads_everything_runs_once() -> None:
    calls = []
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    net[0].register_forward_hook(lambda *_: calls.append(net.training))
    infer(net, X, verify=False)
    assert not any(calls)


class Codebook(nn.Module):
    """Entries that follow moving averages of what is nearest to them (VQ-VAE's exponential moving averages)."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"entries": (6, 8), "sums": (6, 8), "counts": (6,)}.items():
            self.register_buffer(name, torch.rand(shape) + 0.5)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        chosen = torch.cdist(h, self.entries).argmin(-1)
        if self.training:
            codes = functional.one_hot(chosen, 6).to(h)
            self.counts.lerp_(codes.sum(0), 0.1)
            self.sums.lerp_(codes.T @ h, 0.1)
            self.entries.copy_(self.sums / self.counts[:, None])
        return self.entries[chosen]


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.codebook, self.out = nn.Linear(4, 8), Codebook(), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.codebook(self.inp(x)))


@pytest.mark.parametrize("verify", [True, False])
def test_averages_that_only_training_reads_move_with_a_codebook(verify: bool) -> None:
    torch.manual_seed(0)
    net = Quantised().eval()
    symmetry = infer(net, X, verify=verify)
    slots = {(s.param, s.axis) for g in symmetry.sets if g.size == 6 for s in g.slots}
    assert slots == {("codebook.entries", 0), ("codebook.sums", 0), ("codebook.counts", 0)}
    assert ("codebook.sums", 1) in {(s.param, s.axis) for g in symmetry.sets if g.size == 8 for s in g.slots}
    moved = copy.deepcopy(net)
    moved.load_state_dict(symmetry.apply(net.state_dict(), symmetry.random_element(0)))
    for _ in range(3):  # each pass reads what the one before it left
        assert torch.allclose(net.train()(X), moved.train()(X), atol=1e-5)


class Centre(nn.Module):
    """A mean that training follows, and nothing reads (the centre of a loss that is elsewhere)."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.seen = 0, []
        self.register_buffer("mean", torch.rand(8))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
            self.seen.append(self.steps)
            self.mean.lerp_(h.mean(0), 0.1)
        return h


@pytest.mark.parametrize("verify", [True, False])
def test_what_training_only_writes_moves_with_what_it_is_made_of(verify: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), Centre(), nn.Linear(8, 3)).eval()
    symmetry = infer(net, X, verify=verify)
    (group,) = symmetry.sets
    assert {(s.param, s.axis) for s in group.slots} == {("0.weight", 0), ("0.bias", 0), ("1.mean", 0), ("2.weight", 1)}
    assert (net[1].steps, net[1].seen) == (0, [])
    moved = copy.deepcopy(net)
    moved.load_state_dict(symmetry.apply(net.state_dict(), element := symmetry.random_element(0)))
    for one in (net, moved):
        one.train()(X)
    assert torch.allclose(symmetry.apply(net.state_dict(), element)["1.mean"], moved[1].mean, atol=1e-6)
