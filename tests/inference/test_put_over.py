"""Experts whose rows take the place of what was there, under masks that exclude each other, also up to a capacity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from automerge import infer
from automerge._branches._distinct import exclusive
from automerge.trace import trace
from tests.inference._mixtures import COUNT, Mixture, X, modules

CAPACITY = 15


def _codes(scores: Any, capacity: int = CAPACITY) -> Any:
    """One-hot choices of the rows up to a number for each expert (Switch Transformer)."""
    codes = F.one_hot(scores.argmax(-1), COUNT)
    return codes * (codes.cumsum(0) <= capacity)


def _put(h: Any, scores: Any, experts: Any) -> Any:
    out, chosen = h.clone(), scores.argmax(-1)
    for e, expert in enumerate(experts):
        mask = chosen == e
        out[mask] = expert(h[mask])
    return out


def _put_in_place(h: Any, scores: Any, experts: Any) -> Any:
    """Each expert reads its rows where the others wrote theirs."""
    out, chosen = h * 1.0, scores.argmax(-1)
    for e, expert in enumerate(experts):
        mask = chosen == e
        out[mask] = expert(out[mask])
    return out


def _let_through_over_all(h: Any, scores: Any, experts: Any) -> Any:
    chosen, out = scores.argmax(-1, keepdim=True), h
    for e, expert in enumerate(experts):
        out = torch.where(chosen == e, expert(h), out)
    return out


def _up_to_a_capacity(h: Any, scores: Any, experts: Any) -> Any:
    """Rows above it stay as they are."""
    codes, out = _codes(scores), h.clone()
    for e, expert in enumerate(experts):
        mask = codes[:, e].bool()
        out[mask] = expert(h[mask])
    return out * scores.softmax(-1).amax(-1, keepdim=True)


def _up_to_a_capacity_in_place(h: Any, scores: Any, experts: Any) -> Any:
    codes, out = _codes(scores).bool(), h.clone()
    for e, expert in enumerate(experts):
        out[codes[..., e]] = expert(out[codes[..., e]])
    return out


def _up_to_a_capacity_over_zeros(h: Any, scores: Any, experts: Any) -> Any:
    codes, out = _codes(scores), torch.zeros_like(h)
    for e, expert in enumerate(experts):
        mask = codes[:, e] > 0
        out[mask] = expert(h[mask])
    return h + out


def _up_to_a_capacity_compared(h: Any, scores: Any, experts: Any) -> Any:
    codes, out = _codes(scores), h.clone()
    for e, expert in enumerate(experts):
        mask = codes[:, e] == 1
        out[mask] = expert(h[mask])
    return out


def _put_by_number(h: Any, scores: Any, experts: Any) -> Any:
    out, chosen = h.clone(), scores.argmax(-1, keepdim=True)
    for e, expert in enumerate(experts):
        (rows,) = torch.where(chosen.eq(e).squeeze(-1))
        out[rows] = expert(out[rows]) + out[rows]
    return out


def _codes_in_another_layout(h: Any, scores: Any, experts: Any) -> Any:
    codes = _codes(scores).view(2, -1, COUNT).permute(2, 0, 1).reshape(COUNT, -1)
    out = h.clone()
    for e, expert in enumerate(experts):
        mask = codes[e].bool()
        out[mask] = expert(h[mask])
    return out


def _chosen_and_kept(h: Any, scores: Any, experts: Any) -> Any:
    kept, chosen, out = scores.amax(-1) > 1, scores.argmax(-1), h.clone()
    for e, expert in enumerate(experts):
        mask = (chosen == e) & kept
        out[mask] = expert(h[mask])
    return out


PUT = (
    *(_put, _put_in_place, _let_through_over_all, _up_to_a_capacity, _up_to_a_capacity_in_place),
    *(_up_to_a_capacity_over_zeros, _up_to_a_capacity_compared, _chosen_and_kept),
    *(_put_by_number, _codes_in_another_layout),
)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("mix", PUT, ids=lambda f: f.__name__)
def test_experts_that_replace_rows_are_interchangeable(mix: Callable[..., Any], verify: bool) -> None:
    symmetry = infer(Mixture(mix), X, verify=verify)
    assert modules(symmetry) == [(COUNT, 4)]
    assert sorted(g.size for g in symmetry.sets) == [5, 5, 5, 6]


@pytest.mark.parametrize("mix", PUT, ids=lambda f: f.__name__)
def test_an_expert_of_a_single_row_is_as_the_others(mix: Callable[..., Any]) -> None:
    """PyTorch takes the axis of the rows away before it writes a single one."""
    net = Mixture(mix)
    assert modules(infer(net, net.alone(X), verify=False)) == [(COUNT, 4)]


def _added_or_put(h: Any, scores: Any, experts: Any) -> Any:
    """The first expert adds to what the others replace."""
    out, chosen = h * 1.0, scores.argmax(-1)
    for e, expert in enumerate(experts):
        mask = chosen == e
        out[mask] = out[mask] + expert(h[mask]) if e == 0 else expert(h[mask])
    return out


@pytest.mark.parametrize("verify", [True, False])
def test_of_one_that_adds_the_others_are_interchangeable(verify: bool) -> None:
    assert modules(infer(Mixture(_added_or_put), X, verify=verify)) == [(COUNT - 1, 4)]


def _several(h: Any, scores: Any, experts: Any) -> Any:
    """A row may go to several; the last one stays."""
    out, codes = h.clone(), scores > 0
    for e, expert in enumerate(experts):
        out[codes[:, e]] = expert(h[codes[:, e]])
    return out


def _several_in_place(h: Any, scores: Any, experts: Any) -> Any:
    out, codes = h.clone(), scores > 0
    for e, expert in enumerate(experts):
        out[codes[:, e]] = expert(out[codes[:, e]])
    return out


def _two_choices(h: Any, scores: Any, experts: Any) -> Any:
    """Codes of different choices do not exclude each other."""
    first, second = (F.one_hot(s.argmax(-1), COUNT) for s in (scores, -scores.roll(1, -1)))
    out = h.clone()
    for e, expert in enumerate(experts):
        mask = (second if e == 1 else first)[:, e].bool()
        out[mask] = expert(h[mask])
    return out


def _two_ones(h: Any, scores: Any, experts: Any) -> Any:
    """Codes with two ones each."""
    chosen = scores.topk(2, -1).indices
    codes, out = torch.zeros_like(scores).scatter(1, chosen, 1.0), h.clone()
    for e, expert in enumerate(experts):
        mask = codes[:, e].bool()
        out[mask] = expert(h[mask])
    return out


def _either(h: Any, scores: Any, experts: Any) -> Any:
    """A sum of codes has several ones."""
    codes, out = F.one_hot(scores.argmax(-1), COUNT) + F.one_hot(scores.argmin(-1), COUNT), h.clone()
    for e, expert in enumerate(experts):
        mask = codes[:, e].bool()
        out[mask] = expert(h[mask])
    return out


def _along_another_axis(h: Any, scores: Any, experts: Any) -> Any:
    """Entries of one code for different rows."""
    codes, out = F.one_hot(scores.argmax(-1), COUNT)[: len(h)].bool(), h[:COUNT].clone()
    for e, expert in enumerate(experts):
        out[codes[e]] = expert(h[:COUNT][codes[e]])
    return out


def _named_from_the_end(h: Any, scores: Any, experts: Any) -> Any:
    """The last entry of a code, by two names."""
    codes, out = _codes(scores), h.clone()
    for place, expert in zip((0, COUNT - 1, -1), experts, strict=True):
        mask = codes[:, place].bool()
        out[mask] = expert(h[mask])
    return out


def _times_infinity(h: Any, scores: Any, experts: Any) -> Any:
    """Zero times infinity is not zero, so it is no code."""
    codes, out = _codes(scores) * torch.where(scores > 1, float("inf"), scores), h.clone()
    for e, expert in enumerate(experts):
        mask = codes[:, e].bool()
        out[mask] = expert(h[mask])
    return out


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "mix",
    [
        _named_from_the_end,
        _times_infinity,
        _several,
        _several_in_place,
        _two_choices,
        _two_ones,
        _either,
        _along_another_axis,
    ],
    ids=lambda f: f.__name__,
)
def test_where_masks_overlap_the_order_counts(mix: Callable[..., Any], verify: bool) -> None:
    symmetry = infer(Mixture(mix), X, verify=verify)
    assert not symmetry.exchanges
    assert [g.size for g in symmetry.sets].count(5) == COUNT


def test_masks_that_exclude_each_other() -> None:
    def program(scores: torch.Tensor, rows: torch.Tensor) -> Any:
        one, two = F.one_hot(scores.argmax(-1), 3), F.one_hot(scores.argmin(-1), 3)
        chosen = scores.argmax(-1)
        kept = rows > 0
        return (
            *(one[:, 0].bool(), (one * kept[:, None])[:, 1] != 0, (one[:, 2] * kept).bool()),
            *(two[:, 1].bool(), (one + two)[:, 1].bool(), (one * two)[:, 1].bool()),
            *(chosen == 0, (chosen == 1) & kept, kept, rows == 1, one[:, 1] > 0, one[:, 2] == 1, one[:, 2] == 0),
            *(rows == 2**24, rows == 2**24 + 1),  # one number in float32
        )

    class Program(torch.nn.Module):
        def forward(self, scores: torch.Tensor, rows: torch.Tensor) -> Any:
            return program(scores, rows)

    graph = trace(Program(), (torch.randn(9, 3), torch.randn(9)))
    (out,) = next(n for n in graph.graph.nodes if n.op == "output").args
    masks = list(out)
    found = {(a, b) for a in range(len(masks)) for b in range(a) if exclusive(masks[a], masks[b])}
    # 0: one 0; 1: one 1, kept; 2: one 2, kept; 3: two 1; 4: either 1; 5: one 1 and two 1; 6: is 0; 7: is 1, kept;
    # 10: one 1; 11: one 2
    assert found == {
        *((1, 0), (2, 0), (2, 1), (5, 0), (5, 2), (7, 6)),
        *((10, 0), (10, 2), (11, 0), (11, 1), (11, 5), (11, 10)),
        *((13, 9), (14, 9)),
    }
