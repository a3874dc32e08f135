"""Values that python reads, and no output depends on: nothing in the pass tells what they belong to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from automerge import Symmetry, infer
from automerge.testing import assert_sound

Act = Callable[["Policy", torch.Tensor, torch.Tensor], torch.Tensor]


class Policy(nn.Module):
    """A mean of four units, and what their scales are made of."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.mean, self.out = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2)
        self.hidden, self.log_std, self.both = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(6, 8)
        self.gate = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 1))
        self.scale, self.act = nn.Parameter(torch.randn(4)), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.trunk(x))
        return self.out(self.act(self, h, self.mean(h)))


def _made(net: Policy, h: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return Normal(mean, net.log_std(net.hidden(h).relu()).exp()).mean


def _halves(net: Policy, h: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    mean, log_std = net.both(h).chunk(2, dim=-1)
    return Normal(mean, log_std.exp()).mean


def _learned(net: Policy, h: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return Normal(mean, net.scale.exp()).mean


def _least(net: Policy, h: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    scale = nn.functional.softplus(net.log_std(net.hidden(h).relu()))
    assert scale.amin() > 0
    return mean


def _unsure(net: Policy, h: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    classes = net.log_std(net.hidden(h).relu()).softmax(-1)
    entropy = -(classes * classes.log()).sum(-1)
    return mean if entropy.max().item() > 0 else classes


def _far(net: Policy, h: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    distance = (net.scale * net.log_std(net.hidden(h).relu())).norm(dim=-1) / 3
    return mean if float(distance.mean()) > 0 else net.log_std(net.hidden(h))


def _finite(net: Policy, h: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    if torch.isnan(mean).any() or not torch.isfinite(h.reshape(-1)).all() or (mean @ mean.T).max() > 1e6:
        raise ValueError
    return mean


def _gated(net: Policy, h: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return mean * 2 if bool((net.gate(h).sigmoid() > 0).all()) else mean


def _used(net: Policy, h: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    normal = Normal(mean, net.log_std(net.hidden(h).relu()).exp())
    return normal.mean - normal.stddev


def _moved(symmetry: Symmetry) -> set[str]:
    return {f"{slot.param}[{slot.axis}]" for g in symmetry.generators() for slot in g.slots}


@pytest.mark.parametrize(
    ("act", "sizes", "still"),
    [
        (_made, [6, 5, 4], {"log_std.weight[0]", "log_std.bias[0]"}),
        (_halves, [6, 4], set()),
        (_learned, [6, 4], {"scale[0]"}),
        (_least, [6, 5, 4], {"log_std.weight[0]", "log_std.bias[0]"}),
        (_unsure, [6, 5, 4], {"log_std.weight[0]", "log_std.bias[0]"}),
        (_far, [6, 5, 4], {"scale[0]", "log_std.weight[0]", "log_std.bias[0]"}),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_scales_that_are_only_tested_have_no_order_of_their_own(
    act: Act, sizes: list[int], still: set[str], verify: bool
) -> None:
    symmetry = infer(Policy(act).eval(), torch.randn(5, 3), verify=verify)
    assert sorted((g.size for g in symmetry.generators()), reverse=True) == sizes
    assert not _moved(symmetry) & still
    assert any("no output depends on that" in note for note in symmetry.notes)
    if act is _halves:
        (units,) = (g for g in symmetry.generators() if g.size == 4)
        (index,) = (s.index for s in units.slots if s.param == "both.bias")
        assert index.max() == 3  # the means, not the scales


@pytest.mark.parametrize(("act", "sizes"), [(_finite, [6, 4]), (_gated, [7, 6, 4]), (_used, [6, 5, 4])])
def test_tests_of_what_an_output_depends_on_or_of_one_number_take_nothing_away(act: Act, sizes: list[int]) -> None:
    symmetry = assert_sound(Policy(act).eval(), torch.randn(5, 3))
    assert sorted((g.size for g in symmetry.generators()), reverse=True) == sizes
    assert not any("no output depends on that" in note for note in symmetry.notes)


class Measured(nn.Module):
    """Chooses its layers by buffers that hold sizes, as dilated recurrent networks do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("inputs", torch.Tensor([inputs]))
        self.register_buffer("outputs", torch.Tensor([outputs]))
        self.main, self.skip = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x).tanh() + (x if self.inputs == self.outputs else self.skip(x))


def test_numbers_by_which_python_chooses_are_no_weights() -> None:
    net = nn.Sequential(Measured(3, 6), Measured(6, 6), nn.Linear(6, 2)).eval()
    symmetry = assert_sound(net, torch.randn(4, 3))
    assert [g.size for g in symmetry.generators()] == [6]
