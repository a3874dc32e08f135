"""Networks that draw random numbers: whatever is compared on a batch draws the same there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automerge._repair_report import Renormaliser
from automerge.evaluate import agreement, similarity
from automerge.fitting import LeastSquares
from automerge.infer import infer
from automerge.matchers import CCA, ActivationMatching, Matcher, Procrustes, match
from automerge.renormalise import Repair


class Noisy(nn.Module):
    """Noise between two layers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two, self.three = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.one(x)
        return self.three(self.two((h + torch.randn_like(h)).tanh()).tanh())


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("tier", [Repair(), LeastSquares(ridge=1e-9)], ids=["repair", "fit"])
def test_every_network_draws_the_same_on_a_batch(tier: Renormaliser, count: int) -> None:
    net = Noisy(0)
    own = net.state_dict()
    data = list(torch.randn(60 * count, 4).split(60))
    fixed, _ = tier(net, own, [own, own], data)
    for name in own:
        torch.testing.assert_close(fixed[name], own[name], atol=1e-5, rtol=1e-5)
    found = similarity(own, own, model=net, data=data)
    assert all(value > 1 - 1e-6 for value in (*found.cka.values(), *found.correlation.values()))
    assert agreement(net, (net, own), data).share == 1.0


def test_batches_draw_different_numbers() -> None:
    class Draw(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.rand(2))
            return x

    seen: list[torch.Tensor] = []
    agreement(Draw(), Draw(), [torch.randn(3, 2)] * 2)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("matcher", [CCA(ridge=0), Procrustes(), ActivationMatching(mix=1.0)], ids=repr)
def test_what_networks_draw_does_not_hide_what_they_share(matcher: Matcher) -> None:
    net, data = Noisy(0), list(torch.randn(120, 4).split(40))
    symmetry = infer(net, data[0])
    planted = symmetry.random_element(3)
    other = symmetry.apply(net.state_dict(), planted)
    moved = match([net, other], symmetry, matcher, data=data).apply([net.state_dict(), other])
    for name in moved[0]:
        torch.testing.assert_close(moved[0][name], moved[1][name], atol=1e-5, rtol=1e-5)
