"""Experts to which no input is sent move as the others: they are reached with weights in another order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automerge import infer
from automerge.testing import assert_sound

WIDTH, HIDDEN, EXPERTS = 6, 5, 4


class Never(nn.Module):
    """A mixture whose gate chooses its expert 2 on (almost) no input."""

    def __init__(self, by: str, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.gate, self.out = nn.Linear(3, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)) for _ in range(EXPERTS)
        )
        self.spelling = spelling
        if by == "bias":
            self.gate.bias.data[2] = -50.0
        else:
            self.gate.weight.data[2] *= 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inp(x)
        share, chosen = self.gate(h).softmax(-1).max(-1)
        return self.out(h + getattr(self, self.spelling)(h, chosen) * share[:, None])

    def masks(self, h: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            rows = chosen == i
            if rows.any():
                y[rows] = expert(h[rows])
        return y

    def runs(self, h: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        order = chosen.argsort(stable=True)
        rows = h[order].split(torch.bincount(chosen, minlength=EXPERTS).tolist())
        y = torch.cat([expert(r) if len(r) else r for expert, r in zip(self.experts, rows, strict=True)])
        return torch.zeros_like(h).index_copy(0, order, y)


@pytest.mark.parametrize("spelling", ["masks", "runs"])
@pytest.mark.parametrize("by", ["bias", "weight"])
def test_units_of_an_expert_that_no_input_reaches_are_free(by: str, spelling: str) -> None:
    model = Never(by, spelling).eval()
    x = torch.randn(17, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        many = torch.randn(5000, 3, generator=torch.Generator().manual_seed(2))
        assert not (model.gate(model.inp(many)).argmax(-1) == 2).any()
    found = infer(model, x)
    assert sorted(g.size for g in found.generators()) == [HIDDEN] * EXPERTS + [WIDTH]
    if by == "weight":
        assert [e.size for e in found.exchanges] == [EXPERTS]
    assert_sound(model, x, found)


def test_weights_and_inputs_are_left_as_they_were() -> None:
    model = Never("bias", "masks").eval()
    x = torch.randn(17, 3, generator=torch.Generator().manual_seed(1))
    before, given = {n: v.clone() for n, v in model.state_dict().items()}, x.clone()
    infer(model, x)
    assert torch.equal(x, given)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


class Skipped(nn.Module):
    """A block that is left out where its gates are small."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gate, self.block, self.out = (nn.Linear(n, m) for n, m in ((3, 8), (3, 8), (8, 8), (8, 2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, gate = self.inp(x).tanh(), self.gate(x).sigmoid()
        if gate.mean().item() > 0.5:
            h = h + gate * self.block(h).tanh()
        return self.out(h)


@pytest.mark.parametrize("seed", range(6))
def test_a_block_that_the_example_skips_moves_with_the_stream(seed: int) -> None:
    torch.manual_seed(seed)
    net = Skipped().double().eval()
    x = next(x for x in iter(lambda: torch.randn(1, 3).double(), None) if net.gate(x).sigmoid().mean() < 0.5)
    symmetry = infer(net, (x,), verify=False)
    assert [g.size for g in symmetry.generators()] == [8]
    assert set(symmetry.moved) == {n for n, _ in net.named_parameters()} - {"out.bias"}
