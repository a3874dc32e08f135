"""Models that are not on the CPU: everything public on a pretended device finds and returns what it does on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import automerge
from automerge import CCA, FrankWolfe, GaussianRepair, LeastSquares, Matcher, Repair, RowNorms, Symmetry
from automerge.matchers import MATCHERS
from tests._far import CUDA, Far, far, near, pretended


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.last((x + self.norm(self.second(x)).relu()).mean((2, 3)))


class Attention(nn.Module):
    """Causal, with a mask and positions that the forward pass makes where its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 12), nn.Embedding(6, 12)
        self.norm, self.qkv, self.out = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down, self.head = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        n = tokens.shape[1]
        x = self.embed(tokens) + self.place(torch.arange(n, device=tokens.device))
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mask = torch.full((n, n), -torch.inf, device=tokens.device).triu(1)
        mixed = (q @ k.mT / 2 + mask).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(x + self.down(torch.nn.functional.gelu(self.up(x))))


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))


NETWORKS: dict[str, tuple[type[nn.Module], Callable[[], torch.Tensor], int]] = {
    "convolutional": (Convolutional, lambda: torch.randn(16, 1, 5, 5), 5),
    "attention": (Attention, lambda: torch.randint(11, (8, 6)), 11),
    "plain": (Plain, lambda: torch.randn(32, 6), 4),
}


def copies(net: nn.Module, symmetry: Symmetry) -> list[nn.Module]:
    """Three permuted copies with a little noise: what a matcher shall find does not depend on the last bits."""
    torch.manual_seed(3)
    out = []
    for seed in range(3):
        noisy = {
            n: v + 1e-2 * torch.randn(v.shape) if v.is_floating_point() else v for n, v in net.state_dict().items()
        }
        one = deepcopy(net)
        one.load_state_dict(symmetry.apply(noisy, symmetry.random_element(np.random.default_rng(seed))))
        out.append(one)
    return out


@cache
def case(name: str) -> tuple[list[nn.Module], torch.Tensor, torch.Tensor, Symmetry]:
    """Three networks, inputs, labels and the symmetry, on the CPU."""
    kind, inputs, classes = NETWORKS[name]
    nets = []
    for seed in range(3):
        torch.manual_seed(seed)
        nets.append(kind().eval().requires_grad_(False))
    x = inputs()
    labels = torch.randint(classes, nets[0](x).shape[:-1])
    return nets, x, labels, automerge.infer(nets[0], x[:2])


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_symmetry(name: str) -> None:
    nets, x, _, symmetry = case(name)
    with pretended():
        there = automerge.infer(far(nets[0]), far(x[:2]))
        assert automerge.verify(far(nets[0]), far(x[:2]), symmetry).reacted
    assert there.sets == symmetry.sets
    assert there.stats["verified"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("matcher", MATCHERS)
def test_every_matcher_finds_the_same_and_merges_where_the_models_are(name: str, matcher: str) -> None:
    nets, x, _, symmetry = case(name)
    nets = copies(nets[0], symmetry)
    here = automerge.merge(nets, x, symmetry=symmetry, matcher=MATCHERS[matcher](), data=[x], repair="none")
    with pretended():
        there = automerge.merge(
            [far(n) for n in nets], far(x), symmetry=symmetry, matcher=MATCHERS[matcher](), data=[far(x)], repair="none"
        )
    _equal(there.state_dict, here.state_dict)


@pytest.mark.parametrize(
    "matcher",
    [
        FrankWolfe(schedule="simultaneous", start="sinkhorn", restarts=1),
        FrankWolfe(start="barycentre", block_weights="normalised", anchor=1),
        FrankWolfe(dtype="float64"),
    ],
    ids=["simultaneous", "normalised", "float64"],
)
def test_options_of_the_universe(matcher: Matcher) -> None:
    nets, _, _, symmetry = case("attention")
    nets = copies(nets[0], symmetry)
    here = automerge.match(nets, symmetry, matcher)
    with pretended():
        assert automerge.match([far(n) for n in nets], symmetry, matcher).to_universe == here.to_universe


@pytest.mark.parametrize("matcher", MATCHERS)
def test_models_here_and_there_with_data_here(matcher: str) -> None:
    nets, x, _, symmetry = case("convolutional")
    nets = copies(nets[0], symmetry)
    here = automerge.match(nets, symmetry, MATCHERS[matcher](), data=[x])
    with pretended():
        for there in ([far(nets[0]), *nets[1:]], [nets[0], far(nets[1]), far(nets[2].state_dict())]):
            found = automerge.match(there, symmetry, MATCHERS[matcher](), data=[x])
            if "objective" in here.stats:
                assert found.stats["objective"] == pytest.approx(here.stats["objective"], rel=1e-5)
            if MATCHERS[matcher]().exact:
                assert found.to_universe == here.to_universe


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "repair", ["reset", "repair", "both", "auto", Repair(), GaussianRepair(), RowNorms(), LeastSquares()], ids=str
)
def test_every_repair(name: str, repair: Any) -> None:
    nets, x, _, symmetry = case(name)
    if repair == "reset" and name != "convolutional":
        pytest.skip("no BatchNorm")
    here = automerge.merge(nets, x, symmetry=symmetry, data=[x, x[:3]], repair=repair)
    with pretended():
        models, data = [far(n) for n in nets], [far(x), far(x[:3])]
        there = automerge.merge(models, far(x), symmetry=symmetry, data=data, repair=repair)
    _equal(there.state_dict, here.state_dict)


@pytest.mark.parametrize("name", NETWORKS)
def test_measures(name: str) -> None:
    nets, x, labels, symmetry = case(name)

    def numbers(models: list[nn.Module], x: torch.Tensor, labels: torch.Tensor) -> list[float]:
        data, states = [(x, labels)], [m.state_dict() for m in models]
        one, both = automerge.evaluate(models[0], data), automerge.evaluate(models[:2], data)
        line = automerge.barrier(models[0], states[0], states[1], data, 3)
        seen = automerge.plane(models[0], *states, data, 3)
        pair = automerge.agreement(models[0], models[1], data)
        alike = automerge.similarity(states[0], states[1], model=models[0], data=data, symmetry=symmetry)
        return [one.loss, both.loss, *line.losses, *np.ravel(seen.losses), *_numbers(pair), *_numbers(alike)]

    here = numbers(nets, x, labels)
    with pretended():
        there = numbers([far(n) for n in nets], far(x), far(labels))
    assert len(here) > 15
    assert there == pytest.approx(here, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_comparison(name: str) -> None:
    nets, x, labels, symmetry = case(name)
    nets = copies(nets[0], symmetry)
    given: dict[str, Any] = {"matchers": {"universe": FrankWolfe(), "CCA": CCA()}, "repairs": {"repair": "repair"}}
    here = automerge.compare(nets, x, [(x, labels)], **given)
    with pretended():
        there = automerge.compare([far(n) for n in nets], far(x), [(far(x), far(labels))], **given)
    assert _numbers(there) == pytest.approx(_numbers(here), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_gauges(name: str) -> None:
    nets, x, _, symmetry = case(name)
    here, _ = automerge.canonicalise(nets[0], x, [n.state_dict() for n in nets], symmetry, norms=True)
    with pretended():
        models = [far(n) for n in nets]
        there, _ = automerge.canonicalise(models[0], far(x), [n.state_dict() for n in models], symmetry, norms=True)
    for one, other in zip(there, here, strict=True):
        _equal(one, other)


def test_files(tmp_path: Path) -> None:
    nets, _, _, _ = case("plain")
    with pretended():
        automerge.save_state_dict(tmp_path / "a.safetensors", far(nets[0]).state_dict())
    saved = automerge.load_state_dict(tmp_path / "a.safetensors")
    assert all(torch.equal(v, saved[n]) for n, v in nets[0].state_dict().items())


def test_the_pretended_device_refuses_what_the_real_one_does() -> None:
    with pretended():
        x = far(torch.ones(3))
        assert x.device == torch.zeros(2, device="cuda").device == CUDA
        assert (x + torch.tensor(1.0)).device == CUDA
        assert type(x.cpu()) is torch.Tensor
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises((TypeError, RuntimeError)):
            x.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, device=CUDA, generator=torch.Generator())


def _equal(there: dict[str, torch.Tensor], here: dict[str, torch.Tensor]) -> None:
    assert there.keys() == here.keys()
    for name, value in here.items():
        assert isinstance(there[name], Far), name
        assert torch.allclose(near(there[name]), value, rtol=1e-4, atol=1e-5), name


def _numbers(result: Any) -> list[float]:
    """All numbers of a result, seconds left out."""
    out: list[float] = []

    def visit(value: Any, name: str = "") -> None:
        if dataclasses.is_dataclass(value):
            for item in dataclasses.fields(value):
                visit(getattr(value, item.name), item.name)
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(item, str(key))
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item, name)
        elif isinstance(value, int | float) and "second" not in name:
            out.append(float(value))

    visit(result)
    return out
