"""Networks chosen to break inference: name -> (factory, inputs, sizes of the generators), as in `networks`.

Every expected size was derived by hand. ``OPEN`` names the cases that our code does not answer yet, with the reason;
``UNRULED`` those where an operator without a rule is expected; ``FREE`` gives for some parameters the number of free
positions on every axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Factory = Callable[[], Any]
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], str]] = {}
KWARGS: dict[str, dict[str, Any]] = {}
OPEN: dict[str, str] = {}
UNRULED: set[str] = set()
FREE: dict[str, dict[str, tuple[int, ...]]] = {}


class Program(nn.Module):
    """A module whose forward is a function of itself and the inputs."""

    def __init__(self, forward: Callable[..., Any], parts: dict[str, Factory]) -> None:
        super().__init__()
        for name, make in parts.items():
            part = make()
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.program = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.program(self, *args, **kwargs)


def add(
    name: str,
    sizes: str,
    args: tuple[Any, ...],
    forward: Callable[..., Any],
    *,
    kwargs: dict[str, Any] | None = None,
    missing: str = "",
    unruled: bool = False,
    free: dict[str, tuple[int, ...]] | None = None,
    **parts: Factory,
) -> None:
    """Register a program; ``missing`` says why it fails today."""
    assert name not in CASES, name
    CASES[name] = (lambda: Program(forward, parts), args, sizes)
    if kwargs:
        KWARGS[name] = kwargs
    if missing:
        OPEN[name] = missing
    if unruled:
        UNRULED.add(name)
    if free:
        FREE[name] = free


def layers(name: str, sizes: str, args: tuple[Any, ...], *parts: Factory, **options: Any) -> None:
    """Register a sequence of layers."""
    made = {f"m{i}": part for i, part in enumerate(parts)}

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        for part in made:
            x = getattr(self, part)(x)
        return x

    add(name, sizes, args, forward, **options, **made)


def lin(i: int, o: int, bias: bool = True) -> Factory:
    return lambda: nn.Linear(i, o, bias=bias)


def conv(i: int, o: int, k: int = 1, **options: Any) -> Factory:
    return lambda: nn.Conv2d(i, o, k, **options)


def par(*shape: int, dtype: torch.dtype = torch.float32) -> Factory:
    return lambda: nn.Parameter(torch.randn(shape, dtype=dtype))


_rng = torch.Generator().manual_seed(20)
x = torch.randn(2, 4, generator=_rng)
seq = torch.randn(2, 7, 5, generator=_rng)
img = torch.randn(2, 3, 8, 8, generator=_rng)
R = nn.ReLU


def attend(q: Any, k: Any, v: Any, bias: Any = 0.0) -> Any:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v


# ---------------------------------------------------------------- operators that read positions
def _seg_net(s: Any, x: Any) -> Any:
    pooled, where = F.max_pool2d(s.a(x), 2, return_indices=True)
    return s.out(F.max_unpool2d(s.b(pooled), where, 2))


# the indices carry the encoder's channels: they tie the decoder's to them
add("UnpoolTies", "5", (img,), _seg_net, a=conv(3, 5), b=conv(5, 5), out=conv(5, 2), free={"b.weight": (5, 5, 0, 0)})
# the rows of three columns share their order, because every row is added to the next
add(
    "CumsumBeside", "3", (x,), lambda s, x: s.out(s.a(x).view(2, 2, 3).cumsum(1).flatten(1)), a=lin(4, 6), out=lin(6, 2)
)
add(
    "CumsumInside", "2", (x,), lambda s, x: s.out(s.a(x).view(2, 2, 3).cumsum(2).flatten(1)), a=lin(4, 6), out=lin(6, 2)
)
add(
    "CumprodBeside",
    "2",
    (x,),
    lambda s, x: s.out(s.a(x).view(2, 3, 2).cumprod(1).flatten(1)),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "CummaxBeside",
    "2",
    (x,),
    lambda s, x: s.out(s.a(x).view(2, 3, 2).cummax(1)[0].flatten(1)),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "FftBeside",
    "3",
    (x,),
    lambda s, x: s.out(torch.fft.fft(s.a(x).view(2, 2, 3), dim=1).abs().flatten(1)),
    a=lin(4, 6),
    out=lin(6, 2),
)
add("FftAndBack", "", (x,), lambda s, x: s.out(torch.fft.ifft(torch.fft.fft(s.a(x))).real), a=lin(4, 6), out=lin(6, 2))
add(
    "StridedOfTransposed",
    "3x2",
    (x,),
    lambda s, x: s.out(torch.as_strided(s.a(x).t(), (2, 3), (6, 1))),
    a=lin(4, 6),
    out=lin(3, 2),
    free={"a.weight": (6, 0), "out.weight": (0, 3)},
)
add(
    "TopkThreshold",
    "6",
    (x,),
    lambda s, x: (lambda h: s.out(h * (h >= h.topk(2).values[:, -1:])))(s.a(x)),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "MedianOfAxis",
    "6",
    (x,),
    lambda s, x: s.out(s.a(x) - s.a(x).median(-1, keepdim=True).values),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "QuantileOfAxis",
    "6",
    (x,),
    lambda s, x: s.out(s.a(x) - s.a(x).quantile(0.3, -1, keepdim=True)),
    a=lin(4, 6),
    out=lin(6, 2),
)


def _scatter_topk(s: Any, x: Any) -> Any:
    h = s.a(x)
    best = h.topk(2, -1)
    return s.out(torch.zeros_like(h).scatter(1, best.indices, best.values.softmax(-1)))


add("TopkScatter", "6", (x,), _scatter_topk, a=lin(4, 6), out=lin(6, 2))
add(
    "ArgmaxOneHot",
    "6",
    (x,),
    lambda s, x: (lambda h: s.out(F.one_hot(h.argmax(-1), 6).float() * h))(s.a(x)),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "MaskOfBatch",
    "6",
    (x, torch.tensor([True, False])),
    lambda s, x, m: s.out(s.a(x).relu()[m]),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "PooledPositions",
    "5",
    (img,),
    lambda s, x: s.out(F.max_pool2d(s.a(x), 2, return_indices=True)[1].to(x.dtype)),
    a=conv(3, 5),
    out=conv(5, 2),
)

add(
    "ArgsortGather",
    "6",
    (x,),
    lambda s, x: (lambda h: s.out(h.gather(1, h.argsort(1))))(s.a(x)),
    a=lin(4, 6),
    out=lin(6, 2),
)

# ---------------------------------------------------------------- values that python reads
add(
    "ItemOfOne",
    "5",
    (x,),
    lambda s, x: s.out(s.a(x).relu()) * s.a.bias[0].item(),
    a=lin(4, 6),
    out=lin(6, 2),
    free={"a.bias": (5,)},
)
add("ItemSymmetric", "6", (x,), lambda s, x: s.out(s.a(x).relu()) * s.a.bias.max().item(), a=lin(4, 6), out=lin(6, 2))
add(
    "BranchOnOne",
    "5",
    (x,),
    lambda s, x: s.out(s.a(x).relu()) * (2.0 if s.a.bias[0] > 0 else 3.0),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "BranchSymmetric",
    "6",
    (x,),
    lambda s, x: s.out(s.a(x).relu()) if s.a(x).sum() < 1e9 else s.a(x),
    a=lin(4, 6),
    out=lin(6, 2),
)


# ---------------------------------------------------------------- state
def _rebind(s: Any, x: Any) -> Any:
    h = s.a(x)
    s.mean = 0.9 * s.mean + 0.1 * h.mean(0)
    return s.out(h - s.mean)


def _in_place(s: Any, x: Any) -> Any:
    h = s.a(x)
    s.mean.mul_(0.9).add_(0.1 * h.mean(0))
    return s.out(h - s.mean)


add("BufferRebound", "6", (x,), _rebind, a=lin(4, 6), out=lin(6, 2), mean=lambda: torch.zeros(6))
add("BufferInPlace", "6", (x,), _in_place, a=lin(4, 6), out=lin(6, 2), mean=lambda: torch.zeros(6))


def _counter(s: Any, x: Any) -> Any:
    s.calls = getattr(s, "calls", 0) + 1
    return s.out(s.a(x).relu()) * s.calls


def _carried(s: Any, x: Any) -> Any:
    s.h = s.a(x) + getattr(s, "h", 0.0)
    return s.out(s.h.relu())


add("PythonCounter", "6", (x,), _counter, a=lin(4, 6), out=lin(6, 2))
add("PythonState", "6", (x,), _carried, a=lin(4, 6), out=lin(6, 2))
layers("EmbeddingMaxNorm", "6", (torch.tensor([[1, 2, 0]]),), lambda: nn.Embedding(5, 6, max_norm=1.0), R, lin(6, 2))
layers("EmbeddingBag", "6", (torch.tensor([[1, 2, 0]]),), lambda: nn.EmbeddingBag(5, 6), R, lin(6, 2))
add(
    "Noise",
    "6",
    (x,),
    lambda s, x: (lambda h: s.out(s.m(h) + (0.5 * s.v(h)).exp() * torch.randn_like(s.m(h))))(s.e(x).relu()),
    e=lin(4, 6),
    m=lin(6, 3),
    v=lin(6, 3),
    out=lin(3, 2),
    free={"m.weight": (0, 6)},
)

# ---------------------------------------------------------------- constants, identities
add(
    "PlusIdentity",
    "6",
    (x,),
    lambda s, x: s.out(s.a(x) @ (s.w + torch.eye(6).to(x))),
    a=lin(4, 6),
    w=par(6, 6),
    out=lin(6, 2),
)
add(
    "DiagonalEmbed", "6", (x,), lambda s, x: s.out(s.a(x) @ torch.diag_embed(s.w)), a=lin(4, 6), w=par(6), out=lin(6, 2)
)
add("Diagonal", "6", (x,), lambda s, x: s.out(s.a(x) @ torch.diag(s.w)), a=lin(4, 6), w=par(6), out=lin(6, 2))
add(
    "DiagonalOfProduct",
    "6 5",
    (x,),
    lambda s, x: s.out(s.a(x) * (s.w @ s.v).diagonal()),
    a=lin(4, 6),
    w=par(6, 5),
    v=par(5, 6),
    out=lin(6, 2),
)
add("TraceOfProduct", "6 5", (x,), lambda s, x: (s.w @ s.v).trace() * x, w=par(6, 5), v=par(5, 6))
add(
    "SplitAndJoin",
    "6",
    (x,),
    lambda s, x: s.out(torch.cat([t.relu() for t in s.a(x).split(3, 1)], 1)),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "SplitSquareAndJoin",
    "6",
    (x,),
    lambda s, x: s.out(torch.cat([(t * t).clamp(max=2.0) + 1 for t in s.a(x).chunk(2, 1)], 1)),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "SplitAndJoinUnequal",
    "3x2",
    (x,),
    lambda s, x: s.out(torch.cat([t.clamp(max=float(k)) for k, t in enumerate(s.a(x).split(3, 1))], 1)),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "SplitRoundedAndJoined",
    "3x2",
    (x,),
    lambda s, x: s.out(torch.cat([(h := s.a(x))[:, :3].to(torch.bfloat16).to(x), h[:, 3:]], 1)),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "SplitAndJoinHalf",
    "3x2",
    (x,),
    lambda s, x: s.out(torch.cat([(h := s.a(x))[:, :3].relu(), h[:, 3:]], 1)),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "RollByHand",
    "6",
    (x,),
    lambda s, x: (lambda h: s.out(torch.cat([h[:, 2:], h[:, :2]], 1)))(s.a(x)),
    a=lin(4, 6),
    out=lin(6, 2),
)
add("OuterOfVectors", "6", (x,), lambda s, x: (x @ torch.outer(s.a, s.b)).relu() @ s.v, a=par(4), b=par(6), v=par(6, 2))


# ---------------------------------------------------------------- stacked parameters
def _stack_loop(s: Any, x: Any) -> Any:
    h = x @ s.i
    for k in range(3):
        h = h + (h @ s.w1[k]).relu() @ s.w2[k]
    return s.out(h)


def _stack_last(s: Any, x: Any) -> Any:
    h = x @ s.i
    for k in range(3):
        h = h + (h @ s.w1[:, :, k]).relu() @ s.w2[:, k]
    return s.out(h)


# one order per layer: axis 2 of w1 and axis 1 of w2 within each slice of axis 0
add(
    "StackedResidual",
    "6 5x3",
    (x,),
    _stack_loop,
    i=par(4, 6),
    w1=par(3, 6, 5),
    w2=par(3, 5, 6),
    out=lin(6, 2),
    free={"w1": (0, 6, 5), "w2": (0, 5, 6)},
)
add(
    "StackedLastAxis",
    "6 5x3",
    (x,),
    _stack_last,
    i=par(4, 6),
    w1=par(6, 5, 3),
    w2=par(5, 3, 6),
    out=lin(6, 2),
)
add(
    "StackedPlain",
    "6x3",
    (x,),
    lambda s, x: s.out((x @ s.i @ s.w[0]).relu() @ s.w[1]),
    i=par(4, 6),
    w=par(2, 6, 6),
    out=lin(6, 2),
)
add(
    "StackedBias",
    "6x2",
    (x,),
    lambda s, x: s.out(((s.a(x) + s.b[0]).relu() @ s.w + s.b[1]).tanh()),
    a=lin(4, 6),
    w=par(6, 6),
    b=par(2, 6),
    out=lin(6, 2),
)
add(
    "DecoderLayer",
    "8x2 12 2x2 4x8",
    (seq,),
    lambda s, x: s.out(s.d(s.i(x), s.j(x))),
    i=lin(5, 8),
    j=lin(5, 8),
    out=lin(8, 2),
    d=lambda: nn.TransformerDecoderLayer(8, 2, 12, batch_first=True),
)
add(
    "BatchedMiddle",
    "3 5x3 6x3",
    (x,),
    lambda s, x: torch.einsum(
        "bej,jek->bk", torch.einsum("bei,iej->bej", torch.einsum("bd,ide->bei", x, s.u), s.w).relu(), s.v
    ),
    u=par(5, 4, 3),
    w=par(5, 3, 6),
    v=par(6, 3, 2),
)
add(
    "BatchedLast",
    "6 3",
    (x,),
    lambda s, x: torch.einsum("bhe,e->bh", torch.einsum("bd,dhe->bhe", x, s.w).relu(), s.g) @ s.v,
    w=par(4, 6, 3),
    g=par(3),
    v=par(6, 2),
)

# ---------------------------------------------------------------- attention
layers(
    "EncoderLayer",
    "8 12 2 4x4",
    (seq,),
    lin(5, 8),
    lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
    lin(8, 2),
)
layers(
    "EncoderLayerNormFirst",
    "8 12 2 4x4",
    (seq,),
    lin(5, 8),
    lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True, activation="gelu"),
    lin(8, 2),
)
add(
    "MultiheadOtherWidths",
    "8x2 6 3 2 4x4",
    (seq,),
    lambda s, x: s.out(s.a(s.i(x), s.k(x), s.v(x))[0]),
    i=lin(5, 8),
    k=lin(5, 6),
    v=lin(5, 3),
    a=lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=3, batch_first=True),
    out=lin(8, 2),
)
add(
    "MultiheadBiasKv",
    "8x2 2 4x4",
    (seq,),
    lambda s, x: (lambda h: s.out(s.a(h, h, h)[0]))(s.i(x)),
    i=lin(5, 8),
    out=lin(8, 2),
    a=lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True),
)
# the weights of every head are an output: heads are pinned
add(
    "MultiheadWeightsOut",
    "8 4x4",
    (seq,),
    lambda s, x: (lambda h: s.a(h, h, h, average_attn_weights=False))(s.i(x)),
    i=lin(5, 8),
    a=lambda: nn.MultiheadAttention(8, 2, batch_first=True),
)
add(
    "MultiQuery",
    "3 4 3",
    (seq,),
    lambda s, x: s.out(
        attend(s.q(x).view(2, 7, 3, 4).transpose(1, 2), s.k(x)[:, None], s.v(x)[:, None]).transpose(1, 2).flatten(2)
    ),
    q=lin(5, 12),
    k=lin(5, 4),
    v=lin(5, 3),
    out=lin(9, 2),
)


def _grouped_odd(s: Any, x: Any) -> Any:
    q, k, v = s.q(x).view(2, 7, 2, 2, 3), s.k(x).view(2, 7, 2, 3), s.v(x).view(2, 7, 2, 3)
    a = torch.einsum("bqhgd,bkgd->bhgqk", q, k).softmax(-1)
    return s.out(torch.einsum("bhgqk,bkgd->bqhgd", a, v).flatten(2))


# the key-value head runs faster than the queries of a group
add("GroupedQueryFast", "2 2x2 3x4", (seq,), _grouped_odd, q=lin(5, 12), k=lin(5, 6), v=lin(5, 6), out=lin(12, 3))


def _rope(turn: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def forward(s: Any, x: Any) -> Any:
        q, k, v = (f(x).view(2, 7, 2, -1).transpose(1, 2) for f in (s.q, s.k, s.v))
        return s.out(attend(turn(q), turn(k), v).transpose(1, 2).flatten(2))

    return forward


def _turn_complex(t: Any) -> Any:
    phase = torch.polar(torch.ones(7, 2), torch.arange(7.0)[:, None] * torch.tensor([1.0, 0.1]))
    return torch.view_as_real(torch.view_as_complex(t.reshape(2, 2, 7, 2, 2).contiguous()) * phase).flatten(3)


def _turn_interleaved(t: Any) -> Any:
    angle = (torch.arange(7.0)[:, None] * torch.tensor([1.0, 0.1])).repeat_interleave(2, -1)
    return t * angle.cos() + torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2) * angle.sin()


def _turn_partial(t: Any) -> Any:
    angle = torch.arange(7.0)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    head = t[..., :4]
    turned = head * angle.cos() + torch.cat([-head[..., 2:], head[..., :2]], -1) * angle.sin()
    return torch.cat([turned, t[..., 4:]], -1)


add("RopeComplex", "2 4x2", (seq,), _rope(_turn_complex), q=lin(5, 8), k=lin(5, 8), v=lin(5, 8), out=lin(8, 3))
add("RopeInterleaved", "2 4x2", (seq,), _rope(_turn_interleaved), q=lin(5, 8), k=lin(5, 8), v=lin(5, 8), out=lin(8, 3))
# the two dimensions that are not rotated are free in each head
add("RopePartial", "2 2x2 3x2", (seq,), _rope(_turn_partial), q=lin(5, 12), k=lin(5, 12), v=lin(5, 6), out=lin(6, 3))


def _swin(s: Any, x: Any) -> Any:
    h = s.i(x)
    b, hh, ww, c = h.shape
    y = torch.roll(h, (-2, -2), (1, 2)).view(b, 2, 4, 2, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
    q, k, v = s.qkv(y).reshape(-1, 16, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
    a = q @ k.transpose(-2, -1) + s.table[s.index.view(-1)].view(16, 16, 2).permute(2, 0, 1)
    a = (a.view(b, 4, 2, 16, 16) + s.mask[None, :, None]).view(-1, 2, 16, 16).softmax(-1)
    y = s.p((a @ v).transpose(1, 2).reshape(-1, 16, c)).view(b, 2, 2, 4, 4, c).permute(0, 1, 3, 2, 4, 5)
    h = h + torch.roll(y.reshape(b, hh, ww, c), (2, 2), (1, 2))
    m = torch.cat([h[:, 0::2, 0::2], h[:, 1::2, 0::2], h[:, 0::2, 1::2], h[:, 1::2, 1::2]], -1)
    return s.out(s.r(s.n(m)).mean((1, 2)))


def _swin_index() -> torch.Tensor:
    i = torch.arange(16)
    return ((i // 4)[:, None] - (i // 4)[None] + 3) * 7 + ((i % 4)[:, None] - (i % 4)[None] + 3)


add(
    "Swin",
    "6 5 2 3x4",
    (img.permute(0, 2, 3, 1),),
    _swin,
    i=lin(3, 6),
    qkv=lin(6, 18),
    p=lin(6, 6),
    table=par(49, 2),
    index=_swin_index,
    mask=lambda: torch.where(torch.rand(4, 16, 16) > 0.5, 0.0, -100.0),
    n=lambda: nn.LayerNorm(24),
    r=lin(24, 5, bias=False),
    out=lin(5, 2),
    free={"n.weight": (24,), "table": (0, 2), "r.weight": (5, 24)},
)


# ---------------------------------------------------------------- mixtures of experts
def _mixtral(s: Any, x: Any) -> Any:
    h = s.i(x).reshape(-1, 6)
    weight, index = s.g(h).softmax(-1).topk(2, -1)
    out, mask = torch.zeros_like(h), F.one_hot(index, 3).permute(2, 1, 0)
    for e in range(3):
        k, top = torch.where(mask[e])
        out.index_add_(0, top, s.experts[e](h[None, top].reshape(-1, 6)) * weight[top, k, None])
    return s.out((h + out).reshape(*x.shape[:2], 6))


def _route_gather(s: Any, x: Any) -> Any:
    h = s.i(x)
    weight, index = s.g(h).softmax(-1).topk(2, -1)
    hidden = torch.einsum("bd,bkdh->bkh", h, s.a[index]).relu()
    return s.out((torch.einsum("bkh,bkhd->bkd", hidden, s.b[index]) * weight[..., None]).sum(1))


def _route(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., Any]:
    """Experts read twice, each time with something done to what was read."""

    def forward(s: Any, x: Any) -> Any:
        h = s.i(x)
        weight, index = s.g(h).softmax(-1).topk(2, -1)
        hidden = torch.einsum("bd,bkdh->bkh", h, first(s.a, index)).relu()
        return s.out((torch.einsum("bkh,bkhd->bkd", hidden, second(s.b, index)) * weight[..., None]).sum(1))

    return forward


def _route_early_sum(s: Any, x: Any) -> Any:
    h = s.i(x)
    index = s.g(h).softmax(-1).topk(2, -1)[1]
    hidden = torch.einsum("bd,bkdh->bkh", h, s.a[index]).relu().sum(1)
    return s.out(torch.einsum("bh,bhd->bd", hidden, s.b[index][:, 0]))


def _route_two_ranks(s: Any, x: Any) -> Any:
    h = s.i(x)
    index = s.g(h).softmax(-1).topk(2, -1)[1]
    hidden = torch.einsum("bd,bdh->bh", h, s.a[index][:, 0]).relu()
    return s.out(torch.einsum("bh,bhd->bd", hidden, s.b[index][:, 1]))


def _route_first(s: Any, x: Any) -> Any:
    h = s.i(x)
    index = s.g(h).argmax(-1)
    hidden = torch.einsum("bd,bdh->bh", h, s.a[index]) + s.c[index]
    gate, up = hidden.chunk(2, -1)
    return s.out(torch.bmm((gate.relu() * up)[:, None], s.b[index])[:, 0])


def _route_given(s: Any, x: Any, index: Any) -> Any:
    hidden = torch.einsum("bd,bdh->bh", s.i(x), s.a[index]).relu()
    return s.out(torch.einsum("bh,bhd->bd", hidden, s.b[index]))


def _route_mask(s: Any, x: Any) -> Any:
    h = s.i(x)
    score = s.g(h)
    p = score.masked_fill(score < score.topk(2, -1).values[:, -1:], float("-inf")).softmax(-1)
    hidden = torch.einsum("bd,edh->beh", h, s.a).relu()
    return s.out((torch.einsum("beh,ehd->bed", hidden, s.b) * p[..., None]).sum(1))


def _route_scatter(s: Any, x: Any) -> Any:
    h = s.i(x)
    best = s.g(h).topk(2, -1)
    p = torch.zeros(2, 3).to(h).scatter_(1, best.indices, best.values.softmax(-1))
    hidden = torch.einsum("bd,edh->beh", h, s.a).relu()
    return s.out((torch.einsum("beh,ehd->bed", hidden, s.b) * p[..., None]).sum(1))


_expert = lambda: nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6))  # noqa: E731
add(
    "Mixtral",
    "6 8x3",
    (seq,),
    _mixtral,
    i=lin(5, 6),
    g=lin(6, 3),
    experts=lambda: nn.ModuleList(_expert() for _ in range(3)),
    out=lin(6, 2),
)
add(
    "ExpertsGathered",
    "3 7x3 5x2",
    (x,),
    _route_gather,
    i=lin(4, 5),
    g=lin(5, 3),
    a=par(3, 5, 7),
    b=par(3, 7, 5),
    out=lin(5, 2),
)
_EXPERTS: dict[str, Any] = {"i": lin(4, 5), "g": lin(5, 3), "a": par(3, 5, 7), "b": par(3, 7, 5), "out": lin(5, 2)}
_read = lambda w, index: w[index]  # noqa: E731
add("ExpertsReadFlipped", "3 7 5x2", (x,), _route(_read, lambda w, index: w[index].flip(1)), **_EXPERTS)
add("ExpertsReadAtFlipped", "3 7 5x2", (x,), _route(_read, lambda w, index: w[index.flip(1)]), **_EXPERTS)
add("ExpertsReadTransposed", "3 7 5x2", (x[:2],), _route(_read, lambda w, index: w[index].transpose(0, 1)), **_EXPERTS)
add("ExpertsReadTwice", "3 7x3 5x2", (x,), _route(_read, lambda w, index: w[index].flip(1).flip(1)), **_EXPERTS,
    missing="what is done to a choice and undone again")  # fmt: skip
add("ExpertsSummedEarly", "3 7 5x2", (x,), _route_early_sum, **_EXPERTS)
add("ExpertsOfTwoRanks", "3 7 5x2", (x,), _route_two_ranks, **_EXPERTS)
add(
    "ExpertsOfTheBest",
    "3 7x3 5x2",
    (x,),
    _route_first,
    i=lin(4, 5),
    g=lin(5, 3),
    a=par(3, 5, 14),
    c=par(3, 14),
    b=par(3, 7, 5),
    out=lin(5, 2),
)
add(
    "ExpertsGiven",
    "7x3 5x2",
    (x, torch.tensor([2, 0] * (len(x) // 2) + [1] * (len(x) % 2))),
    _route_given,
    i=lin(4, 5),
    a=par(3, 5, 7),
    b=par(3, 7, 5),
    out=lin(5, 2),
)
add(
    "ExpertsMasked",
    "3 7x3 5x2",
    (x,),
    _route_mask,
    i=lin(4, 5),
    g=lin(5, 3),
    a=par(3, 5, 7),
    b=par(3, 7, 5),
    out=lin(5, 2),
)
add(
    "ExpertsScattered",
    "3 7x3 5x2",
    (x,),
    _route_scatter,
    i=lin(4, 5),
    g=lin(5, 3),
    a=par(3, 5, 7),
    b=par(3, 7, 5),
    out=lin(5, 2),
)
add(
    "Codebook",
    "5 6",
    (x,),
    lambda s, x: s.out(s.c[(s.a(x)[:, None] - s.c).pow(2).sum(-1).argmin(-1)]),
    a=lin(4, 6),
    c=par(5, 6),
    out=lin(6, 2),
)
add(
    "Cdist",
    "6 5",
    (x,),
    lambda s, x: s.out(torch.cdist(s.a(x), s.c).neg().exp()),
    a=lin(4, 6),
    c=par(5, 6),
    out=lin(5, 2),
)
add(
    "CosineCentres",
    "6 5",
    (x,),
    lambda s, x: s.out(F.cosine_similarity(s.a(x)[:, None], s.c[None], dim=-1)),
    a=lin(4, 6),
    c=par(5, 6),
    out=lin(5, 2),
)

# ---------------------------------------------------------------- convolutions
for _mode in ("circular", "reflect", "replicate"):
    layers(
        f"Padding_{_mode}",
        "5",
        (img,),
        conv(3, 5, 3, padding=1, padding_mode=_mode),
        R,
        conv(5, 2, 3, padding=1, padding_mode=_mode),
    )
layers(
    "PixelShuffleGrouped", "2 2x4", (img,), conv(3, 4), conv(4, 16, 3, groups=2), lambda: nn.PixelShuffle(2), conv(4, 2)
)
layers(
    "ChannelShuffle", "2 3x4", (img,), conv(3, 6), R, conv(6, 6, groups=2), lambda: nn.ChannelShuffle(2), R, conv(6, 2)
)
layers(
    "TransposedGrouped",
    "2 2x2 3x2",
    (img,),
    conv(3, 4),
    R,
    lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
    R,
    conv(6, 2),
)
layers(
    "Conv3dGrouped",
    "2 2x2 3x2",
    (torch.randn(1, 3, 3, 3, 3),),
    lambda: nn.Conv3d(3, 4, 1),
    R,
    lambda: nn.Conv3d(4, 6, 2, groups=2),
    R,
    lambda: nn.Conv3d(6, 2, 1),
)
layers(
    "PointwiseThenPixels",
    "5 4 2",
    (img,),
    conv(3, 5),
    lambda: nn.Flatten(2),
    lin(64, 4),
    R,
    lin(4, 2),
    nn.Flatten,
    lin(10, 2),
)
layers(
    "WeightNormGrouped",
    "2 2x2 3x2",
    (img,),
    conv(3, 4),
    R,
    lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3, groups=2)),
    R,
    conv(6, 2),
)
layers(
    "WeightNormAxis1",
    "6 5",
    (x,),
    lin(4, 6),
    R,
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5), dim=1),
    R,
    lin(5, 2),
)
add("TiedTransposedConv", "5", (img,), lambda s, x: F.conv_transpose2d(F.conv2d(x, s.w).relu(), s.w), w=par(5, 3, 3, 3))
add(
    "Deformable",
    "5",
    (img,),
    lambda s, x: (lambda h: s.out(F.grid_sample(h, s.off(h).permute(0, 2, 3, 1).tanh(), align_corners=False)))(s.a(x)),
    a=conv(3, 5),
    off=conv(5, 2),
    out=conv(5, 2),
)


def _conditional(s: Any, x: Any) -> Any:
    h = s.a(x).relu()
    w = (s.r(h.mean((2, 3))).sigmoid() @ s.w.flatten(1)).view(12, 5, 3, 3)
    return s.out(F.conv2d(h.reshape(1, 10, 8, 8), w, groups=2, padding=1).view(2, 6, 8, 8).relu())


def _involution(s: Any, x: Any) -> Any:
    h = s.a(x)
    k = s.k(h).view(2, 2, 1, 9, 64)
    return s.out((k * F.unfold(h, 3, padding=1).view(2, 2, 3, 9, 64)).sum(3).view(2, 6, 8, 8))


add("ConditionalConv", "5 4 6", (img,), _conditional, a=conv(3, 5), r=lin(5, 4), w=par(4, 6, 5, 3, 3), out=conv(6, 2))
add("Involution", "2 3x2", (img,), _involution, a=conv(3, 6), k=conv(6, 18), out=conv(6, 2))
add(
    "ChannelConv",
    "",
    (img,),
    lambda s, x: (lambda h: s.out(h * s.c(h.mean((2, 3))[:, None]).sigmoid().transpose(1, 2)[..., None]))(s.a(x)),
    a=conv(3, 6),
    c=lambda: nn.Conv1d(1, 1, 3, padding=1),
    out=conv(6, 2),
)
add(
    "SpatialGate",
    "6",
    (img,),
    lambda s, x: (lambda h: s.out(h * s.c(torch.cat([h.mean(1, True), h.amax(1, True)], 1)).sigmoid()))(s.a(x)),
    a=conv(3, 6),
    c=conv(2, 1, 3, padding=1),
    out=conv(6, 2),
)
add(
    "FoldUnfold",
    "5 3",
    (img,),
    lambda s, x: s.out(F.fold(s.b(F.unfold(s.a(x), 2, stride=2).transpose(1, 2)).transpose(1, 2), (8, 8), 2, stride=2)),
    a=conv(3, 5),
    b=lin(20, 12),
    out=conv(3, 2),
)

# ---------------------------------------------------------------- recurrences and state spaces
for _name, _cell in (("RNNCell", nn.RNNCell), ("GRUCell", nn.GRUCell)):
    add(
        _name,
        "6",
        (seq,),
        lambda s, x: s.out(s.r(x[:, 1], s.r(x[:, 0]))),
        r=lambda cell=_cell: cell(5, 6),
        out=lin(6, 2),
    )
add(
    "LstmProjected",
    "6x2 3x2",
    (seq,),
    lambda s, x: s.out(s.r(x)[0]),
    out=lin(6, 2),
    r=lambda: nn.LSTM(5, 6, batch_first=True, proj_size=3, bidirectional=True),
)
add(
    "GruLearnedStart",
    "6",
    (seq,),
    lambda s, x: s.out(s.r(x, s.h.expand(1, 2, 6).contiguous())[0]),
    out=lin(6, 2),
    h=par(1, 1, 6),
    r=lambda: nn.GRU(5, 6, batch_first=True),
)
add(
    "LstmStates",
    "6",
    (seq,),
    lambda s, x: (lambda r: s.out(torch.cat([r[1][0][0], r[1][1][0]], -1)))(s.r(x)),
    out=lin(12, 2),
    r=lambda: nn.LSTM(5, 6, batch_first=True),
)


def _packed(s: Any, x: Any) -> Any:
    packed = nn.utils.rnn.pack_padded_sequence(s.i(x), torch.tensor([7, 5]), batch_first=True)
    return s.out(nn.utils.rnn.pad_packed_sequence(s.r(packed)[0], batch_first=True)[0])


add(
    "PackedSequence",
    "4 6",
    (seq,),
    _packed,
    i=lin(5, 4),
    r=lambda: nn.GRU(4, 6, batch_first=True),
    out=lin(6, 2),
)


def _s4d(s: Any, x: Any) -> Any:
    u = s.i(x).transpose(-1, -2)
    a = -torch.exp(s.re) + 1j * s.im
    step = a * torch.exp(s.dt)[:, None]
    c = torch.view_as_complex(s.c) * (torch.exp(step) - 1.0) / a
    k = 2 * torch.einsum("hn,hnl->hl", c, torch.exp(step[..., None] * torch.arange(7))).real
    y = torch.fft.irfft(torch.fft.rfft(u, n=14) * torch.fft.rfft(k, n=14), n=14)[..., :7] + u * s.d[:, None]
    return s.out(F.gelu(y).transpose(-1, -2))


add(
    "S4D",
    "6 3x6",
    (seq,),
    _s4d,
    i=lin(5, 6),
    re=par(6, 3),
    im=par(6, 3),
    dt=par(6),
    c=par(6, 3, 2),
    d=par(6),
    out=lin(6, 2),
    free={"re": (6, 3), "c": (6, 3, 0)},
)


def _rwkv(s: Any, x: Any) -> Any:
    h = s.i(x)
    past = F.pad(h, (0, 0, 1, -1))
    k, v, r = s.k(h * s.mk + past * (1 - s.mk)), s.v(h * s.mv + past * (1 - s.mv)), s.r(h).sigmoid()
    num = den = torch.zeros(2, 4).to(h)
    out = []
    for t in range(7):
        e = k[:, t].exp()
        out.append((num + e * v[:, t]) / (den + e + 1e-3))
        num, den = num * s.w.sigmoid() + e * v[:, t], den * s.w.sigmoid() + e
    return s.out(h + s.p(r * torch.stack(out, 1)))


add(
    "Rwkv",
    "6 4",
    (seq,),
    _rwkv,
    i=lin(5, 6),
    k=lin(6, 4),
    v=lin(6, 4),
    r=lin(6, 4),
    mk=par(6),
    mv=par(6),
    w=par(4),
    p=lin(4, 6),
    out=lin(6, 2),
)

# ---------------------------------------------------------------- weights from weights
add(
    "Lora",
    "6 3",
    (x,),
    lambda s, x: s.out((s.a(x) + s.up(s.down(x)) * 2).relu()),
    a=lin(4, 6),
    down=lin(4, 3, False),
    up=lin(3, 6, False),
    out=lin(6, 2),
)
add(
    "Dora",
    "6 3",
    (x,),
    lambda s, x: s.out(F.linear(x, s.m[:, None] * F.normalize(s.w + s.b @ s.a, dim=1)).relu()),
    w=par(6, 4),
    a=par(3, 4),
    b=par(6, 3),
    m=par(6),
    out=lin(6, 2),
)
add(
    "HyperBias",
    "3 6",
    (x,),
    lambda s, x: s.out(F.linear(x, s.h(s.z).view(6, 4), s.hb(s.z)).relu()),
    z=par(3),
    h=lin(3, 24),
    hb=lin(3, 6),
    out=lin(6, 2),
)
add(
    "HyperFromInput",
    "6",
    (x,),
    lambda s, x: s.out(torch.bmm(s.h(x).view(2, 6, 4), x[:, :, None]).squeeze(-1).relu()),
    h=lin(4, 24),
    out=lin(6, 2),
)
add(
    "AutoencoderTied",
    "6 5",
    (x,),
    lambda s, x: F.linear(F.linear((x @ s.w.t()).relu(), s.v).relu(), s.v.t()).relu() @ s.w,
    w=par(6, 4),
    v=par(5, 6),
)
add(
    "FunctionalCall",
    "6",
    (x,),
    lambda s, x: torch.func.functional_call(s.a, {"0.weight": s.w}, (x,)),
    w=par(6, 4),
    a=lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)),
)
add("Vmap", "6", (x,), lambda s, x: torch.func.vmap(lambda y: s.out(s.a(y).relu()))(x), a=lin(4, 6), out=lin(6, 2))


def _force(s: Any, x: Any) -> Any:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(s.out(s.a(x).tanh()).sum(), x)[0]


# the energy is the sum of both outputs, so they may be exchanged as well
add("ForceOfEnergy", "6 2", (x,), _force, a=lin(4, 6), out=lin(6, 2))


# ---------------------------------------------------------------- inputs and outputs, types and lengths
@dataclass
class Answer:
    """An output with tensors in nested places."""

    logits: torch.Tensor
    more: dict[str, Any]


def _image_rows(s: Any, tokens: Any, x: Any) -> Any:
    h, image = s.e(tokens), tokens == 0
    return s.out(h.masked_scatter(image[..., None], (h[image] + s.v(x[:2])).view(-1)))


def _image_entries(s: Any, tokens: Any, x: Any) -> Any:
    h = s.e(tokens)
    image = (tokens == 0)[..., None].expand_as(h)
    return s.out(h.masked_scatter(image, h[image] + s.v(x).reshape(-1)[: 2 * h.shape[-1]]))


def _image_selected(s: Any, tokens: Any, x: Any) -> Any:
    h = s.e(tokens)
    image = (tokens == 0)[..., None]
    return s.out(h.masked_scatter(image, h.masked_select(image).tanh()) + s.v(x[0]))


def _entries_in_order(s: Any, tokens: Any, x: Any) -> Any:
    h = s.a(x)
    return s.out(h[h.abs() > -1].view_as(h).tanh())


def _positive_by_mask(s: Any, tokens: Any, x: Any) -> Any:
    h = s.a(x)
    return s.out(h.masked_scatter(h > 0, h[h > 0].tanh()))


add(
    "Dataclass",
    "6",
    (x,),
    lambda s, x: Answer(s.out(s.a(x).relu()), {"n": [s.a(x).norm()]}),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "KeywordsOnly",
    "6",
    (),
    lambda s, *, x, y=None: s.out(s.a(x).relu()),
    kwargs={"x": x, "y": None},
    a=lin(4, 6),
    out=lin(6, 2),
)
add("OutputIsParameter", "", (x,), lambda s, x: (s.out(s.a(x).relu()), s.a.bias), a=lin(4, 6), out=lin(6, 2))
add(
    "OutputOfParameter",
    "6",
    (x,),
    lambda s, x: (s.out(s.a(x).relu()), s.a.bias.pow(2).sum()),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "OutputIsBuffer",
    "",
    (x,),
    lambda s, x: (s.out(s.a(x).relu() + s.b), s.b),
    a=lin(4, 6),
    out=lin(6, 2),
    b=lambda: torch.randn(6),
)
add("NoParameters", "", (x,), lambda s, x: x.relu())
add(
    "UnusedParameter",
    "6",
    (x,),
    lambda s, x: s.out(s.a(x)),
    a=lin(4, 6),
    out=lin(6, 2),
    unused=par(3, 3),
    free={"unused": (0, 0)},
)
add(
    "ScalarParameters", "6", (x,), lambda s, x: s.out(s.a(x) * s.u + s.v), a=lin(4, 6), out=lin(6, 2), u=par(), v=par(1)
)
add("EmptyParameter", "6", (x,), lambda s, x: s.out(s.a(x)) + s.z.sum(), a=lin(4, 6), out=lin(6, 2), z=par(0, 3))
add("EmptySlice", "6", (x,), lambda s, x: s.out(torch.cat([s.a(x), x[:, :0]], 1)), a=lin(4, 6), out=lin(6, 2))
add("ScalarInput", "6", (torch.tensor(1.5),), lambda s, x: s.out((s.w * x).tanh()), w=par(6), out=lin(6, 2))
add(
    "IntegerInput",
    "6",
    (torch.tensor([[1, 2, 0, 3]]),),
    lambda s, x: s.out(s.a(x.to(s.a.bias.dtype)).relu()),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "BooleanInput",
    "6",
    (x, torch.tensor([[True], [False]])),
    lambda s, x, m: s.out(s.a(x).relu() * m),
    a=lin(4, 6),
    out=lin(6, 2),
)
layers("LengthsOfOne", "", (torch.randn(1, 1),), lin(1, 1), R, lin(1, 1))
layers("PixelsOfOne", "5", (torch.randn(1, 1, 1, 1),), conv(1, 1), R, conv(1, 5), R, conv(5, 1))
layers("BatchStatistics", "6", (x,), lin(4, 6), lambda: nn.BatchNorm1d(6, track_running_stats=False), R, lin(6, 2))
layers("NoAffine", "6", (x,), lin(4, 6), lambda: nn.BatchNorm1d(6, affine=False), R, lin(6, 2))
for _kind in (torch.float16, torch.bfloat16, torch.float64):
    CASES[f"Stored_{str(_kind)[6:]}"] = (
        lambda kind=_kind: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2)).to(kind),
        (x.to(_kind),),
        "6",
    )
add(
    "ComplexParameters",
    "6",
    (x,),
    lambda s, x: torch.view_as_real((x.to(s.w.dtype) @ s.w).tanh() @ s.v),
    w=par(4, 6, dtype=torch.complex64),
    v=par(6, 2, dtype=torch.complex64),
    free={"w": (0, 6), "v": (6, 0)},
)


def _tied_storage() -> nn.Module:
    model = Program(lambda s, x: s.h(s.e(x).relu()), {"e": lin(4, 6, False), "h": lin(6, 4, False)})
    model.h.weight = nn.Parameter(model.e.weight.data.t())
    return model


# one storage, two parameters of different layouts
CASES["SharedStorage"] = (_tied_storage, (x,), "6")


# ---------------------------------------------------------------- writes, and state outside the dispatcher
def _write(change: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def forward(s: Any, x: Any) -> Any:
        h = s.a(x)
        change(s, x, h)
        return s.out(h)

    return forward


def _negative(s: Any, x: Any, h: Any) -> None:
    h[h < 0] = 0


def _two_columns(s: Any, x: Any, h: Any) -> None:
    h[:, [0, 2]] = 0


def _repoint(s: Any, x: Any, h: Any) -> None:
    h.data = h.data.cumsum(1)


def _through_views(s: Any, x: Any, h: Any) -> None:
    h.view(2, 3, 2).transpose(1, 2)[:, 0].copy_(s.b(x))


def _windows(s: Any, x: Any, h: Any) -> None:
    h.unfold(1, 2, 2)[:, :, 0].add_(1)


def _without_loops(s: Any, x: Any) -> Any:
    w = s.w @ s.w.T
    w.fill_diagonal_(0)
    return s.out(s.a(x) @ w)


def _doubled_loops(s: Any, x: Any) -> Any:
    w = s.w @ s.w.T
    w.diagonal().mul_(2)
    return s.out(s.a(x) @ w)


def _image_tokens(s: Any, tokens: Any, x: Any) -> Any:
    h = s.e(tokens)
    return s.out(h.masked_scatter((tokens == 0)[..., None].expand_as(h), s.v(x)))


def _rounded_positions(s: Any, x: Any) -> Any:
    rows, columns = torch.tensor([[[0.0], [0.0], [1.0]], [[0.0], [1.0], [0.0]]])
    turns = torch.tensor([1.0, 1e-4])  # in float32 the cosines of the small ones are 1, of rows as of columns
    return s.out((s.a(x)[:, None] + torch.cat([(rows * turns).cos(), (columns * turns).cos()], 1)).relu())


add("RoundedPositions", "", (x,), _rounded_positions, a=lin(4, 4), out=lin(4, 2))
add(
    "WriteMasked",
    "6",
    (x,),
    _write(_negative),
    a=lin(4, 6),
    out=lin(6, 2),
)
add(
    "WriteColumns",
    "4 2x2",
    (x,),
    _write(_two_columns),
    a=lin(4, 6),
    out=lin(6, 2),
)
# the rows of a that are overwritten are free, too
add("WriteThroughViews", "3x3", (x,), _write(_through_views), a=lin(4, 6), b=lin(4, 3), out=lin(6, 2))
add("WriteWindows", "3x2", (x,), _write(_windows), a=lin(4, 6), out=lin(6, 2))
add("GramWithoutLoops", "6 3", (x,), _without_loops, a=lin(4, 6), w=par(6, 3), out=lin(6, 2))
add(
    "GramDoubledLoops",
    "6 3",
    (x,),
    _doubled_loops,
    a=lin(4, 6),
    w=par(6, 3),
    out=lin(6, 2),
)
add(
    "ImageTokens",
    "6",
    (torch.tensor([[0, 2], [3, 0]]), x),
    _image_tokens,
    e=lambda: nn.Embedding(5, 6),
    v=lin(4, 6),
    out=lin(6, 2),
)
for name, forward in {"Rows": _image_rows, "Entries": _image_entries, "Selected": _image_selected}.items():
    add(
        f"ImageTokens{name}",
        "6",
        (torch.tensor([[0, 2], [3, 0]]), x),
        forward,
        e=lambda: nn.Embedding(5, 6),
        v=lin(4, 6),
        out=lin(6, 2),
    )
add("EntriesInOrder", "", (torch.tensor([0]), x), _entries_in_order, a=lin(4, 6), out=lin(6, 2))
add("PositiveByMask", "6", (torch.tensor([0]), x), _positive_by_mask, a=lin(4, 6), out=lin(6, 2))
# the write goes to a new tensor behind the dispatcher's back: a running sum, so nothing is free
add(
    "Repointed",
    "",
    (x,),
    _write(_repoint),
    a=lin(4, 6),
    out=lin(6, 2),
)

# ---------------------------------------------------------------- graphs
_edges = torch.tensor([[0, 1, 1], [1, 0, 1]])


def _messages(s: Any, x: Any, edges: Any) -> Any:
    h = s.a(x)
    return s.out(h + torch.zeros_like(h).index_add(0, edges[1], s.m(h[edges[0]]).relu()))


def _graph_attention(s: Any, x: Any, edges: Any) -> Any:
    h = s.a(x).view(2, 2, 3)
    score = (h * s.v).sum(-1)
    e = F.leaky_relu(score[edges[0]] + score[edges[1]]).exp()
    a = e / torch.zeros(2, 2).to(e).index_add(0, edges[1], e)[edges[1]]
    return s.out(torch.zeros_like(h).index_add(0, edges[1], h[edges[0]] * a[..., None]).flatten(1))


add("MessagePassing", "6", (x, _edges), _messages, a=lin(4, 6), m=lin(6, 6), out=lin(6, 2))
add("GraphAttention", "2 3x2", (x, _edges), _graph_attention, a=lin(4, 6), v=par(1, 2, 3), out=lin(6, 2))
add(
    "LastToken",
    "6",
    (seq, torch.tensor([1, 3])),
    lambda s, x, i: s.out(s.a(x)[torch.arange(2), i]),
    a=lin(5, 6),
    out=lin(6, 2),
)

_reversed = torch.tensor([5, 4, 3, 2, 1, 0])
for _name, _sizes, _change in (
    ("IndexCopyReversed", "6", lambda h: torch.zeros_like(h).index_copy(1, _reversed, h)),
    ("IndexAddReversed", "6", lambda h: torch.zeros_like(h).index_add(1, _reversed, h)),
    # the rows of a that are overwritten, the columns of out that read the constant, and the rest
    ("IndexFill", "3x3", lambda h: h.index_fill(1, torch.tensor([1, 3, 5]), 2.0)),
):
    add(_name, _sizes, (x,), lambda s, x, f=_change: s.out(f(s.a(x))), a=lin(4, 6), out=lin(6, 2))


# ---------------------------------------------------------------- python reads a shape that depends on one unit's numbers
for _name, _change in (
    ("SizedByAMask", lambda h: h * (1 + h[h[:, 2] > 0].shape[0])),
    ("SizedByASelection", lambda h: h * (1 + h[:, 2].masked_select(h[:, 2] > 0).numel())),
    ("SizedByPlaces", lambda h: h * (1 + len((h[:, 2] > 0).nonzero()))),
    ("SizedByTheLargest", lambda h: h * len(torch.bincount((h[:, 2].abs() * 3).long()))),
):
    add(_name, "7", (x,), lambda s, x, f=_change: s.out(f(s.a(x))), a=lin(4, 8), out=lin(8, 2))


# ---------------------------------------------------------------- commutative functions of pieces: a position may change piece
for _name, _sizes, _outputs, _change in (
    ("PiecesSummed", "4 2x4", 4, lambda h: sum(h.relu().chunk(2, 1))),
    ("PiecesMultiplied", "4 2x4", 4, lambda h: h[:, :4] * h[:, 4:]),
    ("PiecesMaximum", "4 2x4", 4, lambda h: torch.maximum(h.sin()[:, ::2], h.sin()[:, 1::2])),
    ("PiecesSubtracted", "4", 4, lambda h: h[:, :4] - h[:, 4:]),
    ("PiecesWeighted", "4", 4, lambda h: torch.add(h[:, :4], h[:, 4:], alpha=2)),
    ("PiecesGated", "4", 4, lambda h: h[:, :4] * h[:, 4:].sigmoid()),
    ("PiecesSummedThrice", "2 4x2", 2, lambda h: torch.tanh(sum(h.relu().chunk(4, 1)))),
    # a tensor and a function of it are two
    ("PiecesOfTwoTensorsJoined", "4x2", 8, lambda h: torch.cat([h[:, :4], h.relu()[:, 4:]], 1)),
    ("PiecesOfTwoTensorsStacked", "4x2", 8, lambda h: torch.stack([*h.unbind(1)[:4], *h.relu().unbind(1)[4:]], 1)),
    ("PiecesOfTwoTensorsMultiplied", "4", 4, lambda h: h[:, :4] * h.tanh()[:, 4:]),
    ("PiecesSummedAfterAFunction", "2x5", 2, lambda h: (h[:, :2] + h[:, 2:4]).relu() + (h[:, 4:6] + h[:, 6:])),
):
    add(_name, _sizes, (x,), lambda s, x, f=_change: s.out(f(s.a(x))), a=lin(4, 8), out=lin(_outputs, 2))


def _three(order: tuple[int, ...]) -> Callable[..., Any]:
    """Two operands that name every unit twice, and two that do not, three of them at a time, in some order."""

    def forward(s: Any, x: Any) -> Any:
        h, g = s.h(x).tanh(), s.g(x).sin()
        operands = [torch.cat([h, h], 1), torch.cat([g, g], 1), s.b(x), s.e(x)]
        return s.out(s.norm(torch.addcmul(*(operands[i] for i in order))).relu())

    return forward


for _order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (2, 3, 0), (0, 2, 3), (2, 0, 3), (3, 1, 2)):
    _used = {"h": lin(4, 4), "g": lin(4, 4), "b": lin(4, 8), "e": lin(4, 8)}
    add(f"ThreeOperands{''.join(map(str, _order))}", "2x4 4", (x,), _three(_order), **_used, norm=lambda: nn.BatchNorm1d(8),
        out=lin(8, 2))  # fmt: skip


def _square(h: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bi,bj->bij", h, h).flatten(1)


def _transform(identity: bool) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """A matrix that is made from the points and multiplies their features, as in PointNet."""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = s.c(x).relu()
        matrix = s.f(s.e(h).relu().amax(1)).view(-1, 4, 4)
        return s.out(s.d(h @ (matrix + torch.eye(4) if identity else matrix)).relu().amax(1))

    return forward


_POINTS = {"c": lin(3, 4), "e": lin(4, 6), "f": lin(6, 16), "d": lin(4, 5), "out": lin(5, 2)}
_points = (torch.randn(2, 7, 3),)
add("PointTransform", "4 5 6", _points, _transform(True), **_POINTS)
add("PointTransformWithoutIdentity", "4x2 5 6", _points, _transform(False), **_POINTS)
add("SquareBesideUnits", "4", (x,), lambda s, x: s.out(torch.cat([s.a(x).relu(), _square(s.a(x).relu())], 1)),
    a=lin(4, 4), out=lin(20, 2))  # fmt: skip
add("SquaresJoined", "4", (x,), lambda s, x: s.out(torch.cat([_square(s.a(x).relu()), _square(s.a(x).sin())], 1)),
    a=lin(4, 4), out=lin(32, 2))  # fmt: skip
add("SquareNormalised", "4", (x,), lambda s, x: s.out(s.norm(_square(s.a(x).relu())).relu()),
    a=lin(4, 4), norm=lambda: nn.BatchNorm1d(16), out=lin(16, 2))  # fmt: skip
for _letters in ("ijk", "kij", "ikj"):
    add(f"SquareTimesOthers{_letters.title()}", "3 4", (x,), lambda s, x, to=_letters: s.out(torch.einsum(
        f"bi,bj,bk->b{to}", s.a(x).relu(), s.a(x).relu(), s.b(x).sin()).flatten(1)),
        a=lin(4, 4), b=lin(4, 3), out=lin(48, 2))  # fmt: skip
add("SquareByMatrix", "4", (x,), lambda s, x: s.out(s.norm((s.a(x).relu()[:, :, None] * s.w
    * s.a(x).relu()[:, None]).flatten(1))),
    a=lin(4, 4), w=par(4, 4), norm=lambda: nn.BatchNorm1d(16), out=lin(16, 2))  # fmt: skip


def _sliced(first: slice, second: slice, other: int | None) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Two squares by slices of one matrix, of which a further row may belong to other units."""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = s.a(x).relu()
        squares = [(g[:, :, None] * s.w[rows] * g[:, None]).flatten(1) for g, rows in ((h, first), (h.sin(), second))]
        y = s.out(s.norm(torch.cat(squares, 1)).relu())
        return y if other is None else y + s.v(s.g(x).relu() * s.w[other])

    return forward


_slices = {"a": lin(4, 4), "norm": lambda: nn.BatchNorm1d(32), "out": lin(32, 2)}
_beside: dict[str, Any] = {"g": lin(4, 4), "v": lin(4, 2), "w": par(9, 4)}
add("SquaresBySlices", "4", (x,), _sliced(slice(4), slice(4, 8), None), w=par(8, 4), **_slices)
add("SquaresBySlicesAndARow", "4 4", (x,), _sliced(slice(4), slice(4, 8), 8), **_slices, **_beside)
add("SquaresBySlicesApart", "4 4", (x,), _sliced(slice(4), slice(5, 9), 4), **_slices, **_beside)
add("SquareOfForms", "4x3", (x,), lambda s, x: s.out(s.norm((s.b(s.a(x).relu(), s.c(x).sin())[:, :, None]
    * s.a(x).relu()[:, None]).flatten(1)).view(-1, 4, 4).relu().mT.flatten(1)), a=lin(4, 4), c=lin(4, 4),
    b=lambda: nn.Bilinear(4, 4, 4), norm=lambda: nn.LayerNorm(16), out=lin(16, 2))  # fmt: skip
add("SquareOfChannels", "4", (torch.randn(2, 3, 6, 6),),
    lambda s, x: s.out((lambda h: (h @ h.mT).flatten(1))(s.a(x).relu().flatten(2))),
    a=lambda: nn.Conv2d(3, 4, 3), out=lin(16, 2))  # fmt: skip
add("SquareAsMatrix", "4", (x,), lambda s, x: s.out(s.a(x).relu() @ s.w.view(4, 4) + s.a(x)), a=lin(4, 4), w=par(16),
    out=lin(4, 2))  # fmt: skip
add("SquareOfThree", "3", (x,), lambda s, x: s.out((lambda h: torch.einsum("bi,bj,bk->bijk", h, h, h))(
    s.a(x).relu()).flatten(1)), missing="three units of one kind for every entry", a=lin(4, 3), out=lin(27, 2))  # fmt: skip
add(
    "PiecesOverlapping",
    "4 2",
    (x,),
    lambda s, x: s.out(s.a(x).cos()[:, 1:4] + s.a(x).cos()[:, 2:5]),
    missing="a reflection of sliding windows",
    a=lin(4, 8),
    out=lin(3, 2),
)


def _partly(s: Any, x: torch.Tensor) -> torch.Tensor:
    a, b, c = s.a(x).relu().chunk(3, 1)
    return s.out(torch.tanh(a + b + c)) + s.own(a + b)


add("PiecesSummedPartly", "4 2x4", (x,), _partly, a=lin(4, 12), out=lin(4, 2), own=lin(4, 2))


def _read_again(which: int) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """A piece that something else reads after the sum was taken and before the sum is used."""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        pieces = s.a(x).relu().chunk(2, 1)
        both = pieces[0] + pieces[1]
        own = s.own(pieces[which])
        return s.out(both.tanh()) + own

    return forward


for _which in (0, 1):
    add(f"PiecesReadAgain{_which}", "4", (x,), _read_again(_which), a=lin(4, 8), out=lin(4, 2), own=lin(4, 2))


def _radix(s: Any, x: torch.Tensor) -> torch.Tensor:
    """Split attention: two pieces from the two groups of a convolution, weighted and summed."""
    h = s.c(s.a(x).relu()).relu()
    weight = s.f(sum(h.split(4, 1)).mean(2)).view(2, 2, 4).softmax(1).flatten(1)[..., None]
    return s.out(sum((h * weight).split(4, 1)))


add(
    "SplitAttention",
    "3 3 4 2",
    (torch.randn(2, 3, 5),),
    _radix,
    a=lambda: nn.Conv1d(3, 6, 1),
    c=lambda: nn.Conv1d(6, 8, 1, groups=2),
    f=lambda: nn.Linear(4, 8),
    out=lambda: nn.Conv1d(4, 2, 1),
)

# rows and columns of a matrix that only its volume reads
add(
    "Cayley",  # an orthogonal layer: the rows and columns of w are the units
    "6",
    (torch.randn(3, 4),),
    lambda s, x: s.out(s.inp(x).relu() @ torch.linalg.solve(torch.eye(6) + s.w - s.w.T, torch.eye(6) - s.w + s.w.T)),
    inp=lin(4, 6),
    w=par(6, 6),
    out=lin(6, 2),
)
add(
    "LargestSingularValue",
    "6 5",
    (torch.randn(3, 4),),
    lambda s, x: s.out(F.linear(s.inp(x).relu(), s.w / torch.linalg.matrix_norm(s.w, 2)).relu()),
    inp=lin(4, 6),
    w=par(5, 6),
    out=lin(5, 2),
)
add(
    "EigenvaluesOfGram",
    "6",
    (torch.randn(5, 4),),
    lambda s, x: torch.linalg.eigvalsh((lambda h: h @ h.T)(s.inp(x).relu())),
    inp=lin(4, 6),
)
add(
    "ForwardSubstitution",  # of rows that are tokens: features stay free
    "6",
    (torch.randn(5, 4),),
    lambda s, x: (lambda h: s.out(torch.linalg.solve_triangular(torch.eye(5) + (h @ h.T).tril(-1), h, upper=False)))(
        s.inp(x)
    ),
    inp=lin(4, 6),
    out=lin(6, 2),
)
add(
    "Volume",
    "3 3",
    (x,),
    lambda s, x: s.out(x) + torch.linalg.slogdet(s.w)[1],
    w=par(3, 3),
    out=lin(4, 2),
)
add(
    "Experts in two levels",
    "2 3 3 4 4 4 4 4 4 6",
    (torch.randn(5, 3),),
    lambda s, x: s.out(
        torch.einsum(
            "ng,nge,nged->nd",
            s.groups(s.inp(x)).softmax(-1),
            torch.einsum("nd,gde->nge", s.inp(x), s.gate).softmax(-1),
            torch.einsum("ngeh,gehd->nged", torch.einsum("nd,gedh->ngeh", s.inp(x), s.up).relu(), s.down),
        )
    ),
    missing="an order of experts for every group, beside one of units for every expert",
    inp=lin(3, 6),
    groups=lin(6, 2),
    gate=par(2, 6, 3),
    up=par(2, 3, 6, 4),
    down=par(2, 3, 4, 6),
    out=lin(6, 2),
)
add(
    "Signed volume",
    "6",
    (torch.randn(2, 4),),
    lambda s, x: (s.b(s.a(x) @ s.w), torch.logdet(s.w @ s.w.T + s.w), torch.linalg.det(s.w)),
    a=lin(4, 6),
    w=par(6, 6),
    b=lin(6, 2),
)
add(
    "Inverse",
    "3 3 3",
    (torch.randn(2, 4),),
    lambda s, x: s.out(s.b(s.a(x).relu() @ torch.linalg.inv(s.w)).relu()),
    a=lin(4, 3),
    w=par(3, 3),
    b=lin(3, 3),
    out=lin(3, 2),
)


# ---------------------------------------------------------------- joins along another axis than the cut
def _heads_on_batch(s: Any, x: torch.Tensor) -> torch.Tensor:
    """Heads are chunks of the features, joined along the batch, and brought back."""
    h = s.i(x)
    q, k, v = (torch.cat(f(h).chunk(2, dim=2), dim=0) for f in (s.q, s.k, s.v))
    return s.out(h + s.p(torch.cat(attend(q, k, v).chunk(2, dim=0), dim=2)))


def _heads_stacked(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.i(x)
    q, k, v = (torch.stack(f(h).split(3, -1), 1) for f in (s.q, s.k, s.v))
    return s.out(h + s.p(torch.cat(attend(q, k, v).unbind(1), -1)))


def _heads_squeezed(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.i(x)
    q, k, v = (torch.stack(f(h).split(3, -1), 1) for f in (s.q, s.k, s.v))
    return s.out(h + s.p(torch.cat([t.squeeze(1) for t in attend(q, k, v).split(1, 1)], -1)))


def _heads_in_a_loop(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.i(x)
    parts = [[f(h)[..., k : k + 3] for f in (s.q, s.k, s.v)] for k in (0, 3)]
    return s.out(h + s.p(torch.cat([attend(*part) for part in parts], -1)))


for _name, _sizes, _program in (
    ("HeadsOnBatch", "6 2 3x4", _heads_on_batch),
    ("HeadsStacked", "6 2 3x4", _heads_stacked),
    ("HeadsSqueezed", "6 2 3x4", _heads_squeezed),
    ("HeadsInALoop", "6 2 3x4", _heads_in_a_loop),
):
    add(_name, _sizes, (seq,), _program, i=lin(5, 6), q=lin(6, 6), k=lin(6, 6), v=lin(6, 6), p=lin(6, 6), out=lin(6, 2))

for _name, _sizes, _change in (
    ("SelectedMultiplied", "4 2x4", lambda a, b: a * b),
    ("SelectedSubtracted", "4", lambda a, b: a - b),
    ("SelectedReadAgain", "4", lambda a, b: (a + b).tanh() + a),
    ("SelectedJoinedCrosswise", "8", lambda a, b: torch.cat([b.sin(), a.sin()], 1)),
):
    add(
        _name,
        _sizes,
        (x,),
        lambda s, x, f=_change: s.out(f(*s.a(x).view(2, 2, 4).unbind(1))),
        a=lin(4, 8),
        out=lin(8 if "Joined" in _name else 4, 2),
    )


# ---------------------------------------------------------------- stacks whose entries keep their own order
def _last_states(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.r(x)[1]
    return s.out(torch.cat((h[-2], h[-1]), 1))


def _handed_over(s: Any, x: torch.Tensor) -> torch.Tensor:
    return s.out(s.d(x.flip(1), s.e(x)[1])[0])


def _members(s: Any, x: torch.Tensor) -> torch.Tensor:
    w, b, v = (torch.stack([getattr(s, f"{part}{k}") for k in range(3)]) for part in "wbv")
    return torch.baddbmm(b[:, None], x.expand(3, -1, -1), w).relu().bmm(v).mean(0)


def _gru(layers: int, both: bool) -> Factory:
    return lambda: nn.GRU(5, 6, layers, bidirectional=both, batch_first=True)


add("LastStates", "6x2", (seq,), _last_states, r=_gru(1, True), out=lin(12, 2))
add("LastStatesOfLayers", "6x4", (seq,), _last_states, r=_gru(2, True), out=lin(12, 2))
add("StatesHandedOver", "6x2", (seq,), _handed_over, e=_gru(2, False), d=_gru(2, False), out=lin(6, 2))
add(
    "MembersStacked",
    "6x3",
    (x,),
    _members,
    **{f"w{k}": par(4, 6) for k in range(3)},
    **{f"b{k}": par(6) for k in range(3)},
    **{f"v{k}": par(6, 2) for k in range(3)},
)
# read alike by one layer: one order
add(
    "StackedAndMixed",
    "6",
    (x,),
    lambda s, x: s.out(torch.stack([s.a(x), s.b(x)], 1)).sum(1).tanh(),
    a=lin(4, 6),
    b=lin(4, 6),
    out=lin(6, 2),
)
add(
    "StackedAndScaled",
    "6x2",
    (x,),
    lambda s, x: s.out((torch.stack([s.a(x), s.b(x)], 1) * s.g).flatten(1)),
    a=lin(4, 6),
    b=lin(4, 6),
    g=par(2, 6),
    out=lin(12, 2),
)


# ---------------------------------------------------------------- patterns of constants
def _dirac(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x).relu()
    kernel = nn.init.dirac_(torch.empty(6, 6, 3, 3, dtype=h.dtype)) * s.g.view(-1, 1, 1, 1)
    return s.out(F.conv2d(h, s.w + kernel, padding=1).relu())


_blocks = torch.kron(torch.eye(3), torch.ones(2, 2)).bool()
add("DiracKernel", "6", (img,), _dirac, a=conv(3, 6), w=par(6, 6, 3, 3), g=par(6), out=conv(6, 2))
# blocks, and the rows and columns of each block
add(
    "BlockMask",
    "3 2x6",
    (x,),
    lambda s, x: s.out((s.a(x) @ (s.w * _blocks)).relu()),
    a=lin(4, 6),
    w=par(6, 6),
    out=lin(6, 2),
)
add(
    "PermutationMatrix",
    "6",
    (x,),
    lambda s, x: s.out(s.a(x) @ torch.eye(6).to(x)[[3, 0, 1, 5, 2, 4]]),
    a=lin(4, 6),
    out=lin(6, 2),
)
add("IdentityOfTwo", "2", (x,), lambda s, x: s.out(s.a(x) @ torch.eye(2).to(x)), a=lin(4, 2), out=lin(2, 2))
add(
    "LowerTriangle",
    "",
    (x,),
    lambda s, x: s.out(s.a(x) @ torch.ones(6, 6).tril().to(x)),
    a=lin(4, 6),
    out=lin(6, 2),
)


# ---------------------------------------------------------------- memory that nobody filled, operands that nobody reads
def _beta_zero(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.i(x)
    q, (k, v) = s.q(h).view(2, 28, 4), s.kv(h).split(4, -1)
    noise = torch.full((2, 28, 7), float("nan"), dtype=h.dtype)
    weight = torch.baddbmm(noise, q, k.mT, beta=0, alpha=0.5).view(2, 7, 4, 7).softmax(-1)
    return s.out(h + s.p(torch.bmm(weight.view(2, 28, 7), v).view(2, 7, 16)))


def _filled_later(s: Any, x: torch.Tensor) -> torch.Tensor:
    steps = torch.empty(7, 2, 6, dtype=x.dtype)
    for t in range(7):
        steps[t] = s.a(x[:, t]).relu()
    return s.out(steps.transpose(0, 1))


add("BetaZero", "8 4x3", (seq,), _beta_zero, i=lin(5, 8), q=lin(8, 16), kv=lin(8, 8), p=lin(16, 8), out=lin(8, 2))
add("FilledLater", "6", (seq,), _filled_later, a=lin(5, 6), out=lin(6, 2))

# ---------------------------------------------------------------- complex numbers from two parts, functions of a matrix
add(
    "ComplexOfParts",
    "6",
    (x,),
    lambda s, x: torch.complex(x @ s.r, x @ s.i).exp().real @ s.o,
    r=par(4, 6),
    i=par(4, 6),
    o=par(6, 2),
)
add(
    "PolarOfParts",
    "6",
    (x,),
    lambda s, x: s.out(torch.polar(s.a(x).exp(), s.b(x)).imag),
    a=lin(4, 6),
    b=lin(4, 6),
    out=lin(6, 2),
)
add(
    "MatrixExponential",
    "6",
    (x,),
    lambda s, x: s.out(s.a(x) @ torch.matrix_exp(s.w - s.w.T)),
    a=lin(4, 6),
    w=par(6, 6),
    out=lin(6, 2),
)

# ---------------------------------------------------------------- names that are python's
_words = ("lambda_", "del", "self", "self_", "None_", "in", "torch", "α²", "print", "int", "a_b", "layers.a")
add(
    "OddNames",
    "6",
    (x,),
    lambda s, x: s.out(s.a(x) + sum(getattr(s, w.replace(".", "_")) for w in _words) + s.a_.b),
    a=lin(4, 6),
    out=lin(6, 2),
    **{w.replace(".", "_"): par(6) for w in _words},
    a_=lambda: nn.ParameterDict({"b": nn.Parameter(torch.randn(6))}),
)


# ---------------------------------------------------------------- writes at several indices: other axes stay free
def _chosen_queries(s: Any, x: torch.Tensor) -> torch.Tensor:
    """Informer: only the queries with the largest scores attend, all others get the mean."""
    h = s.i(x)
    q, k, v = (f(h).view(2, 7, 2, 3).transpose(1, 2) for f in (s.q, s.k, s.v))
    top = (q @ k.mT).amax(-1).topk(3, sorted=False)[1]
    at = torch.arange(2)[:, None, None], torch.arange(2)[None, :, None], top
    context = v.mean(-2, keepdim=True).expand(-1, -1, 7, -1).clone()
    context[at] = attend(q[at], k, v)
    return s.out(h + s.p(context.transpose(1, 2).reshape(2, 7, 6)))


def _masked_tokens(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.i(x)
    mask = x.sum(-1) > 0
    h[mask] = s.token.to(h) + s.j(x[mask])
    return s.out(h)


# where the queries of each head are written moves with the head
add(
    "WriteChosenQueries",
    "6 2 3x4",
    (seq,),
    _chosen_queries,
    **{n: lin(6, 6) for n in "qkvp"},
    i=lin(5, 6),
    out=lin(6, 2),
)
add("WriteMaskedTokens", "6", (seq,), _masked_tokens, i=lin(5, 6), j=lin(5, 6), token=par(6), out=lin(6, 2))
add(
    "ReadChosenQueries",
    "2 3x2",
    (seq,),
    lambda s, x: (lambda q: s.out(q[torch.arange(2)[:, None], torch.arange(2)[None], q.sum(-1).argmax(-1)].flatten(1)))(
        s.i(x).view(2, 7, 2, 3).transpose(1, 2)
    ),
    i=lin(5, 6),
    out=lin(6, 2),
)


# ---------------------------------------------------------------- entries under a constant mask, in their order
def _components(s: Any, x: torch.Tensor) -> torch.Tensor:
    """A mixture whose components have triangular factors, with the entries below the diagonal in one row."""
    below = torch.ones(3, 3, dtype=torch.bool).tril(-1).expand(4, 3, 3)
    factors = torch.masked_scatter(torch.diag_embed(s.diagonal.exp()), below, s.below)
    z = torch.einsum("kij,bkj->bki", factors, x[:, None, :3] - s.mean)
    return torch.logsumexp(s.logits - z.square().sum(-1), -1)


def _half_table(s: Any, x: torch.Tensor) -> torch.Tensor:
    table = s.w.masked_select(torch.ones(3, 3, dtype=torch.bool).tril()).view(5, 6)
    return s.out((s.a(x) @ table.T).tanh())


add(
    "WriteUnderConstantMask",
    "4",
    (x,),
    _components,
    mean=par(4, 3),
    below=par(4, 3),
    diagonal=par(4, 3),
    logits=par(4),
)
add("ReadUnderConstantMask", "5", (x,), _half_table, a=lin(4, 6), w=par(5, 3, 3), out=lin(5, 2))


# ---------------------------------------------------------------- whether two tensors are equal
def _kernel(s: Any, x: torch.Tensor) -> torch.Tensor:
    """Distances in a space of features, by a function that asks whether it was given one set of points twice."""
    a, b = s.a(x) / s.width, s.points / s.width
    return s.out(torch.zeros(len(a), len(b)) if torch.equal(a, b) else torch.cdist(a, b))


add(
    "EqualPoints", "6", (x,), _kernel, a=lin(4, 6), points=lambda: nn.Parameter(torch.randn(len(x), 6)), width=par(6),
    out=lambda: nn.Linear(len(x), 2),
)  # fmt: skip
add("UnequalPoints", "6 9", (x,), _kernel, a=lin(4, 6), points=par(9, 6), width=par(6), out=lin(9, 2))
