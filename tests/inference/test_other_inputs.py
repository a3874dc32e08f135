"""Groups found on an example must hold on every other input: longer ones, other batches, other random draws.

The examples are chosen so that they hide something: sequences of one (all distances are 0), layers of which a short input
uses a few outputs, inputs that are filled up with zeros, tensors without entries.
"""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge import TraceError, canonicalise, infer, verify
from automerge._subject import Fresh, _may_index, fresh_inputs, runnable
from automerge.testing import assert_sound
from tests.inference.networks_hostile import Program
from tests.inference.test_networks import parse, worst_change

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], list[tuple[Any, ...]], str]] = {}
KNOWN = torch.Generator().manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=KNOWN)


def lin(i: int, o: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o)


def par(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(*shape) * 0.5)


def add(
    name: str, sizes: str, args: tuple[Any, ...], others: list[tuple[Any, ...]], forward: Any, **parts: Any
) -> None:
    """``args`` are the example, ``others`` what the groups must hold on, too."""
    assert name not in CASES, name
    CASES[name] = (lambda: Program(forward, parts), args, others, sizes)


ROWS, MORE_ROWS = (draw(3, 4),), [(draw(5, 4),), (draw(1, 4),)]
ONE, LONGER = (draw(2, 1, 5),), [(draw(2, 4, 5),), (draw(1, 9, 5),)]
SHORT, LONG = (draw(2, 3, 5),), [(draw(2, 6, 5),), (draw(1, 8, 5),)]
QKVO: dict[str, Any] = {"q": lin(5, 12), "k": lin(5, 12), "v": lin(5, 12), "out": lin(12, 2)}
HEADS = "3x8"  # four heads that differ; in each, three dimensions of query and key and three of the value


def attend(s: Any, x: torch.Tensor, change: Callable[..., torch.Tensor], heads: int = 4) -> torch.Tensor:
    """Attention whose scores (given with the length) are changed before the softmax."""
    q, k, v = (f(x).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (s.q, s.k, s.v))
    return s.out((change(q @ k.mT, x.shape[1]).softmax(-1) @ v).transpose(1, 2).flatten(2))


# ------------------------------------------------------------ constants that are equal only in a sequence of one
SLOPES = 2.0 ** -torch.arange(1, 5)
FREQUENCIES = torch.tensor([1.0, 0.5, 0.25, 0.1, 0.05, 0.01])
DISTANCES = torch.arange(16)[None] - torch.arange(16)[:, None]
ALIBI = SLOPES[:, None, None] * DISTANCES
ANGLES = torch.outer(torch.arange(16.0), torch.tensor([1.0, 0.1])).repeat(1, 2)
WAVES = torch.outer(torch.arange(16.0), FREQUENCIES).sin()


def distances(n: int) -> torch.Tensor:
    return torch.arange(n)[None] - torch.arange(n)[:, None]


def rotated(h: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    return h * angles.cos() + torch.cat([-h[..., 2:], h[..., :2]], -1) * angles.sin()


def rope(angles: Callable[[int], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (s.q, s.k, s.v))
        scores = rotated(q, angles(n)) @ rotated(k, angles(n)).mT
        return s.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    return forward


add(
    "Alibi",
    HEADS,
    ONE,
    LONGER,
    lambda s, x: attend(s, x, lambda a, n: a + SLOPES[:, None, None] * distances(n)),
    **QKVO,
)
add("AlibiTable", HEADS, ONE, LONGER, lambda s, x: attend(s, x, lambda a, n: a + ALIBI[:, :n, :n]), **QKVO)
add(
    "Decay",
    HEADS,
    ONE,
    LONGER,
    lambda s, x: attend(s, x, lambda a, n: a * SLOPES[:, None, None] ** distances(n).abs()),
    **QKVO,
)
add(
    "WindowsOfHeads",  # all reach over the whole of a short sequence
    HEADS,
    (draw(2, 2, 5),),
    [(draw(2, 7, 5),)],
    lambda s, x: attend(
        s, x, lambda a, n: a.masked_fill(distances(n).abs() >= torch.tensor([2, 3, 4, 5])[:, None, None], -1e9)
    ),
    **QKVO,
)
_rope = {"q": lin(5, 8), "k": lin(5, 8), "v": lin(5, 8), "out": lin(8, 2)}
add("Rope", "2 4x2", ONE, LONGER, rope(lambda n: torch.outer(torch.arange(float(n)), ANGLES[1])), **_rope)
add("RopeTable", "2 4x2", ONE, LONGER, rope(lambda n: ANGLES[:n]), **_rope)
_waves = {"inp": lin(5, 6), "out": lin(6, 2)}
for _name, _read in {
    "computed": lambda n: (torch.arange(float(n))[:, None] * FREQUENCIES).sin(),
    "product": lambda n: (torch.arange(n).to(FREQUENCIES)[:, None] @ FREQUENCIES[None]).sin(),
    "slice": lambda n: WAVES[:n],
    "index": lambda n: WAVES[torch.arange(n)],
    "embedding": lambda n: F.embedding(torch.arange(n), WAVES),
    "gather": lambda n: WAVES.repeat(2, 1, 1).gather(1, torch.arange(n)[None, :, None].expand(2, -1, 6))[0],
    "one by one": lambda n: torch.stack([WAVES[t] for t in range(n)]),
    "last": lambda n: FREQUENCIES * (n - 1),
    "rounded": lambda n: (torch.arange(float(n))[:, None] * FREQUENCIES).cos().bfloat16(),
    "small angles": lambda n: (torch.arange(float(n))[:, None] * FREQUENCIES * 1e-4).float().cos(),
}.items():
    add(
        f"Waves, {_name}",
        "",
        ONE,
        LONGER,
        lambda s, x, read=_read: s.out((s.inp(x) + read(x.shape[1])).relu()),
        **_waves,
    )
add("PowerOfLength", "", ONE, LONGER, lambda s, x: s.out(s.inp(x).relu() * FREQUENCIES ** (x.shape[1] - 1)), **_waves)
# ... and masks that are meant to be equal: one row of a table for every layer
MASKS = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1]])
add(
    "MasksOfLayers",
    "3x4",
    ROWS,
    MORE_ROWS,
    lambda s, x: s.out(s.b(s.a(x).relu() * MASKS[0]).relu() * MASKS[1]),
    a=lin(4, 6),
    b=lin(6, 6),
    out=lin(6, 2),
)

# ------------------------------------------------------------ layers of which a short input uses a part
_scores = {"inp": lin(5, 6), "w": lin(6, 12), "v": lin(5, 7), "out": lin(7, 2)}
add(
    "Synthesizer",
    "6 7",
    SHORT,
    LONG,
    lambda s, x: s.out(s.w(s.inp(x).relu())[..., : x.shape[1]].softmax(-1) @ s.v(x)),
    **_scores,
)
add(
    "SynthesizerPieces",
    "6 7",
    SHORT,
    LONG,
    lambda s, x: s.out(s.w(s.inp(x).relu()).split([x.shape[1], 12 - x.shape[1]], -1)[0].softmax(-1) @ s.v(x)),
    **_scores,
)
add(
    "ScoresOfTheMean",
    "6 7",
    SHORT,
    LONG,
    lambda s, x: s.out(s.w(s.inp(x).relu()).tanh().mean(1)[:, : x.shape[1]].softmax(-1)[:, None] @ s.v(x)),
    **_scores,
)
add(
    "KernelByLength",
    "6",
    (draw(2, 3, 8), draw(2, 4)),
    [(draw(2, 5, 8), draw(2, 4))],
    lambda s, x, z: torch.einsum("btf,bft->bf", x, s.b(s.a(z).relu()).view(2, 8, 10)[:, :, : x.shape[1]]),
    a=lin(4, 6),
    b=lin(6, 80),
)
add(
    "FiltersByLength",
    "6",
    (draw(2, 5, 3),),
    [(draw(2, 5, 7),)],
    lambda s, x: s.out(s.c(s.inp(x).relu())[:, : x.shape[2]].softmax(1).mT @ x.mT),
    inp=lambda: nn.Conv1d(5, 6, 1),
    c=lambda: nn.Conv1d(6, 9, 1),
    out=lin(5, 2),
)
add("DeadOutputs", "6", ROWS, MORE_ROWS, lambda s, x: s.out(s.inp(x).relu()[:, :6]), inp=lin(4, 10), out=lin(6, 2))
# ... and an index that depends on data cuts nothing
add(
    "PaddedVocabulary",
    "8",
    (torch.tensor([[1, 2, 3]]),),
    [(torch.tensor([[4, 5], [0, 12]]),)],
    lambda s, x: s.out(s.e(x))[..., :13],
    e=lambda: nn.Embedding(13, 8),
    out=lin(8, 16),
)


# ------------------------------------------------------------ inputs filled up to a fixed length
def zeros_behind(h: torch.Tensor, n: int) -> torch.Tensor:
    return torch.cat([h, h.new_zeros(h.shape[0], n - h.shape[1], h.shape[2])], 1)


def in_a_buffer(h: torch.Tensor, n: int) -> torch.Tensor:
    buffer = h.new_zeros(h.shape[0], n, h.shape[2])
    buffer[:, : h.shape[1]] = h
    return buffer


FILL: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "padded": lambda h, n: F.pad(h, (0, 0, 0, n - h.shape[1])),
    "padded in front": lambda h, n: F.pad(h, (0, 0, n - h.shape[1], 0)),
    "padded unequally": lambda h, n: F.pad(h, (0, 0, 1, n - h.shape[1] - 1)),
    "joined": zeros_behind,
    "written": in_a_buffer,
    "padded flat": lambda h, n: F.pad(h.flatten(1), (0, (n - h.shape[1]) * h.shape[2])).view(-1, n, h.shape[2]),
}
_mix = {"inp": lin(5, 6), "mix": par(10, 4), "out": lin(6, 2)}
for (_name, _fill), _x in itertools.product(FILL.items(), (SHORT, ONE)):
    if _name == "padded flat":
        continue
    add(
        f"Tokens {_name} from {_x[0].shape[1]}",
        "6",
        _x,
        LONG,
        lambda s, x, fill=_fill: s.out((fill(s.inp(x).relu(), 10).mT @ s.mix).mT.tanh()),
        **_mix,
    )
    add(
        f"Input {_name} from {_x[0].shape[1]}",
        "6",
        _x,
        LONG,
        lambda s, x, fill=_fill: s.out(s.inp(fill(x, 10).flatten(1)).relu()),
        inp=lin(50, 6),
        out=lin(6, 2),
    )
add(  # where the features of later tokens are is not known, so the features stay as well
    "Tokens padded flat",
    "",
    SHORT,
    LONG,
    lambda s, x: s.out(F.pad(s.inp(x).relu().flatten(1), (0, 48 - 6 * x.shape[1]))),
    inp=lin(5, 6),
    out=lin(48, 2),
)
add(
    "TableOverPadding",
    "6",
    SHORT,
    LONG,
    lambda s, x: s.out((FILL["padded"](s.inp(x), 10) + s.table).tanh().mean(1)),
    inp=lin(5, 6),
    table=par(10, 6),
    out=lin(6, 2),
)
# ... channels filled up with zeros are exchangeable, on one side or on both
add(
    "ChannelsFilledUp",
    "5 6",
    ROWS,
    MORE_ROWS,
    lambda s, x: s.out(F.pad(s.inp(x).relu(), (2, 3)) + s.c(x)),
    inp=lin(4, 6),
    c=lin(4, 11),
    out=lin(11, 2),
)

# ------------------------------------------------------------ random numbers are drawn anew
for _name, _sizes, _draw in (
    ("mask", "", lambda h: h * (torch.rand(8) < 0.5)),
    ("bernoulli", "", lambda h: h * torch.bernoulli(torch.full((8,), 0.5))),
    ("in place", "", lambda h: h * torch.empty(8).bernoulli_(0.5)),
    ("order", "", lambda h: h[:, torch.randperm(8)]),
    ("places", "", lambda h: h[:, torch.randint(0, 8, (8,))]),
    ("scale", "8", lambda h: h * torch.rand(1)),
):
    add(
        f"Random {_name}",
        _sizes,
        ROWS,
        MORE_ROWS,
        lambda s, x, f=_draw: s.out(f(s.inp(x).relu())),
        inp=lin(4, 8),
        out=lin(8, 2),
    )

# ------------------------------------------------------------ tensors without entries show nothing
add(
    "NoBoxes",  # with some, their layers are reached, too
    "5 6",
    (draw(3, 4), draw(0, 4)),
    [(draw(3, 4), draw(2, 4))],
    lambda s, x, b: (s.out(s.inp(x).relu()), s.out_b(s.inp_b(b).relu())),
    inp=lin(4, 6),
    out=lin(6, 2),
    inp_b=lin(4, 5),
    out_b=lin(5, 2),
)


def _experts(s: Any, x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape[0], 2, dtype=x.dtype)
    for e in range(3):
        rows = ((x[:, 0] > 99).long() == e).nonzero()[:, 0]  # all go to the first
        out = out.index_add(0, rows, s.down[e](s.up[e](x[rows]).relu()))
    return out


add(
    "ExpertsWithoutTokens",
    "6x3",
    ROWS,
    MORE_ROWS,
    _experts,
    up=lambda: nn.ModuleList(nn.Linear(4, 6) for _ in range(3)),
    down=lambda: nn.ModuleList(nn.Linear(6, 2) for _ in range(3)),
)

# ------------------------------------------------------------ writes along a diagonal
add(  # the rows of the second index are those of the first: neither axis is constant
    "DiagonalWritten",
    "6",
    ROWS,
    MORE_ROWS,
    lambda s, x: s.out((s.inp(x) @ s.w.index_put((torch.arange(6), torch.arange(6)), s.d)).relu()),
    inp=lin(4, 6),
    w=par(6, 6),
    d=par(6),
    out=lin(6, 2),
)
add(
    "DiagonalAdded",
    "6",
    ROWS,
    MORE_ROWS,
    lambda s, x: s.out((s.inp(x) @ s.w.index_put((torch.arange(6), torch.arange(6)), s.d, accumulate=True)).relu()),
    inp=lin(4, 6),
    w=par(6, 6),
    d=par(6),
    out=lin(6, 2),
)
add(
    "DiagonalOfRows",
    "3 6",
    ROWS,
    MORE_ROWS,
    lambda s, x: s.out(
        torch.einsum("bi,iok->bo", s.inp(x), s.w.index_put((torch.arange(6), torch.arange(6)), s.d)).relu()
    ),
    inp=lin(4, 6),
    w=par(6, 6, 3),
    d=par(6, 3),
    out=lin(6, 2),
)


# ------------------------------------------------------------ constants whose values do not tell what they were made from
_stack = {"q": lin(5, 12), "k": lin(5, 12), "v": lin(5, 12), "out": lin(12, 2)}
for _name, _bias, _x in (
    ("lists", lambda n: torch.tensor([[[-(2.0**-h) * abs(i - j) for j in range(n)] for i in range(n)] for h in range(4)]), ONE),
    ("stacked", lambda n: torch.stack([distances(n).abs() * 2.0**-h for h in range(4)]), ONE),
    ("triangle", lambda n: SLOPES[:, None, None].expand(4, n, n).tril(-1), ONE),
    ("off the diagonal", lambda n: torch.where(torch.eye(n, dtype=torch.bool), 0.0, SLOPES[:, None, None]), ONE),
    ("windows", lambda n: torch.stack([torch.where(distances(n).abs() < w, 0.0, -1e9) for w in (2, 3, 4, 5)]), SHORT),
    ("dilated", lambda n: torch.stack([torch.where(distances(n) % w == 0, 0.0, -1e9) for w in (2, 3, 4, 5)]), (draw(2, 2, 5),)),
):  # fmt: skip
    add(
        f"Biases of heads, {_name}",
        HEADS,
        _x,
        LONGER,
        lambda s, x, bias=_bias: attend(s, x, lambda a, n: a + bias(n)),
        **_stack,
    )


def _table(n: int) -> torch.Tensor:
    return torch.tensor([[math.cos(t * float(f)) for f in FREQUENCIES] for t in range(n)])


def _entry_by_entry(n: int) -> torch.Tensor:
    table = torch.zeros(n, 6)
    for t, c in itertools.product(range(n), range(6)):
        table[t, c] = math.sin(t * float(FREQUENCIES[c]))
    return table


for _name, _read in {"lists": _table, "entry by entry": _entry_by_entry}.items():
    add(
        f"Waves from {_name}",
        "",
        ONE,
        LONGER,
        lambda s, x, read=_read: s.out((s.inp(x) + read(x.shape[1]).to(x)).relu()),
        **_waves,
    )


# ------------------------------------------------------------ what happens beyond a length
def _shifted(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.inp(x)
    return s.out(torch.cat([F.pad(h[..., :3], (0, 0, 1, -1)), h[..., 3:]], -1))


add("TokenShift", "3x2", ONE, LONGER, _shifted, **_waves)  # longer inputs read what is shifted out
add(
    "FramesShifted",
    "2x3",
    (draw(2, 1, 5),),
    [(draw(2, 4, 5),)],
    lambda s, x: s.out(
        (lambda h: torch.cat([F.pad(h[:, 1:, :2], (0, 0, 0, 1)), F.pad(h[:, :-1, 2:4], (0, 0, 1, 0)), h[..., 4:]], -1))(
            s.inp(x)
        ).sum(1)
    ),
    **_waves,
)
add(
    "ChunksIfLong",
    "3x2",
    SHORT,
    LONG,
    lambda s, x: (lambda h: s.out(torch.cat([h[..., :3], h[..., 3:].flip(1)], -1) if x.shape[1] > 4 else h))(s.inp(x)),
    **_waves,
)


add(  # rows up to the length; on inputs of any other length, up to another one
    "TableMaskedByLength",
    "6",
    SHORT,
    [*LONG, (draw(2, 4, 5),), (draw(2, 2, 5),)],
    lambda s, x: s.out((s.table * (torch.arange(8) < x.shape[1])[:, None]).tanh().sum(0) + s.inp(x).mean(1)),
    table=par(8, 6),
    **_waves,
)


# ------------------------------------------------------------ ... of an input that has some later
def _messages(s: Any, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    h = s.inp(x).tanh()
    sent = torch.zeros_like(h).index_add(0, edges[1], s.send(h[edges[0]]))
    return s.out(s.near(sent) + h)


_EDGES = torch.tensor([[0, 1, 2, 2], [1, 0, 0, 1]])
add(
    "NoEdges",
    "6 6",
    (draw(3, 4), _EDGES[:, :0]),
    [(draw(3, 4), _EDGES)],
    _messages,
    inp=lin(4, 6),
    send=lin(6, 6),
    near=lin(6, 6),
    out=lin(6, 2),
)
add(
    "NoEdgesBetweenTwo",  # a mask of no edges
    "6 6",
    (draw(3, 4), _EDGES[:, :0]),
    [(draw(3, 4), _EDGES)],
    lambda s, x, e: _messages(s, x, e[:, e[0] != e[1]]),
    inp=lin(4, 6),
    send=lin(6, 6),
    near=lin(6, 6),
    out=lin(6, 2),
)


# ------------------------------------------------------------ an empty cache shows nothing of what is joined to it
def _cached(s: Any, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    q, k, v = (f(x).unflatten(-1, (4, 3)).transpose(1, 2) for f in (s.q, s.k, s.v))
    scores = q @ torch.cat([keys, k], 2).mT
    return s.out((scores.softmax(-1) @ torch.cat([values, v], 2)).transpose(1, 2).flatten(2))


_EMPTY = torch.zeros(2, 4, 0, 3)
add(
    "EmptyCache",
    "",
    (SHORT[0], _EMPTY, _EMPTY),
    [(draw(1, 4, 5), draw(1, 4, 6, 3), draw(1, 4, 6, 3))],
    _cached,
    **QKVO,
)

# ------------------------------------------------------------ a number for every row is no number for every unit
add("GainOfRows", "7", (draw(3, 4), draw(3, 1)), [(draw(2, 4), draw(2, 1))], lambda s, x, g: s.out(s.inp(x) * g),
    inp=lin(4, 7), out=lin(7, 2))  # fmt: skip


# ------------------------------------------------------------ values of parameters choose the path
def _gated(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.inp(x)
    return s.out(h if not s.gain.any() else h + s.gain * s.b(h).tanh())


add(
    "GainOfZero",  # as it is drawn: with weights that were trained the other path is taken
    "6",
    ROWS,
    MORE_ROWS,
    _gated,
    inp=lin(4, 6),
    b=lin(6, 6),
    gain=lambda: nn.Parameter(torch.zeros(6)),
    out=lin(6, 2),
)


def _routed(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.inp(x)
    best, which = s.gate(h).softmax(-1).max(-1)
    out = torch.zeros_like(h)
    for e, expert in enumerate(s.experts):
        rows = (which == e).nonzero()[:, 0]
        if len(rows):
            out = out.index_add(0, rows, expert(h[rows]) * best[rows, None])
    return s.out(h + out)


add(  # the example reaches one expert, longer inputs and other weights both
    "ExpertsOfOneToken",
    "5x2 6",
    (draw(1, 4),),
    [(draw(40, 4),)],
    _routed,
    inp=lin(4, 6),
    gate=lin(6, 2),
    experts=lambda: nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 6)) for _ in range(2)),
    out=lin(6, 2),
)


def _routed_in_one(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.inp(x)
    best, which = s.gate(h).softmax(-1).max(-1)
    out = torch.zeros_like(h)
    for e in range(3):
        (rows,) = torch.where(which == e)
        out = out.index_add(0, rows, F.silu(h[rows] @ s.up[e]) @ s.down[e] * best[rows, None])
    return s.out(h + out)


add(  # and so where the experts are parts of one tensor
    "StackedExpertsOfOneToken",
    "3 5x3 6",
    (draw(1, 4),),
    [(draw(40, 4),)],
    _routed_in_one,
    inp=lin(4, 6),
    gate=lin(6, 3),
    up=par(3, 6, 5),
    down=par(3, 5, 6),
    out=lin(6, 2),
)


def _recurrent(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = x.new_zeros(len(x), 6)
    for t in range(x.shape[1]):
        h = (h @ s.w).tanh() + s.inp(x[:, t])
    return s.out(h)


add("OneStep", "6", ONE, LONGER, _recurrent, w=par(6, 6), **_waves)


# ------------------------------------------------------------ as libraries do it
def _normalised(s: Any, x: torch.Tensor) -> torch.Tensor:
    """Scores of distances from a normalised table, of which a short sequence reads a few rows (DeBERTa's)."""
    rows = F.layer_norm(s.t, (8,), s.g, s.b)
    n = x.shape[1]
    scores = (s.q(x) @ rows.mT).gather(-1, (distances(n) + 16).expand(len(x), n, n))
    return s.out(scores.softmax(-1) @ s.v(x))


add(
    "NormalisedTable",
    "8 6",
    SHORT,
    LONG,
    _normalised,
    q=lin(5, 8),
    t=par(32, 8),
    g=par(8),
    b=par(8),
    v=lin(5, 6),
    out=lin(6, 2),
)
add(  # as many tokens of a phoneme as a duration says
    "RepeatedByCounts",
    "6",
    (draw(3, 4), torch.tensor([2, 1, 3])),
    [(draw(3, 4), torch.tensor([1, 1, 2])), (draw(4, 4), torch.tensor([1, 4, 2, 1]))],
    lambda s, x, n: s.out(s.inp(x).relu().repeat_interleave(n, 0) * s.inp(x)[torch.repeat_interleave(n)]),
    inp=lin(4, 6),
    out=lin(6, 2),
)


def _mixed_batch(s: Any, x: torch.Tensor) -> torch.Tensor:
    """Every head is scaled by one of the batch: as long as these are two, by the same one as the head after the next."""
    heads = torch.fft.ifft(torch.fft.fft(s.inp(x), dim=1).conj(), dim=1).real.unflatten(-1, (4, 3)).transpose(1, 2)
    heads = heads.flatten(0, 1) * x.mean((1, 2)).repeat(4)[:, None, None]
    return s.out(heads.unflatten(0, (len(x), 4)).transpose(1, 2).flatten(2))


add(
    "HeadsByBatch",
    "3x4",
    (draw(2, 4, 5),),
    [(draw(3, 4, 5),), (draw(10, 4, 5),)],
    _mixed_batch,
    inp=lin(5, 12),
    out=lin(12, 2),
)

add(  # of a constant that hides what it was made from, one of two outputs
    "LargestSlope",
    HEADS,
    ONE,
    LONGER,
    lambda s, x: attend(
        s, x, lambda a, n: a * (1 + (SLOPES[:, None, None] * distances(n)).max(-1).values[..., None]).exp()
    ),
    **QKVO,
)

add(  # a lookup on the first and the last axis
    "LookedUpApart",
    "6",
    (draw(3, 4, 5), torch.tensor([1, 2]), torch.tensor([3, 0])),
    [(draw(3, 6, 5), torch.tensor([2, 0, 1]), torch.tensor([1, 1, 3]))],
    lambda s, x, i, j: s.out(s.inp(x).relu().transpose(1, 2)[i, :, j]),
    inp=lin(5, 6),
    out=lin(6, 2),
)

add(  # of integers among the inputs
    "WholeParts",
    "6",
    (draw(3, 4), torch.tensor([[7], [8], [9]]), torch.tensor([[2], [3], [2]])),
    [(draw(4, 4), torch.tensor([[5], [6], [7], [9]]), torch.tensor([[2], [5], [1], [4]]))],
    lambda s, x, i, j: s.out(s.inp(x).relu()) * (i // (j + 1)),
    inp=lin(4, 6),
    out=lin(6, 2),
)


@pytest.mark.parametrize("name", CASES)
def test_the_groups_hold_on_other_inputs(name: str) -> None:
    factory, args, others, sizes = CASES[name]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return factory()

    symmetry = infer(make(), args)
    assert sorted(g.size for g in symmetry.generators()) == parse(sizes), str(symmetry)
    assert not symmetry.unruled
    for given in (args, *others):
        assert worst_change(make, given, {}, symmetry) < 1e-6


def test_what_nobody_reads_is_reported() -> None:
    factory, args, _, _ = CASES["Synthesizer"]
    symmetry = infer(factory(), args)
    assert any("do not read all of" in n and "w.weight (54 of 72 numbers)" in n for n in symmetry.notes)
    assert any(p.param == "w.weight" and p.axis == 0 and "not read" in p.reason for p in symmetry.pins)


class NoModule(types.SimpleNamespace):
    """An object that is none of PyTorch's."""


class Cached(nn.Module):
    """Appends to a cache of another library that comes with the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, cache: NoModule) -> torch.Tensor:
        k = self.k(x)
        cache.kept.append(k)
        k = cache.kept[0] = torch.cat(cache.kept, 1)
        cache.seen += 1
        return self.out((self.q(x) @ k.mT / cache.seen).softmax(-1) @ k)


def test_every_pass_has_a_cache_of_its_own() -> None:
    torch.manual_seed(0)
    kept = torch.ones(2, 3, 6)
    empty, full = NoModule(kept=[], seen=torch.tensor(0)), NoModule(kept=[kept], seen=torch.tensor(0))
    symmetry = infer(Cached(), (draw(2, 4, 5), empty))
    assert [g.size for g in symmetry.sets] == [6]
    assert not any("verified" in n for n in symmetry.notes)
    assert infer(Cached(), (draw(2, 4, 5), full)).sets == ()  # what was kept has an order
    assert (empty.kept, int(empty.seen)) == ([], 0)
    assert len(full.kept) == 1
    assert full.kept[0] is kept


def test_numbers_that_the_model_writes_to_are_not_those_of_the_inputs() -> None:
    def forward(s: Any, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        n += 1
        return s.out(s.inp(x).relu()) * n

    times = torch.arange(3)[:, None]
    symmetry = infer(Program(forward, {"inp": lin(4, 6), "out": lin(6, 2)}), (draw(3, 4), times))
    assert [g.size for g in symmetry.sets] == [6]
    assert not any("verified" in n for n in symmetry.notes)
    assert times.tolist() == [[0], [1], [2]]


class Table(nn.Module):
    """Categories, each column with a range of its own: they cannot be exchanged among columns."""

    SIZES = (3, 50, 7)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleList([nn.Embedding(n, 4) for n in self.SIZES])
        self.hidden = nn.Linear(12, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [embed(x[:, k]) for k, embed in enumerate(self.embed)]
        return self.head(torch.relu(self.hidden(torch.cat(parts, 1))))


def test_columns_of_a_table_keep_their_places_in_fresh_inputs() -> None:
    x = torch.stack([torch.arange(50) % n for n in Table.SIZES], 1)
    found = infer(Table(), x)
    assert not found.notes
    seen = verify(Table(), x, found)
    assert seen.randomised
    assert seen.inputs == 2
    states = [Table().state_dict() for _ in range(2)]
    _, report = canonicalise(Table(), x, states, found)
    assert report.error < 1e-9
    assert report.scalings


def _below(*ranges: int) -> Callable[[Any, Any], torch.Tensor]:
    def run(args: Any, kwargs: Any) -> torch.Tensor:
        if (args[-1] >= torch.tensor(ranges)).any() or (args[-1] < 0).any():
            raise IndexError("index out of range")
        return args[0].log() if len(args) > 1 else args[0].float()

    return run


CODES = torch.tensor([[0, 8], [2, 5], [1, 1]])


@pytest.mark.parametrize(
    ("run", "args", "how"),
    [
        (_below(9, 9), (CODES,), Fresh("new", "reversed")),
        (_below(3, 9), (CODES,), Fresh("new", "exchanged")),
        (_below(0, 0), (CODES,), Fresh("kept", "kept")),
        (_below(9, 9), (torch.ones(4), CODES), Fresh("positive", "reversed")),
        (_below(3, 9), (torch.ones(4), CODES), Fresh("positive", "exchanged")),
        (_below(3, 9), (CODES.double(),), Fresh("exchanged", "exchanged")),
        (_below(9, 9), (-torch.ones(4), CODES), Fresh("new", "reversed")),
        (_below(9), (), Fresh("new", "reversed")),
    ],
    ids=["tokens", "table", "none fits", "logarithm", "both", "a table of floats", "never finite", "no inputs"],
)
def test_fresh_inputs_are_such_that_the_model_runs(run: Any, args: tuple[Any, ...], how: Fresh) -> None:
    assert runnable(run, args, {})[0] == how


def test_complex_inputs_are_tried_with_other_numbers() -> None:
    x = torch.randn(3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    ((new,), _) = fresh_inputs((x,), {}, 1)
    assert new.dtype == x.dtype
    assert new.shape == x.shape
    assert not torch.isclose(torch.view_as_real(new), torch.view_as_real(x)).any()
    ((turned,), _) = fresh_inputs((x,), {}, 1, Fresh("exchanged", "kept"))
    assert torch.equal(turned, x.flip(0))


def test_no_wrong_index_is_tried_where_it_would_end_the_process() -> None:
    def run(args: object, kwargs: object) -> None:
        raise AssertionError("tried")

    assert runnable(run, (torch.zeros(2, 3, dtype=torch.int64, device="meta"),), {})[0] == Fresh("exchanged", "kept")
    assert _may_index(torch.tensor([[0.5, 1.0], [0.1, 2.0]]))
    assert not _may_index(torch.tensor([[0.5, 1.0], [0.1, 2.5]]))


def test_numbers_that_have_no_logarithm_or_are_codes_are_no_fresh_inputs() -> None:
    class Mixed(Table):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x[:, :3].long()) * x[:, 3:].log()

    x = torch.cat([torch.stack([torch.arange(50) % n for n in Table.SIZES], 1), 1 + torch.rand(50, 1)], 1)
    found = infer(Mixed(), x)
    assert not found.notes
    seen = verify(Mixed(), x, found)
    assert (seen.randomised, seen.inputs) == (True, 2)


class _Normalised(nn.Module):
    """Shift and scale that the first batch sets, as a flag in the state says."""

    def __init__(self, write: Callable[[nn.Module, str, torch.Tensor], Any]) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.ones(6))
        self.register_buffer("ready", torch.tensor(False))
        self.write = write

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.ready:
            self.write(self, "shift", -x.mean(0))
            self.write(self, "scale", 1 / x.std(0))
            self.ready = torch.tensor(True)
        return (x + self.shift) * self.scale


def _copy(module: nn.Module, name: str, value: torch.Tensor) -> None:
    getattr(module, name).data.copy_(value)


def _data(module: nn.Module, name: str, value: torch.Tensor) -> None:
    getattr(module, name).data = value


def _new(module: nn.Module, name: str, value: torch.Tensor) -> None:
    setattr(module, name, nn.Parameter(value))


@pytest.mark.parametrize("verified", [False, True])
@pytest.mark.parametrize("write", [_copy, _data, _new])
def test_parameters_that_the_first_pass_sets_move_as_later_ones_read_them(write: Any, verified: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 6), _Normalised(write), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(8, 4)
    symmetry = infer(net, x, verify=verified)
    assert [(g.size, len(g.slots)) for g in symmetry.generators()] == [(6, 5)]
    assert any("the first pass writes to 1.shift" in note for note in symmetry.notes)
    assert not net[1].ready
    assert not net[1].shift.any()
    net(x)
    assert_sound(net, torch.randn(8, 4), symmetry)


class Pooled(nn.Module):
    """Pooled to one pixel, and laid out without its batch, as in the WideResNets and DenseNets that many train on CIFAR."""

    def __init__(self, window: int = 8) -> None:
        super().__init__()
        self.inp, self.mid, self.out = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1), nn.Linear(8, 4)
        self.window = window

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(nn.functional.avg_pool2d(self.mid(self.inp(x).relu()).relu(), self.window).view(-1, 8))


@pytest.mark.parametrize("batch", [1, 3])
def test_inputs_on_which_a_model_mixes_its_batch_are_left_out(batch: int) -> None:
    found = infer(Pooled(), torch.randn(batch, 3, 16, 16))
    assert sorted(g.size for g in found.generators()) == [6, 8]
    assert any("mixes the entries of a batch" in note for note in found.notes)


@pytest.mark.parametrize("batch", [1, 3])
def test_also_where_there_is_one_channel(batch: int) -> None:
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), Rows(), nn.Linear(6 * 16, 4))
    found = infer(net, torch.randn(batch, 1, 16, 16))
    assert sorted(g.size for g in found.generators()) == [6]


class Rows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, 6 * 16)


def test_an_example_of_one_pixel_hides_what_larger_ones_mix() -> None:
    found = infer(Pooled(1), torch.randn(2, 3, 1, 1))
    assert sorted(g.size for g in found.generators()) == [6]


class Observing(nn.Module):
    """Makes tensors of arrays; its own table is one of its own."""

    def __init__(self, made: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.made, self.inp, self.out, self.ones = made, nn.Linear(6, 7), nn.Linear(7, 3), torch.ones(7)

    def forward(self, given: Any) -> torch.Tensor:
        return self.out(self.inp(self.made(given).float()).tanh() * self.ones)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    ("given", "made"),
    [
        (np.array([[3, 1, 1, 2, 1, 3]]), torch.as_tensor),
        (np.array([[3, 1, 1, 2, 1, 3]]), torch.tensor),
        ({"seen": np.ones((2, 6), np.float32)}, lambda d: torch.from_numpy(d["seen"])),
        ([np.ones(6), np.zeros(6)], lambda rows: torch.stack([torch.tensor(row.tolist()) for row in rows])),
    ],
)
def test_arrays_among_the_inputs_are_no_constants(
    given: Any, made: Callable[[Any], torch.Tensor], verify: bool
) -> None:
    """Columns that are equal in the example are so by chance."""
    found = infer(Observing(made), (given,), verify=verify)
    assert [(g.size, {s.param for s in g.slots}) for g in found.sets] == [(7, {"inp.weight", "inp.bias", "out.weight"})]


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


def test_tensors_in_slots_are_inputs_and_outputs() -> None:
    given = Program(lambda s, b: s.out(s.inp(b.x).tanh()), {"inp": lin(6, 7), "out": lin(7, 3)})
    assert [g.size for g in infer(given, (Slotted(torch.ones(2, 6)),)).sets] == [7]

    def forward(s: Any, x: torch.Tensor) -> Any:
        h = s.inp(x).tanh()
        return s.out(h), Slotted(h)

    assert infer(Program(forward, {"inp": lin(6, 7), "out": lin(7, 3)}), (draw(2, 6),)).sets == ()


def test_values_of_dicts_are_outputs_and_iterators_are_refused() -> None:
    def forward(s: Any, x: torch.Tensor) -> Any:
        h = s.inp(x).tanh()
        return {"h": h, "y": s.out(h)}.values()

    parts = {"inp": lin(6, 7), "out": lin(7, 3)}
    assert infer(Program(forward, parts), (draw(2, 6),)).sets == ()
    with pytest.raises(TraceError, match="returns an iterator"):
        infer(Program(lambda s, x: (f(x) for f in (s.inp, s.inp)), parts), (draw(2, 6),))


@pytest.mark.parametrize("kind", ["branches", "channels"])
def test_what_only_inputs_tell_apart_that_are_not_square(kind: str) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        if kind == "branches":
            sides = zip((s.a, s.b), x.shape[-2:], strict=True)
            return s.out(sum((c(x) / n**0.5).tanh() for c, n in sides).mean((2, 3)))
        scale = torch.tensor([1 / x.shape[2]] * 3 + [1 / x.shape[3]] * 3).to(x)
        return s.out((s.a(x) * scale[:, None, None]).tanh().mean((2, 3)))

    def make() -> nn.Module:
        torch.manual_seed(0)
        conv = lambda: nn.Conv2d(3, 6, 1)  # noqa: E731
        return Program(forward, {"a": conv, "b": conv, "out": lin(6, 2)})

    found = infer(make(), (draw(2, 3, 8, 8),))
    assert found.exchanges == ()
    assert sorted(g.size for g in found.sets) == ([6] if kind == "branches" else [3, 3])
    assert worst_change(make, (draw(2, 3, 8, 20),), {}, found) < 1e-9
