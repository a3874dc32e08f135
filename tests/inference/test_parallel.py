"""Branches beside each other, other than mixtures of experts: heads, towers, ensembles, tasks, depthwise branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge import infer
from automerge.testing import assert_sound
from tests.inference._mixtures import COUNT, HIDDEN, WIDTH, Mixture, X, modules, small_expert, summed


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, 4, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 2
        mask = torch.tril(torch.ones(x.shape[1], x.shape[1]))
        return scores.masked_fill(mask == 0, -torch.inf).softmax(-1) @ self.v(x)


class FusedHead(Head):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x)[:, None] for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]


class Heads(nn.Module):
    """One module for every attention head."""

    def __init__(self, head: type[Head], positions: bool = False) -> None:
        super().__init__()
        self.embed, self.heads = nn.Embedding(11, WIDTH), nn.ModuleList(head() for _ in range(COUNT))
        self.proj, self.out = nn.Linear(COUNT * 4, WIDTH), nn.Linear(WIDTH, 11)
        self.shift = torch.arange(COUNT * 4) if positions else torch.zeros(COUNT * 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return self.out(x + self.proj(torch.cat([h(x) for h in self.heads], -1) + self.shift))


IDS = torch.arange(10).reshape(2, 5)


@pytest.mark.parametrize("head", [Head, FusedHead])
def test_heads_kept_as_modules(head: type[Head]) -> None:
    symmetry = infer(Heads(head), IDS)
    assert modules(symmetry) == [(COUNT, 3)]
    (slot,) = symmetry.exchanges[0].slots
    assert (slot.param, slot.axis, slot.index.tolist()) == (
        "proj.weight",
        1,
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
    )


def test_a_loop_over_the_matrices_of_a_parameter_leaves_their_order_free() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.gate, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, COUNT), nn.Linear(WIDTH, 3)
            self.up = nn.Parameter(torch.randn(COUNT, WIDTH, HIDDEN))
            self.down = nn.Parameter(torch.randn(COUNT, HIDDEN, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inp(x)
            g = self.gate(h).softmax(-1)
            return self.out(sum(g[:, e : e + 1] * ((h @ self.up[e]).relu() @ self.down[e]) for e in range(COUNT)))

    symmetry = infer(Loop(), X)
    assert not symmetry.exchanges
    outer = next(g for g in symmetry.generators() if any((s.param, s.axis) == ("up", 0) for s in g.slots))
    assert {(s.param, s.axis) for s in outer.slots} == {("up", 0), ("down", 0), ("gate.weight", 0), ("gate.bias", 0)}
    assert sorted(g.size for g in symmetry.generators()) == [COUNT, *[HIDDEN] * COUNT, WIDTH, WIDTH]


class Nested(nn.Module):
    """Towers of parallel layers: whole towers may be exchanged, and the layers of each."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)
        self.towers = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(COUNT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inp(x)
        return self.out(sum(sum(layer(h).relu() for layer in tower).tanh() for tower in self.towers))


def test_modules_within_modules() -> None:
    symmetry = infer(Nested(), X)
    assert sorted(modules(symmetry)) == [*[(2, 2)] * COUNT, (COUNT, 4)]
    assert_sound(Nested(), X, symmetry)
    stacks = symmetry.stacks.names
    assert sorted(map(len, stacks.values())) == [2 * COUNT, 2 * COUNT]


def test_members_of_an_ensemble() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList(
                nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
                for _ in range(4)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([m(x) for m in self.members]).mean(0)

    symmetry = infer(Ensemble(), torch.randn(3, 2, 6, 6))
    assert modules(symmetry) == [(4, 8)]
    moved = symmetry.exchanges[0].params[0]
    assert {"members.0.1.running_mean", "members.0.1.running_var"} <= set(moved) <= set(symmetry.shapes)
    assert symmetry.stacked.statistics == {"members.*.1.running_mean", "members.*.1.running_var"}


def test_two_like_branches_among_three() -> None:
    def mix(h: Any, scores: Any, experts: Any) -> Any:
        return experts[0](h) + experts[1](h) + experts[2](h).relu()

    (exchange,) = infer(Mixture(mix), X).exchanges
    assert {n.split(".")[1] for names in exchange.params for n in names} == {"0", "1"}


def test_a_position_of_its_own_for_every_head_pins_the_heads() -> None:
    assert not infer(Heads(Head, positions=True), IDS).exchanges


@pytest.mark.parametrize("how", ["stacked", "side by side", "mapped"])
def test_modules_whose_parameters_are_joined_before_they_are_used(how: str) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(
                nn.Sequential(nn.Linear(4, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 3)) for _ in range(COUNT)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if how == "mapped":
                state, _ = torch.func.stack_module_state(list(self.parts))

                def one(own: Any) -> torch.Tensor:
                    return torch.func.functional_call(self.parts[0], own, (x,))

                return torch.vmap(one)(state).mean(0)
            up, down = ([part[k].weight.T for part in self.parts] for k in (0, 2))
            if how == "stacked":
                return ((x @ torch.stack(up)).relu() @ torch.stack(down)).mean(0)
            return (x @ torch.cat(up, 1)).relu() @ torch.cat(down)

    symmetry = infer(Joined(), X)
    assert [size for size, _ in modules(symmetry)] == [COUNT]
    assert [g.size for g in symmetry.generators()] == [HIDDEN] * COUNT


def test_the_factors_of_a_weight_stay() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.mask = (nn.Parameter(torch.randn(HIDDEN, 4)) for _ in range(2))
            self.out = nn.Linear(HIDDEN, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(F.linear(x, self.weight * self.mask).relu())

    assert not infer(Masked(), X).exchanges


@pytest.mark.parametrize("how", ["stack", "sum"])
def test_experts_of_one_task_beside_those_of_all(how: str) -> None:
    """Those that tasks share are joined with other experts in each of them."""

    class Tasks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.ModuleList(nn.Linear(4, HIDDEN) for _ in range(3))
            self.own = nn.ModuleList(nn.ModuleList(nn.Linear(4, HIDDEN) for _ in range(2)) for _ in range(2))
            self.gates, self.outs = (nn.ModuleList(nn.Linear(*n) for _ in range(2)) for n in ((4, 5), (HIDDEN, 2)))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            shared, out = [m(x).tanh() for m in self.shared], []
            for own, gate, last in zip(self.own, self.gates, self.outs, strict=True):
                g, parts = gate(x).softmax(-1), [*(m(x).tanh() for m in own), *shared]
                if how == "stack":
                    out.append(last(torch.einsum("bed,be->bd", torch.stack(parts, 1), g)))
                else:
                    out.append(last(sum(g[:, i, None] * part for i, part in enumerate(parts))))
            return out

    assert sorted(e.size for e in infer(Tasks(), X).exchanges) == [2, 2, 3]


def test_an_output_for_every_branch_pins_them() -> None:
    class Apart(Mixture):
        def forward(self, x: torch.Tensor) -> Any:
            h = self.inp(x)
            return [expert(h) for expert in self.experts], torch.stack([expert(h) for expert in self.experts]).sum(0)

    assert not infer(Apart(summed), X).exchanges


def test_tables_that_are_read_in_part_stay() -> None:
    """Two tables of which these inputs read one row each may differ in the rows that others read."""

    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Embedding(5, WIDTH), nn.Embedding(5, WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            zero = torch.zeros(x.shape[0], dtype=torch.long)
            return self.out(self.a(zero) + self.b(zero) + x)

    assert not infer(Tables(), torch.randn(3, WIDTH)).exchanges


class _Masked(Head):
    """A head with a mask of its own for the longest input, as in well-known lectures."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tril(torch.ones(9, 9)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).mT
        n = x.shape[1]
        return scores.masked_fill(self.mask[:n, :n] == 0, float("-inf")).softmax(-1) @ self.v(x)


def test_equal_buffers_that_are_read_in_part_are_exchanged() -> None:
    net = Heads(_Masked)
    assert net.heads[0].mask.shape[0] > IDS.shape[1]
    (exchange,) = infer(net, IDS, verify=False).exchanges
    assert exchange.size == COUNT
    assert any(name.endswith("mask") for name in exchange.params[0])
    assert_sound(net, IDS, infer(net, IDS))
    net.heads[1].mask += 1.0
    assert not infer(net, IDS).exchanges


def test_buffers_of_zeros_that_are_read_in_part_stay() -> None:
    """Training may fill two tables of zeros differently, and other inputs read other rows."""

    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a", torch.zeros(5, WIDTH))
            self.register_buffer("b", torch.zeros(5, WIDTH))
            self.out = nn.Linear(WIDTH, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            zero = torch.zeros(x.shape[0], dtype=torch.long)
            return self.out(self.a[zero] + self.b[zero] + x)

    assert not infer(Tables(), torch.randn(3, WIDTH)).exchanges


class Tasks(nn.Module):
    """Two tasks with experts of their own each, and experts that they share (PLE)."""

    def __init__(self, join: Callable[..., Any]) -> None:
        super().__init__()
        self.inp, self.join = nn.Linear(4, WIDTH), join
        self.first, self.second, self.both = (nn.ModuleList(small_expert() for _ in range(n)) for n in (2, 2, 3))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, 5) for _ in range(2))
        self.towers = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> Any:
        h = self.inp(x)
        shared, made = [expert(h) for expert in self.both], []
        for own, gate, tower in zip((self.first, self.second), self.gates, self.towers, strict=True):
            made.append(tower(self.join([*(expert(h) for expert in own), *shared], gate(h).softmax(-1))))
        return made


JOINS = {
    "stack": lambda parts, g: (torch.stack(parts, 1) * g[..., None]).sum(1),
    "cat": lambda parts, g: torch.bmm(g[:, None], torch.cat([p[:, None] for p in parts], 1))[:, 0],
    "sum": lambda parts, g: sum(g[:, i : i + 1] * p for i, p in enumerate(parts)),
}


@pytest.mark.parametrize("join", JOINS)
def test_experts_that_tasks_share_are_exchanged_among_themselves(join: str) -> None:
    net = Tasks(JOINS[join])
    found = infer(net, X)
    groups = {frozenset(names[0].rsplit(".", 2)[0] for names in e.params) for e in found.exchanges}
    assert groups == {frozenset({f"{n}.{i}" for i in range(c)}) for n, c in (("first", 2), ("second", 2), ("both", 3))}
    assert_sound(net, X, found)


class Levels(nn.Module):
    """Two tasks at two levels (CGC): at the first, a gate of its own joins what both tasks share with all the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(4, WIDTH)
        self.experts = nn.ModuleList(nn.ModuleList(small_expert() for _ in range(2)) for _ in range(6))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, n) for n in (4, 4, 6, 4, 4))
        self.towers = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(2))

    def mix(self, parts: Any, gate: nn.Module, h: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bed,be->bd", torch.stack(parts, 1), gate(h).softmax(-1))

    def forward(self, x: torch.Tensor) -> Any:
        h = self.inp(x)
        a, b, s = ([expert(h) for expert in experts] for experts in self.experts[:3])
        ha, hb, hs = (self.mix(p, g, h) for p, g in zip((a + s, b + s, a + b + s), self.gates[:3], strict=True))
        a, b, s = ([e(v) for e in experts] for experts, v in zip(self.experts[3:], (ha, hb, hs), strict=True))
        ends = zip((a + s, b + s), self.gates[3:], (ha, hb), self.towers, strict=True)
        return [tower(self.mix(p, g, v)) for p, g, v, tower in ends]


def test_experts_of_tasks_at_two_levels() -> None:
    net = Levels()
    found = infer(net, X)
    groups = {frozenset(names[0].rsplit(".", 2)[0] for names in e.params) for e in found.exchanges}
    assert groups == {frozenset({f"experts.{k}.{i}" for i in range(2)}) for k in range(6)}
    assert_sound(net, X, found)


def test_like_branches_beside_others() -> None:
    def mix(h: Any, scores: Any, experts: Any) -> Any:
        return torch.cat([experts[0](h), experts[1](h), h.relu(), experts[2](h)], 1).view(-1, 4, WIDTH).sum(1)

    (exchange,) = infer(Mixture(mix), X).exchanges
    assert {n.split(".")[1] for names in exchange.params for n in names} == {"0", "1"}


class Depthwise(nn.Module):
    """Depthwise convolutions beside each other: branches of every channel could be exchanged by themselves."""

    def __init__(self, join: Callable[..., Any]) -> None:
        super().__init__()
        self.inp, self.out, self.join = nn.Conv2d(2, WIDTH, 1), nn.Conv2d(WIDTH, 3, 1), join
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH), nn.BatchNorm2d(WIDTH)) for _ in range(COUNT)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inp(x).relu()
        return self.out(self.join([branch(h) for branch in self.branches]).relu())


IMAGES = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def test_depthwise_branches_are_exchanged_in_all_channels_at_once() -> None:
    net = Depthwise(lambda parts: torch.stack(parts).sum(0))
    found = infer(net, IMAGES)
    assert modules(found) == [(COUNT, 6)]
    assert [g.size for g in found.generators()] == [WIDTH]
    assert_sound(net, IMAGES, found)


def test_two_of_three_branches_in_a_difference() -> None:
    def join(parts: Any) -> Any:
        return torch.cat([sum(p[:, :2] for p in parts), parts[0][:, 2:] - 2 * parts[1][:, 2:] + parts[2][:, 2:]], 1)

    net = Depthwise(join)
    found = infer(net, IMAGES, verify=False)
    assert [{n.split(".")[1] for n in names} for names in found.exchanges[0].params] == [{"0"}, {"2"}]
    assert_sound(net, IMAGES, found)


def test_branches_that_are_interchangeable_in_some_channels_stay() -> None:
    def join(parts: Any) -> Any:
        return torch.cat([sum(p[:, :2] for p in parts), parts[0][:, 2:] - 2 * parts[1][:, 2:] + 3 * parts[2][:, 2:]], 1)

    net = Depthwise(join)
    found = infer(net, IMAGES, verify=False)
    assert not found.exchanges
    assert_sound(net, IMAGES, found)
