"""Rows of which the example chooses none: what is done with them shows the same groups as where it chooses some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge import Symmetry, infer
from automerge.testing import assert_sound

WIDTH, HIDDEN = 6, 4
NONE = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).clamp(max=1.5)
SOME = torch.cat([NONE[:4] + torch.tensor([3.0, 0.0, 0.0]), NONE[4:]])


class Sending(nn.Module):
    """Rows whose first number is large are treated in their own way."""

    def __init__(self, treat: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.out, self.gate = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)
        self.first, self.second = (
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH)) for _ in range(2)
        )
        self.pair, self.norm, self.treat = nn.Linear(2, 3), nn.LayerNorm(WIDTH), treat
        self.heads = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.register_buffer("empty", torch.zeros(0, WIDTH))

    def attend(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return self.heads(q, k, k, need_weights=False)[0][0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x.repeat(1, 2)  # as wide as the layers
        return self.out(self.treat(self, self.inp(x), x[:, 0] > 2))


def _added(change: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Rows that get something on top."""

    def treat(net: Any, h: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        z = h.tanh()
        z[m] += change(net, h[m])
        return z

    return treat


def _put(net: Any, h: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    z = torch.zeros_like(h)
    z[m], z[~m] = net.first(h[m]), net.second(h[~m])
    return z


def _joined(net: Any, h: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return torch.cat([net.first(h[m]), net.second(h[~m])])[_order(m)]


def _order(m: torch.Tensor) -> torch.Tensor:
    return torch.cat([m.nonzero()[:, 0], (~m).nonzero()[:, 0]]).argsort()


def _scattered(net: Any, h: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return h.tanh().masked_scatter(m[:, None].expand_as(h), net.first(h[m]))


def _twice(net: Any, h: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    i = m.nonzero()[:, 0]
    return h.index_add(0, torch.cat([i, i]), torch.cat([net.first(h[i]), net.second(h[i])]))


def _attended(net: Any, h: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Found on longer inputs: what the module does with no tokens shows nothing."""
    z = h.clone()
    z[m] = z[m] + net.attend(h[m][None], h[None])
    return z


def _joined_by_features(net: Any, q: torch.Tensor) -> torch.Tensor:
    a, b = net.first(q).chunk(2, -1)
    return torch.cat([b, a], -1)


def _mapped(net: Any, q: torch.Tensor) -> torch.Tensor:
    weight = net.first[0].weight.t()[None].expand(len(q), -1, -1)
    return torch.bmm(q[:, None], weight)[:, 0] @ net.first[2].weight.t()


TREATMENTS: dict[str, Callable[..., torch.Tensor]] = {
    "put": _put,
    "join rows": _joined,
    "masked_scatter": _scattered,
    "index_add": lambda net, h, m: h.index_add(0, i := m.nonzero()[:, 0], net.first(h[i])),
    "index_copy": lambda net, h, m: h.index_copy(0, i := m.nonzero()[:, 0], net.first(h.index_select(0, i))),
    "sum of rows": lambda net, h, m: h + net.first(h[m]).sum(0) / (1 + m.sum()),
    "largest beside a row": lambda net, h, m: h + torch.cat([net.first(h[m]), h[:1]]).amax(0),
    "add": _added(lambda net, q: net.first(q)),
    "join none": _twice,
    "join features": _added(_joined_by_features),
    "norm": _added(lambda net, q: net.norm(net.first(q))),
    "gate": _added(lambda net, q: q * net.gate(q).softmax(-1)[:, :1]),
    "einsum": _added(lambda net, q: torch.einsum("bd,hd->bh", q, net.first[0].weight) @ net.first[2].weight.t()),
    "convolution": _added(
        lambda net, q: F.conv1d(q[:, :, None], net.first[0].weight[:, :, None])[..., 0] @ net.first[2].weight.t()
    ),
    "stack": _added(lambda net, q: torch.stack([net.first(q), net.second(q)], 1).amax(1)),
    "order": _added(lambda net, q: (v := net.first(q)).gather(1, v.argsort(1))),
    "running sum": _added(lambda net, q: net.first(q).cumsum(1)),
    "outer product": _added(lambda net, q: (net.gate(q)[:, :, None] * net.pair(net.gate(q))[:, None]).flatten(1)),
    "roll": _added(lambda net, q: net.first(q).roll(1, 1)),
    "largest": _added(lambda net, q: net.first(q).amax(1, keepdim=True)),
    "rows of the input": lambda net, h, m: h + torch.cat([net.x[m], net.first(h[~m])])[_order(m)],
    "rows of a constant": lambda net, h, m: torch.cat([torch.arange(6.0).expand(8, 6)[m], net.first(h[~m])])[_order(m)],
    "attention module": lambda net, h, m: h.index_add(0, i := m.nonzero()[:, 0], net.attend(h[i][None], h[None])),
    "attention module, put": _attended,
    "attention of what is chosen": lambda net, h, m: h.index_add(
        0, m.nonzero()[:, 0], F.scaled_dot_product_attention(h[m][None], net.first(h)[None], net.second(h)[None])[0]
    ),
    "an empty buffer": lambda net, h, m: h + torch.cat([net.empty, net.first(h[m])]).sum(0),
    "attention": lambda net, h, m: h + (net.first(h[m]) @ h.t()).softmax(-1).sum(0) @ net.second(h),
}


def _groups(symmetry: Symmetry) -> list[Any]:
    return sorted(
        (g.size, sorted((s.param, s.axis, s.index.tolist(), s.within) for s in g.slots)) for g in symmetry.generators()
    )


@pytest.mark.parametrize("name", TREATMENTS)
def test_groups_are_those_of_an_example_that_chooses_some(name: str) -> None:
    net = Sending(TREATMENTS[name])
    found = infer(net, NONE, verify=False)
    assert _groups(found) == _groups(infer(net, SOME, verify=False))
    assert_sound(net, SOME, found)
    assert not found.unruled


@pytest.mark.parametrize(
    "change",
    [
        lambda net, q: net.first(q.flatten().view(-1, WIDTH)),
        lambda net, q: net.pair(net.first(q).view(-1, 3, 2)).sum(1).repeat(1, 2),
        _mapped,
    ],
    ids=["flatten", "view", "expand"],
)
def test_what_no_rows_do_not_show_stays(change: Callable[..., torch.Tensor]) -> None:
    net = Sending(_added(change))
    assert_sound(net, SOME, infer(net, NONE, verify=False))


def _if_any(experts: Any, chosen: torch.Tensor, h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    for i, expert in enumerate(experts):
        m = (chosen == i).any(-1)
        if m.any():
            z[m] = z[m] + expert(h[m])
    return z


def _hits(experts: Any, chosen: torch.Tensor, h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    for i in chosen.unique().tolist():
        m = (chosen == i).any(-1)
        z[m] = z[m] + experts[i](h[m])
    return z


def _unless_empty(experts: Any, chosen: torch.Tensor, h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    for i, expert in enumerate(experts):
        rows = torch.where(chosen == i)[0]
        if rows.numel():
            z.index_add_(0, rows, expert(h[rows]))
    return z


@pytest.mark.parametrize("loop", [_if_any, _hits, _unless_empty])
def test_experts_that_python_skips_move_with_the_others_without_verification(loop: Callable[..., torch.Tensor]) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inp, self.gate, self.out = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 2)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH)) for _ in range(4)
            )
            self.gate.weight.data.mul_(5)
            self.inp.bias.data.zero_()
            self.gate.bias.data.zero_()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inp(x)
            return self.out(h + loop(self.experts, self.gate(h).topk(2, -1).indices, h, torch.zeros_like(h)))

    found = infer(Experts(), NONE[:1], verify=False)
    assert sorted(g.size for g in found.generators()) == [HIDDEN] * 4 + [WIDTH]
    assert_sound(Experts(), torch.randn(60, 3, generator=torch.Generator().manual_seed(1)), found)


def test_rows_that_a_constant_never_chooses_are_not_read() -> None:
    """Adapters of languages other than the default one."""

    def treat(net: Any, h: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        rows, z = torch.zeros(len(h), dtype=torch.int64) == 1, h.tanh()
        z[rows] = net.first(h[rows])
        return z

    found = infer(Sending(treat), SOME)
    assert [g.size for g in found.generators()] == [WIDTH]
    assert not found.unruled
    assert not any(name.startswith("first") for name in found.moved)
    assert any("first.0.weight" in note for note in found.notes)
