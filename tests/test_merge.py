"""Merging from end to end, its invariants, and every bad input's message."""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch.nn.utils import prune

from automerge._errors import AutomergeError, CheckpointError, MatchingError, OutputError, TraceError
from automerge.datafree import GaussianRepair, RowNorms
from automerge.evaluate import evaluate
from automerge.fitting import LeastSquares
from automerge.infer import infer
from automerge.io import hash_state_dict, load_state_dict
from automerge.matchers import MATCHERS, FrankWolfe, Identity, Matcher, Matching, ZipIt, match
from automerge.merge import average, merge
from automerge.symmetry import Generator, Slot, Symmetry
from tests._factories import Masked

torch.set_num_threads(1)
StateDict = dict[str, torch.Tensor]


def _mlp(seed: int, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def _symmetry(state: StateDict) -> Symmetry:
    """The MLP's two groups, by hand."""
    unit = np.arange(state["0.bias"].numel())[:, None]

    def group(a: str, b: str) -> Generator:
        return Generator(
            len(unit), (Slot(f"{a}.weight", 0, unit), Slot(f"{a}.bias", 0, unit), Slot(f"{b}.weight", 1, unit))
        )

    return Symmetry({n: tuple(v.shape) for n, v in state.items()}, (group("0", "2"), group("2", "4")))


def _norm_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    net.train()
    for _ in range(seed + 1):
        net(torch.randn(16, 4))
    return net.eval()


class _Fixed(Matcher):
    """Moves the models by given elements."""

    def __init__(self, elements: Any) -> None:
        self.elements = elements

    def match(self, models: Any, symmetry: Symmetry, *, progress: Any = None, data: Any = None) -> Matching:
        return Matching(tuple(self.elements), symmetry, "fixed")


X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------- what a merge is
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(2, 5), data=st.data())
def test_copies_moved_about_merge_to_the_original(seed: int, count: int, data: Any) -> None:
    net = _mlp(seed)
    state = net.state_dict()
    symmetry = _symmetry(state)
    elements = [symmetry.random_element(seed + k) for k in range(count)]
    models = [symmetry.apply(state, e) for e in elements]
    weights = data.draw(st.lists(st.floats(0.1, 3), min_size=count, max_size=count))
    i = data.draw(st.integers(0, count - 1))
    back = _Fixed([e.inverse() for e in elements])
    kept = [hash_state_dict(m) for m in models]
    common: dict[str, Any] = {"matcher": back, "weights": weights, "symmetry": symmetry, "architecture": net}
    result = merge(models, X, **common)
    for name, value in state.items():
        torch.testing.assert_close(result.state_dict[name], value)
    own = merge(models, X, coordinates=i, **common)
    for name, value in models[i].items():
        torch.testing.assert_close(own.state_dict[name], value)
    assert [hash_state_dict(m) for m in models] == kept


def test_frank_wolfe_merges_planted_copies_end_to_end() -> None:
    net = _mlp(0)
    symmetry = _symmetry(net.state_dict())
    models = []
    for seed in range(3):
        other = copy.deepcopy(net)
        other.load_state_dict(symmetry.apply(net.state_dict(), symmetry.random_element(seed)))
        models.append(other.train())
    result = merge(models, X, coordinates=0)
    merged = result.load_into(copy.deepcopy(net))
    with torch.no_grad():
        torch.testing.assert_close(merged(X), net(X), atol=1e-5, rtol=1e-5)
    assert result.matching.cycle_error() == 0.0
    assert all(m.training for m in models)
    naive = merge(models, X, matcher=Identity()).state_dict
    torch.testing.assert_close(naive["0.weight"], sum(m[0].weight.detach() for m in models) / 3)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(2, 5),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_average_is_the_rounded_exact_mean(count: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(3, 2, generator=generator).to(dtype) for _ in range(count)]
    share = torch.rand(count, generator=generator).double()
    share = share / share.sum()
    exact = sum((w * v.double() for w, v in zip(share, values, strict=True)), torch.zeros(3, 2).double())
    got = average([{"w": v} for v in values], share.tolist())["w"]
    assert got.dtype == dtype
    torch.testing.assert_close(got, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-14)


def test_a_given_matching_takes_the_place_of_the_search(tmp_path: Path) -> None:
    models, x = [_mlp(k) for k in range(3)], torch.randn(5, 4)
    whole = merge(models, x)
    whole.matching.save(tmp_path / "m.safetensors")
    again = merge(models, x, matching=Matching.load(tmp_path / "m.safetensors"), matcher=Identity())
    assert all(torch.equal(whole.state_dict[k], v) for k, v in again.state_dict.items())
    assert again.provenance["matcher"] == repr(FrankWolfe())
    for bad, text in (
        ({"matching": whole.matching, "symmetry": infer(models[0], x)}, "brings its own symmetry"),
        ({"matching": whole.symmetry}, "got a Symmetry"),
    ):
        with pytest.raises(MatchingError, match=text):
            merge(models, x, **bad)  # type: ignore[arg-type]
    with pytest.raises(MatchingError, match="of 3 models, and 2"):
        merge(models[:2], x, matching=whole.matching)
    with pytest.raises(MatchingError, match="another architecture"):
        merge([_mlp(k, 9) for k in range(3)], x, matching=whole.matching)


def test_a_matching_that_merged_units_of_one_model_makes_only_its_average() -> None:
    models, x = [_mlp(k) for k in range(2)], torch.randn(50, 4)
    whole = merge(models, x, matcher=ZipIt(), data=[x], repair="none")
    assert whole.matching.separable is not any(whole.matching.stats["within"].values())
    again = merge(models, x, matching=whole.matching)
    assert all(torch.equal(whole.state_dict[k], v) for k, v in again.state_dict.items())
    if not whole.matching.separable:
        with pytest.raises(MatchingError, match="ZipIt"):
            merge(models, x, matching=whole.matching, weights=[1, 2])


def _masked(seed: int, pruned: bool = False) -> Masked:
    torch.manual_seed(seed)
    return Masked(pruned)


def test_a_mask_that_all_models_share_stays() -> None:
    models, x = [_masked(k) for k in range(3)], torch.randn(5, 4)
    found = merge(models, x)
    assert sorted(g.size for g in found.symmetry.generators()) == [4, 4, 4]
    assert torch.equal(found.state_dict["first"], models[0].first)
    assert torch.equal(found.state_dict["second"], models[0].second)
    assert "kept as constants" in str(found)
    merged = found.load_into(_masked(9))
    for k in range(4):  # an output sees no later input
        moved = x.clone()
        moved[:, k:] += 1
        assert torch.allclose(merged(x)[:, : k + 1], merged(moved)[:, : k + 1])


def test_masks_of_their_own_move_with_the_models() -> None:
    models, x = [_masked(k, pruned=True) for k in range(2)], torch.randn(5, 4)
    for model in models:
        model.second.fill_(1.0)  # nothing to tell apart: the same in all, and no constant that pins
    found = merge(models, x)
    assert [g.size for g in found.symmetry.generators()] == [12]
    assert "kept as constants" not in str(found)


def test_a_given_symmetry_that_moves_a_shared_mask_is_noted() -> None:
    models, x = [_masked(k) for k in range(2)], torch.randn(5, 4)
    symmetry = infer(models[0], x)
    assert [g.size for g in symmetry.generators()] == [12]
    assert any("constants=" in note for note in merge(models, x, symmetry=symmetry).notes)
    assert any("moved apart" in note for note in match(models, symmetry).remarks())
    kept = infer(models[0], x, constants=["first", "second"])
    assert not merge(models, x, symmetry=kept).notes
    assert not match(models, kept).remarks()
    assert kept.shapes.keys() == models[0].state_dict().keys() - {"first", "second"}


class _Positions(nn.Module):
    """A table of positions that takes no gradient, on a residual stream."""

    def __init__(self, seed: int, frozen: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.into, self.up, self.down, self.out = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.sin(torch.arange(40.0)).view(1, 5, 8), requires_grad=not frozen)
        for layer in (self.into, self.up, self.down, self.out):
            layer.weight.data.mul_(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.into(x) + self.table
        return self.out((h + self.down(torch.relu(self.up(h)))).mean(1))


def test_a_table_without_gradient_that_all_models_share_stays() -> None:
    x = torch.randn(2, 5, 4)
    models = [_Positions(k) for k in range(3)]
    found = merge(models, x)
    assert [g.size for g in found.symmetry.generators()] == [12]
    assert torch.equal(found.state_dict["table"], models[0].table)
    assert "kept as constants" in str(found)
    learned = merge([_Positions(k, frozen=False) for k in range(3)], x)
    assert sorted(g.size for g in learned.symmetry.generators()) == [8, 12]
    moved = [found.symmetry.apply(m.state_dict(), found.symmetry.random_element(k)) for k, m in enumerate(models)]
    for model, state in zip(models, moved, strict=True):
        before = model.double()(x.double())
        model.load_state_dict(state)
        torch.testing.assert_close(model(x.double()), before)


@pytest.mark.parametrize("names", [["absent"], ["a.weight", "a"], "first"])
def test_constants_must_be_in_the_state_dict(names: Any) -> None:
    with pytest.raises(TraceError, match="constants"):
        infer(_masked(0), torch.randn(5, 4), constants=names)


def test_buffers_are_merged_as_what_they_are() -> None:
    models = [_norm_net(0), _norm_net(3)]
    result = merge(models, X, matcher=Identity(), weights=[3, 1])
    a, b = (m.state_dict() for m in models)
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(result.state_dict[name], 0.75 * a[name] + 0.25 * b[name])
    assert result.state_dict["1.num_batches_tracked"].item() == 4
    assert "averages of the models' own" in str(result)
    complex_ = average([{"z": torch.tensor([1j])}, {"z": torch.tensor([3.0 + 0j])}], [0.5, 0.5])["z"]
    assert complex_.item() == 1.5 + 0.5j


class _Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("repair", ["none", "repair"])
def test_tied_weights_stay_tied(repair: Any, tmp_path: Path) -> None:
    models = [_Tied(0), _Tied(1)]
    result = merge(models, X, data=[X], repair=repair)
    assert result.state_dict["a.weight"] is result.state_dict["b.weight"]
    result.save(tmp_path / "m.safetensors")
    loaded = load_state_dict(tmp_path / "m.safetensors")
    states = [{n: v.clone() for n, v in m.state_dict().items()} for m in models]
    from_files = merge([*states, loaded], X, architecture=_Tied(5))
    assert from_files.state_dict["a.weight"] is from_files.state_dict["b.weight"]
    states[1]["b.weight"] = states[1]["b.weight"] + 1
    with pytest.raises(CheckpointError, match=r"model 1: b\.weight and a\.weight are one tensor"):
        merge(states, X, architecture=_Tied(5))


# -------------------------------------------------------------------- repair
@pytest.mark.parametrize(
    ("given_", "mode"),
    [("auto", "reset"), ("reset", "reset"), ("repair", "repair"), ("both", "both"), ("none", "none")],
)
def test_repair_modes_with_batchnorm(given_: Any, mode: str) -> None:
    models = [_norm_net(0), _norm_net(1)]
    before = [hash_state_dict(m.state_dict()) for m in models]
    result = merge(models, X, data=[(X, torch.zeros(12)), (X[:5], torch.zeros(5))], repair=given_)
    assert result.repair.mode == mode
    assert result.provenance["options"]["repair"] == mode
    assert [hash_state_dict(m.state_dict()) for m in models] == before
    assert not any(m.training for m in models)
    if mode in ("reset", "both"):
        hidden = torch.cat([X, X[:5]]) @ result.state_dict["0.weight"].T + result.state_dict["0.bias"]
        torch.testing.assert_close(result.state_dict["1.running_mean"], hidden.mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(result.state_dict["1.running_var"], hidden.var(0), atol=1e-5, rtol=1e-5)
    if mode == "repair":
        assert [layer.name for layer in result.repair.layers] == ["0.weight"]


def test_auto_repairs_networks_without_batchnorm_from_a_generator() -> None:
    models = [_mlp(s) for s in range(3)]
    result = merge(models, X, data=(x for x in X.split(5)))
    assert result.repair.mode == "repair"
    assert [layer.name for layer in result.repair.layers] == ["0.weight", "2.weight"]
    assert "4.weight" in result.repair.skipped
    again = merge(models, X, data=[X[:5], X[5:10], X[10:]])
    assert all(torch.equal(v, again.state_dict[n]) for n, v in result.state_dict.items())


def test_repair_in_the_coordinates_of_a_model_is_the_same_network() -> None:
    models = [_mlp(s).double() for s in range(3)]
    x = X.double()
    outputs = []
    for where in ("universe", 0, 2):
        net = merge(models, x, data=[x], coordinates=where).load_into(_mlp(9).double())  # type: ignore[arg-type]
        with torch.no_grad():
            outputs.append(net(x))
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2])


# -------------------------------------------------------------------- the result
def test_report_provenance_and_saving(tmp_path: Path) -> None:
    models = [_mlp(s) for s in range(2)]
    result = merge(models, X, weights=[1, 3], data=[X])
    text = str(result)
    assert "Merged 2 models of 139 parameters in the coordinates of the universe" in text
    assert "model 1: weight 0.75" in text
    assert "Repair (repair): 2 layers rescaled" in text
    assert set(result.stats) == {"check", "infer", "match", "average", "repair", "total"}
    assert result.provenance["inputs"][0]["sha256"] == hash_state_dict(models[0].state_dict())
    assert result.provenance["matcher"].startswith("FrankWolfe(")
    assert set(result.provenance["versions"]) == {"automerge", "torch", "numpy", "python"}
    json.dumps(result.to_dict())
    file = tmp_path / "m.safetensors"
    result.save(file)
    with safe_open(str(file), "pt") as handle:
        metadata = handle.metadata()
    assert json.loads(metadata["automerge.provenance"]) == json.loads(json.dumps(result.provenance))
    assert json.loads(metadata["automerge.repair"])["mode"] == "repair"
    assert all(torch.equal(v, result.state_dict[n]) for n, v in load_state_dict(file).items())
    with pytest.raises(OutputError, match="exists; pass --force"):
        result.save(file)
    result.save(file, force=True)
    with pytest.raises(CheckpointError, match=r"the merged state dict: 0\.weight has the shape \(8, 4\), expected"):
        result.load_into(_mlp(0, width=5))


def test_several_inputs_and_keywords() -> None:
    class Two(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(2, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor, y: torch.Tensor, *, scale: float) -> torch.Tensor:
            return self.c((self.a(x) + scale * self.b(y)).relu())

    y = torch.randn(12, 2)
    result = merge([Two(0), Two(1)], (X, y), {"scale": 2.0}, data=[(X, y, torch.zeros(12))])
    assert {layer.name for layer in result.repair.layers} == {"a.weight", "b.weight"}


# -------------------------------------------------------------------- bad input
def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("long work began before the input was checked")


@pytest.fixture
def no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["automerge._merge_task"], "infer_common", _never)
    monkeypatch.setattr(sys.modules[merge.__module__], "match", _never)


def _changed(state: StateDict, **changes: torch.Tensor) -> StateDict:
    return {**state, **{n.replace("__", "."): v for n, v in changes.items()}}


@pytest.mark.usefixtures("no_long_work")
def test_bad_models() -> None:
    net = _mlp(0)
    state = net.state_dict()
    for models, message in (
        ([net], "at least two models, got 1"),
        ([], "at least two models, got 0"),
    ):
        with pytest.raises(MatchingError, match=message):
            merge(models, X)
    bad: list[tuple[StateDict, str]] = [
        ({n: v for n, v in state.items() if n != "2.bias"}, r"model 1 has no key '2\.bias'"),
        (_changed(state, extra=torch.ones(1)), r"model 1 has the extra key 'extra'"),
        (_mlp(0, width=5).state_dict(), r"model 1: 0\.weight has the shape \(5, 4\), expected \(8, 4\)"),
        (
            _changed(state, **{"0__bias": torch.full((8,), torch.nan)}),
            r"model 1: 0\.bias has 8 of 8 values that are NaN",
        ),
        (_changed(state, **{"0__bias": torch.full((8,), torch.inf)}), r"model 1: 0\.bias .* infinite"),
    ]
    for other, message in bad:
        with pytest.raises(CheckpointError, match=message):
            merge([state, other], X, architecture=net)
    with pytest.raises(CheckpointError, match=r"model 0: 0\.weight has the shape \(5, 4\)"):
        merge([_mlp(0, width=5), _mlp(1, width=5)], X, architecture=net)
    with pytest.raises(CheckpointError, match="give architecture="):
        merge([state, state], X)
    with pytest.raises(CheckpointError, match="model 1 is a str; give a module or a state dict"):
        merge([net, "b.safetensors"], X)  # type: ignore[list-item]


@pytest.mark.usefixtures("no_long_work")
def test_bad_integer_buffers() -> None:
    class Table(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.a = nn.Linear(4, 2)
            self.register_buffer("table", torch.arange(4) + n)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x[:, self.table])  # type: ignore[index]

    with pytest.raises(CheckpointError, match=r"buffer table of model 2 differs from model 0's"):
        merge([Table(0), Table(0), Table(1)], X)


@pytest.mark.usefixtures("no_long_work")
def test_bad_options() -> None:
    models = [_mlp(0), _mlp(1)]
    for weights, message in (
        ([1.0], "got 1 weights for 2 models"),
        ([1.0, -0.5], "weight 1 is -0.5; weights must be finite and not negative"),
        ([float("nan"), 1.0], "weight 0 is nan"),
        ([0.0, 0.0], "the weights sum to zero"),
    ):
        with pytest.raises(MatchingError, match=message):
            merge(models, X, weights=weights)
    for coordinates in (2, -1, True, "reference"):
        with pytest.raises(MatchingError, match="coordinates must be 'universe' or a model number from 0 to 1"):
            merge(models, X, coordinates=coordinates)  # type: ignore[arg-type]
    with pytest.raises(AutomergeError, match="repair must be one of auto, none"):
        merge(models, X, repair="magic")  # type: ignore[arg-type]
    with pytest.raises(AutomergeError, match="repair='repair' measures activations; give data="):
        merge(models, X, repair="repair")
    with pytest.raises(AutomergeError, match="needs BatchNorm statistics, and this model has none"):
        merge(models, X, repair="reset", data=[X])
    with pytest.raises(AutomergeError, match="data gave no batch"):
        merge(models, X, data=[])
    with pytest.raises(AutomergeError, match="the model does not run on the first batch of data: RuntimeError"):
        merge(models, X, data=[torch.randn(3, 7)])


def test_a_note_names_other_dtypes() -> None:
    models = [_mlp(0), _mlp(1).double()]
    result = merge(models, X)
    assert result.state_dict["0.weight"].dtype == torch.float32
    assert result.notes[0] == "model 1: 0.weight and 5 more are torch.float64, expected torch.float32"


def test_masks_that_differ_are_noted() -> None:
    models = [_mlp(seed) for seed in range(2)]
    for amount, model in zip((2, 2), models, strict=True):
        prune.l1_unstructured(model[0], "weight", amount)
    note = "0.weight_mask hold zeros and ones only, which differ between the models"
    assert any(n.startswith(note) for n in merge(models, X).notes)
    for model in models:
        prune.remove(model[0], "weight")
    assert not any("zeros and ones" in n for n in merge(models, X).notes)


def test_a_matching_of_other_models_is_noted(tmp_path: Path) -> None:
    nets = [nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(3)]
    x = torch.randn(4, 3)
    file = tmp_path / "matching.safetensors"
    match(nets[:2], infer(nets[0], x)).save(file)
    known = Matching.load(file)
    assert not merge(nets[:2], x, matching=known).notes
    states = [dict(reversed(net.state_dict().items())) for net in nets[:2]]
    assert not merge(states, x, matching=known, architecture=nets[0]).notes
    assert any("these models in another order" in note for note in merge(nets[1::-1], x, matching=known).notes)
    assert any("than those of model 1" in note for note in merge(nets[::2], x, matching=known).notes)


def test_matcher_options_are_kept_and_stages_timed() -> None:
    start = time.perf_counter()
    result = merge([_mlp(0), _mlp(1)], X, matcher=FrankWolfe(), symmetry=_symmetry(_mlp(0).state_dict()))
    assert 0 < result.stats["total"] <= time.perf_counter() - start
    assert result.symmetry.sets[0].size == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoints_in_another_precision_are_repaired(dtype: torch.dtype) -> None:
    """In the architecture's own precision, and given back in theirs."""
    states = [{n: v.to(dtype) for n, v in _mlp(seed).state_dict().items()} for seed in range(2)]
    own = [{n: v.float() for n, v in s.items()} for s in states]
    result = merge(states, X, architecture=_mlp(0), data=[X])
    expected = merge(own, X, architecture=_mlp(0), data=[X])
    assert result.repair.mode == "repair"
    assert all(v.dtype == dtype for v in result.state_dict.values())
    for name, value in result.state_dict.items():
        assert torch.allclose(value.float(), expected.state_dict[name], rtol=2e-2, atol=2e-2), name


@pytest.mark.parametrize("matcher", [make() for make in MATCHERS.values()], ids=list(MATCHERS))
@pytest.mark.parametrize("repair", ["auto", LeastSquares(), RowNorms(), GaussianRepair()], ids=str)
def test_checkpoints_of_several_precisions_run_as_the_architecture_would_load_them(matcher: Any, repair: Any) -> None:
    types = (torch.float32, torch.float16, torch.float64)
    for order in (types, types[1:]):
        states = [{n: v.to(t) for n, v in _mlp(seed).state_dict().items()} for seed, t in enumerate(order)]
        own = [{n: v.float() for n, v in s.items()} for s in states]
        mode = repair if matcher.separable else "none"
        result = merge(states, X, architecture=_mlp(0), matcher=matcher, data=[X], repair=mode)
        expected = merge(own, X, architecture=_mlp(0), matcher=matcher, data=[X], repair=mode)
        for name, value in result.state_dict.items():
            assert value.dtype == order[0]
            assert torch.allclose(value.float(), expected.state_dict[name], rtol=2e-2, atol=2e-2), name


@pytest.mark.parametrize("repair", ["reset", "both", LeastSquares()], ids=str)
def test_a_variance_that_the_checkpoints_cannot_hold_is_refused(repair: Any) -> None:
    states = [
        {n: v.half() if v.is_floating_point() else v for n, v in _norm_net(s).state_dict().items()} for s in (0, 1)
    ]
    with pytest.raises(
        AutomergeError, match=r"1\.running_var .* torch\.float16 cannot hold; give checkpoints in float32"
    ):
        merge(states, X, architecture=_norm_net(0), data=[X * 1e4], repair=repair)
    wide = [{n: v.float() if v.is_floating_point() else v for n, v in s.items()} for s in states]
    result = merge(wide, X, architecture=_norm_net(0), data=[X * 1e4], repair=repair)
    assert result.state_dict["1.running_var"].max() > 65504


class Counting(nn.Module):
    """Counts its passes and keeps a running mean of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("passes", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x).relu()
        self.passes += 1
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.out(x - self.mean)


def test_networks_that_write_to_themselves_are_left_as_they_were() -> None:
    torch.manual_seed(0)
    models = [Counting().eval() for _ in range(2)]
    models[1].passes += 7
    before = [{n: v.clone() for n, v in m.state_dict().items()} for m in models]
    x = torch.randn(6, 3)
    merged = merge(models, x, data=[x, x], repair="repair")
    evaluate(models[0], [(x, torch.zeros(6, dtype=torch.long))])
    evaluate((models[0], before[1]), [(x, torch.zeros(6, dtype=torch.long))])
    assert merged.state_dict["passes"] == 7
    assert before[1]["passes"] == 7
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


@pytest.mark.usefixtures("no_long_work")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": _mlp}, r"architecture= is a function; give a module, such as build\(\) rather than build"),
        ({"weights": "ab"}, r"weights='ab': give a list of 2 numbers"),
        ({"weights": 3}, r"weights=3: give a list of 2 numbers"),
        ({"weights": [1, None]}, r"weights=\[1, None\]: give a list of 2 numbers"),
        ({"weights": {0: 1, 1: 2}}, r"weights=\{0: 1, 1: 2\}: give a list of 2 numbers"),
        ({"matcher": "frank-wolfe"}, r"matcher is 'frank-wolfe'; give a matcher such as FrankWolfe\(\)"),
        ({"matcher": FrankWolfe}, r"matcher is the class FrankWolfe; give one with its options: FrankWolfe\(\)"),
        ({"matcher": None}, r"matcher is None"),
        ({"symmetry": "x"}, r"symmetry= takes what automerge.infer returns, got a str"),
    ],
)
def test_options_of_another_kind_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AutomergeError, match=message):
        merge([_mlp(0), _mlp(1)], X, **options)


def test_groups_that_no_matcher_searches_are_named() -> None:
    """Groups written by hand that share some of their positions."""
    first, second = np.arange(3)[:, None], np.arange(3)[:, None] + 2
    sets = tuple(Generator(3, (Slot("weight", 0, units), Slot("bias", 0, units))) for units in (first, second))
    models = [nn.Linear(3, 5) for _ in range(2)]
    symmetry = Symmetry({"weight": (5, 3), "bias": (5,)}, sets)
    matching = match(models, symmetry)
    assert any("overlap without being nested" in remark for remark in matching.remarks())
    assert "weight[0]" in str(matching)
    plain = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
    assert not merge(plain, torch.randn(2, 3)).matching.remarks()
