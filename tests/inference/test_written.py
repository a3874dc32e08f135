"""What a pass leaves in parameters and buffers is what the next one reads: the groups hold for any number of passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge import Generator, InvarianceError, Slot, Symmetry, infer, verify
from automerge.trace import trace

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


class Codes(nn.Module):
    """A codebook of moving averages, which it is made of anew after every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(5, 6), nn.Linear(6, 5)
        self.register_buffer("codes", torch.randn(6, 8))
        self.register_buffer("count", torch.ones(8))
        self.register_buffer("total", torch.randn(6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.enc(x)
        chosen = torch.cdist(z, self.codes.T).argmin(1)
        hit = F.one_hot(chosen, 8).to(z.dtype)
        q = F.embedding(chosen, self.codes.T)
        self.count.data.mul_(0.9).add_(hit.sum(0), alpha=0.1)
        self.total.data.mul_(0.9).add_(z.T @ hit, alpha=0.1)
        self.codes.data.copy_(self.total / self.count)
        return self.dec(z + (q - z).detach())


class Rebound(nn.Module):
    """New tensors in the place of buffers; one of them is read by the next pass only, the other by the one after that."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(5, 6), nn.Linear(6, 2)
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("slow", torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        y = self.out((h - self.mean).relu())
        self.mean = 0.9 * self.slow + 0.1 * h.mean(0)
        self.slow = 0.5 * self.slow + 0.5 * self.mean
        return y


class Queue(nn.Module):
    """Keys of earlier batches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.k = nn.Linear(5, 6), nn.Linear(5, 6)
        self.register_buffer("queue", torch.randn(6, 8))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.a(x), self.k(x)
        scores = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone()], 1)
        at = int(self.at)
        self.queue[:, at : at + 4] = k.T
        self.at[0] = (at + 4) % 8
        return scores


class Shifted(nn.Module):
    """What a pass leaves is in another order: the last unit becomes the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(5, 7), nn.Linear(7, 2)
        self.register_buffer("gain", torch.rand(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.out(self.a(x) * self.gain)
        self.gain.copy_(self.gain.roll(1))
        return y


class Tallied(nn.Module):
    """A tally that nothing reads constrains nothing, and stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(5, 6), nn.Linear(6, 2)
        self.register_buffer("tally", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        self.tally.add_(h.cumsum(1).sum(0))
        return self.out(h.relu())


class Recurrent(nn.Module):
    """A state that is kept between calls; zeros at first, or none."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.a, self.out, self.first = nn.Linear(5, 6), nn.Linear(7, 2), first
        self.cell = (nn.LSTM if first == "none" else nn.GRUCell)(6, 7)
        self.h: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first == "none":
            y, self.h = self.cell(self.a(x)[None], self.h)
            return self.out(y[0])
        h = x.new_zeros(len(x), 7) if self.h is None else self.h["last"][-1]
        self.h = {"last": [self.cell(self.a(x), h)]}
        return self.out(self.h["last"][-1])


class Spiking(nn.Module):
    """Membranes and spikes of the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r, self.out = nn.Linear(5, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)
        self.decay = nn.Parameter(torch.rand(6))
        self.membrane: Any = 0.0
        self.spikes: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.membrane = self.decay * self.membrane + self.a(x) + (0 if self.spikes is None else self.r(self.spikes))
        self.spikes = (self.membrane > 0.1).to(x)
        return self.out(self.membrane)


class Outside(nn.Module):
    """A buffer outside the state dict that is bound anew, or written to."""

    def __init__(self, bound: bool) -> None:
        super().__init__()
        self.a, self.out, self.bound = nn.Linear(5, 6), nn.Linear(6, 2), bound
        self.r = nn.Parameter(torch.randn(6, 6))
        self.register_buffer("h", torch.zeros(6), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x) + self.h.to(x) @ self.r.T
        if self.bound:
            self.h = y.mean(0).tanh()
        else:
            self.h.copy_(y.mean(0).tanh())
        return self.out(y.relu())


def change(make: Callable[[], nn.Module], symmetry: Symmetry, passes: int = 3) -> float:
    """The largest relative difference that a random element makes in any of several passes."""
    torch.manual_seed(1)
    nets: list[Any] = [make().double() for _ in range(2)]
    nets[1].load_state_dict(symmetry.apply(nets[0].state_dict(), symmetry.random_element(0)))
    worst = 0.0
    with torch.no_grad():
        for _ in range(passes):
            before, after = (net(X.double()) for net in nets)
            worst = max(worst, float((before - after).abs().max() / before.abs().max()))
    return worst


@pytest.mark.parametrize("verified", [False, True])
@pytest.mark.parametrize(
    ("make", "sizes", "moved"),
    [
        (Codes, [6, 8], {"codes", "total", "count"}),
        (Rebound, [6], {"mean", "slow"}),
        (Queue, [6], {"queue"}),
        (Shifted, [], set()),
        (Tallied, [6], set()),
        (lambda: Recurrent("zeros"), [6, 7], set()),
        (lambda: Recurrent("none"), [6, 7], set()),
        (Spiking, [6], set()),
        (lambda: Outside(True), [6], set()),
        (lambda: Outside(False), [6], set()),
    ],
)
def test_the_groups_hold_for_several_passes(
    make: Callable[[], nn.Module], sizes: list[int], moved: set[str], verified: bool
) -> None:
    torch.manual_seed(0)
    symmetry = infer(make(), X, verify=verified)
    assert sorted(g.size for g in symmetry.generators()) == sizes
    assert symmetry.moved & {"codes", "total", "count", "mean", "slow", "queue", "gain", "tally"} == moved
    assert change(make, symmetry) < 1e-12


def test_the_recorded_graph_tells_the_change_of_a_parameter() -> None:
    graph = trace(Rebound(), X)
    info = graph.meta["trace"]
    assert info.rewritten == ["mean", "slow"]
    assert sorted(info.again.values()) == ["mean", "slow"]
    assert set(info.again) <= set(info.reads)


class Remembering(nn.Module):
    """What is kept for a look at it is no state; a cache may have no room for another pass."""

    def __init__(self, room: int = 0) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.room, self.kept = room, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).relu()
        if self.room:
            if len(self.kept) == self.room:
                raise ValueError("full")
            h = sum(self.kept, h)
        self.kept.append(self.b(h).tanh())
        return self.out(self.kept[-1])


@pytest.mark.parametrize("room", [0, 1])
def test_a_further_pass_that_reads_nothing_or_fails_leaves_nothing(room: int) -> None:
    net = Remembering(room)
    graph = trace(net, X)
    once = sum(n.target is torch.ops.aten.addmm.default for n in graph.graph.nodes)
    assert once == 3
    assert not graph.meta["trace"].reads
    assert not net.kept
    assert sorted(g.size for g in infer(net, X).generators()) == [6, 6]


def test_a_state_is_recorded_for_two_passes() -> None:
    graph = trace(Remembering(2), X)
    assert sum(n.target is torch.ops.aten.addmm.default for n in graph.graph.nodes) == 6
    assert sorted(g.size for g in infer(Remembering(2), X).generators()) == [6]


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda: Recurrent("zeros"), [Generator(7, (Slot("cell.weight_hh", 1, np.arange(7)[:, None]),))]),
        (Codes, [Generator(6, (Slot("total", 0, np.arange(6)[:, None]),))]),
    ],
)
def test_verification_looks_at_a_further_pass(make: Callable[[], nn.Module], wrong: list[Generator]) -> None:
    torch.manual_seed(0)
    net = make()
    right = infer(net, X)
    assert verify(net, X, right).error < 1e-9
    with pytest.raises(InvarianceError):
        verify(net, X, replace(right, sets=tuple(wrong)))
