"""Branches that do the same with other weights: interchangeable in every spelling, and not where they differ."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from automerge import infer, trace
from automerge._branches import stacked
from automerge._double import double_precision
from automerge.testing import assert_sound
from tests.inference._mixtures import COUNT, HIDDEN, WIDTH, Mixture, X, modules, summed


def _written(h: Any, scores: Any, experts: Any) -> Any:
    out, g = torch.zeros_like(h), scores.softmax(-1)
    for e, expert in enumerate(experts):
        out += g[:, e, None] * expert(h)
    return out


def _stacked(h: Any, scores: Any, experts: Any) -> Any:
    return (torch.stack([expert(h) for expert in experts], 1) * scores.sigmoid()[..., None]).sum(1)


def _joined(h: Any, scores: Any, experts: Any) -> Any:
    pieces = torch.cat([expert(h) for expert in experts], 1).view(len(h), COUNT, WIDTH)
    return torch.einsum("bed,be->bd", pieces, scores.softmax(-1))


def _residual(h: Any, scores: Any, experts: Any) -> Any:
    g = scores.softmax(-1).unbind(1)
    return h + g[0][:, None] * experts[0](h) + g[1][:, None] * experts[1](h) + g[2][:, None] * experts[2](h)


def _best(h: Any, scores: Any, experts: Any) -> Any:
    weight, chosen = scores.softmax(-1).topk(2, -1)
    return sum(((chosen == e) * weight).sum(-1, keepdim=True) * m(h) for e, m in enumerate(experts))


def _sent(h: Any, scores: Any, experts: Any) -> Any:
    weight, chosen = scores.softmax(-1).topk(2, -1)
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        token, slot = torch.where(chosen == e)
        out.index_add_(0, token, expert(h[token]) * weight[token, slot, None])
    return out


def _sent_one_hot(h: Any, scores: Any, experts: Any) -> Any:
    weight, chosen = scores.softmax(-1).topk(2, -1)
    weight, mask = weight / weight.sum(-1, keepdim=True), F.one_hot(chosen, COUNT).permute(2, 1, 0)
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        slot, token = torch.where(mask[e])
        rows = h[None, token].reshape(-1, WIDTH)
        out.index_add_(0, token, expert(rows) * weight[token, slot, None])
    return out


def _sent_added(h: Any, scores: Any, experts: Any) -> Any:
    weight, chosen = scores.softmax(-1).topk(2, -1)
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        token, slot = torch.where(chosen == e)
        out[token] += weight[token, slot, None] * expert(h[token])
    return out


def _sent_added_one_hot(h: Any, scores: Any, experts: Any) -> Any:
    weight, chosen = scores.softmax(-1).topk(2, -1)
    mask = F.one_hot(chosen.view(-1, 2), COUNT).permute(2, 1, 0)
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        slot, token = torch.where(mask[e])
        out[token] += weight[token, slot, None] * expert(h[token])
    return out


def _sent_to_one(h: Any, scores: Any, experts: Any) -> Any:
    weight, chosen = scores.softmax(-1).max(-1)
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        mask = chosen == e
        if mask.any():
            out[mask] = expert(h[mask]) * weight[mask][:, None]
    return out


def _sent_to_empty(h: Any, scores: Any, experts: Any) -> Any:
    weight, chosen = scores.softmax(-1).topk(2, -1)
    rows, chosen = h.repeat_interleave(2, 0), chosen.view(-1)
    out = torch.empty_like(rows)
    for e, expert in enumerate(experts):
        out[chosen == e] = expert(rows[chosen == e])
    return (out.view(*weight.shape, -1) * weight[..., None]).sum(1)


def _sent_if_any(h: Any, scores: Any, experts: Any) -> Any:
    weight, chosen = scores.softmax(-1).topk(2, -1)
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        mask = (chosen == e).any(-1)
        if mask.any():
            share = (weight * (chosen == e)).sum(-1)[mask]
            out[mask] += share[:, None] * expert(h[mask])
    return out


def _sent_to_those_hit(h: Any, scores: Any, experts: Any) -> Any:
    weight, chosen = scores.softmax(-1).topk(2, -1)
    mask = F.one_hot(chosen, COUNT).permute(2, 1, 0)
    out = torch.zeros_like(h)
    for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        slot, token = torch.where(mask[e].squeeze(0))
        rows = h[None, token].reshape(-1, WIDTH)
        out.index_add_(0, token, experts[e](rows) * weight[token, slot, None])
    return out


def _sent_to_those_hit_of_one_more(h: Any, scores: Any, experts: Any) -> Any:
    """One class more than experts, for rows that are sent to none."""
    weight, chosen = scores.softmax(-1).topk(2, -1)
    mask = F.one_hot(chosen, COUNT + 1).permute(2, 1, 0)
    out = torch.zeros_like(h)
    for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        e = hit[0]
        if e == COUNT:
            continue
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, experts[e](h[token]) * weight[token, slot, None])
    return out


def _sent_to_those_hit_by_number(h: Any, scores: Any, experts: Any) -> Any:
    """Each is a tensor of one number, which python reads wherever it is an index."""
    weight, chosen = scores.softmax(-1).topk(2, -1)
    mask = F.one_hot(chosen, COUNT).permute(2, 1, 0)
    out = torch.zeros_like(h)
    for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        slot, token = torch.where(mask[hit[0]])
        out.index_add_(0, token, experts[hit[0]](h[token]) * weight[token, slot, None])
    return out


def _let_through(h: Any, scores: Any, experts: Any) -> Any:
    """Every expert works on all rows, and a mask lets the chosen ones through."""
    weight, chosen = scores.softmax(-1).max(-1)
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        out = torch.where((chosen == e)[:, None], expert(h) * weight[:, None], out)
    return out


def _let_through_beside_zeros(h: Any, scores: Any, experts: Any) -> Any:
    chosen = scores.argmax(-1, keepdim=True)
    return sum(torch.where(chosen == e, expert(h), 0.0) for e, expert in enumerate(experts))


def _choosing_rows(h: Any, scores: Any, experts: Any) -> Any:
    """Experts choose their rows, not rows their experts."""
    weight, rows = scores.softmax(-1).t().topk(5, -1)
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        out.index_add_(0, rows[e], expert(h[rows[e]]) * weight[e][:, None])
    return out


def _choosing_rows_in_place(h: Any, scores: Any, experts: Any) -> Any:
    weight, rows = scores.sigmoid().topk(5, 0)
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        out[rows[:, e]] += expert(h[rows[:, e]]) * weight[:, e, None]
    return out


def _sent_by_rank(h: Any, scores: Any, experts: Any) -> Any:
    """All first choices, then all second ones: every expert is there twice."""
    weight, chosen = scores.softmax(-1).topk(2, -1)
    out = torch.zeros_like(h)
    for k in range(2):
        for e, expert in enumerate(experts):
            mask = chosen[:, k] == e
            if mask.any():
                out[mask] += weight[mask, k, None] * expert(h[mask])
    return out


def _sent_rank_by_rank(h: Any, scores: Any, experts: Any) -> Any:
    weight, chosen = scores.softmax(-1).topk(2, -1)
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        for k in range(2):
            mask = chosen[:, k] == e
            out[mask] += weight[mask, k, None] * expert(h[mask])
    return out


SPELLINGS = (
    *(summed, _written, _stacked, _joined, _residual, _best),
    *(_sent, _sent_one_hot, _sent_added, _sent_added_one_hot, _sent_to_one, _sent_to_empty, _sent_if_any),
    *(_sent_to_those_hit, _sent_to_those_hit_by_number, _sent_to_those_hit_of_one_more),
    *(_choosing_rows, _choosing_rows_in_place),
    *(_sent_by_rank, _sent_rank_by_rank, _let_through, _let_through_beside_zeros),
)


@pytest.mark.parametrize("mix", SPELLINGS, ids=lambda f: f.__name__)
def test_experts_kept_as_modules_are_interchangeable(mix: Callable[..., Any]) -> None:
    symmetry = infer(Mixture(mix), X)
    assert modules(symmetry) == [(COUNT, 4)]
    (exchange,) = symmetry.exchanges
    assert {(s.param, s.axis) for s in exchange.slots} == {("gate.weight", 0), ("gate.bias", 0)}
    assert set(exchange.params[1]) == {f"experts.1.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias")}
    assert sorted(g.size for g in symmetry.generators()) == [HIDDEN] * COUNT + [WIDTH] * (1 if mix is _residual else 2)
    assert not any(p.param.startswith("gate") for p in symmetry.pins)


@pytest.mark.parametrize("mix", SPELLINGS, ids=lambda f: f.__name__)
def test_an_expert_with_a_single_row_is_as_the_others(mix: Callable[..., Any]) -> None:
    net = Mixture(mix)
    assert modules(infer(net, net.alone(X), verify=False)) == [(COUNT, 4)]


class Gated(nn.Module):
    """A feed-forward layer with a gate, after a normalisation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.both, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 2 * HIDDEN),
            nn.Linear(HIDDEN, WIDTH, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.both(self.norm(x)).chunk(2, -1)
        return self.down(F.silu(a) * b)


def _deep() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.PReLU(), nn.Dropout(), _shallow())


def _shallow() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(HIDDEN, WIDTH))


def _low_rank() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH))


@given(st.sampled_from(SPELLINGS), st.sampled_from([Gated, _deep, _low_rank]))
@settings(max_examples=20, deadline=None)
def test_experts_of_any_kind_in_any_spelling(mix: Callable[..., Any], expert: Callable[[], nn.Module]) -> None:
    net = Mixture(mix, expert)
    symmetry = infer(net, X)
    (exchange,) = symmetry.exchanges
    own = {n.removeprefix("experts.0.") for n in symmetry.shapes if n.startswith("experts.0.")}
    assert {n.removeprefix("experts.0.") for n in exchange.params[0]} == own
    assert sum(g.size == HIDDEN for g in symmetry.generators()) == COUNT
    assert_sound(net, X, symmetry, elements=2)


@pytest.mark.parametrize("mix", SPELLINGS, ids=lambda f: f.__name__)
def test_the_graph_with_stacks_computes_the_same(mix: Callable[..., Any]) -> None:
    graph = trace(Mixture(mix), X)
    found = stacked([graph])
    assert found is not None
    (other,) = found.graphs
    state = {n.meta["name"]: n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"}
    with torch.no_grad(), double_precision():
        given = [_read(n.meta["name"], state, found.stacks) for n in other.graph.nodes if n.op == "placeholder"]
        (mine,) = graph(*(n.meta["val"].double() for n in graph.graph.nodes if n.op == "placeholder"))
        (its,) = other(*given)
    torch.testing.assert_close(its, mine, rtol=1e-9, atol=1e-9)


def _read(name: str, state: dict[str, torch.Tensor], stacks: Any) -> torch.Tensor:
    parts = stacks[name].tolist() if name in stacks else None
    return torch.stack([state[p] for p in parts]).double() if parts else state[name].double()


@pytest.mark.parametrize("join", [torch.minimum, torch.maximum, torch.mul, torch.add])
def test_any_operator_that_joins_in_any_order(join: Callable[..., Any]) -> None:
    """Two critics of which the lower counts."""
    (exchange,) = infer(Mixture(lambda h, _, experts: reduce(join, (e(h).tanh() for e in experts))), X).exchanges
    assert exchange.size == COUNT


class Attending(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(WIDTH, 2)

    def forward(self, x: Any) -> Any:
        return super().forward(x, x, x, need_weights=False)[0]


class Recurrent(nn.GRUCell):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        return super().forward(x.tanh(), x)


class Complex(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, dtype=torch.complex64)

    def forward(self, x: Any) -> Any:
        return super().forward(torch.complex(x, x)).real


EXPERTS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "attention views what it permuted": (Attending, 4),
    "half of an axis is a gate": (lambda: nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GLU()), 2),
    "thirds of an axis are gates": (Recurrent, 4),
    "complex": (Complex, 2),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of_all_kinds(name: str) -> None:
    expert, parameters = EXPERTS[name]
    assert modules(infer(Mixture(summed, expert), X)) == [(COUNT, parameters)]


# ---------------------------------------------------------------- what is no exchange
def _weighed(h: Any, scores: Any, experts: Any) -> Any:
    return sum((e + 1) * expert(h) for e, expert in enumerate(experts))


def _in_turn(h: Any, scores: Any, experts: Any) -> Any:
    for expert in experts:
        h = h + expert(h)
    return h


def _differently(h: Any, scores: Any, experts: Any) -> Any:
    g = scores.softmax(-1)
    return g[:, :1] * experts[0](h).relu() + g[:, 1:2] * experts[1](h).tanh() + g[:, 2:] * experts[2](h).sigmoid()


def _shifted_by_rank(h: Any, scores: Any, experts: Any) -> Any:
    """The second choice is served by the next expert."""
    weight, chosen = scores.softmax(-1).topk(2, -1)
    out = torch.zeros_like(h)
    for k in range(2):
        for e in range(COUNT):
            mask = chosen[:, k] == e
            out[mask] += weight[mask, k, None] * experts[(e + k) % COUNT](h[mask])
    return out


def _moved_on(h: Any, scores: Any, experts: Any) -> Any:
    return sum(expert(h.roll(e, 0)) for e, expert in enumerate(experts))


def _mean_of_rows(h: Any, scores: Any, experts: Any) -> Any:
    """Rows of one expert meet: those that it is not given must not count."""
    chosen = scores.argmax(-1)
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        mask = chosen == e
        rows = expert(h[mask])
        out[mask] = rows - rows.mean(0)
    return out


def _mean_that_counts_nothing(h: Any, scores: Any, experts: Any) -> Any:
    """As before, and made-up numbers give zero only."""
    chosen = scores.argmax(-1) + 1
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        mask = chosen == e + 1
        rows = expert(h[mask])
        out[mask] = (rows - rows.mean(0)) * (chosen[mask] == e + 1)[:, None]
    return out


def _overwritten(h: Any, scores: Any, experts: Any) -> Any:
    """The last expert wins."""
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        mask = scores[:, e] > 0
        out[mask] = expert(h[mask])
    return out


def _overwritten_by_second_choice(h: Any, scores: Any, experts: Any) -> Any:
    """A row goes to two experts, of which the last wins."""
    weight, chosen = scores.softmax(-1).topk(2, -1)
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        token, slot = torch.where(chosen == e)
        out[token] = expert(h[token]) * weight[token, slot, None]
    return out


def _named_twice(h: Any, scores: Any, experts: Any) -> Any:
    """Both columns may name the same expert, and of what it adds to a row twice one is lost."""
    out, chosen, weight = (
        torch.zeros_like(h),
        torch.stack([scores.argmax(-1), scores.argmax(-1)], 1),
        scores.softmax(-1),
    )
    for e, expert in enumerate(experts):
        token, slot = torch.where(chosen == e)
        out[token] += expert(h[token]) * weight[token, slot, None]
    return out


def _compared_by_python(h: Any, scores: Any, experts: Any) -> Any:
    """Which expert is larger decides."""
    sizes = [expert[0].weight.norm().item() for expert in experts]
    out = sum(expert(h) for expert in experts)
    return out.tanh() if sizes[0] > sizes[1] else out.sigmoid()


def _choosing_in_turn(h: Any, scores: Any, experts: Any) -> Any:
    """Every expert sees what those before it added."""
    rows = scores.t().topk(5, -1).indices
    for e, expert in enumerate(experts):
        h = h.index_add(0, rows[e], expert(h[rows[e]]))
    return h


def _choosing_over(h: Any, scores: Any, experts: Any) -> Any:
    """What an expert writes stays unless a later one writes there."""
    rows, out = scores.t().topk(5, -1).indices, torch.zeros_like(h)
    for e, expert in enumerate(experts):
        out[rows[e]] = expert(h[rows[e]])
    return out


def _let_through_over(h: Any, scores: Any, experts: Any) -> Any:
    """Masks that do not exclude each other: a later expert covers an earlier one."""
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        out = torch.where((scores[:, e] > 0)[:, None], expert(h), out)
    return out


def _let_through_or_as_before(h: Any, scores: Any, experts: Any) -> Any:
    """Each expert works on what the others left."""
    chosen, out = scores.argmax(-1, keepdim=True), h
    for e, expert in enumerate(experts):
        out = torch.where(chosen == e, expert(out), out.roll(1, 0))
    return out


def _let_through_along_another_axis(h: Any, scores: Any, experts: Any) -> Any:
    """The masks exclude each other by number, but are laid along different axes."""
    chosen, square = scores.argmax(-1)[:WIDTH], torch.zeros(WIDTH, WIDTH)
    square = torch.where((chosen == 0)[:, None], experts[0](h[:WIDTH]), square)
    square = torch.where((chosen == 1)[None], experts[1](h[:WIDTH]), square)
    return torch.where((chosen == 2)[:, None], experts[2](h[:WIDTH]), square)


DIFFERENT = (
    _let_through_along_another_axis,
    *(_let_through_over, _let_through_or_as_before),
    *(_choosing_in_turn, _choosing_over),
    *(_weighed, _in_turn, _differently, _shifted_by_rank, _moved_on, _mean_of_rows, _overwritten),
    *(_overwritten_by_second_choice, _compared_by_python),
)


@pytest.mark.parametrize("mix", DIFFERENT, ids=lambda f: f.__name__)
def test_branches_that_differ_stay(mix: Callable[..., Any]) -> None:
    assert not infer(Mixture(mix), X).exchanges
    assert not infer(Mixture(mix), X, verify=False).exchanges


def test_what_python_asks_of_every_unit_pins_them() -> None:
    """All are positive here; where they are not, the program may go on differently for each."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.out = nn.Linear(4, 3), nn.Linear(3, 2)
            self.parts = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inp(x).sigmoid() + 1
            y = self.out(h)
            for i in range(3):
                if h[0, i] > 0:
                    y = y * (i + 2)
            return y + sum(part(x) for part in self.parts)

    found = infer(Asks(), X, verify=False)
    assert not [g for g in found.generators() if g.size == 3]
    assert modules(found) == [(3, 2)]


class Kernels(nn.Module):
    """A sum of kernels, each of which asks whether it was given one set of points twice."""

    def __init__(self, asked: Callable[[list[torch.Tensor]], Any]) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(5, 4))
        self.widths = nn.ParameterList(nn.Parameter(torch.rand(4) + 0.5) for _ in range(COUNT))
        self.asked = asked

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = [(x / w, self.points / w) for w in self.widths]
        self.asked([a for a, _ in scaled])
        return sum(torch.eye(5) if torch.equal(a, b) else torch.cdist(a, b).neg().exp() for a, b in scaled)


def test_branches_that_ask_whether_two_tensors_are_equal() -> None:
    free, asked = Kernels(lambda points: None), Kernels(lambda points: torch.equal(points[0], points[1]))
    assert [e.size for e in infer(free, X[:5]).exchanges] == [COUNT]
    assert not infer(asked, X[:5]).exchanges  # two branches are held against each other


def test_units_that_data_choose_by_their_place_stay() -> None:
    """All units are chosen here; where some are not, the others meet other rows of the table."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.table = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 2))
            self.parts = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inp(x).sigmoid()
            places = (h.mean(0) > 0.001).nonzero()[:, 0]
            return h[:, places] @ self.table[: len(places)] + sum(part(x) for part in self.parts)

    assert not infer(Chosen(), X, verify=False).generators()


def test_rows_that_meet_are_not_read_as_all_rows() -> None:
    """All rows can be read only where each is treated alike, and no place is written twice."""
    for mix in (_overwritten_by_second_choice, _named_twice, _mean_of_rows, _mean_that_counts_nothing):
        found = stacked([trace(Mixture(mix), X)])
        assert found is None or not found.stacks


@pytest.mark.parametrize("listed", [lambda places: places.tolist(), lambda places: [int(p) for p in places]])
def test_units_that_python_lists_stay(listed: Callable[[Any], list[int]]) -> None:
    """All are listed here; where some are not, the others meet other rows of the table."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.table = nn.Linear(4, 5), nn.Parameter(torch.randn(5, 3))
            self.parts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inp(x).sigmoid()
            places = listed((h.mean(0) > 0.001).nonzero()[:, 0])
            return h[:, places] @ self.table[: len(places)] + sum(part(x) for part in self.parts)

    assert not infer(Listed(), X, verify=False).generators()


def test_experts_that_python_counts_among_those_hit_stay() -> None:
    """All are hit here; one token reaches two, and then the third meets the second row of the table."""

    class Counted(Mixture):
        def __init__(self) -> None:
            super().__init__(summed)
            self.table = nn.Parameter(torch.randn(COUNT, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inp(x)
            weight, chosen = self.gate(h).softmax(-1).topk(2, -1)
            out = torch.zeros_like(h)
            for turn, e in enumerate(F.one_hot(chosen, COUNT).sum((0, 1)).nonzero()):
                token, slot = torch.where(chosen == e)
                out.index_add_(0, token, self.experts[e](h[token]) * weight[token, slot, None] * self.table[turn])
            return self.out(out)

    assert not infer(Counted(), X).exchanges


def test_rows_that_are_put_back_by_their_place_stay() -> None:
    """Every row is chosen here; where some are not, the others meet other rows of the table."""

    class Put(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.table, self.rows = (nn.Linear(4, 5), *(nn.Parameter(torch.randn(5, 3)) for _ in range(2)))
            self.parts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inp(x).sigmoid()
            places = (h.mean(0) > 0.001).nonzero()[:, 0]
            made = torch.zeros(5, 3).index_add(0, places, self.rows[places] * self.table[: len(places)])
            return h @ made + sum(part(x) for part in self.parts)

    assert not [g for g in infer(Put(), X, verify=False).generators() if g.size == 5]


@pytest.mark.parametrize(
    ("read", "free"),
    [
        (lambda rows, flags: rows.tanh(), True),
        (lambda rows, flags: rows * rows[0], False),
        (lambda rows, flags: rows * rows[-1], False),
        (lambda rows, flags: rows * (rows[0] < 0), False),
        (lambda rows, flags: rows * (1 + flags[0]), False),
        (lambda rows, flags: rows * torch.where(flags[0] > 0, 2.0, 3.0), False),
    ],
    ids=["alike", "first", "last", "sign", "whole numbers", "mask"],
)
def test_units_of_which_the_first_that_data_choose_counts_stay(read: Callable[[Any, Any], Any], free: bool) -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
            self.parts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

        def forward(self, x: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
            h = self.inp(x)
            mask, made = h.mean(0) > h.mean(), torch.zeros_like(h.T)
            made[mask] = read(h.T[mask], flags[mask])
            return self.out(made.T) + sum(part(x) for part in self.parts)

    torch.manual_seed(0)
    found = infer(Chosen(), (X, torch.arange(6) % 2), verify=False)
    assert [g.size for g in found.generators()] == [6] * free


def test_a_module_that_is_used_elsewhere_too_stays() -> None:
    class Twice(Mixture):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inp(x)
            return self.out(self.mix(h, self.gate(h), self.experts) + self.experts[0](h).tanh())

    (exchange,) = infer(Twice(summed), X, verify=False).exchanges
    assert {n.split(".")[1] for names in exchange.params for n in names} == {"1", "2"}
    infer(Twice(summed), X)


def test_tied_experts_are_one() -> None:
    net = Mixture(summed)
    net.experts[1] = net.experts[0]
    assert not any(len(set(e.params)) < e.size for e in infer(net, X).exchanges)
    infer(net, X)  # verified


def test_an_expert_that_no_row_is_sent_to_is_one_of_them() -> None:
    """What it would do with rows is written in the branch that it is."""
    net = Mixture(_sent)
    with torch.no_grad():
        net.gate.bias[1] = -1e6
    (exchange,) = infer(net, X, verify=False).exchanges
    assert {n.split(".")[1] for names in exchange.params for n in names} == {"0", "1", "2"}
    assert_sound(net, X, infer(net, X))


def test_an_expert_that_no_row_is_sent_to_moves_with_the_others() -> None:
    """What permutes the others' inputs permutes its inputs, though the recorded pass does not show it."""

    def mix(h: Any, scores: Any, experts: Any) -> Any:
        chosen, out = scores.argmax(-1), torch.zeros_like(h)
        for e, expert in enumerate(experts):
            rows = (chosen == e) & (h[:, 0] > 0)
            out[rows] += expert(h[rows])
        return out

    net = Mixture(mix)
    with torch.no_grad():
        net.gate.bias[1] = -1e6
    symmetry = infer(net, X, verify=False)
    moving = [{s.param for s in g.slots} for g in symmetry.generators() if g.size == WIDTH - 1]
    for names in (names for names in moving if "inp.weight" in names):
        assert names >= {f"experts.{e}.0.weight" for e in range(COUNT)}


def test_rows_of_which_none_was_chosen_leave_nothing_free() -> None:
    """An expert that is used for all rows, too, has its outputs in two places, though no row is sent to it here."""

    def mix(h: Any, scores: Any, experts: Any) -> Any:
        chosen, out = scores.argmax(-1), torch.zeros_like(h)
        for e, expert in enumerate(experts):
            out[chosen == e] += expert(h[chosen == e])
        return torch.cat([out, *(expert(h) for expert in experts)], 1)

    net = Mixture(mix)
    net.out = nn.Linear(4 * WIDTH, 3)
    with torch.no_grad():
        net.gate.bias[1] = -1e6
    symmetry = infer(net, X, verify=False)
    with torch.no_grad():
        net.gate.bias[1] = 0
    assert_sound(net, X, symmetry)
    assert sorted(g.size for g in symmetry.generators()) == [HIDDEN] * 3 + [WIDTH] * 2


def test_an_exchange_that_does_not_hold_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in what branches show must not end inference; what the recorded graph shows is kept."""
    sound = infer(Mixture(summed), X)
    inference = importlib.import_module("automerge._derive")
    monkeypatch.setattr(inference, "_read", lambda exchange, *_: replace(exchange, slots=()))
    found = infer(Mixture(summed), X)
    assert not found.exchanges
    assert found.generators() == sound.generators()
    assert any("please report it" in note for note in found.notes)


class Started(nn.Module):
    """Scale and shift that are used once a flag is set, as in flows that are initialised by their first data."""

    def __init__(self, done: float) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(1, 4))
        self.register_buffer("done", torch.tensor(done))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.done > 0:
            return x, torch.zeros(())
        return (x - self.shift) * torch.exp(-self.scale), -self.scale.sum()


class Flow(nn.Module):
    def __init__(self, *done: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Started(d) for d in done)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(len(x))
        for layer in self.layers:
            x, change = layer(x)
            total = total + change
        return total - 0.5 * (x**2).sum(1)


@pytest.mark.parametrize("done", [(1.0, 1.0, 1.0), (1.0, 2.0, 0.0), (1.0, 1.0, 0.0, 0.0)])
def test_flags_that_python_looks_at_are_not_exchanged(done):
    assert infer(Flow(*done), torch.randn(5, 4), verify=False).exchanges == ()


class Scaled(nn.Module):
    """A number that python takes from the state; the trace has it as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x)) * self.scale.item()


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Scaled() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(branch(x) for branch in self.branches)


def test_branches_whose_own_numbers_python_takes_are_told_apart():
    found = infer(Scales(), torch.randn(3, 4), verify=False)
    assert found.exchanges == ()
    assert_sound(Scales(), torch.randn(3, 4), found)
