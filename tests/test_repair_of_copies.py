"""Copies of a network stay what they are, whatever repairs them: with states, with layers that see one input, with experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from automerge import GaussianRepair, Identity, LeastSquares, Renormaliser, Repair, RowNorms, compare, merge
from automerge._errors import AutomergeError
from automerge.renormalise import reset_batchnorm

torch.set_num_threads(1)
TIERS: dict[str, str | Renormaliser] = {
    "auto": "auto",
    "rescale": Repair(shift=False),
    "row norms": RowNorms(),
    "gaussian": GaussianRepair(gate=1.0),
    "least squares": LeastSquares(),
}


class Normaliser(nn.Module):
    """Normalises by running averages that every pass goes on with, as in reinforcement learning."""

    def __init__(self, data: bool = False) -> None:
        super().__init__()
        self.a, self.m, self.out = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 3)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))
        self.data = data

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        y = self.out(self.m((h - self.mean) / (self.var + 1e-5).sqrt()).relu())
        with torch.no_grad():
            for own, new in ((self.mean, h.mean(0)), (self.var, h.var(0))):
                (own.data if self.data else own).lerp_(new, 0.1)
        return y


def _copies(model: nn.Module, data: list[Any], repair: str | Renormaliser, x: Any) -> nn.Module:
    merged = merge([model, model], x, data=data, repair=repair, matcher=Identity())
    twin = type(model)()
    twin.load_state_dict(merged.state_dict)
    return twin.eval()


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("batches", [3, 70])  # in one pass, and layer after layer
def test_every_pass_begins_with_the_given_state(tier: str, batches: int, data: bool) -> None:
    torch.manual_seed(0)
    model = Normaliser(data).eval()
    x = torch.randn(9, 5)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 5) * 2 + 1)
    kept = {n: v.clone() for n, v in model.state_dict().items()}
    twin = _copies(model, [torch.randn(16, 5) * 2 + 1 for _ in range(batches)], TIERS[tier], x)
    assert all(torch.equal(v, kept[n]) for n, v in model.state_dict().items())
    assert torch.equal(twin.mean, model.mean)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=1e-5)


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t, self.t2, self.a, self.out = nn.Linear(4, 16), nn.Linear(16, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.out((self.a(x) + self.t2(torch.tanh(self.t(t)).cumsum(-1))).relu())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tier", TIERS)
def test_where_all_samples_are_at_one_time_step(tier: str, seed: int) -> None:
    """The inputs of the layers of ``t`` vary by rounding only; at other times the network is as it was."""
    torch.manual_seed(seed)
    model, x, t = Conditioned().eval(), torch.randn(12, 5), torch.randn(12, 4)
    one = torch.randn(1, 4)
    twin = _copies(model, [(torch.randn(n, 5), one.expand(n, 4)) for n in (16, 13, 7, 1, 5)], TIERS[tier], (x, t))
    torch.testing.assert_close(twin(x, t), model(x, t), rtol=0, atol=1e-3)


def test_least_squares_learns_from_small_variations() -> None:
    """Inputs that vary by a hundredth of their mean are data, not rounding."""
    torch.manual_seed(0)
    true, own = nn.Linear(4, 3), nn.Linear(4, 3)
    x = 1 + 0.01 * torch.randn(400, 4)
    fixed, report = LeastSquares()(own, own.state_dict(), [true.state_dict()], [x])
    assert torch.allclose(fixed["weight"], true.weight, atol=5e-3)
    assert report.layers[0].error is not None
    assert report.layers[0].error < 1e-4


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(5, 3), nn.Linear(4, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, out = self.gate(x).argmax(-1), x.new_zeros(len(x), 4)
        for number, expert in enumerate(self.experts):
            rows = chosen == number
            if rows.any():
                out[rows] = expert(x[rows])
        return self.out(out)


def _batch(model: Experts, expert: int, rows: int) -> torch.Tensor:
    x = torch.randn(4000, 5)
    chosen = model.gate(x).argmax(-1)
    return torch.cat([x[chosen != expert][: 16 - rows], x[chosen == expert][:rows]])


@pytest.mark.parametrize("repair", ["reset", "both", LeastSquares()])
@pytest.mark.parametrize(("first", "later"), [(4, 1), (0, 4), (1, 4), (1, 1), (1, 0), (0, 1)])
def test_an_expert_with_a_single_row_keeps_its_statistics(first: int, later: int, repair: Any) -> None:
    torch.manual_seed(0)
    model = Experts().eval()
    expert = int(model.gate(torch.randn(4000, 5)).argmax(-1).bincount(minlength=3).argmin())
    data = [_batch(model, expert, first), _batch(model, expert, later)]
    found = merge([model, model], _batch(model, expert, 4), data=data, repair=repair, matcher=Identity())
    name = f"experts.{expert}.1"
    few = first + later < 2
    kept = torch.equal(found.state_dict[f"{name}.running_var"], model.experts[expert][1].running_var)
    if first or not isinstance(repair, LeastSquares):  # which refits what the first batch runs
        assert few == kept == (name not in found.repair.reset)
        assert few == ("fewer than two values" in found.repair.skipped.get(name, ""))
    assert len(found.repair.reset) >= 2


def test_single_rows_everywhere_have_no_variance() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(AutomergeError, match="two samples or more"):
        reset_batchnorm(model, [torch.randn(1, 2), torch.randn(1, 2)])
    assert reset_batchnorm(model, [torch.randn(1, 2), torch.randn(6, 2)]) == ("0",)


def test_compare_has_every_row_where_an_expert_gets_a_single_one() -> None:
    torch.manual_seed(0)
    model = Experts().eval()
    expert = int(model.gate(torch.randn(4000, 5)).argmax(-1).bincount(minlength=3).argmin())
    batches = [(x, torch.randint(3, (16,))) for x in (_batch(model, expert, 1), _batch(model, expert, 4))]
    one = {"identity": Identity()}
    found = compare([model, model], batches[0][0], batches, select=batches, report=batches, matchers=one)
    assert {row.repair for row in found.rows} >= {"reset", "both"}
    assert not [row.error for row in found.rows if row.error]
