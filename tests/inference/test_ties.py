"""Scores that are equal by the way they are made: the first of them is chosen, so their axis keeps its order."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge import Generator, Slot, Symmetry, infer
from automerge._restoring import kept_tensors
from automerge.testing import assert_sound
from tests.inference.networks_hostile import Program
from tests.inference.test_found_networks import lin
from tests.inference.test_networks import parse


def _largest(h: torch.Tensor) -> torch.Tensor:
    values, index = h.topk(3)
    return torch.zeros_like(h).scatter(1, index, values)


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def sizes(net: nn.Module, expected: str) -> None:
    for verify in (False, True):
        symmetry = infer(net, X, verify=verify)
        assert sorted(g.size for g in symmetry.generators()) == parse(expected), str(symmetry)
    assert_sound(net, X, symmetry)


def router(act: Callable[[torch.Tensor], torch.Tensor], soft: bool) -> nn.Module:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        v, i = act(s.gate(x)).topk(2, -1)
        w = torch.zeros(len(x), 4, dtype=x.dtype).scatter(1, i, v.softmax(-1) if soft else v)
        return torch.einsum("be,eij,bi->bj", w, s.experts, x)

    torch.manual_seed(0)
    return Program(forward, {"gate": lin(5, 4), "experts": lambda: nn.Parameter(torch.randn(4, 5, 3))}).eval()


@pytest.mark.parametrize(
    ("act", "soft", "expected"),
    [
        (F.relu, True, ""),  # a row with one positive score: which other expert counts?
        (F.relu6, True, ""),
        (lambda z: z.clamp(min=0) * 2, True, ""),
        (F.relu, False, "4"),  # a weight of zero takes no expert
        (lambda z: (z * 4).round() / 4, False, ""),
        (torch.sign, True, ""),
        (lambda z: z.softmax(-1), True, "4"),
        (torch.sigmoid, False, "4"),
    ],
)
def test_routers(act: Callable[[torch.Tensor], torch.Tensor], soft: bool, expected: str) -> None:
    sizes(router(act, soft), expected)


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda h: h.gather(1, (h > 0).float().argmax(1, keepdim=True)), ""),
        (lambda h: h.gather(1, (h > 0).long().max(1, keepdim=True).indices), ""),
        (lambda h: torch.zeros_like(h).scatter(1, h.floor().argsort(1)[:, :2], 1.0), ""),
        (lambda h: _largest(h.relu()), "8"),  # units that are off stay off, whichever are listed
        (lambda h: (h > 0).float().max(1, keepdim=True).values, "8"),  # the value alone does not tell
        (lambda h: h.gather(1, h.argmax(1, keepdim=True)), "8"),
    ],
)
def test_units(read: Callable[[torch.Tensor], torch.Tensor], expected: str) -> None:
    torch.manual_seed(0)
    net = Program(lambda s, x: (lambda h: s.out(h + read(h)))(s.inp(x)), {"inp": lin(5, 8), "out": lin(8, 3)})
    sizes(net.eval(), expected)


@pytest.mark.parametrize(
    "first",
    [
        lambda x: torch.zeros(len(x), 8, dtype=x.dtype),
        lambda x: x.new_zeros(len(x), 8),
        lambda x: torch.zeros_like(x[:, :4]).repeat(1, 2),
        lambda x: x.new_zeros(8, len(x)).t().clone(),
    ],
)
def test_scores_of_a_first_state_of_zeros(first: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = first(x)
        for _ in range(2):
            score = h @ s.keys.t()
            w = torch.zeros_like(score).scatter(1, score.topk(2, 1).indices, 1.0)
            h = torch.tanh(torch.einsum("be,eij,bi->bj", w, s.experts, x))
        return s.out(h)

    torch.manual_seed(0)
    parts = {
        "keys": lambda: nn.Parameter(torch.randn(6, 8)),
        "experts": lambda: nn.Parameter(torch.randn(6, 5, 8)),
        "out": lin(8, 2),
    }
    sizes(Program(forward, parts).eval(), "8")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("held", ["attribute", "list", "shared", "buffer", "object"])
def test_what_passes_through_a_tensor_of_the_module_is_verified(held: str, skip: bool) -> None:
    """A cache that is no part of the state is computed in double precision, too."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.key, self.out = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            room = torch.zeros(8, 6)
            if held == "buffer":
                self.register_buffer("cache", room, persistent=False)
            else:
                self.cache = room if held == "attribute" else [room]
                self.rooms = SimpleNamespace(room=room)
            self.inp.shared = self.cache  # one memory, of two modules

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            room = self.cache[0] if held in ("list", "shared") else self.cache
            room = self.rooms.room if held == "object" else room
            room[: len(x)] = self.key(self.inp(x).relu())
            if held == "shared":
                room = self.inp.shared[0]
            return self.out(room[: len(x)].relu()) + (self.inp(x).sum(-1, keepdim=True) if skip else 0)

    torch.manual_seed(0)
    model = Cached().eval()
    symmetry = infer(model, X)
    assert [g.size for g in symmetry.generators()] == [6, 6]
    assert symmetry.stats["verified"] < 1e-9
    units = np.arange(6)[:, None]
    wrong = Symmetry(symmetry.shapes, (Generator(6, (Slot("key.weight", 0, units), Slot("key.bias", 0, units))),))
    with pytest.raises(AssertionError, match="changes the output"):
        assert_sound(model, X, wrong)
    assert all(t.dtype is torch.float32 for t in kept_tensors(model))


def _spikes(s: Any, x: torch.Tensor) -> torch.Tensor:
    """The units that fired most often, of a layer whose spikes are counted."""
    current = s.inp(x)
    membrane = counts = torch.zeros_like(current)
    for _ in range(6):
        membrane = 0.8 * membrane + current
        fired = (membrane > 1).to(current)
        membrane, counts = membrane - fired, counts + fired
    return s.out(counts * torch.zeros_like(counts).scatter_(1, counts.topk(3, -1).indices, 1.0))


MADE_EQUAL: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "capped": lambda s, g, x: torch.minimum(g, g.new_tensor(0.3)),
    "no less than a column": lambda s, g, x: torch.maximum(g, x[:, :1]),
    "gated": lambda s, g, x: g.sigmoid() * F.relu(s.gate(x)),
    "shrunk": lambda s, g, x: F.softshrink(g),
    "hard": lambda s, g, x: F.hardswish(3 * g),
    "counted": lambda s, g, x: ((g[:, None] > s.gate(x)[..., None]).sum(1)).float(),
}
BY_MASK: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "fewer allowed than chosen": lambda s, g, x: g.masked_fill(s.gate(x).sigmoid() < 0.6, -1e9),
    "one of two": lambda s, g, x: torch.where(g > 0, torch.ones_like(g), g),
}
EXPERTS = {
    "router": lin(5, 4),
    "gate": lin(5, 4),
    "inner": lambda: nn.Parameter(torch.randn(4, 5, 6)),
    "outer": lambda: nn.Parameter(torch.randn(4, 6, 3)),
}


def _experts(scores: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]) -> nn.Module:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        value, chosen = scores(s, s.router(x), x).topk(2, -1)
        h = torch.einsum("bd,bkdf->bkf", x, s.inner[chosen]).relu()
        return (torch.einsum("bkf,bkfo->bko", h, s.outer[chosen]) * value.softmax(-1)[..., None]).sum(1)

    torch.manual_seed(0)
    return Program(forward, EXPERTS).eval()


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", MADE_EQUAL)
def test_experts_chosen_by_scores_that_are_made_equal(name: str, verify: bool) -> None:
    model = _experts(MADE_EQUAL[name])
    found = infer(model, torch.randn(16, 5), verify=verify)
    thresholds = [4] if name == "counted" else []
    assert sorted(g.size for g in found.sets) == [*thresholds, 6, 6, 6, 6]
    assert not any("may be equal" in note for note in found.notes)
    assert_sound(model, torch.randn(64, 5), found)


@pytest.mark.parametrize("name", BY_MASK)
def test_verification_finds_the_others(name: str) -> None:
    """A mask may leave fewer than are chosen, or not; what happens shows."""
    model = _experts(BY_MASK[name])
    found = infer(model, torch.randn(16, 5))
    assert sorted(g.size for g in found.sets) == [6] * 4
    assert any("may be equal, so that what it chooses from keeps its order" in note for note in found.notes)
    assert_sound(model, torch.randn(64, 5), found)


def test_counts_of_spikes() -> None:
    torch.manual_seed(0)
    model = Program(_spikes, {"inp": lin(5, 8), "out": lin(8, 3)}).eval()
    for verify in (False, True):
        assert infer(model, torch.randn(16, 5), verify=verify).sets == ()


# -------------------------------------------------------------------- squared distances are zero by coincidence only
def _rows(t: torch.Tensor) -> torch.Tensor:
    return (t**2).sum(-1)


DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "clamp": lambda x, e: (_rows(x)[:, None] + _rows(e) - 2 * x @ e.T).clamp(min=0),
    "relu": lambda x, e: (_rows(x)[:, None] + _rows(e) - 2 * (x @ e.T)).relu(),
    "small": lambda x, e: (
        (_rows(x)[:, None] + _rows(e)[None] + torch.einsum("id,jd->ij", x, e) * -2).clamp(min=1e-8).sqrt()
    ),
    "products": lambda x, e: ((x * x).sum(-1)[:, None] + (e * e).sum(-1) + torch.matmul(x * -2, e.t())).clamp_min(0),
    "subtracted": lambda x, e: torch.sub(_rows(x)[:, None] + _rows(e), x @ e.T, alpha=2).clamp(0),
    "batches": lambda x, e: (_rows(x)[None, :, None] + _rows(e[None])[:, None] - 2 * x[None] @ e[None].mT).clamp(0)[0],
}
NO_DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "another factor": lambda x, e: (_rows(x)[:, None] + _rows(e) - 3 * x @ e.T).clamp(min=0),
    "one square": lambda x, e: (_rows(x)[:, None] - 2 * x @ e.T).clamp(min=0),
    "scaled": lambda x, e: (_rows(x)[:, None] + _rows(2 * e) - 2 * x @ e.T).clamp(min=0),
    "another axis": lambda x, e: (_rows(x)[:, None] + (e**2).sum(0) - 2 * x @ e.T).clamp(min=0),
    "slices": lambda x, e: (_rows(x[:, :4])[:, None] + _rows(e[:, :4]) - 2 * x[:, 4:] @ e[:, 4:].T).clamp(min=0),
    "a large floor": lambda x, e: (_rows(x)[:, None] + _rows(e) - 2 * x @ e.T).clamp(min=3),
    "a ceiling": lambda x, e: (_rows(x)[:, None] + _rows(e) - 2 * x @ e.T).clamp(0, 3),
}


def _quantiser(distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> nn.Module:
    torch.manual_seed(0)

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        return s.out(s.codes[(-distance(s.inp(x), s.codes)).argmax(-1)])

    return Program(
        forward, {"inp": lin(5, 8), "out": lin(8, 3), "codes": lambda: nn.Parameter(torch.randn(8, 8))}
    ).eval()


def _codes(net: nn.Module, verify: bool) -> bool:
    return any((s.param, s.axis) == ("codes", 0) for g in infer(net, X, verify=verify).generators() for s in g.slots)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", DISTANCES)
def test_codes_by_a_distance_that_is_kept_from_falling_below_zero(name: str, verify: bool) -> None:
    net = _quantiser(DISTANCES[name])
    assert [g.size for g in infer(net, X, verify=verify).generators()] == [8, 8]
    assert_sound(net, X, infer(net, X, verify=verify))


@pytest.mark.parametrize("name", NO_DISTANCES)
def test_codes_by_what_is_no_distance_keep_their_order(name: str) -> None:
    assert not _codes(_quantiser(NO_DISTANCES[name]), False)
