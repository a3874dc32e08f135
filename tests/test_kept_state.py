"""What a model keeps on its modules in a pass: the next pass and the caller's model do not know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge import (
    ActivationMatching,
    Identity,
    Repair,
    barrier,
    compare,
    evaluate,
    infer,
    match,
    merge,
    reset_batchnorm,
)
from automerge._data import Batch
from automerge._forward import bind, run_batch
from automerge._restoring import lent, restored


class WeightDrop(nn.Module):
    """A recurrence whose weight is dropped out into the place of a parameter; in eval that is the parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.LSTM(4, 6), nn.Linear(6, 2)
        self.inner.weight_raw = self.inner._parameters.pop("weight_hh_l0")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner.weight_hh_l0 = F.dropout(self.inner.weight_raw, 0.5, self.training)
        return self.out(self.inner(x)[0][-1])


class Computed(nn.Module):
    """A plain tensor where a parameter was removed, and a new buffer every time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.raw = self.inner._parameters.pop("weight")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner.weight = self.raw / self.raw.norm()
        self.inner.register_buffer("seen", x.mean(0), persistent=False)
        return self.out(self.norm(self.inner(x.mean(0))).relu())


class Carrying(nn.Module):
    """A hidden state on self, from pass to pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out, self.state = nn.LSTM(4, 6), nn.Linear(6, 2), None
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, self.state = self.inner(x, self.state)
        self.seen.append(y)
        return self.out(y[-1])


@dataclass
class Memory:
    """A state and what was seen, outside of any module."""

    state: Any = None
    steps: int = 0
    seen: list[torch.Tensor] = field(default_factory=list)
    inner: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(last=None))


class Slotted:
    """One without a dict of attributes, some of which are not set yet."""

    __slots__ = ("seen", "state")

    def __init__(self) -> None:
        self.state: Any = None


class Slotting(nn.Module):
    """A hidden state on such an object, from pass to pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out, self.memory = nn.LSTM(4, 6), nn.Linear(6, 2), Slotted()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, self.memory.state = self.inner(x, self.memory.state)
        self.memory.seen = getattr(self.memory, "seen", 0) + 1
        return self.out(y[-1] * self.memory.seen)


class Remembering(nn.Module):
    """A hidden state on an object, from pass to pass, and one within another one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out, self.memory = nn.LSTM(4, 6), nn.Linear(6, 2), {"one": Memory()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = self.memory["one"]
        y, memory.state = self.inner(x, memory.state)
        memory.steps += 1
        memory.seen.append(y)
        y = y if memory.inner.last is None else y + memory.inner.last
        memory.inner.last = y
        return self.out(y[-1])


def _models(make: Callable[[], nn.Module]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [make().eval() for _ in range(2)]


X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
LABELLED = [(X, torch.tensor([0, 1, 0, 1, 1])), (X + 1, torch.tensor([1, 1, 0, 1, 0]))]
USES: dict[str, Callable[[list[Any]], object]] = {
    "reset": lambda m: merge(m, X, data=[X, X], repair="auto"),
    "repair": lambda m: merge(m, X, data=[X, X], repair=Repair()),
    "activations": lambda m: merge(m, X, data=[X, X], matcher=ActivationMatching()),
    "barrier": lambda m: barrier(m[0], m[0].state_dict(), m[1].state_dict(), LABELLED),
    "compare": lambda m: compare(
        m, X, LABELLED, select=LABELLED, report=LABELLED, matchers={"i": Identity(), "a": ActivationMatching()}
    ),
    "reset_batchnorm": lambda m: reset_batchnorm(m[0], [X, X]),
}


@pytest.mark.parametrize("make", [WeightDrop, Computed, Carrying, Remembering, Slotting])
@pytest.mark.parametrize("use", USES)
def test_every_use_leaves_a_model_s_attributes(make: Callable[[], nn.Module], use: str) -> None:
    models = _models(make)
    before = [{path: dict(vars(m)) for path, m in model.named_modules()} for model in models]
    names = [list(model.state_dict()) for model in models]
    found: Any = USES[use](models)
    assert [row.error for row in getattr(found, "rows", ()) if row.error] == []
    assert [list(model.state_dict()) for model in models] == names
    for model, kept in zip(models, before, strict=True):
        for path, module in model.named_modules():
            assert vars(module).keys() == kept[path].keys()
            assert all(value is kept[path][name] for name, value in vars(module).items())
    assert not any(getattr(m, "seen", None) for m in models)
    memories = [m.memory["one"] for m in models if isinstance(m, Remembering)]
    assert all(m == Memory() for m in memories)
    assert all(m.memory.state is None and not hasattr(m.memory, "seen") for m in models if isinstance(m, Slotting))


@pytest.mark.parametrize("make", [WeightDrop, Computed, Carrying, Remembering, Slotting])
@pytest.mark.parametrize("ran", [False, True])
def test_passes_do_not_know_of_each_other(make: Callable[[], nn.Module], ran: bool) -> None:
    """Own weights, lent weights, own weights again, in any order; also after a pass of the caller's."""
    one, other = _models(make)
    if ran and make in (WeightDrop, Computed):
        with torch.no_grad():
            one(X), other(X)
    assert evaluate(one, LABELLED) == evaluate(one, LABELLED[::-1])
    state = other.state_dict()
    wanted = evaluate(other, LABELLED)
    for _ in range(2):
        assert evaluate((one, state), LABELLED) == wanted
        assert evaluate([one, (one, state)], LABELLED).samples == 10


def test_a_merge_of_models_that_ran_before() -> None:
    models = _models(WeightDrop)
    with torch.no_grad():
        for model in models:
            model(X)
    found = merge(models, X, data=[X, X])
    assert torch.equal(found.state_dict["inner.weight_raw"], found.state_dict["inner.weight_hh_l0"])
    assert match(models, found.symmetry, ActivationMatching(), data=[X, X]).stats["samples"] > 1


def test_a_note_names_what_the_model_holds_of_an_earlier_pass() -> None:
    """Another trace gives the units of a fresh state away; silence would look like a network without symmetry."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Carrying()
            self.register_buffer("mask", torch.randn(4), persistent=False)
            self.step, self.last = torch.zeros(4), {}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.step = self.step + 1
            self.last["x"] = x
            return self.part(x * self.mask + self.step)

    model = Deep()
    fresh = infer(model, X)
    assert [g.size for g in fresh.generators()] == [6]
    assert not any("earlier pass" in note for note in fresh.notes)
    with torch.no_grad():
        model(X)
    held = infer(model, X)
    assert held.generators() == []
    (note,) = (note for note in held.notes if "earlier pass" in note)
    assert "(part.state)" in note
    for make in (WeightDrop, Computed):
        assert not any("earlier pass" in note for note in infer(_models(make)[0], X).notes)


def test_parameters_are_lent_as_parameters_over_the_same_memory() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    state = bind(net, net.state_dict(), copy=True)
    tensors = lent(net, state)
    assert isinstance(tensors["0.weight"], nn.Parameter)
    assert tensors["0.weight"] is tensors["2.weight"]
    assert not isinstance(tensors["1.running_mean"], nn.Parameter)
    version = state["0.weight"]._version
    tensors["0.weight"].zero_()
    assert not state["0.weight"].any()
    assert state["0.weight"]._version > version


def test_a_lazy_module_keeps_the_parameters_that_a_pass_gives_it() -> None:
    net = nn.Sequential(nn.LazyLinear(3))
    run_batch(net, None, Batch((torch.randn(2, 4),)))
    assert net[0].weight.shape == (3, 4)
    run_batch(net, None, Batch((torch.randn(2, 4),)))


def test_containers_stay_the_same_objects() -> None:
    net = Carrying()
    held = net.seen
    with restored(net):
        net(X)
        assert len(held) == 1
    assert net.seen is held
    assert not held
    assert net.state is None
