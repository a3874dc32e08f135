"""Small hard networks with known symmetry: name -> (factory, inputs, sizes of the generators).

``sizes`` is a string such as ``"8 4x3"``: one generator of 8 units and three of 4. All widths in one network differ
where they may, so that a size names its group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], str]] = {}


def case(sizes: str, *shapes: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a module class with the shapes of its inputs (a tuple) or ready tensors."""

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        generator = torch.Generator().manual_seed(len(CASES))
        args = tuple(s if isinstance(s, torch.Tensor) else torch.randn(s, generator=generator) for s in shapes)
        CASES[cls.__name__] = (cls, args, sizes)
        return cls

    return add


class Net(nn.Module):
    """Base: ``build`` makes the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.build()

    def build(self) -> None:
        raise NotImplementedError


def sequential(name: str, sizes: str, shape: tuple[int, ...], *layers: Callable[[], nn.Module]) -> None:
    CASES[name] = (lambda: nn.Sequential(*(layer() for layer in layers)), (torch.randn(shape),), sizes)


L, C2, R = nn.Linear, nn.Conv2d, nn.ReLU
sequential("mlp", "6 5", (2, 4), lambda: L(4, 6), R, lambda: L(6, 5), R, lambda: L(5, 3))
sequential("linear_only", "", (2, 4), lambda: L(4, 3))
sequential("mlp_no_bias_gelu", "6", (2, 4), lambda: L(4, 6, bias=False), nn.GELU, lambda: L(6, 3, bias=False))
sequential("mlp_layernorm", "6", (2, 4), lambda: L(4, 6), lambda: nn.LayerNorm(6), R, lambda: L(6, 3))
sequential("mlp_batchnorm", "6", (3, 4), lambda: L(4, 6), lambda: nn.BatchNorm1d(6), R, lambda: L(6, 3))
sequential("mlp_prelu", "6", (3, 4), lambda: L(4, 6), lambda: nn.PReLU(6), lambda: L(6, 3))
sequential("mlp_prelu_one", "6", (3, 4), lambda: L(4, 6), lambda: nn.PReLU(), lambda: L(6, 3))
sequential("mlp_softmax", "6", (3, 4), lambda: L(4, 6), lambda: nn.Softmax(1), lambda: L(6, 3))
sequential("mlp_glu", "4", (3, 4), lambda: L(4, 8), lambda: nn.GLU(-1), lambda: L(4, 3))
sequential("conv_flatten", "5", (2, 3, 6, 6), lambda: C2(3, 5, 3), R, nn.Flatten, lambda: L(80, 3))
sequential(
    "conv_pool_flatten",
    "5 4",
    (2, 3, 8, 8),
    lambda: C2(3, 5, 3),
    lambda: nn.MaxPool2d(2),
    lambda: C2(5, 4, 2),
    lambda: nn.AdaptiveAvgPool2d(1),
    nn.Flatten,
    lambda: L(4, 3),
)
sequential(
    "conv_bn",
    "5 4",
    (2, 3, 6, 6),
    lambda: C2(3, 5, 3),
    lambda: nn.BatchNorm2d(5),
    R,
    lambda: C2(5, 4, 3),
    lambda: nn.InstanceNorm2d(4, affine=True),
    lambda: C2(4, 2, 1),
)
sequential("conv1d", "5", (2, 3, 9), lambda: nn.Conv1d(3, 5, 3), R, lambda: nn.Conv1d(5, 2, 3))
sequential("conv3d", "5", (2, 3, 4, 4, 4), lambda: nn.Conv3d(3, 5, 2), R, lambda: nn.Conv3d(5, 2, 2))
sequential(
    "conv_transposed",
    "5 4",
    (2, 3, 4, 4),
    lambda: nn.ConvTranspose2d(3, 5, 2, 2),
    R,
    lambda: nn.ConvTranspose2d(5, 4, 3),
    R,
    lambda: C2(4, 2, 1),
)
sequential(
    "grouped", "2 3x2 4x2", (2, 3, 5, 5), lambda: C2(3, 8, 1), R, lambda: C2(8, 6, 3, groups=2), R, lambda: C2(6, 2, 1)
)
sequential(
    "grouped_transposed",
    "2 3x2 4x2",
    (2, 3, 5, 5),
    lambda: C2(3, 8, 1),
    R,
    lambda: nn.ConvTranspose2d(8, 6, 3, groups=2),
    R,
    lambda: C2(6, 2, 1),
)
sequential(
    "depthwise", "6", (2, 3, 5, 5), lambda: C2(3, 6, 1), R, lambda: C2(6, 6, 3, groups=6), R, lambda: C2(6, 2, 1)
)
sequential(
    "depthwise_multiplier",
    "6 2x6",
    (2, 3, 5, 5),
    lambda: C2(3, 6, 1),
    R,
    lambda: C2(6, 12, 3, groups=6),
    R,
    lambda: C2(12, 2, 1),
)
sequential("grouped_input", "3x2", (2, 4, 5, 5), lambda: C2(4, 6, 3, groups=2), R, lambda: C2(6, 2, 1))
sequential(
    "groupnorm", "3 4x3", (2, 3, 5, 5), lambda: C2(3, 12, 1), lambda: nn.GroupNorm(3, 12), R, lambda: C2(12, 2, 1)
)
sequential("groupnorm_one", "6", (2, 3, 5, 5), lambda: C2(3, 6, 1), lambda: nn.GroupNorm(1, 6), R, lambda: C2(6, 2, 1))
sequential("groupnorm_all", "6", (2, 3, 5, 5), lambda: C2(3, 6, 1), lambda: nn.GroupNorm(6, 6), R, lambda: C2(6, 2, 1))
sequential("pixel_shuffle", "3", (2, 2, 5, 5), lambda: C2(2, 12, 1), lambda: nn.PixelShuffle(2), R, lambda: C2(3, 2, 1))
sequential(
    "pixel_unshuffle", "3", (2, 2, 4, 4), lambda: C2(2, 3, 1), lambda: nn.PixelUnshuffle(2), R, lambda: C2(12, 2, 1)
)
sequential("weight_norm", "6", (2, 4), lambda: nn.utils.parametrizations.weight_norm(L(4, 6)), R, lambda: L(6, 3))
sequential("spectral_norm", "6", (2, 4), lambda: nn.utils.parametrizations.spectral_norm(L(4, 6)), R, lambda: L(6, 3))
sequential(
    "weight_norm_old", "6", (2, 4), lambda: L(4, 6), R, lambda: nn.utils.parametrizations.weight_norm(L(6, 3), dim=None)
)
sequential(
    "upsample",
    "5",
    (2, 3, 4, 4),
    lambda: C2(3, 5, 1),
    lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    lambda: C2(5, 2, 3),
)
sequential("reflection", "5", (2, 3, 4, 4), lambda: C2(3, 5, 1), lambda: nn.ReflectionPad2d(1), lambda: C2(5, 2, 3))
sequential("zero_pad", "5", (2, 3, 4, 4), lambda: C2(3, 5, 1), lambda: nn.ZeroPad2d((1, 0, 2, 1)), lambda: C2(5, 2, 3))
sequential("lrn", "", (2, 3, 4, 4), lambda: C2(3, 5, 1), lambda: nn.LocalResponseNorm(2), lambda: C2(5, 2, 3))
sequential("dropout", "6", (2, 4), lambda: L(4, 6), lambda: nn.Dropout(0.5), R, lambda: L(6, 3))


@case("6", (2, 4))
class Residual(Net):
    def build(self):
        self.inp, self.a, self.out = L(4, 6), L(6, 6), L(6, 3)

    def forward(self, x):
        x = self.inp(x)
        return self.out(x + self.a(x).relu())


@case("6 5", (2, 4))
class ResidualBottleneck(Net):
    def build(self):
        self.inp, self.a, self.b, self.out = L(4, 6), L(6, 5), L(5, 6), L(6, 3)

    def forward(self, x):
        x = self.inp(x)
        return self.out(x + self.b(self.a(x).relu()))


@case("5", (2, 4))
class ResidualToInput(Net):
    def build(self):
        self.a, self.b = L(4, 5), L(5, 4)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


@case("5 3", (2, 4))
class Concatenate(Net):
    def build(self):
        self.a, self.b, self.out = L(4, 5), L(4, 3), L(8, 2)

    def forward(self, x):
        return self.out(torch.cat([self.a(x).relu(), self.b(x).tanh()], 1))


@case("5 2x5", (2, 4))
class ConcatenateTwice(Net):
    def build(self):
        self.a, self.out = L(4, 5), L(10, 2)

    def forward(self, x):
        h = self.a(x).relu()
        return self.out(torch.cat([h, h], 1))


@case("5", (2, 4))
class ConcatenateDifferent(Net):
    def build(self):
        self.a, self.out = L(4, 5), L(10, 2)

    def forward(self, x):
        h = self.a(x)
        return self.out(torch.cat([h.relu(), h.tanh()], 1).softmax(1))


@case("5 3 6", (2, 4))
class Dense(Net):
    def build(self):
        self.a, self.b, self.c, self.out = L(4, 5), L(5, 3), L(8, 6), L(14, 2)

    def forward(self, x):
        x = self.a(x).relu()
        x = torch.cat([x, self.b(x).relu()], 1)
        x = torch.cat([x, self.c(x).relu()], 1)
        return self.out(x)


@case("5", (2, 4))
class ConcatenateThenAdd(Net):
    """a and b become united after they were joined."""

    def build(self):
        self.a, self.b, self.out = L(4, 5), L(4, 5), L(10, 2)

    def forward(self, x):
        a, b = self.a(x).relu(), self.b(x).relu()
        return self.out(torch.cat([a, b], 1)) + (a + b).sum(1, keepdim=True)


@case("3x2", (2, 4))
class UnequalSplitSame(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(6, 2)

    def forward(self, x):
        a, b = self.a(x).split([3, 3], 1)
        return self.out(torch.cat([a.relu(), b.sigmoid()], 1))


@case("5 2", (2, 4))
class UnequalSplit(Net):
    def build(self):
        self.a, self.p, self.q = L(4, 7), L(5, 2), L(2, 2)

    def forward(self, x):
        a, b = self.a(x).split([5, 2], 1)
        return self.p(a.relu()) + self.q(b)


@case("4 3", (2, 4))
class SliceAndAll(Net):
    def build(self):
        self.a, self.p, self.q = L(4, 7), L(7, 2), L(3, 2)

    def forward(self, x):
        h = self.a(x)
        return self.p(h.relu()) + self.q(h[:, 2:5].relu())


@case("3", (2, 4))
class SliceSum(Net):
    """A slice that meets no parameter still singles out its positions."""

    def build(self):
        self.a = L(4, 3)

    def forward(self, x):
        return self.a(x).relu().sum(1, keepdim=True)


@case("3 2", (2, 4))
class SliceSumPart(Net):
    def build(self):
        self.a = L(4, 5)

    def forward(self, x):
        h = self.a(x).relu()
        return h[:, :3].sum(1, keepdim=True) * h[:, 3:].sum(1, keepdim=True)


@case("6", (2, 4))
class Flip(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(6, 2)

    def forward(self, x):
        return self.out(self.a(x).relu().flip(1))


@case("3 2x3", (2, 4))
class FlipAdd(Net):
    """x + flip(x): pairs may be exchanged, and the two of a pair."""

    def build(self):
        self.a, self.out = L(4, 6), L(6, 2)

    def forward(self, x):
        h = self.a(x).relu()
        return self.out(h + h.flip(1))


@case("6", (2, 4))
class Roll(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(6, 2)

    def forward(self, x):
        return self.out(self.a(x).relu().roll(2, 1))


@case("6", (2, 4))
class ConstantIndex(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(6, 2)

    def forward(self, x):
        return self.out(self.a(x).relu()[:, [3, 1, 5, 0, 2, 4]])


@case("", (2, 4))
class Cumsum(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(6, 2)

    def forward(self, x):
        return self.out(self.a(x).cumsum(1))


@case("", (2, 4))
class Fft(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(4, 2)

    def forward(self, x):
        return self.out(torch.fft.rfft(self.a(x)).abs())


@case("6", (2, 4))
class SortedValues(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(6, 2)

    def forward(self, x):
        return self.out(self.a(x).sort(1).values)


@case("", (2, 4))
class ConstantDistinct(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(6, 2)

    def forward(self, x):
        return self.out(self.a(x) + torch.arange(6))


@case("4 2", (2, 4))
class ConstantEqual(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(6, 2)

    def forward(self, x):
        return self.out(self.a(x) * torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0, 1.0]))


@case("4 2", (2, 4))
class Buffers(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(6, 2)
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 1, 0, 1]), persistent=False)
        self.register_buffer("scale", torch.rand(6))

    def forward(self, x):
        return self.out(self.a(x) * self.mask * self.scale)


@case("6", (2, 4))
class Siamese(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(6, 2)

    def forward(self, x):
        return self.out((self.a(x) - self.a(x.flip(0))).abs())


@case("6", (2, 4))
class ModuleTwice(Net):
    def build(self):
        self.inp, self.a, self.out = L(4, 6), L(6, 6), L(6, 2)

    def forward(self, x):
        return self.out(self.a(self.a(self.inp(x)).relu()).relu())


@case("6", torch.tensor([[1, 2, 0], [3, 3, 4]]))
class TiedEmbedding(Net):
    def build(self):
        self.e, self.a, self.head = nn.Embedding(5, 6), L(6, 6), L(6, 5, bias=False)
        self.head.weight = self.e.weight

    def forward(self, x):
        h = self.e(x)
        return self.head(h + self.a(h).relu())


@case("6", (3, 4))
class Functional(Net):
    def build(self):
        self.w, self.b, self.v = (nn.Parameter(torch.randn(s)) for s in ((4, 6), (6,), (2, 6)))

    def forward(self, x):
        return torch.einsum("bi,ij->bj", x, self.w).add(self.b).relu() @ self.v.T


@case("6", (3, 4))
class Transposed(Net):
    """W and its transpose."""

    def build(self):
        self.w = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return (x @ self.w).relu() @ self.w.T


@case("6", (3, 4))
class SquareTransposed(Net):
    def build(self):
        self.inp, self.out, self.w = L(4, 6), L(6, 2), nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        h = self.inp(x)
        return self.out((h @ self.w).relu() @ self.w.T + h @ (self.w + self.w.T))


@case("6 5", (3, 4))
class Bilinear(Net):
    def build(self):
        self.a, self.b, self.bi = L(4, 6), L(4, 5), nn.Bilinear(6, 5, 2)

    def forward(self, x):
        return self.bi(self.a(x).relu(), self.b(x).tanh())


@case("3 2", (3, 4))
class OuterProduct(Net):
    def build(self):
        self.a, self.b, self.out = L(4, 3), L(4, 2), L(6, 2)

    def forward(self, x):
        return self.out((self.a(x).relu()[:, :, None] * self.b(x).relu()[:, None, :]).flatten(1))


@case("3", (3, 4))
class OuterSquare(Net):
    """The units of an outer square overlap: each owns a row of it and a column."""

    def build(self):
        self.a, self.out = L(4, 3), L(9, 2)

    def forward(self, x):
        h = self.a(x).relu()
        return self.out(torch.einsum("bi,bj->bij", h, h).flatten(1))


@case("6", (3, 4))
class Gate(Net):
    def build(self):
        self.a, self.b, self.out = L(4, 6), L(4, 6), L(6, 2)

    def forward(self, x):
        return self.out(F.silu(self.a(x)) * self.b(x))


@case("5", (3, 4))
class GeGluChunk(Net):
    def build(self):
        self.a, self.out = L(4, 10), L(5, 2)

    def forward(self, x):
        a, b = self.a(x).chunk(2, -1)
        return self.out(a * F.gelu(b))


@case("6 3", (2, 3, 5, 5))
class SqueezeExcite(Net):
    def build(self):
        self.a, self.r, self.e, self.out = C2(3, 6, 1), C2(6, 3, 1), C2(3, 6, 1), C2(6, 2, 1)

    def forward(self, x):
        x = self.a(x).relu()
        s = self.e(self.r(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.out(x * s)


@case("5 3", (2, 3, 8, 8))
class UNet(Net):
    def build(self):
        self.a, self.b, self.out = C2(3, 5, 3, padding=1), C2(5, 3, 3, padding=1), C2(8, 2, 1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x):
        a = self.a(x).relu()
        b = self.up(self.b(F.max_pool2d(a, 2)).relu())
        return self.out(torch.cat([a, b], 1))


@case("6 2x6", (2, 4))
class Repeat(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(12, 2)

    def forward(self, x):
        return self.out(self.a(x).relu().repeat(1, 2))


@case("6 2x6", (2, 4))
class RepeatInterleave(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(12, 2)

    def forward(self, x):
        return self.out(self.a(x).relu().repeat_interleave(2, 1))


@case("6 2", (2, 4))
class StackSum(Net):
    def build(self):
        self.a, self.b, self.w, self.out = L(4, 6), L(4, 6), nn.Parameter(torch.randn(2)), L(6, 2)

    def forward(self, x):
        h = torch.stack([self.a(x).relu(), self.b(x).relu()], 1)
        return self.out((h * self.w[None, :, None].softmax(1)).sum(1))


CASES["StackSum"] = (CASES["StackSum"][0], CASES["StackSum"][1], "6")


@case("6", (2, 3, 7))
class Unfold(Net):
    def build(self):
        self.a, self.out = nn.Conv1d(3, 6, 1), L(18, 2)

    def forward(self, x):
        h = self.a(x).relu().unfold(2, 3, 2)
        return self.out(h.permute(0, 2, 1, 3).flatten(2))


@case("5", (2, 3, 6, 6))
class Im2col(Net):
    def build(self):
        self.a, self.out = C2(3, 5, 1), L(20, 2)

    def forward(self, x):
        return self.out(F.unfold(self.a(x).relu(), 2).transpose(1, 2))


@case("5", (2, 6, 6, 3))
class ChannelsLast(Net):
    def build(self):
        self.a, self.n, self.out = C2(3, 5, 2), nn.LayerNorm(5), L(5, 2)

    def forward(self, x):
        return self.out(self.n(self.a(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))


@case("8", (2, 4))
class Heads(Net):
    """Heads without mixing: reshaping alone ties nothing."""

    def build(self):
        self.a, self.out = L(4, 8), L(8, 2)

    def forward(self, x):
        return self.out(self.a(x).view(2, 2, 4).relu().flatten(1))


@case("2 4x2", (2, 4))
class HeadNorm(Net):
    def build(self):
        self.a, self.out = L(4, 8), L(8, 2)

    def forward(self, x):
        return self.out(F.normalize(self.a(x).view(2, 2, 4), dim=-1).flatten(1))


@case("2 4", (2, 4))
class HeadNormShared(Net):
    def build(self):
        self.a, self.n, self.out = L(4, 8), nn.LayerNorm(4), L(8, 2)

    def forward(self, x):
        return self.out(self.n(self.a(x).view(2, 2, 4)).flatten(1))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


class _Attention(Net):
    dim, heads, qk, val = 6, 2, 3, 4

    def build(self):
        h = self.heads
        self.inp, self.out = L(5, self.dim), L(self.dim, 2)
        self.q, self.k, self.v = L(self.dim, h * self.qk), L(self.dim, h * self.qk), L(self.dim, h * self.val)
        self.o = L(h * self.val, self.dim)

    def split(self, x, h):
        return x.view(*x.shape[:2], h, -1).transpose(1, 2)

    def merge(self, x):
        return x.transpose(1, 2).flatten(2)

    def forward(self, x):
        x = self.inp(x)
        q, k, v = (self.split(f(x), self.heads) for f in (self.q, self.k, self.v))
        return self.out(x + self.o(self.merge(self.attend(q, k, v))))

    def attend(self, q, k, v):
        return attend(q, k, v)


@case("6 2 3x2 4x2", (2, 7, 5))
class Attention(_Attention):
    pass


@case("6 2 3x2 4x2", (2, 7, 5))
class AttentionSdpa(_Attention):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


@case("6 2 3x2 4x2", (2, 7, 5))
class AttentionCausal(_Attention):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@case("6 2 4x2", (2, 7, 5))
class AttentionRope(_Attention):
    qk = 6

    def attend(self, q, k, v):
        t = torch.arange(7.0)[:, None] * (10000 ** (-torch.arange(3) / 3))[None]
        cos, sin = torch.cat([t, t], 1).cos(), torch.cat([t, t], 1).sin()
        turn = lambda x: x * cos + torch.cat([-x[..., 3:], x[..., :3]], -1) * sin  # noqa: E731
        return attend(turn(q), turn(k), v)


@case("6 2 3x2 4x2", (2, 7, 5))
class AttentionLinear(_Attention):
    def attend(self, q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return q @ (k.transpose(-1, -2) @ v) / (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)


@case("6 2 3 4x2", (2, 7, 5))
class AttentionQKNorm(_Attention):
    def build(self):
        super().build()
        self.nq, self.nk = nn.LayerNorm(3), nn.LayerNorm(3)

    def attend(self, q, k, v):
        return attend(self.nq(q), self.nk(k), v)


@case("6 2 3x2 4x2", (2, 7, 5))
class AttentionHeadScale(_Attention):
    def build(self):
        super().build()
        self.tau = nn.Parameter(torch.ones(2, 1, 1))

    def attend(self, q, k, v):
        return (q @ k.transpose(-1, -2) * self.tau).softmax(-1) @ v


@case("6 3x2 4x2", (2, 7, 5))
class AttentionAlibi(_Attention):
    def attend(self, q, k, v):
        slope = torch.tensor([0.5, 0.25])[:, None, None]
        bias = -(torch.arange(7)[:, None] - torch.arange(7)[None]).abs() * slope
        return (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v


@case("6 2 3x2 4x2", (2, 7, 5))
class AttentionRelativeBias(_Attention):
    def build(self):
        super().build()
        self.table = nn.Parameter(torch.randn(13, 2))
        self.register_buffer("index", torch.arange(7)[:, None] - torch.arange(7)[None] + 6)

    def attend(self, q, k, v):
        bias = self.table[self.index.view(-1)].view(7, 7, 2).permute(2, 0, 1)
        return (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v


@case("6 2 2 3x2 4x2", (2, 7, 5))
class AttentionTalking(_Attention):
    """Talking heads: the mixing separates the heads of the scores from those of the values."""

    def build(self):
        super().build()
        self.mix = nn.Parameter(torch.randn(2, 2))

    def attend(self, q, k, v):
        s = torch.einsum("bhqk,hg->bgqk", q @ k.transpose(-1, -2), self.mix)
        return s.softmax(-1) @ v


@case("6 2 3x2 4x2", (2, 7, 5), (2, 4, 5))
class AttentionCross(_Attention):
    def forward(self, x, y):
        x, y = self.inp(x), self.inp(y)
        q, k, v = self.split(self.q(x), 2), self.split(self.k(y), 2), self.split(self.v(y), 2)
        return self.out(x + self.o(self.merge(attend(q, k, v))))


class _Fused(_Attention):
    def build(self):
        self.inp, self.out, self.qkv, self.o = L(5, 6), L(6, 2), L(6, 24), L(8, 6)


@case("6 2 4x4", (2, 7, 5))
class FusedThreeHeadDim(_Fused):
    def forward(self, x):
        x = self.inp(x)
        q, k, v = self.qkv(x).reshape(2, 7, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return self.out(x + self.o(self.merge(attend(q, k, v))))


@case("6 2 4x4", (2, 7, 5))
class FusedHeadThreeDim(_Fused):
    def forward(self, x):
        x = self.inp(x)
        q, k, v = self.qkv(x).reshape(2, 7, 2, 3, 4).permute(3, 0, 2, 1, 4).unbind(0)
        return self.out(x + self.o(self.merge(attend(q, k, v))))


@case("6 2 4x4", (2, 7, 5))
class FusedHeadChunk(_Fused):
    def forward(self, x):
        x = self.inp(x)
        q, k, v = self.qkv(x).view(2, 7, 2, 12).transpose(1, 2).chunk(3, -1)
        return self.out(x + self.o(self.merge(attend(q, k, v))))


@case("6 2 4x4", (2, 7, 5))
class FusedChunk(_Fused):
    def forward(self, x):
        x = self.inp(x)
        q, k, v = (self.split(t, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(x + self.o(self.merge(attend(q, k, v))))


@case("6 2 4x4", (2, 7, 5))
class FusedDimHead(_Fused):
    """The head index runs fastest."""

    def forward(self, x):
        x = self.inp(x)
        q, k, v = (t.view(2, 7, 4, 2).permute(0, 3, 1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(x + self.o(attend(q, k, v).permute(0, 2, 3, 1).flatten(2)))


@case("8 2 4x4", (2, 7, 5))
class MultiheadAttention(Net):
    def build(self):
        self.inp, self.out, self.a = L(5, 8), L(8, 2), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.inp(x)
        return self.out(x + self.a(x, x, x, need_weights=False)[0])


class _Grouped(Net):
    """Grouped queries: 2 key-value heads of 3, each read by 2 query heads; values of 4."""

    def build(self):
        self.inp, self.out = L(5, 7), L(7, 2)
        self.q, self.k, self.v, self.o = L(7, 12), L(7, 6), L(7, 8), L(16, 7)

    def forward(self, x):
        x = self.inp(x)
        q = self.q(x).view(2, 6, 4, 3).transpose(1, 2)
        k = self.k(x).view(2, 6, 2, 3).transpose(1, 2)
        v = self.v(x).view(2, 6, 2, 4).transpose(1, 2)
        return self.out(x + self.o(self.attend(q, k, v).transpose(1, 2).flatten(2)))


@case("7 2 2x2 3x2 4x2", (2, 6, 5))
class GroupedQueryRepeat(_Grouped):
    def attend(self, q, k, v):
        return attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


@case("7 2 2x2 3x2 4x2", (2, 6, 5))
class GroupedQueryExpand(_Grouped):
    def attend(self, q, k, v):
        k, v = (t[:, :, None].expand(2, 2, 2, 6, t.shape[-1]).reshape(2, 4, 6, -1) for t in (k, v))
        return attend(q, k, v)


@case("7 2 2x2 3x2 4x2", (2, 6, 5))
class GroupedQuerySdpa(_Grouped):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@case("6 5", (2, 7, 4))
class Lstm(Net):
    def build(self):
        self.r, self.out, self.inp = nn.LSTM(6, 5, batch_first=True), L(5, 2), L(4, 6)

    def forward(self, x):
        return self.out(self.r(self.inp(x))[0])


@case("5 3", (2, 4, 4))
class LstmLayers(Net):
    def build(self):
        self.r, self.out = nn.LSTM(4, 5, 2, batch_first=True, proj_size=3), L(3, 2)

    def forward(self, x):
        return self.out(self.r(x)[0])


CASES["LstmLayers"] = (CASES["LstmLayers"][0], CASES["LstmLayers"][1], "5x2 3x2")


@case("5x2", (2, 4, 4))
class LstmBidirectional(Net):
    def build(self):
        self.r, self.out = nn.LSTM(4, 5, batch_first=True, bidirectional=True), L(10, 2)

    def forward(self, x):
        return self.out(self.r(x)[0])


@case("5x4", (2, 4, 4))
class GruBidirectional(Net):
    def build(self):
        self.r, self.out = nn.GRU(4, 5, 2, batch_first=True, bidirectional=True), L(10, 2)

    def forward(self, x):
        return self.out(self.r(x)[0])


@case("5", (2, 4, 4))
class GruBidirectionalSum(Net):
    def build(self):
        self.r, self.out = nn.GRU(4, 5, batch_first=True, bidirectional=True), L(5, 2)

    def forward(self, x):
        h = self.r(x)[0]
        return self.out(h[..., :5] + h[..., 5:])


@case("5", (4, 2, 4))
class Rnn(Net):
    def build(self):
        self.r, self.out = nn.RNN(4, 5), L(5, 2)

    def forward(self, x):
        return self.out(self.r(x)[1][-1])


@case("5", (2, 4, 4))
class LstmCell(Net):
    def build(self):
        self.r, self.out = nn.LSTMCell(4, 5), L(5, 2)

    def forward(self, x):
        h = c = torch.zeros(2, 5)
        for t in range(3):
            h, c = self.r(x[:, t], (h, c))
        return self.out(h)


@case("4 6x4 5x2", (3, 2))
class Experts(Net):
    """Dense mixture: batched expert weights and a router."""

    def build(self):
        self.inp, self.r, self.out = L(2, 5), L(5, 4), L(5, 2)
        self.a, self.ba, self.b = (nn.Parameter(torch.randn(s)) for s in ((4, 5, 6), (4, 6), (4, 6, 5)))

    def forward(self, x):
        x = self.inp(x)
        gate = self.r(x).softmax(-1)
        h = (torch.einsum("bd,edh->beh", x, self.a) + self.ba).relu()
        return self.out(torch.einsum("beh,ehd,be->bd", h, self.b, gate))


@case("4 6x4 5x2", (3, 2))
class ExpertsBmm(Net):
    def build(self):
        self.inp, self.r, self.out = L(2, 5), L(5, 4), L(5, 2)
        self.a, self.b = nn.Parameter(torch.randn(4, 5, 6)), nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, x):
        x = self.inp(x)
        h = torch.bmm(x.expand(4, 3, 5), self.a).relu()
        y = torch.bmm(h, self.b) * self.r(x).softmax(-1).T[..., None]
        return self.out(y.sum(0))


@case("5x2 6x3", (3, 2))
class ExpertsList(Net):
    """Experts as modules: their hidden units are free; whole experts are other parameters."""

    def build(self):
        self.inp, self.r, self.out = L(2, 5), L(5, 3), L(5, 2)
        self.e = nn.ModuleList(nn.Sequential(L(5, 6), R(), L(6, 5)) for _ in range(3))

    def forward(self, x):
        x = self.inp(x)
        g = self.r(x).softmax(-1)
        return self.out(sum(g[:, i : i + 1] * e(x) for i, e in enumerate(self.e)))


@case("8 3 6", (2, 10, 4))
class Mamba(Net):
    """A selective state-space block: inner channels, dt rank, state."""

    def build(self):
        d, self.n, self.rank = 6, 3, 2
        self.inp, self.out = L(4, 8), L(8, 2)
        self.proj, self.conv, self.o = (
            L(8, 2 * d, bias=False),
            nn.Conv1d(d, d, 3, groups=d, padding=2),
            L(d, 8, bias=False),
        )
        self.x, self.dt = L(d, self.rank + 2 * self.n, bias=False), L(self.rank, d)
        self.a, self.skip = nn.Parameter(torch.randn(d, self.n)), nn.Parameter(torch.randn(d))

    def forward(self, u):
        x = self.inp(u)
        h, z = self.proj(x).chunk(2, -1)
        h = F.silu(self.conv(h.transpose(1, 2))[..., :10]).transpose(1, 2)
        dt, b, c = self.x(h).split([self.rank, self.n, self.n], -1)
        dt = F.softplus(self.dt(dt))
        state, ys = torch.zeros(2, 6, self.n), []
        for t in range(10):
            state = torch.exp(dt[:, t, :, None] * self.a) * state + dt[:, t, :, None] * b[:, t, None] * h[:, t, :, None]
            ys.append((state * c[:, t, None]).sum(-1))
        y = (torch.stack(ys, 1) + h * self.skip) * F.silu(z)
        return self.out(x + self.o(y))


CASES["Mamba"] = (CASES["Mamba"][0], CASES["Mamba"][1], "8 3 6 2")


@case("6 5 7", (2, 4, 3))
class Mixer(Net):
    """Token mixing: hidden units of both mixing directions; tokens are input positions."""

    def build(self):
        self.inp, self.t1, self.t2, self.c1, self.c2, self.out = L(3, 6), L(4, 5), L(5, 4), L(6, 7), L(7, 6), L(6, 2)

    def forward(self, x):
        x = self.inp(x)
        x = x + self.t2(self.t1(x.transpose(1, 2)).relu()).transpose(1, 2)
        x = x + self.c2(self.c1(x).relu())
        return self.out(x.mean(1))


@case("6", (2, 4, 3))
class PositionTable(Net):
    def build(self):
        self.inp, self.out = L(3, 6), L(6, 2)
        self.p, self.cls = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x):
        x = torch.cat([self.cls.expand(2, -1, -1), self.inp(x)], 1) + self.p
        return self.out(x[:, 0])


@case("5", (2, 3, 6, 6))
class PositionFlat(Net):
    """A table over the flattened channels and pixels."""

    def build(self):
        self.a, self.p, self.out = C2(3, 5, 3), nn.Parameter(torch.randn(80)), L(80, 2)

    def forward(self, x):
        return self.out(self.a(x).flatten(1) + self.p)


@case("4 5 3", (2, 4, 3))
class Queries(Net):
    """Learned queries (Perceiver, DETR) are interchangeable when their outputs are averaged."""

    def build(self):
        self.q, self.k, self.v, self.out = nn.Parameter(torch.randn(4, 5)), L(3, 5), L(3, 3), L(3, 2)

    def forward(self, x):
        return self.out(attend(self.q.expand(2, 4, 5), self.k(x), self.v(x)).mean(1))


@case("5 3", (2, 4, 3))
class RmsNorm(Net):
    def build(self):
        self.inp, self.n, self.a, self.b, self.out = L(3, 5), nn.RMSNorm(5), L(5, 3), L(3, 5), L(5, 2)

    def forward(self, x):
        x = self.inp(x)
        return self.out(x + self.b(self.a(self.n(x)).relu()))


@case("6", (2, 4))
class InPlace(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(6, 2)

    def forward(self, x):
        h = self.a(x)
        h += 1
        h.relu_().mul_(2)
        return self.out(h)


@case("4 2", (2, 4))
class InPlaceSlice(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(6, 2)

    def forward(self, x):
        h = self.a(x).relu()
        h[:, :2] *= 3
        return self.out(h)


@case("6", (2, 4))
class ZeroThenFill(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(12, 2)

    def forward(self, x):
        buffer = torch.zeros(2, 12)
        buffer[:, ::2] = self.a(x).relu()
        return self.out(buffer)


CASES["ZeroThenFill"] = (CASES["ZeroThenFill"][0], CASES["ZeroThenFill"][1], "6x2")


@case("3 5", (2, 4))
class LowRank(Net):
    def build(self):
        self.a, self.out, self.u, self.v = (
            L(4, 5),
            L(5, 2),
            nn.Parameter(torch.randn(5, 3)),
            nn.Parameter(torch.randn(3, 4)),
        )

    def forward(self, x):
        return self.out(self.a(x).relu() + x @ (self.u @ self.v).T)


@case("5 3", (2, 4))
class HyperNetwork(Net):
    """Weights computed from parameters."""

    def build(self):
        self.z, self.h, self.out = nn.Parameter(torch.randn(3)), L(3, 20), L(5, 2)

    def forward(self, x):
        return self.out((x @ self.h(self.z).view(5, 4).T).relu())


@case("5", (2, 3, 4, 4))
class DynamicConvolution(Net):
    def build(self):
        self.a, self.w, self.g, self.out = C2(3, 5, 1), nn.Parameter(torch.randn(3, 2, 5, 3, 3)), L(5, 3), None

    def forward(self, x):
        x = self.a(x).relu()
        gate = self.g(x.mean((2, 3))).softmax(-1)
        w = torch.einsum("bk,koihw->boihw", gate, self.w)
        out = F.conv2d(x.reshape(1, 10, 4, 4), w.reshape(4, 5, 3, 3), groups=2)
        return out.view(2, 2, 2, 2)


CASES["DynamicConvolution"] = (CASES["DynamicConvolution"][0], CASES["DynamicConvolution"][1], "5 3")


@case("6", (2, 4))
class CustomFunction(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(6, 2)

    def forward(self, x):
        return self.out(_Square.apply(self.a(x)))


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, g):
        return g


@case("6", (2, 4))
class DataDependent(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(6, 2)

    def forward(self, x):
        h = self.a(x)
        if h.sum().item() > 1e9:
            h = h.cumsum(1)
        return {"out": self.out(h.relu()), "parts": [h.sum()]}


@case("5 4x5", (2, 3))
class WreathDeep(Net):
    """Groups of a grouped layer inside groups."""

    def build(self):
        self.a, self.b, self.out = nn.Conv1d(3, 20, 1), nn.Conv1d(20, 5, 1, groups=5), nn.Conv1d(5, 2, 1)

    def forward(self, x):
        return self.out(self.b(self.a(x[..., None]).relu()).relu())


@case("6", (2, 4))
class Maximum(Net):
    def build(self):
        self.a, self.b, self.out = L(4, 6), L(4, 6), L(6, 2)

    def forward(self, x):
        return self.out(torch.maximum(self.a(x), self.b(x)))


@case("3 2x3", (2, 4))
class Maxout(Net):
    def build(self):
        self.a, self.out = L(4, 6), L(3, 2)

    def forward(self, x):
        return self.out(self.a(x).view(2, 3, 2).amax(-1))


@case("3 2", (2, 4))
class MaxoutShared(Net):
    def build(self):
        self.a, self.b, self.out = L(4, 6), nn.Parameter(torch.randn(2)), L(3, 2)

    def forward(self, x):
        return self.out((self.a(x).view(2, 3, 2) * self.b).amax(-1))


@case("6", (2, 4))
class UnusedBranch(Net):
    def build(self):
        self.a, self.b, self.out = L(4, 6), L(6, 3), L(6, 2)

    def forward(self, x):
        h = self.a(x)
        self.b(h).cumsum(1)
        h.cumsum(1)
        return self.out(h)
