"""Experts on runs of sorted rows, cut by what python read: interchangeable in every spelling, not where they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge import infer, trace
from automerge._branches import stacked
from automerge._double import double_precision
from automerge.testing import assert_sound

WIDTH, HIDDEN, COUNT, CHOSEN = 6, 5, 4, 2
X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)) * 2


class Mixture(nn.Module):
    """A layer of experts that work on some of the rows each."""

    def __init__(self, mix: Callable[..., torch.Tensor], in_order: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inp, self.gate, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, COUNT, bias=False), nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)) for _ in range(COUNT)
        )
        self.table = nn.Parameter(torch.randn(len(X) * CHOSEN * 2, WIDTH))
        self.mix, self.in_order = mix, in_order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inp(x)
        weight, chosen = self.gate(h).softmax(-1).topk(CHOSEN, -1, sorted=self.in_order)
        weight = weight / weight.sum(-1, keepdim=True)
        return self.out(self.mix(h, weight, chosen, self.experts, self.table))


# -------------------------------------------------------------------- the same in other words
def _cut(stops: Any) -> Iterator[tuple[int, int, int]]:
    start = 0
    for e, stop in enumerate(stops):
        if stop > start:
            yield e, start, stop
        start = stop


def _added_where_they_came_from(h: Any, weight: Any, chosen: Any, experts: Any, _: Any) -> Any:
    flat, out = chosen.view(-1), torch.zeros_like(h)
    order = flat.argsort()
    for e, start, stop in _cut(flat.bincount().cpu().numpy().cumsum(0)):
        token = (order // CHOSEN)[start:stop]
        rows = experts[e](h[token]).mul_(weight.view(-1, 1)[order[start:stop]])
        out.scatter_add_(0, token.view(-1, 1).repeat(1, h.shape[-1]), rows)
    return out


def _reduced(h: Any, weight: Any, chosen: Any, experts: Any, _: Any) -> Any:
    flat, out = chosen.view(-1), torch.zeros_like(h)
    order = flat.argsort()
    for e, start, stop in _cut(flat.bincount(minlength=COUNT).cumsum(0).tolist()):
        rows = order[start:stop]
        made = experts[e](h[rows // CHOSEN]) * weight.view(-1)[rows].unsqueeze(-1)
        out = out.scatter_reduce(0, (rows // CHOSEN)[:, None].expand_as(made), made, "sum")
    return out


def _put_together(h: Any, weight: Any, chosen: Any, experts: Any, _: Any) -> Any:
    codes = chosen.new_zeros((len(chosen), COUNT)).scatter_(1, chosen, 1)
    order = chosen.view(-1).argsort()
    rows, start, parts = h[order // CHOSEN], 0, []
    for e, number in enumerate(codes.sum(0).cpu().numpy()):
        if number == 0:
            continue
        parts.append(experts[e](rows[start : start + number]))
        start = start + number
    parts = torch.cat(parts)
    back = torch.empty_like(parts)
    back[order] = parts
    return back.view(*chosen.shape, -1).mul_(weight.unsqueeze(-1)).sum(1)


def _split(h: Any, weight: Any, chosen: Any, experts: Any, _: Any) -> Any:
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    rows = h.repeat_interleave(CHOSEN, 0)[order].split(flat.bincount(minlength=COUNT).tolist())
    made = torch.cat([expert(part) for expert, part in zip(experts, rows, strict=True)])
    return (made[order.argsort()].view(-1, CHOSEN, WIDTH) * weight.unsqueeze(-1)).sum(1)


def _written_over_zeros(h: Any, weight: Any, chosen: Any, experts: Any, _: Any) -> Any:
    flat, order = chosen.view(-1).sort()
    counts, rows, start = flat.bincount(minlength=COUNT), h[order // CHOSEN], 0
    made = torch.zeros(len(flat), WIDTH)
    for e, expert in enumerate(experts):
        stop = start + int(counts[e])
        if stop > start:
            made[start:stop] = expert(rows[start:stop])
        start = stop
    return torch.zeros_like(h).index_add_(0, order // CHOSEN, made * weight.view(-1)[order][:, None])


def _asked_one_by_one(h: Any, weight: Any, chosen: Any, experts: Any, _: Any) -> Any:
    flat, parts, start = chosen.view(-1), [], 0
    order = flat.argsort()
    for e, number in enumerate(F.one_hot(flat, COUNT).sum(0)):
        if number == 0:
            continue
        parts.append(experts[e](h[order // CHOSEN][start : start + number]))
        start = start + number
    made = torch.cat(parts)
    back = torch.zeros_like(made).index_copy(0, order, made)
    return torch.einsum("nkd,nk->nd", back.view(-1, CHOSEN, WIDTH), weight)


def _skipped_by_number(h: Any, weight: Any, chosen: Any, experts: Any, _: Any) -> Any:
    out, counts = torch.zeros_like(h), torch.bincount(chosen.flatten(), minlength=COUNT).tolist()
    for e, expert in enumerate(experts):
        if counts[e] == 0:
            continue
        token, slot = torch.where(chosen == e)
        out[token] += expert(h[token]) * weight[token, slot, None]
    return out


def _one_after_the_other(between: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Every layer cuts the same rows, and puts them together (JetMoe)."""

    def mix(h: Any, weight: Any, chosen: Any, experts: Any, _: Any) -> Any:
        order = chosen.flatten().argsort()
        counts = torch.zeros(len(h), COUNT).scatter(1, chosen, 1).long().sum(0).tolist()
        rows, weights = h[order // CHOSEN], weight.flatten()[order]
        rows = torch.cat([expert[0](part) for expert, part in zip(experts, rows.split(counts), strict=True)])
        rows = between(rows, weights)
        rows = torch.cat([expert[2](part) for expert, part in zip(experts, rows.split(counts), strict=True)])
        return torch.zeros_like(h).index_add(0, order // CHOSEN, rows * weights[:, None])

    return mix


_layer_by_layer = _one_after_the_other(lambda rows, _: rows.relu())
_layer_by_layer.__name__ = "_layer_by_layer"
SPELLINGS = (
    *(_added_where_they_came_from, _reduced, _put_together, _split, _written_over_zeros, _asked_one_by_one),
    *(_skipped_by_number, _layer_by_layer),
)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("mix", SPELLINGS, ids=lambda f: f.__name__)
def test_spellings(mix: Callable[..., Any], in_order: bool) -> None:
    net = Mixture(mix, in_order)
    for symmetry in (infer(net, X), infer(net, X, verify=False)):
        (exchange,) = symmetry.exchanges
        assert (exchange.size, len(exchange.params[0])) == (COUNT, 4)
        assert {s.param for s in exchange.slots} == {"gate.weight"}
        assert sorted(g.size for g in symmetry.generators()) == [*[HIDDEN] * COUNT, WIDTH, WIDTH]
    assert_sound(net, X, symmetry)
    assert_sound(net, X[:7], symmetry)  # some experts get no row


BETWEEN: dict[str, tuple[Callable[[Any, Any], Any], bool]] = {  # and whether every row is treated alone
    "its own parts": (lambda r, w: r.view(len(r), -1)[:, :HIDDEN].clone() * (1 + r[:, :HIDDEN].sigmoid()), True),
    "a weight of its own": (lambda r, w: torch.tanh(r) * w[:, None], True),
    "softmax of the row": (lambda r, w: r.softmax(-1) + r, True),
    "the mean of all": (lambda r, w: r - r.mean(0), False),
    "softmax of all": (lambda r, w: r.softmax(0), False),
    "the next": (lambda r, w: r.relu().roll(1, 0), False),
    "turned": (lambda r, w: r.relu().flip(0), False),
    "so far": (lambda r, w: r.relu().cumsum(0), False),
    "half": (lambda r, w: torch.cat([r[len(r) // 2 :], r[: len(r) // 2]]), False),
}


@pytest.mark.parametrize("how", BETWEEN)
def test_what_is_done_between_layers_of_experts(how: str) -> None:
    """A second layer cuts the same rows that the first has put together."""
    between, alone = BETWEEN[how]
    net = Mixture(_one_after_the_other(between))
    for symmetry in (infer(net, X), infer(net, X, verify=False)):
        if alone:
            (exchange,) = symmetry.exchanges
            assert (exchange.size, len(exchange.params[0])) == (COUNT, 4)
            assert sorted(g.size for g in symmetry.generators()) == [*[HIDDEN] * COUNT, WIDTH, WIDTH]
        assert_sound(net, X, symmetry)
        assert_sound(net, X[:7], symmetry)


# -------------------------------------------------------------------- experts that are told apart
def _changed(change: Callable[..., Any]) -> Callable[..., Any]:
    """Runs put together, each changed by what is known of it."""

    def mix(h: Any, weight: Any, chosen: Any, experts: Any, table: Any) -> Any:
        flat = chosen.view(-1)
        order = flat.argsort()
        made = []
        for e, start, stop in _cut(flat.bincount(minlength=COUNT).cumsum(0).tolist()):
            made.append(change(experts[e](h[order // CHOSEN][start:stop]), e, start, stop, table))
        back = torch.zeros(len(flat), WIDTH).index_copy(0, order, torch.cat(made))
        return (back.view(-1, CHOSEN, WIDTH) * weight.unsqueeze(-1)).sum(1)

    return mix


def _numbered(h: Any, weight: Any, chosen: Any, experts: Any, table: Any) -> Any:
    """The place in the sorted rows decides which row of a table is added."""
    flat = chosen.view(-1)
    order = flat.argsort()
    made = [
        experts[e](h[order // CHOSEN][start:stop]) + table[: len(flat)][start:stop]
        for e, start, stop in _cut(flat.bincount(minlength=COUNT).cumsum(0).tolist())
    ]
    back = torch.zeros(len(flat), WIDTH).index_copy(0, order, torch.cat(made))
    return (back.view(-1, CHOSEN, WIDTH) * weight.unsqueeze(-1)).sum(1)


def _left_in_order(h: Any, weight: Any, chosen: Any, experts: Any, table: Any) -> Any:
    """The rows are not put back, so that the number of an expert decides where its rows come out."""
    flat = chosen.view(-1)
    order = flat.argsort()
    made = [
        experts[e](h[order // CHOSEN][start:stop])
        for e, start, stop in _cut(flat.bincount(minlength=COUNT).cumsum(0).tolist())
    ]
    return torch.cat(made)[: len(h)]


def _in_turn(h: Any, weight: Any, chosen: Any, experts: Any, table: Any) -> Any:
    """Every expert sees what the one before it made."""
    flat, out = chosen.view(-1), h
    order = flat.argsort()
    for e, start, stop in _cut(flat.bincount(minlength=COUNT).cumsum(0).tolist()):
        token = (order // CHOSEN)[start:stop]
        out = out.index_add(0, token, experts[e](out[token]))
    return out


def _one_is_asked_for(h: Any, weight: Any, chosen: Any, experts: Any, table: Any) -> Any:
    """Python looks at one number alone."""
    out = _split(h, weight, chosen, experts, table)
    return out * 2 if int((chosen == 0).sum()) > 0 else out


DIFFERENT = {
    "number": _changed(lambda rows, e, start, stop, table: rows * (e + 1)),
    "how many": _changed(lambda rows, e, start, stop, table: rows / (stop - start)),
    "where it begins": _changed(lambda rows, e, start, stop, table: rows + start),
    "table by place": _changed(lambda rows, e, start, stop, table: rows + table[start:stop]),
    "another operator": _changed(lambda rows, e, start, stop, table: rows.relu() if e % 2 else rows),
    "numbered": _numbered,
    "left in order": _left_in_order,
    "in turn": _in_turn,
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_experts_that_differ_stay(what: str) -> None:
    assert not infer(Mixture(DIFFERENT[what]), X, verify=False).exchanges
    infer(Mixture(DIFFERENT[what]), X)  # verified


def test_a_row_of_a_table_for_every_expert_goes_with_it() -> None:
    def added(rows: Any, e: int, start: int, stop: int, table: Any) -> Any:
        return rows + table[e]

    net = Mixture(_changed(added))
    (exchange,) = infer(net, X, verify=False).exchanges
    assert {s.param for s in exchange.slots} == {"gate.weight", "table"}
    assert_sound(net, X, infer(net, X))


def test_an_expert_that_python_asks_for_stays() -> None:
    (exchange,) = infer(Mixture(_one_is_asked_for), X, verify=False).exchanges
    assert {n.split(".")[1] for names in exchange.params for n in names} == {"1", "2", "3"}


def test_rows_of_a_run_may_meet_without_being_exchanged_wrongly() -> None:
    """Rows of one expert that meet (a mean over them) cannot be read as all rows."""

    def centred(rows: Any, e: int, start: int, stop: int, table: Any) -> Any:
        return rows - rows.mean(0)

    net = Mixture(_changed(centred))
    assert_sound(net, X, infer(net, X, verify=False))


def test_places_within_a_run_are_no_places_among_all_rows() -> None:
    """The first row of every run gets the first row of the table; other inputs have other runs."""

    def placed(rows: Any, e: int, start: int, stop: int, table: Any) -> Any:
        return rows + table[: stop - start]

    net = Mixture(_changed(placed))
    assert_sound(net, X, infer(net, X, verify=False))


def test_equal_runs_may_be_cut_for_another_reason() -> None:
    def halved(h: Any, weight: Any, chosen: Any, experts: Any, table: Any) -> Any:
        order = chosen.view(-1).argsort()
        rows = h[order // CHOSEN].chunk(COUNT)
        counts = chosen.view(-1).bincount(minlength=COUNT).tolist()
        made = torch.cat([expert(part) for expert, part in zip(experts, rows, strict=True)])
        return (made[order.argsort()].view(-1, CHOSEN, WIDTH) * weight.unsqueeze(-1)).sum(1) * (sum(counts) > 0)

    net = Mixture(halved)
    with torch.no_grad():  # as many rows for each
        net.inp.weight.copy_(torch.eye(WIDTH, 4))
        net.inp.bias.zero_()
        net.gate.weight.copy_(torch.eye(COUNT, WIDTH) * 3)
    x = torch.eye(4).repeat(3, 1) + torch.eye(4).roll(1, 1).repeat(3, 1) / 2
    with torch.no_grad():
        assert net.gate(net.inp(x)).topk(CHOSEN).indices.flatten().bincount().tolist() == [6] * COUNT
    assert not infer(net, x, verify=False).exchanges


@pytest.mark.parametrize("mix", SPELLINGS, ids=lambda f: f.__name__)
def test_the_graph_with_stacks_computes_the_same_on_other_rows(mix: Callable[..., Any]) -> None:
    """No length that python read is left in it."""
    net = Mixture(mix)
    found = stacked([trace(net, X)])
    assert found is not None
    state = net.double().state_dict()
    x = torch.randn(X.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (graph,) = found.graphs
    given = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            names = np.atleast_1d(found.stacks.get(node.meta["name"], np.array(node.meta["name"], dtype=object)))
            parts = [state[n] for n in names] if node.meta["kind"] == "state" else [x]
            given.append(torch.stack(parts) if node.meta["name"] in found.stacks else parts[0])
    with torch.no_grad(), double_precision():
        (made,) = graph(*given)
        torch.testing.assert_close(made, net(x), rtol=1e-9, atol=1e-12)
