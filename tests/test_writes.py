"""Passes that write to what they are given: the caller's inputs, weights and models stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from automerge import (
    ActivationMatching,
    Identity,
    Repair,
    agreement,
    average,
    barrier,
    compare,
    evaluate,
    infer,
    match,
    merge,
    reset_batchnorm,
    similarity,
)
from automerge.io import hash_state_dict

TOKENS = torch.randint(0, 10, (32, 5), generator=torch.Generator().manual_seed(0))
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(32) % 3


class Bounded(nn.Module):
    """An embedding whose rows are made shorter where they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.norm = nn.Embedding(10, 6, max_norm=0.5), nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.hidden(self.embed(x).mean(1))).relu())


class Clipped(nn.Module):
    """Weights that are made positive in place; the view of them and `.data` count no writes."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.out = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hidden.weight.data.t().clamp_(min=0)
        return self.out(self.norm(self.hidden(x)).tanh())


class Scaled(nn.Module):
    """Scales that the first batch sets, as a flag in the state says."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.scale, self.out = nn.Linear(4, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("done", torch.tensor(False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.hidden(x)
        if not self.done:
            self.scale.data.copy_(1 / h.std(0))
            self.done.fill_(True)
        return self.out(self.norm(h * self.scale).relu())


class Summing(nn.Module):
    """A moving sum in a tensor that is in no state dict."""

    persistent: bool | None = False

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.out = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        if self.persistent is None:
            self.sum = torch.zeros(1)
        else:
            self.register_buffer("sum", torch.zeros(1), persistent=self.persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sum.mul_(0.9).add_(x.sum())
        return self.out(self.norm(self.hidden(x) + self.sum).relu())


class SummingPlainly(Summing):
    persistent = None


class InPlace(nn.Module):
    """Normalises its inputs where they are."""

    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.own = own
        self.hidden, self.norm, self.out = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mul(2).sub(0.5) if self.own else x.mul_(2).sub_(0.5)
        return self.out(self.norm(self.hidden(x)).relu())


NETS: dict[Callable[[], nn.Module], torch.Tensor] = {
    Bounded: TOKENS,
    Clipped: X,
    Scaled: X,
    InPlace: X,
    Summing: X,
    SummingPlainly: X,
}
USES: dict[str, Callable[[list[Any], Any, Any], object]] = {
    "merge": lambda m, x, d: merge(m, x, data=d, repair="none"),
    "reset": lambda m, x, d: merge(m, x, data=d, repair="reset"),
    "repair": lambda m, x, d: merge(m, x, data=d, repair=Repair()),
    "match": lambda m, x, d: match(m, merge(m, x).symmetry, ActivationMatching(), data=[x]),
    "evaluate": lambda m, x, d: evaluate(m[0], d),
    "other weights": lambda m, x, d: evaluate((m[0], m[1].state_dict()), d),
    "agreement": lambda m, x, d: agreement(m[0], m[1], [x]),
    "barrier": lambda m, x, d: barrier(m[0], m[0].state_dict(), m[1].state_dict(), d, points=3),
    "compare": lambda m, x, d: compare(m, x, d, select=d, report=d, matchers={"i": Identity()}),
    "similarity": lambda m, x, d: similarity(m[0].state_dict(), m[1].state_dict(), model=m[0], data=[x]),
    "reset_batchnorm": lambda m, x, d: reset_batchnorm(copy.deepcopy(m[0]), [x]),
}


def _models(make: Callable[[], nn.Module]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [make().eval() for _ in range(2)]


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("use", USES)
def test_nothing_of_the_caller_s_is_written_to(make: Callable[[], nn.Module], use: str) -> None:
    models, x = _models(make), NETS[make]
    before = [hash_state_dict(m.state_dict()) for m in models]
    given = x.clone()
    found: Any = USES[use](models, given, [(given, Y), (given, Y)])
    assert [row.error for row in getattr(found, "rows", ()) if row.error] == []
    assert torch.equal(given, x)
    assert [hash_state_dict(m.state_dict()) for m in models] == before
    assert not any(bool(m.sum) for m in models if isinstance(m, Summing))


@pytest.mark.parametrize("make", NETS)
def test_the_same_with_data_as_without(make: Callable[[], nn.Module]) -> None:
    x = NETS[make]
    plain = merge(_models(make), x, matcher=Identity(), repair="none").state_dict
    found = merge(_models(make), x, data=[x], matcher=Identity(), repair="none")
    assert all(torch.equal(found.state_dict[n], v) for n, v in plain.items())
    turned = merge(_models(make)[::-1], x, data=[x], matcher=Identity(), repair="none").state_dict
    assert all(torch.allclose(turned[n].double(), v.double()) for n, v in plain.items())


@pytest.mark.parametrize("make", NETS)
def test_every_pass_begins_with_the_same(make: Callable[[], nn.Module]) -> None:
    one, other = _models(make)
    data = [(NETS[make], Y), (NETS[make], Y)]
    once, twice = evaluate(one, data[:1]), evaluate(one, data)
    assert twice.loss == pytest.approx(once.loss, rel=1e-12)
    assert evaluate((other, one.state_dict()), data).loss == pytest.approx(once.loss, rel=1e-12)
    assert evaluate([one, one], data).loss == pytest.approx(once.loss, rel=1e-6)
    assert agreement(one, one, [NETS[make]]).share == 1


def test_inputs_are_read_as_if_the_model_had_copied_them() -> None:
    found = merge(_models(InPlace), X, data=[X, X])
    wanted = merge(_models(lambda: InPlace(own=True)), X, data=[X, X])
    assert all(torch.equal(found.state_dict[n], v) for n, v in wanted.state_dict.items())
    assert found.repair.drift == wanted.repair.drift


def test_buffers_of_models_that_write_to_no_parameter_go_on_within_an_evaluation() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return self.out(x) * self.seen

    torch.manual_seed(0)
    net = Counting().eval()
    assert evaluate(net, [(X, Y)]).loss != evaluate(net, [(X, Y), (X, Y)]).loss
    assert int(net.seen) == 0


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad],
    ids=["inference", "autocast", "no_grad"],
)
def test_the_caller_s_modes_change_nothing(mode: Callable[[], Any]) -> None:
    def found() -> list[Any]:
        models = _models(lambda: InPlace(own=True))
        symmetry = infer(models[0], X)
        merged = merge(models, X, data=[X], repair=Repair())
        same = similarity(models[0].state_dict(), models[1].state_dict(), model=models[0], data=[X])
        rows = compare(models, X, [(X, Y)], select=[(X, Y)], report=[(X, Y)], matchers={"i": Identity()}).rows
        return [symmetry.sets, merged.state_dict, same.cka, evaluate(models[0], [(X, Y)]).loss, [r.error for r in rows]]

    plain = found()
    with mode():
        other = found()
    assert [g.size for g in other[0]] == [g.size for g in plain[0]]
    assert all(torch.equal(other[1][n], v) for n, v in plain[1].items())
    assert other[2:] == plain[2:]


@pytest.mark.parametrize("count", [3, 7])
def test_what_all_models_share_is_the_same_to_the_last_digit(count: int) -> None:
    state = {"rounds": torch.arange(40, dtype=torch.float64), "steps": torch.tensor(5, dtype=torch.uint16)}
    found = average([state] * count, [1.0] * count)
    assert torch.equal(found["rounds"], state["rounds"])
    assert found["steps"].dtype is torch.uint16
    assert int(found["steps"]) == 5


def test_infinite_entries_of_all_models_stay_on_a_path() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 3)
            self.register_buffer("mask", torch.tensor([[0.0, float("-inf")], [0.0, 0.0]]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.hidden(x).relu().view(-1, 2, 4)
            return self.out(((h @ h.mT + self.mask).softmax(-1) @ h).flatten(1))

    from automerge import interpolate, plane

    models = [*_models(Masked), *_models(lambda: Masked().double().float())[:1]]
    models[2].load_state_dict({n: v if n == "mask" else v + 1 for n, v in models[0].state_dict().items()})
    states = [m.state_dict() for m in models]
    for position in (0, 0.3, 1):
        assert torch.equal(interpolate(*states[:2], position)["mask"], states[0]["mask"])
    ends = [evaluate(m, [(X, Y)]).loss for m in models[:2]]
    losses = barrier(models[0], *states[:2], [(X, Y)], points=3).losses
    assert (losses[0], losses[-1]) == pytest.approx(tuple(ends))
    assert -1 <= similarity(*states[:2]).cosine <= 1
    grid = plane(models[0], *states, [(X, Y)], points=2)
    assert all(0 < value < 100 for row in grid.losses for value in row)
