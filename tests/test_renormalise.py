"""BatchNorm reset is exact, REPAIR hits its targets, and neither changes what it should not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.data import DataLoader, TensorDataset

from automerge._errors import AutomergeError
from automerge.datafree import GaussianRepair, RowNorms
from automerge.fitting import LeastSquares
from automerge.renormalise import Renormaliser, Repair, RepairReport, reset_batchnorm
from automerge.symmetry import Generator, Slot, Symmetry

torch.set_num_threads(1)
StateDict = dict[str, torch.Tensor]


def _mlp(*widths: int, bias: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _outputs(
    model: nn.Module, state: StateDict, data: list[torch.Tensor], layers: list[str]
) -> dict[str, torch.Tensor]:
    """Every named layer's output over all data, channels last."""
    own = copy.deepcopy(model)
    own.load_state_dict(state)
    seen: dict[str, list[torch.Tensor]] = {n: [] for n in layers}
    for name in layers:
        own.get_submodule(name).register_forward_hook(lambda m, i, o, n=name: seen[n].append(o.detach()))
    with torch.no_grad():
        own.eval()
        for x in data:
            own(x)
    flat = {
        n: [v.movedim(1, -1).reshape(-1, v.shape[1]) if v.ndim == 4 else v.flatten(0, -2) for v in vs]
        for n, vs in seen.items()
    }
    return {n: torch.cat(v).double() for n, v in flat.items()}


def _mean(states: list[StateDict], weights: list[float] | None = None) -> StateDict:
    share = weights or [1 / len(states)] * len(states)
    return {
        n: sum((w * s[n] for w, s in zip(share, states, strict=True)), torch.zeros_like(v))
        if v.is_floating_point()
        else v
        for n, v in states[0].items()
    }


def _snapshot(states: list[StateDict]) -> list[StateDict]:
    return [{n: v.clone() for n, v in s.items()} for s in states]


def _same(a: list[StateDict], b: list[StateDict]) -> bool:
    return all(torch.equal(x[n], y[n]) for x, y in zip(a, b, strict=True) for n in x)


# -------------------------------------------------------------------- reset
@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5), dims=st.integers(1, 3), seed=st.integers(0, 99))
def test_reset_is_exact_over_unequal_batches(sizes: list[int], dims: int, seed: int) -> None:
    sizes[0] += 1
    generator = torch.Generator().manual_seed(seed)
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](3, momentum=0.3)
    shape = (2,) * dims if dims > 1 else (4,)
    batches = [torch.randn(n, 3, *shape, generator=generator) * 3 + 5 for n in sizes]
    assert reset_batchnorm(nn.Sequential(norm), batches) == ("0",)
    flat = torch.cat([b.movedim(1, -1).reshape(-1, 3) for b in batches]).double()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean.double(), flat.mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), flat.var(0), atol=1e-6, rtol=1e-6)
    assert norm.momentum == 0.3


class _Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.sync = nn.SyncBatchNorm(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.sync(self.drop(self.bn(self.conv(x)).relu())).mean((2, 3)))


def test_reset_equals_training_mode_for_one_batch_and_keeps_everything_else() -> None:
    torch.manual_seed(0)
    model = _Mixed()
    model.eval()
    model.drop.train()
    x = torch.randn(16, 1, 6, 6)
    reference = copy.deepcopy(model)
    reference.sync = nn.BatchNorm2d(4)  # the same formula; SyncBatchNorm trains on accelerators only
    reference.train()
    reference.drop.eval()
    for norm in (reference.bn, reference.sync):
        norm.momentum = None
        norm.reset_running_stats()
    reference(x)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    assert reset_batchnorm(model, x) == ("bn", "sync")
    assert not any(m.training for m in model.modules())
    assert model.bn.momentum == 0.1
    assert not model.bn._forward_pre_hooks
    for name, value in model.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value, reference.state_dict()[name], atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(value, before[name])


def test_reset_restores_everything_on_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    model.train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(AutomergeError, match=r"batch 1 of the data.*(shape|size)"):
        reset_batchnorm(model, [torch.randn(4, 2), torch.randn(4, 2, 3)])
    assert _same([model.state_dict()], [before])
    assert model.training
    assert not model[0]._forward_pre_hooks


def test_reset_bad_data() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(AutomergeError, match="data gave no batch"):
        reset_batchnorm(model, [])
    with pytest.raises(AutomergeError, match=r"BatchNorm '0' one value per channel.*two samples or more"):
        reset_batchnorm(model, [torch.randn(1, 2)])
    with pytest.raises(AutomergeError, match="single samples, not of batches"):
        reset_batchnorm(model, TensorDataset(torch.randn(3, 2)))
    with pytest.raises(AutomergeError, match="data is a int"):
        reset_batchnorm(model, 3)
    assert reset_batchnorm(nn.Linear(2, 2), [torch.randn(3, 2)]) == ()


# -------------------------------------------------------------------- REPAIR
class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(x).mean(1))


class _Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, groups=2)
        self.b = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.c = nn.ConvTranspose2d(6, 4, 2)
        self.d = nn.Conv2d(4, 4, 1, groups=4)
        self.e = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.e(self.d(self.c(self.b(self.a(x).relu()).relu()).relu()).relu())


class _Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 7))
        self.b = nn.Parameter(torch.randn(7))
        self.v = nn.Parameter(torch.randn(6, 7))
        self.c = nn.Parameter(torch.randn(6))
        self.out = nn.Parameter(torch.randn(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = (x @ self.w + self.b).relu()
        return (torch.einsum("bti,oi->bto", h, self.v) + self.c).relu() @ self.out


_ZOO: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (lambda: _mlp(4, 8, 6, 3), (4,)),
    "no bias": (lambda: _mlp(4, 8, 6, 3, bias=False), (4,)),
    "batchnorm": (_Mixed, (1, 6, 6)),
    "attention": (_Attention, (5, 8)),
    "transposed and grouped": (_Transposed, (2, 5, 5)),
    "bare parameters": (_Bare, (3, 5)),
}


@pytest.mark.parametrize("name", list(_ZOO))
@pytest.mark.parametrize("sizes", [[16], [5, 9, 2]])
@pytest.mark.parametrize("count", [1, 3])
def test_a_network_repaired_to_itself_is_unchanged(name: str, sizes: list[int], count: int) -> None:
    torch.manual_seed(0)
    factory, shape = _ZOO[name]
    model = factory().train()
    state = model.state_dict()
    before = _snapshot([state])
    data = [torch.randn(n, *shape) for n in sizes]
    fixed, report = Repair()(model, state, [state] * count, data)
    assert report.layers
    for key, value in state.items():
        torch.testing.assert_close(fixed[key], value, atol=1e-6, rtol=1e-6)
    assert _same([model.state_dict()], before)
    assert all(m.training for m in model.modules())
    assert fixed["".join(key for key in list(state)[:1])] is not state[next(iter(state))]


@pytest.mark.parametrize("sizes", [[40], [13, 20, 7]])
@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_every_layer_reaches_its_targets(sizes: list[int], weights: list[float] | None) -> None:
    model = _mlp(5, 12, 10, 8, 3)
    states = [_mlp(5, 12, 10, 8, 3, seed=s).state_dict() for s in (1, 2)]
    share = [0.5, 0.5] if weights is None else [0.75, 0.25]
    before = _snapshot(states)
    data = [torch.randn(n, 5) for n in sizes]
    fixed, report = Repair()(model, _mean(states, share), states, data, weights=weights)
    assert [layer.name for layer in report.layers] == ["0.weight", "2.weight", "4.weight"]
    assert report.skipped == {"6.weight": "it makes the model's final output"}
    layers = ["0", "2", "4"]
    targets = [_outputs(model, s, data, layers) for s in states]
    got = _outputs(model, fixed, data, layers)
    for name in layers:
        mean = sum(w * t[name].mean(0) for w, t in zip(share, targets, strict=True))
        std = sum(w * t[name].std(0, correction=0) for w, t in zip(share, targets, strict=True))
        dead = got[name].std(0) < 1e-6
        torch.testing.assert_close(got[name].mean(0)[~dead], mean[~dead], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[name].std(0, correction=0)[~dead], std[~dead], atol=1e-5, rtol=1e-5)
    assert _same(states, before)


@pytest.mark.parametrize("name", ["attention", "transposed and grouped", "bare parameters", "no bias"])
def test_one_batch_and_many_batches_agree(name: str) -> None:
    torch.manual_seed(0)
    factory, shape = _ZOO[name]
    models = [factory().double() for _ in range(3)]
    states = [m.state_dict() for m in models]
    x = torch.randn(12, *shape).double()
    one, report = Repair()(models[0], _mean(states), states, x)
    many, other = Repair()(models[0], _mean(states), states, [x[:5], x[5:6], x[6:]])
    assert [layer.name for layer in report.layers] == [layer.name for layer in other.layers]
    for key in one:
        torch.testing.assert_close(one[key], many[key], atol=1e-9, rtol=1e-9)


def test_what_each_architecture_allows() -> None:
    expected = {
        "no bias": ({"0.weight", "2.weight"}, {"4.weight"}),
        "transposed and grouped": ({"a.weight", "b.weight", "c.weight", "d.weight"}, {"e.weight"}),
        "bare parameters": ({"w", "v"}, {"out"}),
        "attention": (
            {
                "block.self_attn.in_proj_weight",
                "block.self_attn.out_proj.weight",
                "block.linear1.weight",
                "block.linear2.weight",
            },
            {"head.weight"},
        ),
    }
    for name, (corrected, skipped) in expected.items():
        torch.manual_seed(0)
        factory, shape = _ZOO[name]
        models = [factory() for _ in range(2)]
        states = [m.state_dict() for m in models]
        _, report = Repair()(models[0], _mean(states), states, torch.randn(20, *shape))
        assert {layer.name for layer in report.layers} == corrected
        assert set(report.skipped) == skipped
        assert all(layer.shifted is (name != "no bias") for layer in report.layers)
        assert ("scale only: it has no bias" in str(report)) is (name == "no bias")


def test_transposed_groups_reach_their_targets() -> None:
    torch.manual_seed(0)
    models = [_Transposed().double() for _ in range(2)]
    states = [m.state_dict() for m in models]
    data = [torch.randn(n, 2, 5, 5).double() for n in (3, 6)]
    fixed, _ = Repair()(models[0], _mean(states), states, data)
    layers = ["a", "b", "c", "d"]
    targets = [_outputs(models[0], s, data, layers) for s in states]
    got = _outputs(models[0], fixed, data, layers)
    for name in layers:
        std = (targets[0][name].std(0, correction=0) + targets[1][name].std(0, correction=0)) / 2
        torch.testing.assert_close(got[name].std(0, correction=0), std, atol=1e-9, rtol=1e-9)


def test_rescale_keeps_the_means() -> None:
    model = _mlp(5, 12, 3)
    states = [_mlp(5, 12, 3, seed=s).state_dict() for s in (1, 2)]
    merged = _mean(states)
    x = torch.randn(40, 5)
    fixed, _ = Repair(shift=False)(model, merged, states, x)
    was, now = _outputs(model, merged, [x], ["0"])["0"], _outputs(model, fixed, [x], ["0"])["0"]
    torch.testing.assert_close(now.mean(0), was.mean(0), atol=1e-5, rtol=1e-5)
    assert (now.std(0) > was.std(0)).all()


def test_only_free_channels_are_corrected() -> None:
    model = _mlp(4, 6, 2)
    states = [_mlp(4, 6, 2, seed=s).state_dict() for s in (1, 2)]
    shapes = {n: tuple(v.shape) for n, v in states[0].items()}
    unit = np.array([[1], [3], [4]])
    slots = (Slot("0.weight", 0, unit), Slot("0.bias", 0, unit), Slot("2.weight", 1, unit))
    symmetry = Symmetry(shapes, (Generator(3, slots),))
    merged = _mean(states)
    fixed, report = Repair()(model, merged, states, torch.randn(30, 4), symmetry=symmetry)
    assert report.layers[0].corrected == 3
    assert report.skipped == {"2.weight": "the symmetry pins its output channels"}
    moved = (fixed["0.weight"] != merged["0.weight"]).any(1)
    assert moved.tolist() == [False, True, False, True, True, False]
    assert torch.equal(fixed["2.weight"], merged["2.weight"])


def test_one_sample_is_too_few_and_the_report_says_so() -> None:
    model = _mlp(5, 12, 10, 3)
    states = [_mlp(5, 12, 10, 3, seed=s).state_dict() for s in (1, 2)]
    fixed, report = Repair()(model, states[0], states, [torch.randn(1, 5)])
    assert not report.layers
    assert any("one sample, which has no variance" in reason for reason in report.skipped.values())
    assert all(torch.equal(fixed[n], v) for n, v in states[0].items())


def test_complex_activations_are_left_alone_and_named() -> None:
    """A repair by their real parts would be of something else."""

    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 5, dtype=torch.complex64), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x.to(torch.complex64)).abs())

    states = [Complex().state_dict() for _ in range(2)]
    merged = {n: (a + states[1][n]) / 2 for n, a in states[0].items()}
    fixed, report = Repair()(Complex(), merged, states, [torch.randn(20, 3)])
    assert torch.equal(fixed["up.weight"], merged["up.weight"])
    assert "complex" in report.skipped["up.weight"]


def test_dead_channels_are_left_alone() -> None:
    model = _mlp(4, 6, 5, 2)
    states = [_mlp(4, 6, 5, 2, seed=s).state_dict() for s in (1, 2)]
    for state in states:
        state["0.weight"][2] = 0
        state["2.weight"][1] = 0
        state["2.bias"][1] = 1000.0
    merged = _mean(states)
    fixed, report = Repair()(model, merged, states, torch.randn(30, 4))
    assert [layer.dead for layer in report.layers] == [1, 1]
    assert torch.equal(fixed["0.weight"][2], merged["0.weight"][2])
    assert torch.equal(fixed["2.bias"][1], merged["2.bias"][1])
    assert all(v.isfinite().all() for v in fixed.values())


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.twice = nn.Linear(4, 4)
        self.q = nn.Linear(4, 4)
        self.k = nn.Linear(4, 4)
        self.k.bias = self.q.bias
        self.table = nn.Parameter(torch.randn(5, 4))
        self.mask = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 9, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        x = self.embedding(i) + self.table
        x = self.twice(self.twice(x).relu())
        x = self.q(x).relu() + self.k(x).relu()
        x = F.linear(x, self.mask.weight * 0.5, self.mask.bias).relu()
        return self.decoder(x).log_softmax(-1)


def test_shared_and_computed_weights_are_skipped_and_named() -> None:
    torch.manual_seed(0)
    models = [_Shared() for _ in range(2)]
    states = [m.state_dict() for m in models]
    data = [torch.randint(0, 9, (6, 5)) for _ in range(2)]
    merged = _mean(states)
    fixed, report = Repair()(models[0], merged, states, data)
    assert not report.layers
    assert "used more than once (by addmm)" in report.skipped["twice.weight"]
    assert "its bias q.bias is used more than once" in report.skipped["q.weight"]
    assert "used more than once (by embedding, mm)" in report.skipped["embedding.weight"]
    assert report.skipped["mask.weight"] == "it is no plain linear or convolution weight (used by mul)"
    assert report.skipped["table"] == "it is no plain linear or convolution weight (used by add)"
    assert all(torch.equal(fixed[n], merged[n]) for n in merged)
    assert fixed["decoder.weight"] is fixed["embedding.weight"]
    assert "table: left alone" in str(report)


def test_a_layer_that_the_first_batch_does_not_reach_is_named_as_such() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out((self.one if x.mean() > 0 else self.two)(x).relu())

    net = Branch()
    own = net.state_dict()
    _, report = Repair()(net, own, [own, own], [torch.rand(9, 3), -torch.rand(9, 3)])
    assert report.skipped["two.weight"] == "the merged network does not use it on the first batch"


@pytest.mark.parametrize("sizes", [[24], [11, 13]])
def test_repair_with_reset_leaves_normalised_layers_to_the_reset(sizes: list[int]) -> None:
    torch.manual_seed(0)
    models = [
        nn.Sequential(
            nn.Linear(4, 6),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.Linear(6, 5),
            nn.ReLU(),
            nn.Linear(5, 3),
            nn.BatchNorm1d(3),
        )
        for _ in range(2)
    ]
    states = [m.state_dict() for m in models]
    data = [torch.randn(n, 4) for n in sizes]
    fixed, report = Repair(reset=True)(models[0], _mean(states), states, data)
    assert [layer.name for layer in report.layers] == ["3.weight"]
    assert report.reset == ("1", "6")
    assert "normalised by 1.running_mean" in report.skipped["0.weight"]
    inputs = _outputs(models[0], fixed, data, ["0", "5"])
    for layer, norm in (("0", "1"), ("5", "6")):
        torch.testing.assert_close(fixed[f"{norm}.running_mean"].double(), inputs[layer].mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fixed[f"{norm}.running_var"].double(), inputs[layer].var(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [[24], [11, 13]])
@pytest.mark.parametrize("bias", [True, False])
def test_repair_without_reset_corrects_normalised_layers(sizes: list[int], bias: bool) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 6, bias=bias), nn.BatchNorm1d(6), nn.Linear(6, 3)) for _ in range(2)]
    states = [m.state_dict() for m in models]
    data = [torch.randn(n, 4) + 1 for n in sizes]
    fixed, report = Repair()(models[0], _mean(states), states, data)
    assert [(layer.name, layer.shifted) for layer in report.layers] == [("0.weight", True)]
    targets = [_outputs(models[0], s, data, ["1"])["1"] for s in states]
    got = _outputs(models[0], fixed, data, ["1"])["1"]
    torch.testing.assert_close(got.mean(0), (targets[0].mean(0) + targets[1].mean(0)) / 2, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.std(0), (targets[0].std(0) + targets[1].std(0)) / 2, atol=1e-5, rtol=1e-5)


class TwoReaders(nn.Module):
    """A convolution without a bias that a BatchNorm reads, and another one or a skip as well, at once or much later."""

    def __init__(self, second: str) -> None:
        super().__init__()
        self.second = second
        self.conv, self.norm = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.other, self.out = nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1)
        self.between = nn.Sequential(*(nn.Conv2d(5, 5, 1) for _ in range(10)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        first = self.norm(y).relu()
        if self.second == "norm":
            return self.out(first + self.other(y))
        if self.second == "late":
            return self.out(self.between(first) + y)
        return self.out(first + y if self.second == "skip" else first)


@pytest.mark.parametrize("second", ["none", "norm", "skip", "late"])
def test_a_mean_is_moved_into_a_batchnorm_that_alone_reads_the_output(second: str) -> None:
    torch.manual_seed(0)
    models = [TwoReaders(second) for _ in range(2)]
    states = [m.state_dict() for m in models]
    merged, data = _mean(states), [torch.randn(n, 3, 6, 6) + 1 for n in (4, 2)]
    fixed, report = Repair()(models[0], merged, states, data)
    assert report.layers[0].shifted == (second == "none")
    targets = [_outputs(models[0], s, data, ["conv"])["conv"] for s in states]
    got = _outputs(models[0], fixed, data, ["conv"])["conv"]
    torch.testing.assert_close(got.std(0), (targets[0].std(0) + targets[1].std(0)) / 2, atol=1e-5, rtol=1e-5)
    read = (
        got.mean(0) - fixed["norm.running_mean"] + merged["norm.running_mean"]
    )  # what the norm is given, but for a constant
    wanted = (targets[0].mean(0) + targets[1].mean(0)) / 2 if second == "none" else got.mean(0)
    torch.testing.assert_close(read.double(), wanted.double(), atol=1e-5, rtol=1e-5)


def test_weights_that_the_network_writes_to_stay() -> None:
    models = [
        nn.Sequential(nn.Embedding(5, 6, max_norm=0.5), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in "ab"
    ]
    states = [copy.deepcopy(m.state_dict()) for m in models]
    merged = _mean(states)
    fixed, report = Repair()(models[0], merged, states, [torch.arange(5)[None]])
    assert torch.equal(fixed["0.weight"], merged["0.weight"])
    assert [layer.name for layer in report.layers] == ["1.weight"]


class Flex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(5, 24), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out(flex_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("tier", [Repair(), RowNorms(), GaussianRepair(gate=1), LeastSquares()], ids=repr)
def test_higher_order_operators_and_inference_mode(tier: Renormaliser) -> None:
    torch.manual_seed(0)
    models = [Flex() for _ in range(2)]
    states = [m.state_dict() for m in models]
    data = [torch.randn(2, 7, 5), torch.randn(1, 7, 5)]
    wanted, report = tier(models[0], _mean(states), states, data)
    assert report.layers[0].name == "qkv.weight"
    with torch.inference_mode():
        found, _ = tier(models[0], _mean(states), states, data)
    assert all(torch.equal(found[n], v) for n, v in wanted.items())


def test_half_precision_and_keyword_inputs() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)
            self.b = nn.Linear(4, 2)

        def forward(self, *, x: torch.Tensor, flag: bool) -> torch.Tensor:
            assert flag
            return self.b(self.a(x).relu())

    torch.manual_seed(0)
    models = [Keyword().bfloat16() for _ in range(2)]
    states = [m.state_dict() for m in models]
    data = [{"x": torch.randn(5, 3).bfloat16(), "labels": torch.zeros(5)}]
    fixed, report = Repair()(models[0], _mean(states), states, data, kwargs={"flag": True, "x": torch.ones(1)})
    assert fixed["a.weight"].dtype == torch.bfloat16
    assert len(report.layers) == 1


def test_data_of_every_kind_give_the_same() -> None:
    model = _mlp(4, 6, 2)
    states = [_mlp(4, 6, 2, seed=s).state_dict() for s in (1, 2)]
    x, y = torch.randn(9, 4), torch.zeros(9)

    def once() -> Iterator[Any]:
        yield x[:4], y[:4]
        yield x[4:8], y[4:8]
        yield x[8:], y[8:]

    kinds = [
        [x[:4], x[4:8], x[8:]],
        once(),
        DataLoader(TensorDataset(x, y), batch_size=4),
        [[x[:4]], (x[4:8],), (x[8:],)],
    ]
    results = [Repair()(model, _mean(states), states, kind)[0] for kind in kinds]
    for other in results[1:]:
        assert _same([results[0]], [other])


def test_repair_bad_input() -> None:
    model = _mlp(4, 6, 2)
    state = model.state_dict()
    with pytest.raises(AutomergeError, match="data gave no batch"):
        Repair()(model, state, [state], [])
    with pytest.raises(AutomergeError, match="needs the endpoints"):
        Repair()(model, state, [], [torch.randn(2, 4)])
    with pytest.raises(AutomergeError, match="1 weights for 2 endpoints"):
        Repair()(model, state, [state, state], [torch.randn(2, 4)], weights=[1.0])
    with pytest.raises(AutomergeError, match="batch 0 of the data has 1 items, but the model takes 2"):
        Repair()(model, state, [state], [(torch.randn(2, 4),)], inputs=2)
    with pytest.raises(AutomergeError, match="batch 0 of the data is a int"):
        Repair()(model, state, [state], [3])
    assert str(RepairReport()) == "Repair: none"
    assert RepairReport().to_dict()["layers"] == ()
