"""Zeros, cuts and kernels whose size is that of units on one input, and of tokens on another: these must stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge import infer
from tests.inference.networks_hostile import Program
from tests.inference.test_networks import parse, worst_change


def lin(i: int, o: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o)


def conv(*sizes: int, **options: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv1d(*sizes, **options)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def weights(*shape: int) -> Callable[[], nn.Module]:
    return lambda: nn.Parameter(draw(*shape))  # type: ignore[return-value]


CASES: dict[str, tuple[str, list[torch.Tensor], Callable[..., Any], dict[str, Callable[[], nn.Module]]]] = {}


def add(name: str, sizes: str, inputs: list[torch.Tensor], forward: Callable[..., Any], **parts: Any) -> None:
    """The groups on the first input, which hold on all."""
    assert name not in CASES
    CASES[name] = (sizes, inputs, forward, parts)


# ------------------------------------------------------------ filled up with zeros to a fixed length
ROWS, MORE_ROWS = draw(2, 3), draw(2, 5)
TOKENS, MORE_TOKENS, FEW_TOKENS = draw(2, 3, 4), draw(2, 6, 4), draw(2, 2, 4)


def filled(x: torch.Tensor) -> torch.Tensor:
    """The first axis after the batch filled up to 9."""
    return torch.cat([x, x.new_zeros(x.shape[0], 9 - x.shape[1], *x.shape[2:])], 1)


def in_front(x: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:]), x], 1)


add("scales of the rest", "", [ROWS, MORE_ROWS], lambda s, x: s.out(torch.cat([filled(x)[:, :3], filled(x)[:, 3:] * s.a], 1)),
    a=weights(6), out=lin(9, 2))  # fmt: skip
add("scales in two parts", "", [ROWS, MORE_ROWS], lambda s, x: s.out(filled(x) * torch.cat([s.a, s.b])),
    a=weights(3), b=weights(6), out=lin(9, 2))  # fmt: skip
add("layers of two parts", "7", [ROWS, MORE_ROWS], lambda s, x: s.out(s.a(filled(x)[:, :3]).relu() + s.b(filled(x)[:, 3:])),
    a=lin(3, 7), b=lin(6, 7), out=lin(7, 2))  # fmt: skip
add("zeros on both sides", "", [ROWS, MORE_ROWS],
    lambda s, x: s.out(torch.cat([x.new_zeros(len(x), 2), filled(x)[:, :7]], 1) * torch.cat([s.a, s.b, s.c])),
    a=weights(2), b=weights(3), c=weights(4), out=lin(9, 2))  # fmt: skip
add("zeros around what is filled up", "", [ROWS, MORE_ROWS, draw(2, 2)],
    lambda s, x: s.out(F.pad(filled(x) * s.a, (x.shape[1], 9 - x.shape[1])) * s.b),
    a=weights(9), b=weights(18), out=lin(18, 2))  # fmt: skip
add("zeros joined around what is filled up", "", [ROWS, MORE_ROWS, draw(2, 2)],
    lambda s, x: s.out(torch.cat([x.new_zeros(x.shape), filled(x) + s.a, x.new_zeros(len(x), 9 - x.shape[1])], 1) * s.b),
    a=weights(9), b=weights(18), out=lin(18, 2))  # fmt: skip
add("places of the rest", "5", [TOKENS, MORE_TOKENS, FEW_TOKENS],
    lambda s, x: s.out((filled(s.e(x))[:, 3:] + s.a).relu().mean(1) + filled(s.e(x))[:, :3].mean(1)),
    e=lin(4, 5), a=weights(6, 5), out=lin(5, 2))  # fmt: skip
add("zeros before a window", "", [TOKENS, draw(2, 5, 4), FEW_TOKENS],
    lambda s, x: s.out((in_front(x[..., 0], 6)[:, :3] + s.a).relu()), a=weights(3), out=lin(3, 2))  # fmt: skip
add("layers of two halves", "5", [TOKENS, draw(2, 5, 4), FEW_TOKENS],
    lambda s, x: s.out((s.a(in_front(x, 6)[:, :3].mT) + s.b(in_front(x, 6)[:, 3:].mT)).relu()),
    a=lin(3, 5), b=lin(3, 5), out=lin(5, 2))  # fmt: skip
add("a kernel over all", "6", [TOKENS.mT, draw(2, 4, 4), draw(2, 4, 5)],
    lambda s, x: s.out(s.c(filled(x.mT)[:, :5].mT).relu().mean(-1)), c=conv(4, 6, 5), out=lin(6, 2))  # fmt: skip


# ------------------------------------------------------------ first states
def recurrent(first: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = first(x).expand(x.shape[0], 6)
        for t in range(x.shape[1]):
            h = s.cell(torch.cat([x[:, t], h], 1)).tanh()
        return s.out(h)

    return forward


def gated(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = torch.zeros(x.shape[0], 6)
    for t in range(x.shape[1]):
        update, reset = s.gates(torch.cat([x[:, t], h], 1)).sigmoid().chunk(2, 1)
        h = update * h + (1 - update) * s.cell(torch.cat([x[:, t], reset * h], 1)).tanh()
    return s.out(h)


def two_states(s: Any, x: torch.Tensor) -> torch.Tensor:
    h, c = torch.zeros(x.shape[0], 5), torch.zeros(x.shape[0], 5)
    for t in range(x.shape[1]):
        h, c = s.cell(torch.cat([x[:, t], h, c], 1)).tanh().chunk(2, 1)
    return s.out(h) + s.more(c)


def two_ways(s: Any, x: torch.Tensor) -> torch.Tensor:
    a = b = torch.zeros(x.shape[0], 6)
    for t in range(x.shape[1]):
        a, b = (s.cell(torch.cat([x[:, k], h], 1)).tanh() for k, h in ((t, a), (-1 - t, b)))
    return s.out(torch.cat([a, b], 1))


def shown(s: Any, x: torch.Tensor) -> Any:
    first = joined = torch.cat([x[:, 0], torch.zeros(x.shape[0], 6)], 1)
    for t in range(x.shape[1]):
        h = s.cell(joined).tanh()
        joined = torch.cat([x[:, t], h], 1)
    return s.out(h), first


def delayed(s: Any, x: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros(x.shape[0], 3)
    for t in range(x.shape[1]):
        joined = torch.cat([x[:, t], kept], 1)
        kept = torch.cat([joined[:, 1:3], kept[:, :1]], 1)
    return s.out((joined * s.a).relu())


STATES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "zeros": ("6", lambda x: x.new_zeros(6)),
    "equal": ("6", lambda x: x.new_full((6,), 0.3)),
    "all different": ("", lambda x: torch.arange(6.0).to(x)),
    "one is one": ("5", lambda x: (torch.arange(6) == 2).to(x)),
    "ones in one half": ("3 3", lambda x: torch.cat([x.new_zeros(3), x.new_ones(3)])),
}
for what, (found, start) in STATES.items():
    add(f"first state {what}", found, [TOKENS, MORE_TOKENS], recurrent(start), cell=lin(10, 6), out=lin(6, 2))
add("gated", "6", [TOKENS, MORE_TOKENS], gated, gates=lin(10, 12), cell=lin(10, 6), out=lin(6, 2))
add("two states", "5 5", [TOKENS, MORE_TOKENS], two_states, cell=lin(14, 10), out=lin(5, 2), more=lin(5, 2))
add("two recurrences", "6", [TOKENS, MORE_TOKENS], two_ways, cell=lin(10, 6), out=lin(12, 2))
add("the filled up input is an output", "", [TOKENS, MORE_TOKENS], shown, cell=lin(10, 6), out=lin(6, 2))
add("a delay", "", [TOKENS, MORE_TOKENS], delayed, a=weights(7), out=lin(7, 2))


# ------------------------------------------------------------ a stream of which as much is read as there are tokens
def stream(read: Callable[..., Any]) -> Callable[..., Any]:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = s.inner(s.inp(x.mean(1)).relu())
        return read(s, h + s.last(s.more(h).relu()), x)

    return forward


SCORES: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
    "that are the output": ("7 7", lambda s, h, x: h[:, : x.shape[1]], {}),
    "of which one less": ("7 7", lambda s, h, x: h[:, 1 : x.shape[1]], {}),
    "that weigh tokens": ("7 7", lambda s, h, x: s.out((h[:, : x.shape[1], None].softmax(1) * x).sum(1)), {"out": lin(4, 2)}),
}  # fmt: skip
for what, (found, read, parts) in SCORES.items():
    add(f"scores {what}", found, [draw(2, 40, 4), draw(2, 50, 4), draw(2, 20, 4)], stream(read),
        inp=lin(4, 7), inner=lin(7, 64), more=lin(64, 7), last=lin(7, 64), **parts)  # fmt: skip


def test_of_a_table_cut_as_the_scores_are_what_longer_inputs_read_stays() -> None:
    """The scores that are read meet units only, rows of a table that is cut, too."""
    read = stream(lambda s, h, x: h[:, : x.shape[1]].softmax(1) @ s.table[: x.shape[1]])
    parts = {"inp": lin(4, 7), "inner": lin(7, 64), "more": lin(64, 7), "last": lin(7, 64), "table": weights(64, 3)}

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Program(read, parts)

    symmetry = infer(make(), draw(2, 40, 4), verify=False)
    for length in (40, 50, 64):
        assert worst_change(make, (draw(2, length, 4),), {}, symmetry) < 1e-9


# ------------------------------------------------------------ kernels as long as the example
IMAGES = [draw(2, 3, 5), draw(2, 3, 9), draw(2, 3, 6)]
for what, options in {"plain": {}, "stride": {"stride": 2}, "padding": {"padding": 1}, "groups": {"groups": 3}}.items():
    add(f"a kernel of the example's length, {what}", "2x3" if "groups" in options else "6", IMAGES,
        lambda s, x: s.out(s.c(x).relu().mean(-1)), c=conv(3, 6, 5, **options), out=lin(6, 2))  # fmt: skip


def over_constants(s: Any, x: torch.Tensor) -> torch.Tensor:
    equal = (x.mean(-1, keepdim=True) * s.a).expand(-1, -1, x.shape[2])
    return s.out(s.c(F.pad(equal, (0, 5 - x.shape[2]))).relu().mean(-1))


add("a kernel over constants that are filled up", "6", [IMAGES[0], draw(2, 3, 4)], over_constants,
    a=weights(3, 1), c=conv(3, 6, 5), out=lin(6, 2))  # fmt: skip
add("a kernel over rows of a table", "3 6", [draw(2, 5, 4), draw(2, 8, 4), draw(2, 6, 4)],
    lambda s, x: s.out(s.c(s.table[: x.shape[1]].t()[None]).relu().mean(-1)) * x.mean(),
    table=weights(9, 3), c=conv(3, 6, 5), out=lin(6, 2))  # fmt: skip
UNITS = [draw(2, 3), draw(4, 3)]
for what, (options, found) in {
    "plain": ({}, "5 6"), "stride": ({"stride": 2}, "5 6"), "padding": ({"padding": 1}, "6")
}.items():  # fmt: skip
    add(f"a kernel over units, {what}", found, UNITS, lambda s, x: s.out(s.c(s.p(x).relu()[:, None]).relu().mean(-1)),
        p=lin(3, 5), c=conv(1, 6, 5, **options), out=lin(6, 2))  # fmt: skip


# ------------------------------------------------------------ statistics that are written to
def running(read: Callable[..., Any]) -> Callable[..., Any]:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        mean, var = torch.zeros(6, dtype=x.dtype), torch.ones(6, dtype=x.dtype)
        other = mean.view(1, 6)
        F.batch_norm(s.p(x), mean, var, None, None, True)
        return s.out(read(mean, var, other))

    return forward


RUNNING = [draw(5, 4), draw(7, 4)]
add("both statistics", "6", RUNNING, running(lambda mean, var, _: mean * var), p=lin(4, 6), out=lin(6, 2))
add("one seen before it was written", "6", RUNNING, running(lambda mean, var, other: other), p=lin(4, 6), out=lin(6, 2))
add(
    "both statistics joined",
    "6",
    RUNNING,
    running(lambda mean, var, _: torch.cat([mean, var])),
    p=lin(4, 6),
    out=lin(12, 2),
)


# ------------------------------------------------------------ written through a tensor that changed its shape
def through_pieces(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.p(x).clone()
    a, b = h.chunk(2, 1)
    a.unsqueeze_(2)
    b.t_()
    b.mul_(a[..., 0].t())
    a.squeeze_(2)
    a.add_(1.0)
    return s.out(h) + s.part(b.t())


def through_rows(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.p(x)
    v = h[:, 1:4]
    h.transpose_(0, 1)
    v.transpose_(0, 1)
    v[0].mul_(7.0)
    h[5].sub_(1.0)
    return s.part(v.t()) + s.out(h.t())


add("through pieces", "3", RUNNING, through_pieces, p=lin(4, 6), part=lin(3, 2), out=lin(6, 2))
add("through rows", "2 2", RUNNING, through_rows, p=lin(4, 6), part=lin(3, 2), out=lin(6, 2))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_groups_hold_on_inputs_of_other_sizes(name: str, verify: bool) -> None:
    sizes, inputs, forward, parts = CASES[name]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Program(forward, parts)

    symmetry = infer(make(), inputs[0], verify=verify)
    assert sorted(g.size for g in symmetry.generators()) == parse(sizes), str(symmetry)
    for x in inputs:
        assert worst_change(make, (x,), {}, symmetry) < 1e-9
