"""Ways to route tokens to experts: the experts may be permuted in each, but where a position itself is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from automerge import infer
from automerge.testing import assert_sound

COUNT, WIDTH, HIDDEN = 4, 6, 8
X = torch.linspace(-2, 2, 24).cos().mul(3).sin().reshape(8, 3)
Route = Callable[[Any, Tensor], Tensor]


class Routed(nn.Module):
    """Experts with stacked weights, and a way to choose them."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.gate, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, COUNT), nn.Linear(WIDTH, 2)
        self.up = nn.Parameter(torch.randn(COUNT, WIDTH, HIDDEN))
        self.down = nn.Parameter(torch.randn(COUNT, HIDDEN, WIDTH))
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(h + self.route(self, h))

    def all(self, h: Tensor, weight: Tensor) -> Tensor:
        """Every expert for every token, weighted."""
        hidden = torch.einsum("td,edh->teh", h, self.up).relu()
        return (torch.einsum("teh,ehd->ted", hidden, self.down) * weight[..., None]).sum(1)

    def some(self, h: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The chosen experts of every token, weighted."""
        hidden = torch.einsum("td,tkdh->tkh", h, self.up[index]).relu()
        return (torch.einsum("tkh,tkhd->tkd", hidden, self.down[index]) * weight[..., None]).sum(1)

    def best(self, h: Tensor) -> tuple[Tensor, Tensor]:
        weight, index = self.gate(h).softmax(-1).topk(2, -1)
        return weight, index


FREE: dict[str, Route] = {}
PINNED: dict[str, Route] = {}
TIED: dict[str, Route] = {}  # the experts move with those features that they are compared with


def free(route: Route) -> Route:
    FREE[route.__name__] = route
    return route


def pinned(route: Route) -> Route:
    PINNED[route.__name__] = route
    return route


def tied(route: Route) -> Route:
    TIED[route.__name__] = route
    return route


@free
def best_and_second_best_stacked(s, h):
    scores = s.gate(h)
    one = scores.argmax(-1)
    two = scores.masked_fill(F.one_hot(one, COUNT).bool(), float("-inf")).argmax(-1)
    index = torch.stack([one, two], -1)
    return s.some(h, index, scores.gather(-1, index).softmax(-1))


@free
def best_and_second_best_joined(s, h):
    p = s.gate(h).softmax(-1)
    v, one = p.max(-1, keepdim=True)
    w, two = p.scatter(-1, one, 0.0).max(-1, keepdim=True)
    return s.some(h, torch.cat([one, two], -1), torch.cat([v, w], -1))


@free
def columns_joined_in_another_order(s, h):
    w, i = s.best(h)
    return s.some(h, torch.cat([i[:, 1:], i[:, :1]], 1), torch.cat([w[:, 1:], w[:, :1]], 1))


@free
def columns_stacked(s, h):
    w, i = s.best(h)
    return s.some(h, torch.stack([i[:, 1], i[:, 0]], 1), torch.stack([w[:, 1], w[:, 0]], 1))


@free
def compared_with_all_numbers(s, h):
    w, i = s.best(h)
    return s.all(h, ((i[..., None] == torch.arange(COUNT)) * w[..., None]).sum(1))


@free
def masked_where_the_number_differs(s, h):
    p = s.gate(h).softmax(-1)
    return s.all(h, p.masked_fill(torch.arange(COUNT) != p.argmax(-1)[:, None], 0.0))


@free
def two_choices_compared(s, h):
    one, two = s.gate(h).argmax(-1), F.linear(h, s.gate.weight).argmax(-1)
    return s.some(h, torch.stack([one, two], 1), torch.ones(len(h), 2)) * (1.0 + (one == two))[:, None]


@free
def read_beside_the_token(s, h):
    w, i = s.best(h)
    y = torch.einsum("teh,ehd->ted", torch.einsum("td,edh->teh", h, s.up).relu(), s.down)
    return (y[torch.arange(len(h))[:, None], i] * w[..., None]).sum(1)


@free
def written_beside_the_token(s, h):
    w, i = s.best(h)
    mask = torch.zeros(len(h), COUNT)
    mask[torch.arange(len(h))[:, None], i] = w
    return s.all(h, mask)


@free
def the_worst_struck_out(s, h):
    scores = s.gate(h).clone()
    scores[torch.arange(len(h)), scores.argmin(-1)] = float("-inf")
    return s.all(h, scores.softmax(-1))


@free
def seen_experts(s, h):
    w, i = s.best(h)
    seen = torch.zeros(COUNT)
    seen[i.reshape(-1)] = 1.0
    return s.some(h, i, w) + (seen * s.gate(h)).sum(-1, keepdim=True)


@free
def load_counted(s, h):
    w, i = s.best(h)
    load = torch.bincount(i.reshape(-1), minlength=COUNT)
    return s.some(h, i, w) + (load * s.gate(h)).sum(-1, keepdim=True)


@free
def load_in_bins(s, h):
    w, i = s.best(h)
    load = torch.histc(i.float(), bins=COUNT, min=0, max=COUNT)
    return s.some(h, i, w) + (load * s.gate(h)).sum(-1, keepdim=True)


@free
def taken_along(s, h):
    p = s.gate(h).softmax(-1)
    i = p.argsort(-1, descending=True)[:, :2]
    return s.some(h, i, torch.take_along_dim(p, i, 1))


@free
def brought_into_range(s, h):
    w, i = s.best(h)
    return s.some(h, i.clamp(0, COUNT - 1).clamp(min=-1), w)


def compared_backwards(s, h):
    p = s.gate(h).softmax(-1)
    return s.all(h, p.masked_fill(torch.arange(COUNT).flip(0) != p.argmax(-1)[:, None], 0.0))


@pinned
def compared_in_a_circle(s, h):
    p = s.gate(h).softmax(-1)
    return s.all(h, p.masked_fill(torch.tensor([1, 2, 0, *range(3, COUNT)]) != p.argmax(-1)[:, None], 0.0))


@tied
def compared_with_a_choice_of_others(s, h):
    w, i = s.best(h)
    return s.some(h, i, w) * (1.0 + (i[:, 0] == torch.sort(h[:, :COUNT])[1][:, 0]))[:, None]


@tied
def joined_with_a_choice_of_others(s, h):
    w, i = s.best(h)
    return s.some(h, torch.stack([i[:, 0], h[:, :COUNT].argmax(-1)], 1), w)


@pinned
def joined_with_a_number(s, h):
    w, i = s.best(h)
    return s.some(h, torch.cat([i[:, :1], torch.zeros_like(i[:, :1])], 1), w)


@pinned
def a_piece_moved_on(s, h):
    w, i = s.best(h)
    return s.some(h, (i[:, :1] + 1) % COUNT, w[:, :1])


@pinned
def clamped_to_fewer(s, h):
    w, i = s.best(h)
    return s.some(h, i.clamp(max=COUNT - 2), w)


@pinned
def numbered_around(s, h):
    w, i = s.best(h)
    return s.some(h, i.remainder(COUNT - 1), w)


@pinned
def other_numbers_joined(s, h):
    w, i = s.best(h)
    return s.some(h, torch.cat([(one + 1) % COUNT for one in i.chunk(2, 1)], 1), w)


@pinned
def other_numbers_stacked(s, h):
    w, i = s.best(h)
    return s.some(h, torch.stack([COUNT - 1 - i[:, 0], COUNT - 1 - i[:, 1]], 1), w)


@pinned
def none_or_any(s, h):
    w, i = s.best(h)
    return s.some(h, i.bool().long(), w)


@pinned
def one_hot_of_none_or_any(s, h):
    return s.all(h, (s.gate(h).argmax(-1, keepdim=True).bool() == torch.arange(COUNT)).to(h.dtype))


@pinned
def mean_load_of_those_up_to_the_last(s, h):
    w, i = s.best(h)
    return s.some(h, i, w) * torch.bincount(i.reshape(-1)).to(h.dtype).mean()


@pinned
def read_at_a_choice_and_written_to_the_next(s, h):
    """No expert has an order of its own for its hidden units, either: they are read by the next expert."""
    i = s.gate(h).argmax(-1)
    hidden = torch.einsum("td,tdh->th", h, s.up[i]).relu()
    return torch.einsum("th,thd->td", hidden, s.down[(i + 1) % COUNT])


@pinned
def load_in_wider_bins(s, h):
    w, i = s.best(h)
    load = torch.histc(i.float(), bins=COUNT, min=0, max=2 * COUNT)
    return s.some(h, i, w) * (load * torch.arange(COUNT)).sum()


@pinned
def written_to_another_axis(s, h):
    w, i = s.best(h)
    table = torch.zeros(COUNT, len(h))
    table[i[:, 0], torch.arange(len(h))] = 1.0
    return s.some(h, i, w) * (table * torch.arange(COUNT)[:, None]).sum()


@free
def put_up_to_a_capacity(s, h):
    """Each expert takes the first rows that choose it; those above its capacity are left out."""
    weight, index = s.gate(h).softmax(-1).max(-1)
    code = F.one_hot(index, COUNT)
    place = ((code.cumsum(0) - 1) * code).sum(-1)
    kept = place < 2
    room = h.new_zeros(COUNT, 2, WIDTH)
    room[index[kept], place[kept]] = h[kept]
    made = torch.bmm(torch.bmm(room, s.up).relu(), s.down)
    out = torch.zeros_like(h)
    out[kept] = made[index[kept], place[kept]] * weight[kept, None]
    return out


@free
def read_in_another_order(s, h):
    weight, index = s.best(h)
    order = weight.neg().argsort(-1)
    return s.some(h, index.gather(-1, order), weight.gather(-1, order))


@free
def read_choice_by_choice(s, h):
    """Each choice is cut out anew wherever it is used."""
    weight, index = s.best(h)
    out = 0
    for k in range(2):
        hidden = torch.bmm(h[:, None], s.up[index[:, k]]).relu()
        out = out + torch.bmm(hidden, s.down[index[:, k]])[:, 0] * weight[:, k, None]
    return out


@free
def read_for_some_rows(s, h):
    rows, kept = h.sum(-1).argsort(), h.sum(-1) > 0
    weight, index = s.best(h)
    mine = s.some(h[kept], index[:, 0].masked_select(kept)[:, None], weight[kept][:, :1])
    theirs = s.some(h[rows], index.index_select(0, rows), weight[rows])
    return torch.zeros_like(h).index_add(0, rows, theirs).masked_scatter(kept[:, None], mine)


@pinned
def read_and_used_as_numbers(s, h):
    weight, index = s.best(h)
    kept = h.sum(-1) > 0
    mine = s.some(h[kept], index[kept], weight[kept] * index[kept])
    return torch.zeros_like(h).masked_scatter(kept[:, None], mine)


@pinned
def read_and_sorted(s, h):
    weight, index = s.best(h)
    return s.some(h, index.gather(-1, weight.argsort(-1)).sort(-1).values, weight)


@pytest.mark.parametrize("name", FREE)
def test_experts_may_be_permuted(name):
    found = sorted(g.size for g in infer(Routed(FREE[name]), X).generators())  # verifies, too
    assert found == sorted([COUNT, WIDTH, *[HIDDEN] * COUNT])


@pytest.mark.parametrize("name", PINNED)
def test_experts_stay(name):
    symmetry = infer(Routed(PINNED[name]), X)
    assert not any(s.param == "up" and s.axis == 0 for g in symmetry.generators() for s in g.slots)


@pytest.mark.parametrize("name", TIED)
def test_experts_move_with_what_they_are_compared_with(name):
    net = Routed(TIED[name])
    symmetry = infer(net, X, verify=False)
    (moves,) = (g for g in symmetry.generators() if any((s.param, s.axis) == ("up", 0) for s in g.slots))
    assert ("embed.weight", 0) in {(s.param, s.axis) for s in moves.slots}
    assert_sound(net, X, symmetry)


def test_pairs_of_experts_that_face_each_other_are_exchanged():
    net = Routed(compared_backwards)
    symmetry = infer(net, X, verify=False)
    moves = [next((s for s in g.slots if (s.param, s.axis) == ("up", 0)), None) for g in symmetry.generators()]
    assert sorted(np.sort(s.index).tolist() for s in moves if s) == [[[0], [3]], [[0, 3], [1, 2]], [[1], [2]]]
    assert_sound(net, X, symmetry)


def test_some_of_the_experts_are_compared():
    """A choice may be none of the experts: the identity, say."""

    def route(s, h):
        choice = s.gate(h).argmax(-1, keepdim=True)
        return s.all(h, (choice == torch.tensor([2, 0])).to(h.dtype) @ torch.eye(2, COUNT)) + h * (choice == 1)

    net = Routed(route)
    symmetry = infer(net, X, verify=False)
    (some,) = (g for g in symmetry.generators() if any(s.param == "gate.weight" and s.axis == 0 for s in g.slots))
    assert sorted(next(s for s in some.slots if s.param == "gate.weight").index[:, 0].tolist()) == [0, 2]
    assert_sound(net, X, symmetry)


# of these a certain expert stays where it is, and the others may be permuted
ONE_STAYS: dict[str, Route] = {
    "compared with its number": lambda s, h: s.some(h, s.best(h)[1], s.best(h)[0] * (s.best(h)[1] == 1)),
    "differs from its number": lambda s, h: s.some(h, s.best(h)[1], s.best(h)[0] * (s.best(h)[1] != torch.tensor(2))),
    "in the place of others": lambda s, h: s.some(h, s.best(h)[1].masked_fill(s.best(h)[0] < 0.3, 1), s.best(h)[0]),
}


@pytest.mark.parametrize("name", ONE_STAYS)
def test_one_expert_stays(name):
    found = sorted(g.size for g in infer(Routed(ONE_STAYS[name]), X).generators())  # verifies, too
    assert found == sorted([COUNT - 1, WIDTH, *[HIDDEN] * COUNT])


class Skipping(Routed):
    """One more score than there are experts: where it is the best, no expert is asked."""

    def __init__(self) -> None:
        super().__init__(skip)
        self.gate = nn.Linear(WIDTH, COUNT + 1)


def skip(s: Skipping, h: Tensor) -> Tensor:
    w, i = s.gate(h).softmax(-1).topk(1, -1)
    none = i == COUNT
    return s.some(h, i.masked_fill(none, 0), w.masked_fill(none, 0))


def test_the_expert_asked_in_place_of_none_stays():
    found = sorted(g.size for g in infer(Skipping(), X).generators())
    assert found == sorted([COUNT - 1, WIDTH, *[HIDDEN] * COUNT])


HEADS = 5


class Headed(Routed):
    """Experts chosen by several heads, each of which has scores of its own."""

    def __init__(self, route: Route) -> None:
        super().__init__(route)
        self.gates, self.mix = nn.Parameter(torch.randn(HEADS, COUNT, WIDTH)), nn.Parameter(torch.randn(HEADS, WIDTH))

    def scores(self, h: Tensor) -> Tensor:
        """Tokens, heads, experts."""
        return torch.einsum("td,hed->the", h, self.gates)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return super().forward(x) + self.head(torch.einsum("the,hd->td", self.scores(h).tanh(), self.mix))


ONE_HEAD: dict[str, Route] = {
    "read": lambda s, h: s.some(h, s.scores(h).argmax(-1)[:, :1], torch.ones(len(h), 1)),
    "compared": lambda s, h: s.all(h, (s.scores(h).argmax(-1)[:, 0, None] == torch.arange(COUNT)).to(h.dtype)),
    "written": lambda s, h: s.all(h, torch.zeros(len(h), COUNT).scatter(1, s.scores(h).argmax(-1)[:, :1], 1.0)),
    "gathered": lambda s, h: s.all(h, s.gate(h)) * s.gate(h).gather(1, s.scores(h).argmax(-1)[:, :1]),
    "clamped": lambda s, h: s.some(h, s.scores(h).argmax(-1)[:, 0].clamp(0, COUNT)[:, None], torch.ones(len(h), 1)),
}


@pytest.mark.parametrize("name", ONE_HEAD)
def test_the_head_that_chooses_stays(name):
    """A slice of an index tensor singles out its heads, though its numbers are used as such; others have their own order."""
    net = Headed(ONE_HEAD[name])
    symmetry = infer(net, X)
    assert sorted(g.size for g in symmetry.generators()) == sorted([HEADS - 1, COUNT, COUNT, WIDTH, *[HIDDEN] * COUNT])
    assert_sound(net, X, symmetry)


def test_heads_that_overwrite_each_other_stay():
    def route(s: Any, h: Tensor) -> Tensor:
        value, index = s.scores(h).max(-1)
        return s.all(h, torch.zeros(len(h), COUNT, dtype=value.dtype).scatter(1, index, value))

    found = sorted(g.size for g in infer(Headed(route), X).generators())
    assert found == sorted([COUNT, WIDTH, *[HIDDEN] * COUNT])


class ProductKeys(nn.Module):
    """Two heads look their values up by pairs of keys, and `EmbeddingBag` sums over the chosen ones of all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.query, self.out = nn.Linear(3, 6), nn.Linear(6, 2 * 8), nn.Linear(6, 2)
        self.keys = nn.Parameter(torch.randn(2, 2, 4, 4))
        self.values = nn.EmbeddingBag(16, 6, mode="sum")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        q = self.query(x).view(len(x), 2, 2, 4)
        scores, places = torch.einsum("bhpd,hpnd->bhpn", q, self.keys).topk(2, -1)
        both = (scores[:, :, 0, :, None] + scores[:, :, 1, None]).flatten(-2)
        at = (places[:, :, 0, :, None] * 4 + places[:, :, 1, None]).flatten(-2)
        best, which = both.topk(2, -1)
        at = at.gather(-1, which)
        return self.out(x + self.values(at.flatten(1), per_sample_weights=best.softmax(-1).flatten(1)))


def test_the_heads_of_a_memory_with_bags_are_interchangeable() -> None:
    symmetry = infer(ProductKeys(), torch.randn(5, 3))
    assert sorted(g.size for g in symmetry.generators()) == [2, 4, 4, 4, 4, 4, 4, 6]  # none that others make up
    heads = next(g for g in symmetry.generators() if any((s.param, s.axis) == ("keys", 0) for s in g.slots))
    assert heads.size == 2
    assert {(s.param, s.axis) for s in heads.slots} == {("keys", 0), ("query.weight", 0), ("query.bias", 0)}


# ------------------------------------------------------------ one of several classes, for each of several variables
def _one_hot(p: Tensor) -> Tensor:
    return F.one_hot(p.argmax(-1), 4).to(p)


def _scattered(p: Tensor) -> Tensor:
    return torch.zeros_like(p).scatter_(-1, p.argmax(-1, keepdim=True), 1.0)


def _largest(p: Tensor) -> Tensor:
    return torch.zeros_like(p).scatter(-1, p.topk(2, -1).indices, 1.0)


@pytest.mark.parametrize("hard", [_one_hot, _scattered, _largest])
@pytest.mark.parametrize("through", [False, True])
def test_the_classes_of_several_variables_have_orders_of_their_own(
    hard: Callable[[Tensor], Tensor], through: bool
) -> None:
    """(And the variables are interchangeable.)"""

    class Categorical(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.out = nn.Linear(5, 12), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            p = self.inp(x).unflatten(1, (3, 4)).softmax(-1)
            h = hard(p)
            return self.out((h + p - p.detach() if through else h).flatten(1))

    net, x = Categorical(), torch.randn(6, 5)
    symmetry = infer(net, x)
    assert sorted(g.size for g in symmetry.generators()) == [3, 4, 4, 4]
    assert_sound(net, x, symmetry)
