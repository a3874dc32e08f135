"""Operators that write to several results, or to several tensors; places under a mask; bounds that all positions keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical

from automerge.testing import assert_sound
from tests.inference.networks_hostile import Program
from tests.inference.test_found_networks import found, lin


def made(forward: Callable[..., Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Program(forward, parts)


STEPS, MORE = torch.randn(2, 5, 3), torch.randn(4, 7, 3)
ROWS, OTHERS = torch.randn(3, 4), torch.randn(5, 4)


# ------------------------------------------------------------ out= of operators with two results
def _largest(h: torch.Tensor) -> torch.Tensor:
    values, index = h.new_empty(0), torch.empty(0, dtype=torch.long)
    torch.max(h, 1, out=(values, index))
    return values + (index >= 0).to(h.dtype)


def _topmost(h: torch.Tensor) -> torch.Tensor:
    values, index = h.new_empty(0), torch.empty(0, dtype=torch.long)
    torch.topk(h, 2, 1, out=(values, index))
    values.mul_(torch.tensor([1.0, 0.5], dtype=h.dtype)[:, None])
    return values.sum(1) + h.gather(1, index).mean(1)


def _median(h: torch.Tensor) -> torch.Tensor:
    pair = h.new_empty(0), torch.empty(0, dtype=torch.long)
    return torch.median(h, 1, out=pair)[0] + pair[0]


@pytest.mark.parametrize("read", [_largest, _topmost, _median])
def test_results_given_to_an_operator_that_has_several(read: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return s.out(read(s.inp(x)))

    found(made(forward, inp=lin(3, 6), out=lin(6, 2)), "6", STEPS, MORE)


# ------------------------------------------------------------ lists of tensors
class Teacher(nn.Module):
    """An average of a student's weights, kept up in every pass."""

    def __init__(self, step: Callable[[list[torch.Tensor], list[torch.Tensor]], None]) -> None:
        super().__init__()
        self.student, self.teacher, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.step([p.data for p in self.teacher.parameters()], [p.data for p in self.student.parameters()])
        both = torch._foreach_tanh([self.student(x), self.teacher(x)])
        return self.out(torch._foreach_mul(both, [0.3, 0.7])[0] + both[1])


def _lerp(means: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    torch._foreach_lerp_(means, values, 0.1)


def _scaled(means: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    torch._foreach_mul_(means, 0.9)
    torch._foreach_add_(means, values, alpha=0.1)


def _alone(means: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for mean, value in zip(means, values, strict=True):
        mean.mul_(0.9).add_(value, alpha=0.1)


@pytest.mark.parametrize("step", [_alone, _scaled, _lerp])
def test_operators_on_lists_of_tensors_are_those_on_each(step: Any) -> None:
    symmetry = assert_sound(Teacher(step).double().eval(), torch.randn(3, 4).double())
    (units,) = symmetry.generators()
    assert units.size == 6
    assert {(s.param, s.axis) for s in units.slots} == {
        *((f"{name}.{part}", 0) for name in ("student", "teacher") for part in ("weight", "bias")),
        ("out.weight", 1),
    }


# ------------------------------------------------------------ places under a mask
MASK = torch.arange(6) % 2 == 0


def _coupled(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[..., ~MASK] = x[..., ~MASK] + s.deep(s.first(x[..., MASK]).relu())
    return s.out(y)


def _adapted(s: Any, x: torch.Tensor) -> torch.Tensor:
    """Low-rank changes of the queries and values of a joint projection, as in LoRA."""
    change = F.conv1d(s.down[None], s.up[..., None], groups=2).squeeze(0)
    where = torch.tensor([True, False, True])[:, None].expand(3, 4).reshape(-1)
    rows = change.new_zeros(12, 3)
    rows[where] = change
    q, k, v = (s.joint(x) + x @ rows.T).chunk(3, -1)
    return s.out((q @ k.mT).softmax(-1) @ v)


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (made(_coupled, first=lin(3, 5), deep=lin(5, 3), out=lin(6, 2)), "5"),
        (
            made(
                _adapted,
                joint=lin(3, 12),
                out=lin(4, 2),
                down=lambda: nn.Parameter(torch.randn(4, 3)),
                up=lambda: nn.Parameter(torch.randn(8, 2)),
            ),
            "4 4 2 2",
        ),
    ],
)
def test_rows_written_under_a_mask_of_their_axis(make: Any, sizes: str) -> None:
    x = torch.randn(2, 5, 6 if sizes == "5" else 3)
    found(make, sizes, x, torch.randn(3, *x.shape[1:]))


# ------------------------------------------------------------ blocks, and bounds
def test_blocks_on_a_diagonal_have_orders_of_their_own() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        return s.out((s.inp(x).relu() @ torch.block_diag(s.one, s.two)).relu())

    square = lambda: nn.Parameter(torch.randn(3, 3))  # noqa: E731
    found(made(forward, inp=lin(4, 6), out=lin(6, 2), one=square, two=square), "3x4", ROWS, OTHERS)


@pytest.mark.parametrize("checked", [False, True])
def test_whether_an_index_is_in_range_asks_nothing_of_it(checked: bool) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        policy = Categorical(logits=s.out(s.inp(x).tanh()), validate_args=checked)
        chosen = policy.logits.argmax(-1)
        assert (chosen <= 2).all()
        return policy.log_prob(chosen) + policy.entropy()

    found(made(forward, inp=lin(4, 6), out=lin(6, 3)), "6 3", ROWS, OTHERS)


def test_an_index_compared_with_a_bound_among_its_own_stays() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = s.inp(x)
        return s.out(h.softmax(-1)) * (h.argmax(-1, keepdim=True) < 2)

    found(made(forward, inp=lin(4, 6), out=lin(6, 3)), "", ROWS, OTHERS)


# ------------------------------------------------------------ positions of a mask, in the place of the mask
PUT: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "where": lambda h, m: _put(h, torch.where(m)),
    "as a tuple": lambda h, m: _put(h, m.nonzero(as_tuple=True)),
    "columns": lambda h, m: _put(h, tuple(m.nonzero()[:, k] for k in range(m.dim()))),
    "rows of the other": lambda h, m: _put(h, tuple(m.nonzero().t())),
    "unbound": lambda h, m: _put(h, m.nonzero().unbind(-1)),
    "index_put": lambda h, m: h.index_put(torch.where(m), torch.tensor(0.5, dtype=h.dtype)),
    "added": lambda h, m: h.index_put(torch.where(m), torch.tensor(0.5, dtype=h.dtype), accumulate=True),
}


def _put(h: torch.Tensor, where: Any) -> torch.Tensor:
    h = h.clone()
    h[where] = 0.5
    return h


@pytest.mark.parametrize("put", PUT)
def test_units_written_at_the_positions_of_a_mask_are_free(put: str) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = s.inp(x)
        return s.out(PUT[put](h, h < 0))

    found(made(forward, inp=lin(4, 6), out=lin(6, 2)), "6", ROWS, OTHERS)


ELSEWHERE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "the other way round": lambda h: _put(h.t(), torch.where(h < 0)[::-1]).t(),
    "rows alone": lambda h: _put(h, torch.where(h < 0)[0]),
    "columns as rows": lambda h: _put(h, torch.where(h < 0)[1] % len(h)),
    "some of them": lambda h: _put(h, tuple(i[:1] for i in torch.where(h < 0))),
    "of a smaller mask": lambda h: _put(h, torch.where(h[1:] < 0)),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_positions_are_what_they_are(name: str) -> None:
    """(No more is claimed than holds: where columns and rows change places, that is what the network computes.)"""
    net = made(lambda s, x: s.out(ELSEWHERE[name](s.inp(x))), inp=lin(4, 6), out=lin(6, 2))()
    assert_sound(net.double(), ROWS.double())


class Sent(nn.Module):
    """Megatron's dispatch: the rows of an expert have an axis of length one beside."""

    def __init__(self, send: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.send = nn.Linear(4, 3), send
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = self.send(out, x, (chosen == e).nonzero(), expert)
        return out * weight[:, None]


def _beside(out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, expert: nn.Module) -> torch.Tensor:
    out[rows, :] = expert(x[rows, :])
    return out


def _flat(out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, expert: nn.Module) -> torch.Tensor:
    out[rows] = expert(x[rows].squeeze(1)).unsqueeze(1)
    return out


def _first_column(out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, expert: nn.Module) -> torch.Tensor:
    out[rows[:, 0]] += expert(x[rows[:, 0]])
    return out


@pytest.mark.parametrize("send", [_beside, _flat, _first_column])
def test_rows_with_an_axis_beside_are_the_rows(send: Any) -> None:
    symmetry = assert_sound(Sent(send).double(), torch.randn(12, 4, dtype=torch.float64))
    assert [e.size for e in symmetry.exchanges] == [3]
    assert sorted(g.size for g in symmetry.generators()) == [5, 5, 5]
