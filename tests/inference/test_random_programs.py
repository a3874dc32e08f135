"""Soundness on random programs: whatever inference claims about them must hold.

Nobody decides here what the symmetry is; every generator is tried alone and together with the others, by the definition of
a generator. The operators are those that have broken rules before: lookups with repeats, copies, regrouped axes, shared
weights, grouped products, writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from automerge import infer
from automerge.testing import assert_sound
from tests.inference.test_dispatch import BACK

ACTIVATIONS = (torch.relu, torch.tanh, torch.sigmoid, torch.square, torch.sin)
STEPS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor | None]] = {}


def step(fn: Callable[[Any, torch.Tensor], torch.Tensor | None]) -> Callable[[Any, torch.Tensor], torch.Tensor | None]:
    STEPS[fn.__name__] = fn
    return fn


class Program(nn.Module):
    """A sequence of steps drawn once; a value is (batch, width) or (batch, tokens, width).

    Every draw is made while the program is built and replayed afterwards, and parameters are made on first use.
    """

    def __init__(self, pick: Callable[[list[Any]], Any], length: int, tokens: int) -> None:
        super().__init__()
        self.pick, self.recorded, self.length = pick, [], length
        self.weights = nn.ParameterList()
        self.forward(torch.zeros(2, tokens, 3) if tokens else torch.zeros(2, 3))
        self.pick = None

    def draw(self, options: Any) -> Any:
        if self.pick is not None:
            self.recorded.append(self.pick(list(options)))
        self.at += 1
        return self.recorded[self.at - 1]

    def weight(self, *shape: int) -> torch.Tensor:
        self.used += 1
        if self.pick is not None:
            rng = torch.Generator().manual_seed(self.used)
            self.weights.append(nn.Parameter(torch.randn(shape, generator=rng) / math.sqrt(shape[0])))
        return self.weights[self.used - 1]

    def factor(self, n: int) -> int | None:
        options = [k for k in range(2, n) if n % k == 0]
        return self.draw(options) if options else None

    def linear(self, h: torch.Tensor, n: int) -> torch.Tensor:
        return h @ self.weight(h.shape[-1], n)

    def other(self, h: torch.Tensor) -> torch.Tensor:
        return self.draw_value([v for v in self.values if v.shape == h.shape])

    def draw_value(self, options: list[torch.Tensor]) -> torch.Tensor:
        return options[self.draw(range(len(options)))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.at = self.used = 0
        self.values = [self.linear(x, self.draw([4, 6, 8])) for _ in range(self.draw([1, 2]))]
        for _ in range(self.length):
            h = self.draw_value(self.values[-3:])
            out = STEPS[self.draw(STEPS)](self, h)
            if out is not None and 2 <= out.shape[-1] <= 16:
                self.values.append(out)
        h = self.values[-1]
        if self.draw([True, False]):
            h = h + self.other(h)
        if h.ndim == 3 and self.draw([True, False]):
            h = h.flatten(1)
        h = h.sum(-1) if self.draw([True, False, False]) else self.linear(h, 2)
        self.values = []
        return h


# -------------------------------------------------------------------- along the width
@step
def dense(p, h):
    return p.linear(p.draw(ACTIVATIONS)(h), p.draw([4, 6, 8]))


@step
def residual(p, h):
    return h + p.linear(h, h.shape[-1])


@step
def activation(p, h):
    return p.draw(ACTIVATIONS)(h)


@step
def scaled(p, h):
    return h * p.weight(h.shape[-1]) + p.weight(h.shape[-1])


@step
def flip_added(p, h):
    return h + h.flip(-1) if p.draw([True, False]) else h * h.roll(1, -1)


@step
def joined(p, h):
    return torch.cat([h, p.other(h).tanh() if p.draw([True, False]) else h], -1)


@step
def split_joined(p, h):
    k = p.draw(range(1, h.shape[-1]))
    a, b = h.split([k, h.shape[-1] - k], -1)
    return torch.cat([b.relu(), a.tanh()] if p.draw([True, False]) else [a.relu(), b.relu()], -1)


@step
def half_changed(p, h):
    """Pieces of a tensor beside pieces of a function of it, or of the same function of it twice."""
    f, half = p.draw(ACTIVATIONS), h.shape[-1] // 2
    one, two = f(h) if p.draw([True, False]) else h, f(h)
    if p.draw([True, False]):
        return torch.cat([one[..., :half], two[..., half:]], -1)
    return p.draw((torch.add, torch.mul))(one[..., :half], two[..., -half:])


FOLDS = (torch.add, torch.mul, torch.maximum, torch.minimum, torch.logaddexp, torch.sub)


@step
def folded(p, h):
    """Pieces folded in some order, of which one may be read on its own before or after the fold is."""
    k = p.factor(h.shape[-1])
    if k is None:
        return None
    pieces = list(p.draw(ACTIVATIONS)(h).chunk(k, -1))
    if p.draw([True, False]):
        pieces = [h[..., i::k].tanh() for i in range(k)]
    fold, last = p.draw(FOLDS), p.draw(FOLDS)
    out = pieces[p.draw(range(k))]
    for i in range(p.draw(range(1, k + 1))):
        out = (fold if i + 2 < k else last)(out, pieces[i])
    alone = pieces[p.draw(range(k))]
    own = p.draw(["none", "before", "after", "both"])
    if own == "none":
        return out
    if own == "both":
        return out + p.linear(alone, out.shape[-1]) + p.linear(out, out.shape[-1])
    read = p.linear(alone, 4)
    used = p.linear(out, 4)
    return torch.cat([read, used] if own == "before" else [used, read], -1)


@step
def sliced(p, h):
    return h[..., p.draw(range(h.shape[-1] // 2)) :: p.draw([1, 2])]


@step
def repeated(p, h):
    return torch.cat([h, h], -1) if p.draw([True, False]) else h.repeat_interleave(2, -1)


@step
def looked_up(p, h):
    n = h.shape[-1]
    return h[..., torch.tensor([p.draw(range(n)) for _ in range(n)])]


@step
def summed(p, h):
    return h + p.other(h)


@step
def gated(p, h):
    return h * p.other(h).sigmoid()


@step
def padded(p, h):
    return F.pad(h, (p.draw([0, 1]), 1))


@step
def softmax(p, h):
    return h.softmax(-1)


@step
def scattered(p, h):
    out = h.new_zeros(*h.shape[:-1], h.shape[-1] + 2)
    out[..., 1:-1] = h
    out[..., 0] += h[..., 0]
    return out


@step
def written(p, h):
    out = h.clone()
    k = p.draw(range(1, h.shape[-1]))
    out[..., :k] = out[..., :k] * 2 if p.draw([True, False]) else h[..., -k:].tanh()
    return out


@step
def tied(p, h):
    w = p.weight(h.shape[-1], p.draw([3, h.shape[-1]]))
    return (h @ w).tanh() @ w.T


@step
def weight_twice(p, h):
    w = p.weight(h.shape[-1], h.shape[-1])
    return ((h @ w).tanh() @ w).relu()


@step
def running(p, h):
    return h.cumsum(-1)


@step
def ordered(p, h):
    return h.sort(-1).values


@step
def experts(p, h):
    """Weights read at the best of some scores, once or twice, and what is read moved about in between."""
    count, hidden, n = 3, p.draw([2, 3]), h.shape[-1]
    up, down = p.weight(count, n, hidden), p.weight(count, hidden, p.draw([4, 6]))
    index = (p.linear(h, count) + p.weight(count)).topk(2, -1).indices  # biased: no ties
    first, second = up[index], down[index if p.draw([True, True, False]) else index.flip(-1)]
    y = torch.einsum("...d,...kdh->...kh", h, first).relu()
    if p.draw([True, False]):
        y = y + p.weight(count, hidden)[index]
    if p.draw([False, False, True]):
        y, second = (y.flip(-2), second) if p.draw([True, False]) else (y[..., :1, :], second[..., 1:, :, :])
    if p.draw([False, False, True]):
        y = y.sum(-2, keepdim=True).expand_as(y)
    if h.ndim == 3 and p.draw([False, True]):
        y = y.flip(1)
    return torch.einsum("...kh,...khd->...d", y, second)


@step
def table(p, h):
    return p.weight(5, p.draw([4, 6]))[(p.linear(h, 5) + p.weight(5)).argmax(-1)]


CHOOSE = (
    lambda z: z.argmax(-1),
    lambda z: z.argmin(-1),
    lambda z: z.max(-1).indices,
    lambda z: z.topk(2, -1).indices[..., 1],
    lambda z: z.argsort(-1)[..., 0],
)
MOVE = (
    lambda i, j: i,
    lambda i, j: i.flip(-1),
    lambda i, j: torch.cat([i[..., 1:], i[..., :1]], -1),
    lambda i, j: torch.cat([i[..., :1], j[..., :1]], -1),
    lambda i, j: torch.stack([i[..., 0], j[..., -1]], -1),
    lambda i, j: torch.stack(i.unbind(-1)[::-1], -1),
    lambda i, j: torch.stack([i, j], -2).flatten(-2),
    lambda i, j: i[..., 1:],
    lambda i, j: i.clamp(0, 3).remainder(4),
    lambda i, j: i.clamp(max=2),
)
READ = (
    lambda w, i: w[i],
    lambda w, i: F.embedding(i, w),
    lambda w, i: F.one_hot(i, 4).to(w.dtype) @ w,
    lambda w, i: (i[..., None] == torch.arange(4)).to(w.dtype) @ w,
    lambda w, i: w.new_zeros(*i.shape, 4).scatter(-1, i[..., None], 1.0) @ w,
    lambda w, i: w.expand(*i.shape, *w.shape).gather(-2, i[..., None, None].expand(*i.shape, 1, w.shape[1]))[..., 0, :],
    lambda w, i: torch.stack([w.new_zeros(4).index_put((r,), w.new_ones(())) for r in i.flatten(0, -2)])[:, None] @ w,
    lambda w, i: (i.unsqueeze(-1) == i.unsqueeze(-2)).to(w.dtype).sum(-1, keepdim=True) * w[0],
)


@step
def chosen(p, h):
    """The best of some scores for every head, moved about, joined with others, and read in one of many ways."""
    heads = p.draw([2, 3])
    if p.draw([True, True, False]):
        scores = torch.einsum("...n,knj->...kj", h, p.weight(heads, h.shape[-1], 4)) + p.weight(heads, 4)  # no ties
    else:
        scores = p.linear(h, heads * 4).unflatten(-1, (heads, 4)) + p.weight(4)
    i, j = p.draw(CHOOSE)(scores), p.draw(CHOOSE)(scores if p.draw([True, True, False]) else scores.roll(1, -2))
    i = p.draw(MOVE)(i, j)
    y = p.draw(READ)(p.weight(4, 6), i)
    if y.shape[:-2] != h.shape[:-1]:
        return None  # written for all rows together
    how = p.draw(["sum", "max", "weighted", "heads", "one"])
    if how == "weighted":
        return (y * p.weight(y.shape[-2], 1)).sum(-2)
    if how == "heads":
        return p.linear(y, 2).flatten(-2)
    return y.sum(-2) if how == "sum" else y.amax(-2) if how == "max" else y[..., 0, :] - y[..., -1, :].tanh()


AMONG_ROWS = (
    lambda y, order: y.relu(),
    lambda y, order: y / (1 + y.abs().amax(0)),
    lambda y, order: y * (1 + order[:, None] % 2),
    lambda y, order: torch.where(y > 0, y, torch.zeros_like(y)),
    lambda y, order: y.cumsum(0).tanh(),
    lambda y, order: y + y[:1],
    lambda y, order: y * torch.linspace(1, 2, len(y))[:, None],
    lambda y, order: torch.where(y > 9, y.roll(1, 0), y),
    lambda y, order: y[order],
)


@step
def dispatched(p, h):
    """Experts on sorted rows, of which the order may be used on the way."""
    n, count = h.shape[-1], 3
    if h.ndim != 2 or n % 4 or not hasattr(F, "grouped_mm"):
        return None
    weight, best = (p.linear(h, count) + p.weight(count)).topk(2, -1)
    number, order = best.reshape(-1).sort()
    ends = torch.bincount(number, minlength=count).cumsum(0).to(torch.int32)
    ends = (ends - p.draw([0, 0, 0, 1])).clamp(min=0)
    y = F.grouped_mm(h[order // 2], p.weight(count, n, 8), offs=ends)
    y = y + p.weight(count, 8)[number] if p.draw([True, False]) else y
    y = p.draw(AMONG_ROWS)(y, order) if p.draw([True, False]) else y
    y = F.grouped_mm(y, p.weight(count, 8, n), offs=ends) * weight.reshape(-1)[order, None]
    return p.draw(list(BACK.values()))(y, order)


# -------------------------------------------------------------------- the width as a product
def grid(p, h):
    k = p.factor(h.shape[-1])
    return (None, None) if k is None else (k, h.unflatten(-1, (k, -1)))


@step
def transposed(p, h):
    _, g = grid(p, h)
    return None if g is None else g.mT.flatten(-2)


@step
def group_softmax(p, h):
    _, g = grid(p, h)
    return None if g is None else g.softmax(p.draw([-1, -2])).flatten(-2)


@step
def group_linear(p, h):
    k, g = grid(p, h)
    if g is None:
        return None
    w = p.weight(k, g.shape[-1], p.draw([2, 3]))
    return torch.einsum("...ki,kij->...kj", g, w).flatten(-2)


@step
def group_shared_linear(p, h):
    _, g = grid(p, h)
    return None if g is None else p.linear(g, p.draw([2, 3])).flatten(-2)


@step
def gram(p, h):
    _, g = grid(p, h)
    return None if g is None else (g @ p.other(h).reshape(g.shape).mT).flatten(-2)


@step
def group_biased(p, h):
    k, g = grid(p, h)
    if g is None:
        return None
    bias = p.weight(g.shape[-1]) if p.draw([True, False]) else p.weight(k, 1)
    return (g + bias).tanh().flatten(-2)


@step
def group_max(p, h):
    _, g = grid(p, h)
    return None if g is None else g.amax(p.draw([-1, -2]))


@step
def group_norm(p, h):
    k = p.factor(h.shape[-1])
    if k is None or h.ndim != 2:
        return None
    return F.group_norm(h, k, p.weight(h.shape[-1]), p.weight(h.shape[-1]))


@step
def broadcast(p, h):
    _, g = grid(p, h)
    return None if g is None else (g * g.mean(p.draw([-1, -2]), keepdim=True) + g.amax(-2, keepdim=True)).flatten(-2)


@step
def outer(p, h):
    return (h[..., :, None] * h[..., None, :]).flatten(-2) if h.shape[-1] <= 4 else None


# -------------------------------------------------------------------- along the tokens
@step
def token_mixed(p, h):
    return p.linear(h.mT, h.shape[1]).mT if h.ndim == 3 else None


@step
def attended(p, h):
    return (h @ p.other(h).mT).softmax(-1) @ h if h.ndim == 3 else None


@step
def positioned(p, h):
    return h + p.weight(h.shape[1], h.shape[2]) if h.ndim == 3 else None


@step
def pooled(p, h):
    return h - h.mean(1, keepdim=True) if h.ndim == 3 else None


@st.composite
def programs(draw):
    def pick(options):
        return options[draw(st.integers(0, len(options) - 1))]

    tokens = pick([0, 0, 2, 3])
    return Program(pick, pick(range(1, 8)), tokens), torch.randn(2, tokens, 3) if tokens else torch.randn(2, 3)


@settings(max_examples=150)
@given(programs())
def test_what_is_claimed_holds(case):
    program, x = case
    symmetry = infer(program, x, verify=False)
    assert not symmetry.unruled
    assert_sound(program, x, symmetry, elements=4)
