"""Rows that are added where they came from, read several times over, or chosen among all entries of several axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.inference.test_found_networks import found, lin
from tests.inference.test_written_forms import made

TOKENS, OTHERS = torch.randn(7, 8), torch.randn(9, 8)
EXPERTS = 3


def weights(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


def mixture(forward: Callable[..., Any]) -> Callable[[], nn.Module]:
    return made(forward, gate=lin(8, EXPERTS), up=weights(EXPERTS, 8, 5), down=weights(EXPERTS, 5, 8))


def worked(s: Any, rows: torch.Tensor) -> torch.Tensor:
    return torch.bmm(torch.bmm(rows, s.up).relu(), s.down)


# ------------------------------------------------------------ rows added where they came from
def _where(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return index.reshape(-1, 1).expand(-1, like.shape[-1])


BACK: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "index_add": lambda z, i, y: z.index_add(0, i.flatten(), y.flatten(0, 1)),
    "scatter_add": lambda z, i, y: z.scatter_add(0, _where(i, z), y.flatten(0, 1)),
    "scatter_reduce": lambda z, i, y: z.scatter_reduce(0, _where(i, z), y.flatten(0, 1), "sum"),
    "largest": lambda z, i, y: z.scatter_reduce(0, _where(i, z), y.flatten(0, 1), "amax"),
    "mean": lambda z, i, y: z.scatter_reduce(0, _where(i, z), y.flatten(0, 1), "mean", include_self=False),
    "index_put": lambda z, i, y: z.index_put((i,), y, accumulate=True),
    "index_put_": lambda z, i, y: z.clone().index_put_((i.flatten(),), y.flatten(0, 1), accumulate=True),
    "columns": lambda z, i, y: z.T.index_put((torch.arange(8)[:, None], i.flatten()), y.flatten(0, 1).T, True).T,
}


@pytest.mark.parametrize("back", BACK)
def test_experts_choose_tokens(back: str) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        weight, index = s.gate(x).softmax(-1).T.topk(2, -1)
        return BACK[back](torch.zeros_like(x), index, worked(s, x[index]) * weight[..., None])

    found(mixture(forward), "3 5x3", TOKENS, OTHERS)


@pytest.mark.parametrize("replace", ["scatter", "index_put"])
def test_the_last_of_rows_written_to_one_place_stays(replace: str) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        weight, index = s.gate(x).softmax(-1).T.topk(5, -1)
        y, z = worked(s, x[index]) * weight[..., None], torch.zeros_like(x)
        put = z.scatter(0, _where(index, z), y.flatten(0, 1)) if replace == "scatter" else z.index_put((index,), y)
        return put

    found(mixture(forward), "5x3", TOKENS)


def test_how_often_each_is_chosen() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        index = s.code(x).argmax(-1)
        counts = x.new_zeros(6).index_put((index,), x.new_ones(1), accumulate=True)
        return s.out(counts / len(x)) + s.out(s.code(x).softmax(-1))

    found(made(forward, code=lin(8, 6), out=lin(6, 2)), "6", TOKENS, OTHERS)


# ------------------------------------------------------------ rows read several times over
def _over(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(x)).view(1, -1).expand(EXPERTS, -1)


SEVERAL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "repeat": lambda x: x.repeat(EXPERTS, 1).view(EXPERTS, *x.shape),
    "index": lambda x: x[_over(x).reshape(-1)].view(EXPERTS, *x.shape),
    "index of two axes": lambda x: x[_over(x)],
    "index_select": lambda x: x.index_select(0, torch.arange(len(x)).repeat(EXPERTS)).view(EXPERTS, *x.shape),
    "gather": lambda x: x.gather(0, _over(x).reshape(-1, 1).expand(-1, 8)).view(EXPERTS, *x.shape),
    "in a row": lambda x: x[torch.arange(EXPERTS * len(x)) // EXPERTS].view(len(x), EXPERTS, 8).transpose(0, 1),
    "in rows": lambda x: (
        x[torch.arange(2 * EXPERTS * len(x)) // EXPERTS % len(x)].view(2, -1, EXPERTS, 8)[0].transpose(0, 1)
    ),
}


@pytest.mark.parametrize("rows", SEVERAL)
def test_all_tokens_for_all_experts(rows: str) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = worked(s, SEVERAL[rows](x))
        return (y * s.gate(x).softmax(-1).T[..., None]).sum(0)

    found(mixture(forward), "3 5x3", TOKENS, OTHERS)


def test_rows_that_come_in_another_order_each_time_are_told_apart() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        ahead = torch.arange(7)
        y = worked(s, x[torch.cat([ahead, ahead.flip(0), ahead.roll(1)])].view(3, 7, 8))
        return (y * s.gate(x).softmax(-1).T[..., None]).sum(0)

    found(mixture(forward), "5x3", TOKENS)


# ------------------------------------------------------------ the best of all queries and classes
def _best(s: Any, x: torch.Tensor, read: Callable[..., Any]) -> Any:
    h = (s.queries @ x.mT).softmax(-1) @ x + s.queries
    scores = s.classes(h).sigmoid()
    best, index = scores.flatten(1).topk(5, 1)
    return read(s.boxes(h), scores, best, index)


def _boxes(boxes: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return boxes.gather(1, query[..., None].expand(-1, -1, boxes.shape[-1]))


POST: dict[str, tuple[Callable[..., Any], str]] = {
    "reference": (lambda b, p, v, i: (v, i % 4, _boxes(b, i // 4)), "6"),
    "labels": (lambda b, p, v, i: (v, i - i // 4 * 4), ""),
    "remainder": (lambda b, p, v, i: (v, torch.remainder(i, p.shape[2])), "6"),
    "divided": (lambda b, p, v, i: _boxes(b, torch.div(i, p.shape[2], rounding_mode="floor")), "6 4"),
    "selected": (lambda b, p, v, i: b[torch.arange(len(b))[:, None], i // 4], "6 4"),
    "which queries": (lambda b, p, v, i: (v, i // 4), "4"),
    "which entries": (lambda b, p, v, i: (v, i), ""),
    "other rows": (lambda b, p, v, i: _boxes(b, i // 8), "4"),  # those of two queries each
    "other columns": (
        lambda b, p, v, i: (v, i % 3),
        "2x4",
    ),  # (query + class) % 3: the first and the last class, queries that are three apart
}


@pytest.mark.parametrize("name", POST)
def test_the_best_among_all_classes_of_all_queries(name: str) -> None:
    read, sizes = POST[name]
    x = torch.randn(2, 7, 8)
    net = made(lambda s, x: _best(s, x, read), queries=weights(6, 8), classes=lin(8, 4), boxes=lin(8, 3))
    found(net, sizes, x, torch.randn(3, 5, 8))


def test_the_best_among_classes_that_may_move_too() -> None:
    def read(boxes: torch.Tensor, scores: torch.Tensor, best: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return _boxes(boxes, index // 4) * best[..., None] + scores.mean((1, 2), keepdim=True)

    net = made(lambda s, x: _best(s, x, read), queries=weights(6, 8), classes=lin(8, 4), boxes=lin(8, 3))
    found(net, "6 4", torch.randn(2, 7, 8), torch.randn(3, 5, 8))


# ------------------------------------------------------------ losses whose targets are chosen
LOSSES: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "cross entropy": (F.cross_entropy, "7 5"),
    "of every row": (lambda p, c: F.cross_entropy(p, c, reduction="none"), "7 5"),
    "summed": (lambda p, c: F.nll_loss(p.log_softmax(-1), c, reduction="sum"), "7 5"),
    "smooth": (lambda p, c: F.cross_entropy(p, c, label_smoothing=0.1), "7 5"),
    "places behind": (lambda p, c: F.cross_entropy(p.T[None].expand(2, -1, -1), c.expand(2, -1)), "7 5"),
    "gathered": (lambda p, c: -p.log_softmax(-1).gather(1, c[:, None]).mean(), "7 5"),
    "weighted": (lambda p, c: F.cross_entropy(p, c, weight=torch.linspace(1, 2, 7, dtype=p.dtype)), "5"),
    "one is ignored": (lambda p, c: F.cross_entropy(p, c, ignore_index=3), "5 5"),  # the first is read in its place
    "of others": (lambda p, c: F.cross_entropy(p, c.flip(0)), "7 5"),
    "of the next": (lambda p, c: F.cross_entropy(p, (c + 1) % 7), "5"),
    "of a margin": (F.multi_margin_loss, "7 5"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_codes_that_are_predicted_keep_one_order(loss: str) -> None:
    of, sizes = LOSSES[loss]

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        return of(s.head(x), torch.cdist(s.inp(x), s.codes).argmin(-1))

    net = made(forward, inp=lin(8, 5), codes=weights(7, 5), head=lin(8, 7))
    found(net, sizes, TOKENS, OTHERS)
