"""Repair in one pass over several batches: runs that wait for each other at every layer."""

import threading

import pytest
import torch
from torch import nn

from automerge import AutomergeError, Repair
from automerge import _repair as repair_module
from automerge._data import Batches
from automerge._lockstep import Held, replicas, several

RUNS: list[int] = []


class Counting(nn.Module):
    """Every forward pass notes how many samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        RUNS.append(len(x))
        return self.c(self.norm(torch.relu(self.b(torch.relu(self.a(x))))))


class Keeping(Counting):
    """Leaves a result on a module and reads it after another layer."""

    def forward(self, x):
        self.a.kept = torch.relu(self.a(x))
        y = torch.relu(self.b(self.a.kept))
        return self.c(y + self.a.kept)


class Detour(Counting):
    """Small batches do not run the second layer."""

    def forward(self, x):
        x = torch.relu(self.a(x))
        if len(x) > 3:
            x = torch.relu(self.b(x))
        return self.c(x)


class Failing(Counting):
    """Fails on three samples after the second layer, where it runs beside others."""

    def forward(self, x):
        y = torch.relu(self.b(torch.relu(self.a(x))))
        if len(x) == 3 and threading.current_thread() is not threading.main_thread():
            raise ValueError("three is bad")
        return self.c(y)


def _case(kind: type[nn.Module], sizes=(5, 3, 7)):
    torch.manual_seed(0)
    models = [kind().double().eval() for _ in range(3)]
    states = [m.state_dict() for m in models]
    merged = {k: torch.stack([s[k].double() for s in states]).mean(0).to(states[0][k].dtype) for k in states[0]}
    return models[0], merged, states, [torch.randn(n, 4).double() for n in sizes]


def _by_layers(monkeypatch, *case, **options):
    with monkeypatch.context() as patch:
        patch.setattr(repair_module, "several", lambda batches, held: None)
        return Repair(**options)(*case)


def _equal(one, other) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-12, rtol=1e-9)


def test_every_batch_runs_once_through_every_network() -> None:
    case = _case(Counting)
    RUNS.clear()
    Repair()(*case)
    assert sorted(RUNS) == sorted([5] + 4 * [5, 3, 7])  # the plan, three endpoints, the merged network


@pytest.mark.parametrize("kind", [Counting, Keeping, Detour])
@pytest.mark.parametrize("reset", [False, True])
def test_the_answer_is_that_of_a_run_for_every_layer(monkeypatch, kind, reset) -> None:
    case = _case(kind)
    fixed, report = Repair(reset=reset)(*case)
    slow, other = _by_layers(monkeypatch, *case, reset=reset)
    _equal(fixed, slow)
    assert report.skipped == other.skipped
    assert [layer.name for layer in report.layers] == [layer.name for layer in other.layers]
    assert report.reset == other.reset


def test_an_error_of_one_batch_ends_all_runs() -> None:
    case = _case(Failing, sizes=(5, 6, 3, 4))
    before, threads = {k: v.clone() for k, v in case[1].items()}, threading.active_count()
    with pytest.raises(AutomergeError, match=r"batch 2 of the data .*three is bad"):
        Repair()(*case)
    assert threading.active_count() == threads
    assert all(torch.equal(case[1][k], v) for k, v in before.items())


def test_hooks_that_are_plain_functions_may_share_what_they_see() -> None:
    seen = []
    model = Counting()
    assert replicas(model, 2) is not None
    model.a.register_forward_hook(lambda module, args, out: seen.append(out))
    assert replicas(model, 2) is None
    assert replicas(model, 1) == [model]
    assert replicas(nn.utils.spectral_norm(nn.Linear(3, 3)), 2) is not None


def test_replicas_share_tensors_and_nothing_else() -> None:
    model = Keeping()
    model.extra = torch.ones(2, requires_grad=True) * 2  # not a leaf: deepcopy alone would refuse
    one, other = replicas(model, 2)
    assert one is not model
    assert one.a is not other.a
    assert one.a.weight is other.a.weight is model.a.weight
    assert one.norm.running_mean is model.norm.running_mean


def test_modes_of_the_calling_thread_are_not_lost() -> None:
    model = Counting()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert replicas(model, 2) is None
    with torch.inference_mode():
        assert replicas(model, 2) is None
    with torch.device("cpu"):
        assert replicas(model, 2) is None


def test_too_much_data_is_not_held() -> None:
    batches = Batches([torch.zeros(2, 3)] * 65)
    assert several(batches, 1) is None
    few = Batches([torch.zeros(2, 3)] * 3)
    assert len(several(few, 1)) == 3
    assert several(few, 2**60) is None


def test_what_a_run_holds_is_measured() -> None:
    with Held() as held:
        x = torch.zeros(1000, dtype=torch.float64)
        for _ in range(5):
            x = x + 1
        del x
    assert held.peak == 16000
