"""What a repair did to the outputs, recomputed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automerge import Identity, Repair, merge
from automerge._data import Batches
from automerge._drift import SAMPLES, drifts

CPU = torch.device("cpu")


def _nets(count: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)) for _ in range(count)
    ]


def _by_hand(net: nn.Module, nets: list[nn.Module], weights: list[float], x: torch.Tensor) -> float:
    mean = sum(w * m(x).double() for w, m in zip(weights, nets, strict=True))
    assert isinstance(mean, torch.Tensor)
    return float(((net(x).double() - mean).square().mean() / mean.var(0, correction=0).mean()).sqrt().detach())


def test_the_report_says_how_far_the_outputs_are_from_the_models_mean() -> None:
    nets, x = _nets(), torch.randn(200, 4)
    weights = [0.5, 0.3, 0.2]
    plain = merge(nets, x[:4], weights=weights, matcher=Identity(), repair="none")
    fixed = merge(nets, x[:4], weights=weights, matcher=Identity(), data=list(x.split(60)))
    assert plain.repair.drift is None
    assert fixed.repair.drift is not None
    for found, result in zip(fixed.repair.drift, (plain, fixed), strict=True):
        net = result.load_into(_nets(1)[0])
        torch.testing.assert_close(found, _by_hand(net, nets, weights, x), rtol=1e-5, atol=0)
    assert f"{fixed.repair.drift[1]:.3g} after" in str(fixed)
    assert fixed.to_dict()["repair"]["drift"] == fixed.repair.drift


def test_models_that_are_their_own_mean_do_not_drift() -> None:
    net = _nets(1)[0]
    state = net.state_dict()
    found = drifts(net, [state], [state, state], [0.5, 0.5], Batches([torch.randn(8, 4)], 1, None, CPU))
    assert found == [0.0]


def test_a_repair_that_moves_the_outputs_away_is_told() -> None:
    class Worse(Repair):
        def __call__(self, *args: object, **options: object):  # type: ignore[no-untyped-def]
            fixed, report = super().__call__(*args, **options)  # type: ignore[arg-type]
            return {n: 3 * t for n, t in fixed.items()}, report

    nets, x = _nets(2), torch.randn(64, 4)
    same = [nets[0], nets[0]]
    told = merge(same, x[:4], data=[x], repair=Worse())
    assert any("away from the models' own" in note for note in told.notes)
    silent = merge(same, x[:4], data=[x])
    assert not any("away from the models' own" in note for note in silent.notes)


def test_only_the_first_samples_are_looked_at() -> None:
    net, seen = _nets(1)[0], []
    net.register_forward_hook(lambda *call: seen.append(len(call[2])))
    state = net.state_dict()
    drifts(net, [state], [state], [1.0], Batches(list(torch.randn(10 * SAMPLES, 4).split(100)), 1, None, CPU))
    assert SAMPLES <= sum(seen) / 2 < SAMPLES + 100


def test_outputs_that_are_no_numbers_are_not_judged() -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x).argmax(-1)

    class Constant(Choice):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * self.body(x) + 1

    x = torch.randn(8, 4)
    for kind in (Choice, Constant):
        net = kind()
        state = net.state_dict()
        assert drifts(net, [state], [state], [1.0], Batches([x], 1, None, CPU)) is None


def test_random_draws_are_the_same_for_every_network() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.body(x)
            return y + torch.randn_like(y)

    net = Noisy()
    state = net.state_dict()
    x = torch.randn(8, 4)
    before = torch.get_rng_state()
    assert drifts(net, [state], [state], [1.0], Batches([x], 1, None, CPU)) == [0.0]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("lengths", [(7,), (7, 5), (7, 5, 1)])
@pytest.mark.parametrize("tokens", [False, True])
def test_a_network_that_gives_the_best_constant_is_at_one(lengths: tuple[int, ...], tokens: bool) -> None:
    """Outputs whose means differ (a rare class, targets of several sizes) do not make the spread larger."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.tensor([5.0, 0.0, -50.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight, self.bias)

    torch.manual_seed(0)
    net = Head()
    batches = [torch.randn(6, n, 4) if tokens else torch.randn(n, 4) for n in lengths]
    inputs = torch.cat([b.reshape(-1, 4) for b in batches]) if len(lengths) > 1 or not tokens else batches[0]
    state = {k: v.detach() for k, v in net.state_dict().items()}
    with torch.no_grad():
        means = net(inputs).mean(0)
    if means.dim() == 1:
        constant = {"weight": torch.zeros(3, 4), "bias": means}
        found = drifts(net, [constant, state], [state], [1.0], Batches(batches, 1, None, CPU))
        assert found == pytest.approx([1.0, 0.0], abs=1e-5)
    else:  # a constant of its own for every position: the spread is smaller
        spread = (net(inputs) - means).square().sum().sqrt()
        shifted = {"weight": state["weight"], "bias": state["bias"] + 1}
        found = drifts(net, [shifted], [state], [1.0], Batches(batches, 1, None, CPU))
        assert found == pytest.approx([float(inputs.shape[0] * 7 * 3) ** 0.5 / float(spread.detach())], rel=1e-5)
