"""A copy reads its own weights, also in functions that the module keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from automerge import infer, merge
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
