"""Blocks of random networks for images and for sequences of tokens, and the ways from them to a vector."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from automerge.testing._blocks import Make
from automerge.testing._builder import Block, Builder, Built
from automerge.testing._ledger import Cell, Layout, Units, cells, distinct, grouped, tagged


# -------------------------------------------------------------------- images
def grouped_conv(b: Builder, x: Layout) -> Built | None:
    """A grouped convolution: units inside groups on both sides."""
    options = [g for g in range(2, len(x) // 2 + 1) if len(x) % g == 0]
    if not options:
        return None
    groups = b.pick(options)
    apart = distinct(x)
    parts = grouped(apart, groups)
    if parts is None:
        return None
    n, m = len(x) // groups, b.pick([1, 2, 3])
    conv: Any = nn.Conv2d(len(x), m * groups, 3, padding=1, groups=groups)
    outs: dict[int, Units] = {}
    rows: list[Cell] = []
    for i, (outer, number, part) in enumerate(parts):
        made = outs.setdefault(-1 - i if outer is None else id(outer), Units(m, outer))
        rows += [Cell(made, (0 if outer is None else number) * m + k) for k in range(m)]
        b.ledger.own(conv.weight, 1, part, ((0, i * m, i * m + m),), outer)
        assert len(part) == n
    b.ledger.own(conv.weight, 0, tuple(rows))
    b.ledger.own(conv.bias, 0, tuple(rows))
    return conv, b.retag(tuple(rows))


def depthwise(b: Builder, x: Layout) -> Built:
    """One kernel, or two, for each channel."""
    m = b.pick([1, 2]) if len(x) <= 6 else 1
    rows = distinct(tuple(c for c in x for _ in range(m)))  # kernels of equal channels are interchangeable, too
    conv: Any = nn.Conv2d(len(x), len(rows), 3, padding=1, groups=len(x))
    b.ledger.own(conv.weight, 0, rows)
    b.ledger.own(conv.bias, 0, rows)
    return conv, b.retag(rows)


def squeeze_excite(b: Builder, x: Layout) -> Built:
    """Channels scaled by a function of their means."""
    hidden, rows = b.fresh(4), distinct(x)
    inner = b.stack(b.mix(x, hidden, pixels=False), nn.ReLU(), b.mix(b.retag(hidden), rows, pixels=False))
    block = Block("se", lambda self, x: x * self.parts[0](x.mean((2, 3), keepdim=True)).sigmoid(), inner)
    return block, b.retag(rows)


def resample(b: Builder, x: Layout) -> Built:
    """Pooling, padding or interpolation: nothing happens to the channels."""
    options: list[tuple[int, nn.Module]] = [(b.space, nn.MaxPool2d(3, 1, 1))]
    if b.space > 1:  # a single pixel has none beside it to reflect
        options.append((b.space + 2, nn.ReflectionPad2d(1)))
    if b.space % 2 == 0 and b.space > 2:
        options += [(b.space // 2, nn.MaxPool2d(2)), (b.space // 2, nn.AvgPool2d(2))]
    if b.space <= 4:
        options.append((b.space * 2, nn.Upsample(scale_factor=2, mode=b.pick(["nearest", "bilinear"]))))
    space, module = b.pick([o for o in options if o[0] <= 8])
    b.space = space
    return module, b.retag(x)


def pixel_shuffle(b: Builder, x: Layout) -> Built | None:
    """A unit owns a block of channels that becomes pixels.

    A ramp gives the order of the pixels a meaning, and a layer common to all pixels their channels one order.
    """
    if b.space > 4:
        return None
    rows = b.fresh(3)
    b.space *= 2
    wide = tuple(Cell(c.units, c.at, (k,)) for c in rows for k in range(4))
    side, after = b.space, b.fresh()

    def forward(self: Block, x: torch.Tensor) -> torch.Tensor:
        ramp = 1 + torch.arange(side**2, dtype=x.dtype).view(side, side) / side**2
        return self.parts[1](F.pixel_shuffle(self.parts[0](x), 2) * ramp).relu()

    return Block("pixel shuffle", forward, b.mix(x, wide), b.mix(b.retag(rows), after)), b.retag(after)


def pixel_unshuffle(b: Builder, x: Layout) -> Built | None:
    """Pixels become channels."""
    if b.space % 2 or len(x) > 4:
        return None
    b.space //= 2
    return nn.PixelUnshuffle(2), tuple(c for cell in x for c in (tagged([cell], "pixel", k)[0] for k in range(4)))


IMAGE: dict[str, Make] = {
    f.__name__: f for f in (grouped_conv, depthwise, squeeze_excite, resample, pixel_shuffle, pixel_unshuffle)
}


# -------------------------------------------------------------------- tokens
def attention(b: Builder, x: Layout) -> Built:
    """Self-attention in one of several spellings: heads, and dimensions inside each head."""
    h, dk, dv = b.pick([2, 3]), b.pick([2, 3]), b.pick([2, 3])
    fused, fastest, normed = b.pick([False, True]), b.pick([False, True]), b.pick([False, False, True])
    sdpa, skip = b.pick([False, True]), b.pick([True, False])
    heads = Units(h)
    inner = Units(dk) if normed else Units(dk, heads)
    value = Units(dv, heads)
    rows_out = distinct(x) if skip else b.fresh()
    q = [(i, d) for d in range(dk) for i in range(h)] if fastest else [(i, d) for i in range(h) for d in range(dk)]
    v = [(i, d) for d in range(dv) for i in range(h)] if fastest else [(i, d) for i in range(h) for d in range(dv)]
    v_rows = tuple(Cell(value, i * dv + d) for i, d in v)
    if normed:  # one scale for all heads: the order of dimensions is common to them
        pairs = tuple(Cell(heads, i, (d,)) for i, d in q), tuple(Cell(inner, d, (i,)) for i, d in q)
    else:
        pairs = (tuple(Cell(inner, i * dk + d) for i, d in q),) * 2
    parts = _projections(b, x, [pairs[0], pairs[0], v_rows], [pairs[1], pairs[1], None] if normed else None, fused)
    out = nn.Linear(h * dv, len(rows_out))
    b.own_matrix(out, rows_out, v_rows, bias=True)
    block: Any = Block(
        f"attention h={h} {dk=} {dv=} {fused=} {fastest=} {normed=} {sdpa=} {skip=}", _attend, out, *parts
    )
    block.options = (h, dk, dv, fastest, sdpa, skip)
    if normed:
        block.norm = nn.LayerNorm(dk)
        b.ledger.own(block.norm.weight, 0, cells(inner))
        b.ledger.own(block.norm.bias, 0, cells(inner))
    return block, b.retag(rows_out)


def _projections(b: Builder, x: Layout, rows: list[Any], also: list[Any] | None, fused: bool) -> list[nn.Module]:
    """Query, key and value layers, or one for all three; ``also`` is a second way in which their rows move."""
    if fused:
        rows = [tuple(c for i, part in enumerate(rows) for c in tagged(part, i))]
        also = None if also is None else [(*tagged(also[0], 0), *tagged(also[1], 1))]
    layers: list[nn.Module] = []
    for i, mine in enumerate(rows):
        layer = nn.Linear(len(x), len(mine))
        b.own_matrix(layer, mine, x, bias=True)
        if also is not None and also[i] is not None:
            rest = cells(Units(len(mine) - len(also[i]), pinned=True))
            for tensor in (layer.weight, layer.bias):
                b.ledger.own(tensor, 0, (*also[i], *rest))
        layers.append(layer)
    return layers


def _attend(self: Any, x: torch.Tensor) -> torch.Tensor:
    h, dk, dv, fastest, sdpa, skip = self.options
    out, *layers = self.parts
    if len(layers) == 1:
        q, k, v = layers[0](x).split([h * dk, h * dk, h * dv], -1)
    else:
        q, k, v = (f(x) for f in layers)

    def split(t: torch.Tensor, d: int) -> torch.Tensor:
        n, s, _ = t.shape
        return t.view(n, s, d, h).permute(0, 3, 1, 2) if fastest else t.view(n, s, h, d).transpose(1, 2)

    q, k, v = split(q, dk), split(k, dk), split(v, dv)
    if hasattr(self, "norm"):
        q, k = self.norm(q), self.norm(k)
    plain = (q @ k.transpose(-1, -2) / math.sqrt(dk)).softmax(-1) @ v
    y = F.scaled_dot_product_attention(q, k, v) if sdpa else plain
    y = y.permute(0, 2, 3, 1).flatten(2) if fastest else y.transpose(1, 2).flatten(2)
    return x + out(y) if skip else out(y)


def grouped_query(b: Builder, x: Layout) -> Built:
    """Grouped-query attention: key-value heads, the query heads of each, and dimensions common to those."""
    g, r, dk, dv = 2, 2, b.pick([2, 3]), b.pick([2, 3])
    kv = Units(g)
    reps, inner, value = Units(r, kv), Units(dk, kv), Units(dv, kv)
    rows_out = b.fresh()
    q, k = nn.Linear(len(x), g * r * dk), nn.Linear(len(x), g * dk)
    v, out = nn.Linear(len(x), g * dv), nn.Linear(g * r * dv, len(rows_out))

    def both(units: Units, d: int) -> tuple[Layout, Layout]:
        at = [(i, j, e) for i in range(g) for j in range(r) for e in range(d)]
        first = tuple(Cell(reps, i * r + j, (e,)) for i, j, e in at)
        return first, tuple(Cell(units, i * d + e, (j,)) for i, j, e in at)

    outer, inside = both(inner, dk)
    b.own_matrix(q, outer, x, bias=True)
    for tensor in (q.weight, q.bias):
        b.ledger.own(tensor, 0, inside, scope=kv)
    b.own_matrix(k, cells(inner), x, bias=True)
    b.own_matrix(v, cells(value), x, bias=True)
    outer, inside = both(value, dv)
    b.own_matrix(out, rows_out, outer, bias=True)
    b.ledger.own(out.weight, 1, inside, scope=kv)

    def forward(self: Block, x: torch.Tensor) -> torch.Tensor:
        n, s, _ = x.shape
        one, two, three = (
            f(x).view(n, s, -1, d).transpose(1, 2) for f, d in zip(self.parts, (dk, dk, dv), strict=False)
        )
        two, three = two.repeat_interleave(r, 1), three.repeat_interleave(r, 1)
        y = (one @ two.transpose(-1, -2)).softmax(-1) @ three
        return self.parts[3](y.transpose(1, 2).flatten(2))

    return Block(f"grouped query {dk=} {dv=}", forward, q, k, v, out), b.retag(rows_out)


def token_mixer(b: Builder, x: Layout) -> Built:
    """Mixing along the tokens, the same for every channel."""
    hidden = b.fresh(4)
    positions = cells(Units(b.space, pinned=True))
    one, two = nn.Linear(b.space, len(hidden)), nn.Linear(len(hidden), b.space)
    b.own_matrix(one, hidden, positions, bias=True)
    b.own_matrix(two, positions, hidden, bias=True)

    def forward(self: Block, x: torch.Tensor) -> torch.Tensor:
        return x + self.parts[1](self.parts[0](x.transpose(1, 2)).relu()).transpose(1, 2)

    return Block("token mixer", forward, one, two), b.retag(x)


def position_table(b: Builder, x: Layout) -> Built:
    """A learned vector for each position."""
    apart = distinct(x)
    block: Any = Block("x + positions", _shifted)
    block.table = nn.Parameter(torch.randn(b.space, len(x)))
    b.ledger.own(block.table, 1, apart)
    return block, b.retag(apart)


def _shifted(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x + self.table


TOKENS: dict[str, Make] = {f.__name__: f for f in (attention, grouped_query, token_mixer, position_table)}


# -------------------------------------------------------------------- to a vector
def to_vector(b: Builder, x: Layout) -> Built:
    """From an image or tokens to a vector: a mean, a flattening, or the first token."""
    pixels = b.space**2 if b.kind == "image" else b.space
    flat = b.pick([False, True]) and len(x) * pixels <= 200
    if b.kind == "image":
        b.kind = "vector"
        if not flat:
            return Block("mean", lambda self, x: x.mean((2, 3))), b.retag(x)
        b.pixels = True
        return nn.Flatten(), tuple(c for cell in x for c in (tagged([cell], "at", p)[0] for p in range(pixels)))
    b.kind = "vector"
    if flat:
        return nn.Flatten(), tuple(tagged([cell], "at", p)[0] for p in range(pixels) for cell in x)
    return b.pick([Block("mean", lambda self, x: x.mean(1)), Block("first", lambda self, x: x[:, 0])]), b.retag(x)
