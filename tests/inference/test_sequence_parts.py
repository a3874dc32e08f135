"""Parts of sequence, audio, graph and tabular networks of other libraries, written out in a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from automerge import infer
from tests.inference.networks_hostile import Program
from tests.inference.test_networks import parse, worst_change


def lin(i: int, o: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


CASES: dict[str, tuple[Callable[[], nn.Module], Any, list[Any], str]] = {}


def add(name: str, sizes: str, args: Any, others: list[Any], forward: Callable[..., Any], **parts: Any) -> None:
    """``args`` are the example, ``others`` what the groups must hold on, too."""
    assert name not in CASES
    CASES[name] = (lambda: Program(forward, parts), args, others, sizes)


ROWS, MORE_ROWS = (draw(3, 5),), [(draw(5, 5),), (draw(1, 5),)]


# ------------------------------------------------------------ part of a residual stream is not read at its end
def _half(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.inp(x).relu()
    return s.out((h + s.more(h).relu())[:, :4])


def _decision_steps(s: Any, x: torch.Tensor) -> Any:
    """TabNet: of every step's channels, some are summed to the output and the others attend in the next one."""
    total, focus = 0, torch.ones_like(x)
    for step in (s.one, s.two):
        h = s.shared(x * focus).relu()
        h = h + nn.functional.glu(step(h))
        total = total + h[:, :4].relu()
        focus = s.attend(h[:, 4:]).softmax(-1)
    return s.out(total)


add("HalfOfAStream", "3 4", ROWS, MORE_ROWS, _half, inp=lin(5, 7), more=lin(7, 7), out=lin(4, 2))
add(
    "DecisionSteps",
    "3 4",
    ROWS,
    MORE_ROWS,
    _decision_steps,
    shared=lin(5, 7),
    one=lin(7, 14),
    two=lin(7, 14),
    attend=lin(3, 5),
    out=lin(4, 2),
)


# ------------------------------------------------------------ a tensor changes its own shape
def _reshaped(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.inp(x).relu()
    part = h[:, :3]
    h.unsqueeze_(0).transpose_(1, 2)
    h.mul_(s.scale[:, None])
    return s.out(part)


add(
    "SeenUnderItsFormerShape",
    "3",
    ROWS,
    MORE_ROWS,
    _reshaped,
    inp=lin(5, 7),
    scale=lambda: nn.Parameter(draw(7)),
    out=lin(3, 2),
)
add(
    "Quantiles",
    "7",
    ROWS,
    MORE_ROWS,
    lambda s, x: s.out(torch.quantile(s.inp(x), torch.tensor([0.2, 0.7], dtype=x.dtype), dim=0)),
    inp=lin(5, 7),
    out=lin(7, 2),
)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_known_generators(name: str, verify: bool) -> None:
    factory, args, others, sizes = CASES[name]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return factory()

    symmetry = infer(make(), args, verify=verify)
    assert sorted(g.size for g in symmetry.generators()) == parse(sizes), str(symmetry)
    assert not symmetry.unruled
    assert not any("writes to" in note for note in symmetry.notes)
    for given in (args, *others):
        assert worst_change(make, given, {}, symmetry) < 1e-9


def test_a_layer_that_no_layer_before_reads_with_keeps_what_is_not_read() -> None:
    """Scores for 9 places of which an input of 4 reads 4: a longer one reads more of them."""
    torch.manual_seed(0)
    net = Program(lambda s, x: s.out(s.inp(x)[..., : x.shape[1]].softmax(-1) @ x), {"inp": lin(5, 9), "out": lin(5, 2)})
    assert not infer(net, draw(2, 4, 5), verify=False).generators()
