"""Joins of branches in other words: tensors filled piece by piece, chains, masks as factors, lists of the experts hit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from automerge import infer
from automerge.testing import assert_sound
from tests.inference._mixtures import COUNT, HIDDEN, WIDTH, Mixture, X, modules

Mix = Callable[..., Any]


# -------------------------------------------------------------------- filled piece by piece
def _slices_of_zeros(h: Any, scores: Any, experts: Any) -> Any:
    out = torch.zeros(len(h), COUNT * WIDTH)
    for e, expert in enumerate(experts):
        out[:, e * WIDTH : (e + 1) * WIDTH] = expert(h)
    return (out.view(-1, COUNT, WIDTH) * scores.softmax(-1)[..., None]).sum(1)


def _entries_of_nothing(h: Any, scores: Any, experts: Any) -> Any:
    out = torch.empty(len(h), COUNT, WIDTH)
    for e in reversed(range(COUNT)):
        out[:, e] = experts[e](h) * scores.softmax(-1)[:, e : e + 1]
    return out.sum(1)


def _entries_changed(h: Any, scores: Any, experts: Any) -> Any:
    """What is there is read, and added to."""
    out = h.expand(COUNT, -1, -1).clone()
    for e, expert in enumerate(experts):
        out[e] += expert(out[e])
    return out.amax(0)


def _rows_of_entries(h: Any, scores: Any, experts: Any) -> Any:
    """Each expert works on its rows of a copy of its own (NLLB)."""
    chosen = scores.argmax(-1)
    out = torch.einsum("bm,be->ebm", h, F.one_hot(chosen, COUNT).to(h))
    for e, expert in enumerate(experts):
        mask = chosen == e
        out[e, mask] = scores.softmax(-1)[mask, e, None] * expert(out[e, mask])
    return out.sum(0)


def _beside_others(h: Any, scores: Any, experts: Any) -> Any:
    """The first and the last entry are not written."""
    out = torch.stack([h] * (COUNT + 2))
    for e, expert in enumerate(experts):
        out[e + 1] = expert(h)
    return out.square().sum(0)


# -------------------------------------------------------------------- chains
def _longer_and_longer(h: Any, scores: Any, experts: Any) -> Any:
    out = experts[0](h)[None]
    for expert in experts[1:]:
        out = torch.cat([out, expert(h)[None]])
    return out.amax(0)


def _longer_from_nothing(h: Any, scores: Any, experts: Any) -> Any:
    out = h.new_empty(len(h), 0, WIDTH)
    for expert in experts:
        out = torch.cat([out, expert(h)[:, None]], 1)
    return out.mean(1)


def _subtracted(h: Any, scores: Any, experts: Any) -> Any:
    out = h
    for expert in experts:
        out = out - expert(h)
    return out


def _multiplied_and_added(h: Any, scores: Any, experts: Any) -> Any:
    out = torch.zeros_like(h)
    for e, expert in enumerate(experts):
        out = torch.addcmul(out, scores.softmax(-1)[:, e : e + 1], expert(h), value=0.5)
    return out


def _added_in_part(h: Any, scores: Any, experts: Any) -> Any:
    out = torch.zeros_like(h)
    for expert in experts:
        out = torch.sub(torch.add(out, expert(h), alpha=0.5), expert(h).tanh(), alpha=2)
    return out


def _folded(op: Mix) -> Mix:
    def mix(h: Any, scores: Any, experts: Any) -> Any:
        out = experts[0](h)
        for expert in experts[1:]:
            out = op(out, expert(h))
        return out.to(h)

    mix.__name__ = f"_{op.__name__}"
    return mix


def _any(h: Any, scores: Any, experts: Any) -> Any:
    out = experts[0](h) > 0
    for expert in experts[1:]:
        out = out | (expert(h) > 0)
    return h * out


# -------------------------------------------------------------------- masks
def _factors(h: Any, scores: Any, experts: Any) -> Any:
    out, chosen = h, scores.argmax(-1)
    for e, expert in enumerate(experts):
        mask = (chosen == e).float()[:, None]
        out = out * (1 - mask) + mask * expert(h)
    return out


def _factors_of_codes(h: Any, scores: Any, experts: Any) -> Any:
    codes, out = F.one_hot(scores.argmax(-1), COUNT).to(h), h
    for e, expert in enumerate(experts):
        mask = codes[:, e : e + 1]
        out = mask * expert(h) * scores.softmax(-1)[:, e : e + 1] + (1 - mask) * out
    return out


def _factors_of_truths(h: Any, scores: Any, experts: Any) -> Any:
    out, chosen = h, scores.argmax(-1, keepdim=True)
    for e, expert in enumerate(experts):
        out = expert(h) * (chosen == e) + out * ~(chosen == e)
    return out


def _scattered(h: Any, scores: Any, experts: Any) -> Any:
    out, chosen = torch.zeros_like(h), scores.argmax(-1)
    for e, expert in enumerate(experts):
        mask = chosen == e
        out = out.masked_scatter(mask[:, None], expert(h[mask]))
    return out


# -------------------------------------------------------------------- experts that were hit
def _each(h: Any, chosen: Any, experts: Any, kinds: Any) -> Any:
    out = torch.zeros_like(h)
    for e in kinds:
        mask = chosen == e
        out[mask] = experts[e](h[mask])
    return out


def _unique_list(h: Any, scores: Any, experts: Any) -> Any:
    chosen = scores.argmax(-1)
    return _each(h, chosen, experts, chosen.unique().tolist())


def _unique_numbers(h: Any, scores: Any, experts: Any) -> Any:
    chosen = scores.max(-1).indices
    return _each(h, chosen, experts, [e.item() for e in torch.unique(chosen)])


def _unique_entries(h: Any, scores: Any, experts: Any) -> Any:
    chosen = scores.argmax(-1)
    return _each(h, chosen, experts, chosen.unique())


def _hit_of_two(h: Any, scores: Any, experts: Any) -> Any:
    weights, chosen = scores.softmax(-1).topk(2)
    codes, out = F.one_hot(chosen, COUNT).permute(2, 1, 0), torch.zeros_like(h)
    for e in torch.greater(codes.sum((-1, -2)), 0).nonzero().flatten().tolist():
        slot, row = torch.where(codes[e])
        out.index_add_(0, row, experts[e](h[row]) * weights[row, slot, None])
    return out


def _hit_up_to_a_capacity(h: Any, scores: Any, experts: Any) -> Any:
    """Switch Transformer, earlier than transformers 4.56."""
    codes, out = F.one_hot(scores.argmax(-1), COUNT), h.clone()
    codes = (codes * (codes.cumsum(0) <= 15)).bool()
    for e in torch.nonzero(codes.sum(0), as_tuple=True)[0].tolist():
        out[codes[:, e]] = experts[e](h[codes[:, e]])
    return scores.softmax(-1).amax(-1, keepdim=True) * out


FILLED = (_slices_of_zeros, _entries_of_nothing, _entries_changed, _rows_of_entries, _beside_others)
FOLDED = tuple(map(_folded, (torch.fmax, torch.fmin, torch.logaddexp, torch.logical_or, torch.logical_and)))
CHAINS = (_longer_and_longer, _longer_from_nothing, _subtracted, _multiplied_and_added, _added_in_part, _any, *FOLDED)
MASKED = (_factors, _factors_of_codes, _factors_of_truths, _scattered)
HIT = (_unique_list, _unique_numbers, _unique_entries, _hit_of_two, _hit_up_to_a_capacity)


@pytest.mark.parametrize("mix", [*FILLED, *CHAINS, *MASKED, *HIT], ids=lambda f: f.__name__)
def test_branches_are_interchangeable_however_they_are_joined(mix: Mix) -> None:
    net = Mixture(mix)
    symmetry = infer(net, X, verify=False)
    assert [size for size, _ in modules(symmetry)] == [COUNT]
    assert [g.size for g in symmetry.sets].count(HIDDEN) == COUNT
    assert_sound(net, X, symmetry)
    assert modules(infer(net, X)) == modules(symmetry)


# -------------------------------------------------------------------- where they are not
def _over_each_other(h: Any, scores: Any, experts: Any) -> Any:
    """Slices that meet: the later one stays."""
    out = torch.zeros(len(h), 2 * WIDTH)
    for e, expert in enumerate(experts):
        out[:, 3 * e : 3 * e + WIDTH] = expert(h)
    return out[:, :WIDTH] + out[:, WIDTH:]


def _of_what_was_written(h: Any, scores: Any, experts: Any) -> Any:
    """Each reads what the one before it wrote."""
    out = h.expand(COUNT, -1, -1).clone()
    for e, expert in enumerate(experts):
        out[e] = expert(out[e - 1])
    return out.sum(0)


def _alternating(h: Any, scores: Any, experts: Any) -> Any:
    out = experts[0](h)
    for e, expert in enumerate(experts[1:]):
        out = out - (e + 1) * expert(h)
    return out


def _factors_that_overlap(h: Any, scores: Any, experts: Any) -> Any:
    out = h
    for e, expert in enumerate(experts):
        mask = (scores[:, e : e + 1] > 0).float()
        out = out * (1 - mask) + mask * expert(h)
    return out


def _factors_that_are_no_truths(h: Any, scores: Any, experts: Any) -> Any:
    out, chosen = h, scores.argmax(-1)
    for e, expert in enumerate(experts):
        mask = (chosen == e).float()[:, None] * 0.5
        out = out * (1 - mask) + mask * expert(h)
    return out


def _other_factors(h: Any, scores: Any, experts: Any) -> Any:
    """What is left is not the opposite of what is put there."""
    out, chosen = h, scores.argmax(-1)
    for e, expert in enumerate(experts):
        mask, other = (chosen == e).float()[:, None], (chosen == (e + 1) % COUNT).float()[:, None]
        out = out * (1 - other) + mask * expert(out)
    return out


APART = (_over_each_other, _of_what_was_written, _alternating)
OVERLAPPING = (_factors_that_overlap, _factors_that_are_no_truths, _other_factors)


@pytest.mark.parametrize("mix", [*APART, *OVERLAPPING], ids=lambda f: f.__name__)
def test_where_the_order_of_branches_counts(mix: Mix) -> None:
    net = Mixture(mix)
    symmetry = infer(net, X, verify=False)
    assert not symmetry.exchanges
    assert_sound(net, X, symmetry)


def _first_of_those_hit(h: Any, scores: Any, experts: Any) -> Any:
    chosen, out = scores.argmax(-1), torch.zeros_like(h)
    kinds = chosen.unique().tolist()
    for e in kinds:
        mask = chosen == e
        out[mask] = experts[e](h[mask]) * (2 if e == kinds[0] else 1)
    return out


def _some_of_those_hit(h: Any, scores: Any, experts: Any) -> Any:
    chosen = scores.argmax(-1)
    return _each(h, chosen, experts, [int(e) for e in chosen.unique()[:2]])


def _others_than_those_hit(h: Any, scores: Any, experts: Any) -> Any:
    chosen, out = scores.argmax(-1), torch.zeros_like(h)
    for e in chosen.unique().tolist():
        mask = chosen == COUNT - 1 - e
        out[mask] = experts[e](h[mask])
    return out


@pytest.mark.parametrize("mix", [_first_of_those_hit, _some_of_those_hit, _others_than_those_hit])
def test_what_python_makes_of_a_list_of_numbers_keeps_experts_in_place(mix: Mix) -> None:
    """Where other ones are hit, the branches that are alike here are not."""
    assert not infer(Mixture(mix), X, verify=False).exchanges


def test_experts_that_no_row_hit_stay() -> None:
    class Two(Mixture):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inp(x)
            return self.out(self.mix(h, self.gate(h) + torch.tensor([0.0, 0.0, -1e4]), self.experts))

    for mix in HIT[:3]:
        (exchange,) = infer(Two(mix), X).exchanges
        assert {n.split(".")[1] for names in exchange.params for n in names} == {"0", "1"}
