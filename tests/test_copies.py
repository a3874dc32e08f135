"""A copy reads its own weights, also in functions that the module keeps."""

from __future__ import annotations

import io
import math
import queue
import threading
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge import AutomergeError, TraceError, infer, merge
from automerge._copies import copied


class Tied(nn.Module):
    """The head is a function that reads the embedding."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.head: Any = HEADS[how](self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        head = self.head[0] if isinstance(self.head, list) else self.head
        return head(torch.relu(self.inner(self.embed(x))))


def _apply(model: Any, h: torch.Tensor) -> torch.Tensor:
    return h @ model.embed.weight.t()


def _nested(model: Tied) -> Callable[..., torch.Tensor]:
    def weight() -> torch.Tensor:
        return model.embed.weight

    def head(h: torch.Tensor) -> torch.Tensor:
        return h @ weight().t()

    return head


def _itself(model: Tied) -> Callable[..., torch.Tensor]:
    def head(h: torch.Tensor, again: bool = True) -> torch.Tensor:
        return head(h, False) if again else _apply(model, h)

    return head


HEADS: dict[str, Callable[[Tied], Any]] = {
    "a closure": lambda model: lambda h: h @ model.embed.weight.t(),
    "a parameter": lambda model: (lambda w: lambda h: h @ w.t())(model.embed.weight),
    "a default": lambda model: lambda h, own=model: _apply(own, h),
    "a keyword": lambda model: lambda h, *, own=model.embed: h @ own.weight.t(),
    "in a list": lambda model: [lambda h: _apply(model, h)],
    "a partial": lambda model: partial(_apply, model),
    "a partial of a closure": lambda model: partial(lambda scale, h: scale * _apply(model, h), 2.0),
    "functions of functions": _nested,
    "a function of itself": _itself,
    "a dict of modules": lambda model: (lambda own: lambda h: h @ own["embed"].weight.t())({"embed": model.embed}),
    "a method": lambda model: (lambda rows: lambda h: h @ rows(torch.arange(7)).t())(model.embed.forward),
}


@pytest.mark.parametrize("how", HEADS)
def test_functions_of_a_copy_read_the_copy(how: str) -> None:
    torch.manual_seed(0)
    model, x = Tied(how), torch.randint(7, (2, 5))
    before = model(x)
    own = copied(model)
    assert torch.equal(own(x), before)
    with torch.no_grad():
        own.embed.weight.mul_(-3)  # type: ignore[union-attr, operator]
    assert torch.equal(model(x), before)
    assert not torch.allclose(own(x), before)
    assert [g.size for g in infer(model, x).generators()] == [6]  # embedding, head, and both sides of the layer
    other = Tied(how)
    merged = merge([model, other], x, data=[x]).load_into(Tied(how))
    assert merged(x).shape == before.shape


def test_functions_that_read_nothing_of_the_module_stay_the_same_objects() -> None:
    scale = [2.0]
    model = Tied("a closure")
    model.plain = lambda h: h * scale[0]  # type: ignore[assignment]
    model.relu = torch.relu  # type: ignore[assignment]
    own = copied(model)
    assert own.plain is model.plain
    assert own.relu is model.relu
    assert own.head is not model.head


def test_hooks_of_a_copy_read_the_copy() -> None:
    model: Any = Tied("a closure")
    model.head = nn.Linear(6, 7)
    model.inner.register_forward_hook(lambda module, args, out: out * model.embed.weight.sum(0).sigmoid())
    x = torch.randint(7, (2, 5))
    before = model(x)
    own: Any = copied(model)
    with torch.no_grad():
        own.embed.weight.mul_(-3)
    assert not torch.allclose(own(x), before)
    assert torch.equal(model(x), before)


class Holder:
    """An object of a user's with a lock, and with the network."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.lock = network, threading.Lock()


class Irrep(tuple[int, int]):
    """A tuple whose class makes it of two numbers, and refuses ``len``."""

    def __new__(cls, degree: int, parity: int) -> Irrep:
        return super().__new__(cls, (degree, parity))

    def __len__(self) -> int:
        raise NotImplementedError


class Tokens:
    """An object without tensors that wraps what python cannot see."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("cannot pickle")


UNCOPYABLE: dict[str, Callable[[], Any]] = {
    "a python module": lambda: F,
    "a lock": threading.Lock,
    "an event": threading.Event,
    "a queue": queue.Queue,
    "a file": lambda: io.TextIOWrapper(io.BytesIO()),
    "a tuple without a length": lambda: Irrep(1, -1),
    "an object that refuses": Tokens,
    "a static method": lambda: staticmethod(math.sin),
    "a generator": lambda: (i for i in range(3)),
    "the keys of a dict": lambda: {"a": 1}.keys(),
    "a handle whose module is gone": lambda: nn.Linear(1, 1).register_forward_hook(lambda *_: None),
    "a distribution with gradients": lambda: torch.distributions.Normal(torch.ones(1, requires_grad=True) * 2, 1.0),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("what", UNCOPYABLE)
def test_what_cannot_be_copied_is_shared(what: str, nested: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    held = UNCOPYABLE[what]()
    net.held = {"here": [held]} if nested else held
    own = copied(net)
    assert own[0].weight is not net[0].weight
    assert [g.size for g in infer(net, torch.randn(2, 3)).generators()] == [5]


def test_what_holds_a_lock_and_the_network_reads_the_copy() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)
            self.__dict__["helper"] = Holder(self.a)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.helper.network(x).relu())

    net = Wrapped()
    own = copied(net)
    assert own.helper.network is own.a
    assert own.helper.lock is net.helper.lock
    assert [g.size for g in infer(net, torch.randn(2, 3)).generators()] == [5]
    merged = merge([Wrapped(), Wrapped()], torch.randn(2, 3), repair="none")
    assert set(merged.state_dict) == set(net.state_dict())


@pytest.mark.parametrize("how", ["proxy", "values", "generator", "static method"])
def test_what_cannot_be_copied_and_holds_the_network_is_refused(how: str) -> None:
    """A copy that shared it would read the original's weights."""
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    inner = net[0]
    net.held = {
        "proxy": lambda: MappingProxyType({"a": inner}),
        "values": lambda: {"a": inner}.values(),
        "generator": lambda: (inner(x) for x in ()),
        "static method": lambda: staticmethod(lambda x: inner(x)),
    }[how]()
    with pytest.raises(AutomergeError, match="cannot pickle"):
        copied(net)
    with pytest.raises(TraceError, match="cannot be copied"):
        infer(net, torch.randn(2, 3))
