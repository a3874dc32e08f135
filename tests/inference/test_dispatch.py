"""Experts that work on sorted rows: free in every spelling, and pinned where the order of the rows is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from automerge import infer, trace
from automerge._double import double_precision
from automerge._places import survey
from automerge.rules._dispatch import without_dispatch

WIDTH, HIDDEN, COUNT, BEST = 8, 12, 4, 2  # (the kernel asks for rows of 16 bytes)
X = torch.linspace(-1, 1, 9 * 3).sin().reshape(9, 3)

pytestmark = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this PyTorch has no grouped products")


def _of_sort(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.sort(ids)


def _of_argsort(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.argsort(ids, stable=True)
    return ids[order], order


SORTS = {"sort": _of_sort, "argsort": _of_argsort}
COUNTS: dict[str, Callable[..., torch.Tensor]] = {
    "histc": lambda ids, number: torch.histc(number.float(), bins=COUNT, min=0, max=COUNT - 1),
    "histc of the unsorted": lambda ids, number: torch.histc(ids.float(), bins=COUNT, min=0, max=COUNT),
    "bincount": lambda ids, number: torch.bincount(ids, minlength=COUNT),
    "one_hot": lambda ids, number: F.one_hot(number, COUNT).sum(0),
    "scatter_add": lambda ids, number: ids.new_zeros(COUNT).scatter_add(0, ids, torch.ones_like(ids)),
    "compared": lambda ids, number: (ids[:, None] == torch.arange(COUNT)).sum(0),
}
ROWS: dict[str, Callable[..., torch.Tensor]] = {
    "divided": lambda h, order: h[order // BEST],
    "selected": lambda h, order: h.index_select(0, torch.div(order, BEST, rounding_mode="floor")),
    "repeated": lambda h, order: h.repeat_interleave(BEST, 0)[order],
    "gathered": lambda h, order: torch.gather(h, 0, (order // BEST)[:, None].expand(-1, h.shape[1])),
}


def _by_inverse(inverse: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda y, order: y[inverse(order)].view(-1, BEST, y.shape[1]).sum(1)


def _put_back(order: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    return inverse


def _written(y: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(y)
    out[order] = y
    return out.view(-1, BEST, y.shape[1]).sum(1)


BACK: dict[str, Callable[..., torch.Tensor]] = {
    "index_put": _by_inverse(_put_back),
    "argsort": _by_inverse(torch.argsort),
    "scatter": _by_inverse(lambda order: torch.zeros_like(order).scatter(0, order, torch.arange(order.numel()))),
    "written": _written,
    "index_add": lambda y, order: y.new_zeros(len(y) // BEST, y.shape[1]).index_add(0, order // BEST, y),
    "scatter_add": lambda y, order: y.new_zeros(len(y) // BEST, y.shape[1]).scatter_add(
        0, (order // BEST)[:, None].expand(-1, y.shape[1]), y
    ),
}


def _grouped(y: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    return F.grouped_mm(y, weight.transpose(1, 2), offs=ends)


def _of_each(y: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nd,nkd->nk", y, weight[number])


def _in_turn(y: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    return torch.bmm(F.embedding(number, weight.flatten(1)).view(-1, *weight.shape[1:]), y[..., None])[..., 0]


class Sorted(nn.Module):
    """A mixture of experts on sorted rows.

    Args:
        sort, counts, rows, back: how rows are sorted, counted, read and put back.
        inside: a function of the rows before the second product, their order, and the sorted numbers.
        bias, norm: whether experts have biases, and their outputs a norm.
        offsets: of the cumulated counts.
        product: how the rows are multiplied by the matrices of their experts.
    """

    def __init__(
        self,
        sort: Any = _of_sort,
        counts: Any = COUNTS["histc"],
        rows: Any = ROWS["divided"],
        back: Any = BACK["index_put"],
        inside: Any = None,
        bias: bool = False,
        norm: bool = False,
        offsets: Any = None,
        product: Any = _grouped,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.gate = nn.Linear(3, WIDTH), nn.Linear(WIDTH, COUNT, bias=False)
        self.up = nn.Parameter(torch.randn(COUNT, 2 * HIDDEN, WIDTH))
        self.down = nn.Parameter(torch.randn(COUNT, WIDTH, HIDDEN))
        self.bias = nn.Parameter(torch.randn(COUNT, 2 * HIDDEN)) if bias else None
        self.norm, self.head = nn.LayerNorm(WIDTH) if norm else nn.Identity(), nn.Linear(WIDTH, 2)
        self.sort, self.counts, self.rows, self.back = sort, counts, rows, back
        self.inside, self.offsets, self.product = inside, offsets, product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        weight, best = self.gate(h).softmax(-1).topk(BEST)
        weight, ids = weight.reshape(-1), best.reshape(-1)
        number, order = self.sort(ids)
        ends = self.counts(ids, number).cumsum(0).to(torch.int32)
        ends = ends if self.offsets is None else self.offsets(ends)
        y = self.product(self.rows(h, order), self.up, ends, number)
        y = y if self.bias is None else y + self.bias[number]
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
        y = y if self.inside is None else self.inside(y, order, number)
        y = self.norm(self.product(y, self.down, ends, number))
        return self.head(h + self.back(y * weight[order, None], order))


def sizes(model: nn.Module) -> list[int]:
    return sorted(g.size for g in infer(model, X).generators())


FREE = sorted([WIDTH, COUNT, *[HIDDEN] * COUNT])
PINNED = sorted([WIDTH, *[HIDDEN] * COUNT])


def same_outputs(graph: fx.GraphModule, model: nn.Module) -> bool:
    """Whether the graph without the sort computes what the recorded one does."""
    state, x = dict(model.state_dict(keep_vars=True)), X.double() + torch.randn(X.shape, dtype=torch.float64)
    results = []
    with torch.no_grad(), double_precision():
        for one in (graph, without_dispatch(graph).graph):
            given = [
                state[n.meta["name"]].double() if n.meta["kind"] == "state" else x
                for n in one.graph.nodes
                if n.op == "placeholder"
            ]
            results.append(fx.Interpreter(one).run(*given))
    return all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(*results, strict=True))


@settings(max_examples=12, database=None)
@given(
    st.sampled_from(list(SORTS.values())),
    st.sampled_from(list(COUNTS.values())),
    st.sampled_from(list(ROWS.values())),
    st.sampled_from(list(BACK.values())),
    st.booleans(),
    st.booleans(),
)
def test_the_experts_are_free_in_every_spelling(sort, counts, rows, back, bias, norm):
    model = Sorted(sort, counts, rows, back, bias=bias, norm=norm)
    assert sizes(model) == FREE
    graph = trace(model, X)
    found = without_dispatch(graph)
    assert not any("_grouped_mm" in str(n.target) for n in found.graph.graph.nodes)
    assert same_outputs(graph, model)
    assert set(found.nodes) == set(graph.graph.nodes)


@pytest.mark.parametrize("part", ["sort", "counts", "rows", "back"])
def test_each_spelling_alone(part):
    for name, one in {"sort": SORTS, "counts": COUNTS, "rows": ROWS, "back": BACK}[part].items():
        assert sizes(Sorted(**{part: one})) == FREE, name


INSIDE: dict[str, Callable[..., torch.Tensor]] = {
    "scaled by the place": lambda y, order, number: y * (1 + order[:, None] % BEST),
    "a norm over the rows": lambda y, order, number: y / y.abs().amax(0),
    "masked rows": lambda y, order, number: torch.where(y.sum(1, keepdim=True) > 0, y, torch.zeros_like(y)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_keeps_the_rows_leaves_the_experts_free(name):
    model = Sorted(inside=INSIDE[name])
    assert same_outputs(trace(model, X), model)
    assert COUNT in sizes(model)


ORDERED: dict[str, dict[str, Any]] = {
    "a running sum": {"inside": lambda y, order, number: y.cumsum(0)},
    "numbered rows": {"inside": lambda y, order, number: y * torch.arange(1.0, 1 + len(y))[:, None]},
    "rarely numbered rows": {
        "inside": lambda y, order, number: torch.where(y > 1e3, torch.arange(1.0, 1 + len(y))[:, None], y)
    },
    "the first row": {"inside": lambda y, order, number: y + y[:1]},
    "neighbours": {"inside": lambda y, order, number: y + y.roll(1, 0)},
    "the largest number": {"inside": lambda y, order, number: y * torch.linspace(1, 2, COUNT)[number[-1]]},
    "the third row's place": {"inside": lambda y, order, number: y * torch.linspace(1, 2, len(y))[(order // 4)[2]]},
    "where the second row is from": {"inside": lambda y, order, number: torch.where((order < len(y) // 2)[1], y, -y)},
    "a mask of the first row": {"inside": lambda y, order, number: torch.where((y.sum(1) > 0)[0], y, -y)},
    "some of the first row": {"inside": lambda y, order, number: torch.where((y > 1).any(1)[0], y, -y)},
    "how many of the first row": {"inside": lambda y, order, number: y * (1 + y.relu().count_nonzero(1)[0])},
    "filled with a place": {"inside": lambda y, order, number: y + torch.zeros(len(y)).fill_(y[:, 0].argmax()).amax()},
    "where it is not zero": {"inside": lambda y, order, number: y + y.relu().nonzero()[:3].sum()},
    "a table of rows": {"inside": lambda y, order, number: y * torch.linspace(1, 2, len(y))[order.argsort()][:, None]},
    "sorted back twice": {"back": lambda y, order: BACK["index_put"](y[order], order)},
    "not put back": {"back": lambda y, order: y.view(-1, BEST, y.shape[1]).sum(1)},
    "put back the wrong way": {"back": lambda y, order: y[order].view(-1, BEST, y.shape[1]).sum(1)},
    "other runs": {"offsets": lambda ends: (ends - 1).clamp(min=0)},
    "runs of the half": {"counts": lambda ids, number: torch.bincount(number[: len(number) // 2], minlength=COUNT)},
    "a capacity above the example's rows": {"offsets": lambda ends: ends.clamp(max=50)},
    "downwards": {"sort": lambda ids: torch.sort(ids, descending=True)},
    "python reads them": {"inside": lambda y, order, number: y * (1 + order.tolist()[0])},
}


@pytest.mark.parametrize("name", ORDERED)
def test_where_the_order_is_used_nothing_changes(name):
    model = Sorted(**ORDERED[name])
    graph = trace(model, X)
    found = without_dispatch(graph)
    assert found.graph is graph
    assert not found.nodes
    assert COUNT not in sizes(model)


OF_RUNS = ["other runs", "runs of the half", "a capacity above the example's rows"]
READ = {"of each": _of_each, "by words": _in_turn}


@pytest.mark.parametrize("product", READ)
@pytest.mark.parametrize("back", BACK)
@pytest.mark.parametrize("sort", [*SORTS, "downwards"])
def test_matrices_may_be_read_for_every_row(product, back, sort):
    sorts = {**SORTS, "downwards": ORDERED["downwards"]["sort"]}
    model = Sorted(sorts[sort], back=BACK[back], product=READ[product])
    assert sizes(model) == FREE
    assert same_outputs(trace(model, X), model)


@pytest.mark.parametrize("name", sorted({*ORDERED} - {*OF_RUNS, "downwards"}))
def test_where_the_order_is_used_nothing_changes_there_either(name):
    model = Sorted(**ORDERED[name], product=_of_each)
    graph = trace(model, X)
    assert without_dispatch(graph).graph is graph
    assert COUNT not in sizes(model)


def test_the_order_as_an_output():
    class Both(Sorted):
        def forward(self, x: torch.Tensor) -> Any:
            ids = self.gate(self.embed(x)).softmax(-1).topk(BEST)[1].reshape(-1)
            return super().forward(x), torch.sort(ids)[1]

    assert COUNT not in sizes(Both())


def test_two_layers_and_one_order_for_two_products():
    model = nn.Sequential(Sorted(), nn.Linear(2, 3), Sorted(counts=COUNTS["bincount"], back=BACK["index_add"]))
    found = sizes(model)
    assert found == sorted([*FREE, 3, *FREE, 2])


def test_sorted_rows_are_no_samples():
    """Row i of the sorted rows is another token in another model, so activations are not compared there."""
    graph, model = trace(Sorted(), X), Sorted()
    symmetry = infer(model, X)
    rows = {n.name for n in without_dispatch(graph).sorted}
    observed = survey(graph, symmetry).places
    assert rows
    assert not rows & {place.node for place in observed}
    assert {symmetry.sets[g].size for place in observed for g in place.slots} == {WIDTH, COUNT}


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_few_tokens(tokens):
    """As many rows as experts, or fewer; the groups are those of many tokens."""
    model = Sorted()
    symmetry = infer(model, X[:tokens])
    assert sorted(g.size for g in symmetry.generators()) == FREE
