"""Blocks of random networks for tensors of any kind; each writes down the units that it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from automerge.testing._builder import Block, Builder, Built
from automerge.testing._ledger import Cell, Layout, Units, cells, distinct, grouped, whole

Make = Callable[[Builder, Layout], Built | None]
_MOST = 12  # channels beyond which nothing is joined any more


def dense(b: Builder, x: Layout) -> Built:
    """A layer of new units."""
    rows = b.fresh()
    return b.stack(b.mix(x, rows), b.activation()), b.retag(rows)


def residual(b: Builder, x: Layout) -> Built:
    """The sum x + f(x), through one or two layers."""
    rows = distinct(x)
    if b.pick([True, False]):
        hidden = b.fresh()
        inner = b.stack(b.mix(x, hidden), b.activation(), b.mix(b.retag(hidden), rows))
    else:
        inner = b.stack(b.mix(x, rows), b.activation())
    return Block("x + f(x)", lambda self, x: x + self.parts[0](x), inner), b.retag(rows)


def gate(b: Builder, x: Layout) -> Built:
    """The product x * sigmoid(f(x))."""
    rows = distinct(x)
    return Block("x * sigmoid(f(x))", lambda self, x: x * self.parts[0](x).sigmoid(), b.mix(x, rows)), b.retag(rows)


def batch_norm(b: Builder, x: Layout) -> Built | None:
    """Batch normalisation, or instance normalisation on images."""
    if b.kind == "tokens":
        return None
    if b.kind == "image":
        many = [nn.InstanceNorm2d(len(x), affine=True)] if b.space > 1 else []
        norm: nn.Module = b.pick([nn.BatchNorm2d(len(x)), *many])
    else:
        norm = nn.BatchNorm1d(len(x))
    return norm, b.on_channels(norm, x)


def layer_norm(b: Builder, x: Layout) -> Built:
    """Layer or RMS normalisation over the channels, with or without scale and shift."""
    affine = b.pick([True, False])
    kind: Any = b.pick([nn.LayerNorm, nn.RMSNorm])
    norm = kind(len(x), elementwise_affine=affine)
    after = b.on_channels(norm, x) if affine else b.retag(x)
    if b.kind != "image":
        return norm, after
    last = Block("channels last", lambda self, x: self.parts[0](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm)
    return last, after


def group_norm(b: Builder, x: Layout) -> Built | None:
    """Group normalisation: units inside groups."""
    options = [g for g in range(1, len(x) // 2 + 1) if len(x) % g == 0]
    if b.kind == "tokens" or not options:
        return None
    groups = b.pick(options)
    if groups > 1 and grouped(x, groups) is None:
        return None
    norm = nn.GroupNorm(groups, len(x))
    return norm, b.on_channels(norm, x)


def prelu(b: Builder, x: Layout) -> Built:
    """A slope per channel, or one for all."""
    if b.pick([True, False]):
        return nn.PReLU(), b.retag(x)
    apart = distinct(x)
    block: Any = Block("prelu", _prelu)
    block.dim = b.dim
    block.slope = nn.Parameter(torch.rand(len(x)))
    b.ledger.own(block.slope, 0, apart)
    return block, b.retag(apart)


def _prelu(self: Any, x: torch.Tensor) -> torch.Tensor:
    slope = self.slope[:, None, None] if self.dim == 1 else self.slope
    return torch.where(x > 0, x, x * slope)


def concat_branch(b: Builder, x: Layout) -> Built | None:
    """cat([x, f(x)]), in either order."""
    if len(x) > _MOST:
        return None
    rows = b.fresh()
    inner, d = b.stack(b.mix(x, rows), b.activation()), b.dim
    if b.pick([True, False]):
        return Block("cat([x, f(x)])", lambda self, x: torch.cat([x, self.parts[0](x)], d), inner), x + b.retag(rows)
    return Block("cat([f(x), x])", lambda self, x: torch.cat([self.parts[0](x), x], d), inner), b.retag(rows) + x


def concat_functions(b: Builder, x: Layout) -> Built | None:
    """Two functions of the same units, side by side."""
    if len(x) > _MOST // 2:
        return None
    d = b.dim
    block = Block("cat([tanh(x), x * x])", lambda self, x: torch.cat([x.tanh(), x * x], d))
    return block, b.retag(x) + b.retag(x)


def copies(b: Builder, x: Layout) -> Built | None:
    """The same values twice: consumers may exchange them."""
    if len(x) > _MOST // 2:
        return None
    d = b.dim
    text = b.pick(["cat", "repeat", "interleave"])
    if text == "interleave":
        wide = tuple(c for c in x for _ in range(2))
        return Block("repeat_interleave", lambda self, x: x.repeat_interleave(2, d)), wide
    if text == "cat":
        return Block("cat([x, x])", lambda self, x: torch.cat([x, x], d)), x + x
    return Block("repeat", _repeat_first if d == 1 else _repeat_last), x + x


def _repeat_first(self: Block, x: torch.Tensor) -> torch.Tensor:
    return x.repeat(1, 2, 1, 1)


def _repeat_last(self: Block, x: torch.Tensor) -> torch.Tensor:
    return x.repeat(*[1] * (x.ndim - 1), 2)


def split_join(b: Builder, x: Layout) -> Built:
    """A layer cut in two that go through different functions and come back in the other order."""
    first, second, d = b.fresh(4), b.fresh(4), b.dim
    cut = [len(first), len(second)]

    def forward(self: Block, x: torch.Tensor) -> torch.Tensor:
        one, two = self.parts[0](x).split(cut, d)
        return torch.cat([two.tanh(), one.relu()], d)

    block = Block(f"split {cut}, join", forward, b.mix(x, first + second))
    return block, b.retag(second) + b.retag(first)


def split_apart(b: Builder, x: Layout) -> Built:
    """A layer cut in two (equal parts); one gates the other, as in GLU."""
    rows, d = b.fresh(4), b.dim

    def forward(self: Block, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.parts[0](x).chunk(2, d)
        return value * F.gelu(gate)

    return Block("glu", forward, b.mix(x, b.retag(rows) + b.retag(rows))), b.retag(rows)


def drop(b: Builder, x: Layout) -> Built | None:
    """Keep some of the channels; whole sets only, so that nothing is cut apart, whatever the size of the input.

    The others are read by a mean: what nobody reads would stay where it is.
    """
    if b.pixels:
        return None
    cuts = [(i, j) for i in range(len(x)) for j in range(i + 2, len(x) + 1) if whole(x, range(i, j))]
    cuts = [c for c in cuts if c != (0, len(x))]
    if not cuts:
        return None
    start, stop = b.pick(cuts)
    d = b.dim

    def forward(self: Block, x: torch.Tensor) -> torch.Tensor:
        return x.narrow(d, start, stop - start) + x.sin().mean(d, keepdim=True)

    return Block(f"x[{start}:{stop}] + mean", forward), b.retag(x[start:stop])


def shared(b: Builder, x: Layout) -> Built:
    """One module called two or three times."""
    rows = distinct(x)
    before = b.pick([True, False])
    times = b.pick([2, 3])
    layer = b.mix(rows, rows)

    def forward(self: Block, x: torch.Tensor) -> torch.Tensor:
        for _ in range(times):
            x = x + self.parts[0](x.tanh()) if before else self.parts[0](x).tanh()
        return x

    return Block(f"shared, {times} times, {'residual' if before else 'plain'}", forward, layer), b.retag(rows)


def tied_coder(b: Builder, x: Layout) -> Built | None:
    """An encoder whose transpose decodes: x + W.T relu(W x)."""
    if b.kind == "image":
        return None
    apart, hidden = distinct(x), b.fresh()

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x + (x @ self.w.T).relu() @ self.w

    block = Block("x + W.T relu(W x)", forward)
    block.w = nn.Parameter(torch.randn(len(hidden), len(x)))
    b.ledger.own(block.w, 0, hidden)
    b.ledger.own(block.w, 1, apart)
    return block, b.retag(apart)


def twins(b: Builder, x: Layout) -> Built | None:
    """Two layers with one weight and their own biases, side by side."""
    if b.kind == "image":
        return None
    rows = b.fresh(4)
    one, two = nn.Linear(len(x), len(rows)), nn.Linear(len(x), len(rows))
    two.weight = one.weight
    b.own_matrix(one, rows, x, bias=True)
    b.ledger.own(two.bias, 0, rows)
    block = Block("cat of tied layers", lambda self, x: torch.cat([f(x) for f in self.parts], -1).relu(), one, two)
    return block, b.retag(rows) + b.retag(rows)


def softmax(b: Builder, x: Layout) -> Built:
    """A symmetric normalisation without parameters."""
    d = b.dim
    text = b.pick(["softmax", "normalize", "log_softmax"])
    function: Any = {"softmax": torch.softmax, "normalize": _normalise, "log_softmax": torch.log_softmax}[text]
    return Block(text, lambda self, x: function(x, d)), b.retag(x)


def _normalise(x: torch.Tensor, dim: int) -> torch.Tensor:
    return F.normalize(x, dim=dim)


def reorder(b: Builder, x: Layout) -> Built:
    """The channels in another constant order."""
    d, n = b.dim, len(x)
    text = b.pick(["flip", "roll"] if b.pixels else ["flip", "roll", "index"])
    if text == "flip":
        return Block("flip", lambda self, x: x.flip(d)), x[::-1]
    if text == "roll":
        return Block("roll", lambda self, x: x.roll(1, d)), x[-1:] + x[:-1]
    order = b.pick([[(i * k) % n for i in range(n)] for k in (1, n - 1) if n > 1] or [[0]])
    return Block(f"x[{order}]", lambda self, x: x.index_select(d, torch.tensor(order))), tuple(x[i] for i in order)


def ordered(b: Builder, x: Layout) -> Built:
    """Something that gives the order of the channels a meaning."""
    for cell in x:
        cell.units.pin()
    d, n = b.dim, len(x)
    after = cells(Units(n, pinned=True))
    text = b.pick(["cumsum", "scale"])
    if text == "cumsum":
        return Block(text, lambda self, x: x.cumsum(d)), after

    def forward(self: Block, x: torch.Tensor) -> torch.Tensor:
        scale = 1 + torch.arange(n, dtype=x.dtype)
        return x * (scale[:, None, None] if d == 1 else scale)

    return Block(text, forward), after


def experts(b: Builder, x: Layout) -> Built | None:
    """A dense mixture of experts with batched weights."""
    if b.kind == "image":
        return None
    count, hidden = b.pick([2, 3]), b.pick([2, 3])
    outer = Units(count)
    inner, rows = Units(hidden, outer), b.fresh(4)
    router = nn.Linear(len(x), count)
    b.own_matrix(router, cells(outer), x, bias=True)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        h = torch.einsum("...d,edh->...eh", x, self.up).relu()
        return torch.einsum("...eh,ehd,...e->...d", h, self.down, self.parts[0](x).softmax(-1))

    block = Block("experts", forward, router)
    block.up = nn.Parameter(torch.randn(count, len(x), hidden))
    block.down = nn.Parameter(torch.randn(count, hidden, len(rows)))
    b.ledger.own(block.up, 0, cells(outer))
    b.ledger.own(block.up, 1, distinct(x))
    b.ledger.own(block.down, 0, cells(outer))
    b.ledger.own(block.down, 2, rows)
    for e in range(count):
        mine = tuple(Cell(inner, e * hidden + i) for i in range(hidden))
        b.ledger.own(block.up, 2, mine, ((0, e, e + 1),), outer)
        b.ledger.own(block.down, 1, mine, ((0, e, e + 1),), outer)
    return block, b.retag(rows)


def square(b: Builder, x: Layout) -> Built | None:
    """Products of all pairs of units, normalised or not, through a layer; f(i) g(j) and f(j) g(i) differ."""
    if b.kind == "image":
        return None
    units, rows = cells(Units(b.pick([3, 4]))), b.fresh(4)
    n = len(units)
    norm = nn.LayerNorm(n * n) if b.pick([True, False]) else nn.Identity()
    layer = nn.Linear(n * n, len(rows), bias=False)
    b.ledger.own(layer.weight, 0, rows)
    owned = [(layer.weight, 1), *((p, 0) for p in norm.parameters())]
    for pairs in (tuple(u for u in units for _ in range(n)), units * n):
        for tensor, axis in owned:
            b.ledger.own(tensor, axis, pairs)

    def forward(self: Block, x: torch.Tensor) -> torch.Tensor:
        h = self.parts[0](x)
        return self.parts[1]((h.tanh()[..., None] * h.sin()[..., None, :]).flatten(-2))

    return Block("tanh(f(x)) sin(f(x)).T", forward, b.mix(x, units), b.stack(norm, layer)), b.retag(rows)


BLOCKS: dict[str, Make] = {
    f.__name__: f
    for f in (
        dense,
        residual,
        gate,
        batch_norm,
        layer_norm,
        group_norm,
        prelu,
        concat_branch,
        concat_functions,
        copies,
        split_join,
        split_apart,
        drop,
        shared,
        tied_coder,
        twins,
        softmax,
        reorder,
        ordered,
        experts,
        square,
    )
}
