"""Measurements agree with their definitions, computed here by hand."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from automerge._errors import AutomergeError, CheckpointError, OutputError
from automerge.compare import compare
from automerge.datafree import GaussianRepair, RowNorms
from automerge.evaluate import (
    Barrier,
    agreement,
    barrier,
    cycle_error,
    evaluate,
    interpolate,
    predictions,
    similarity,
)
from automerge.fitting import LeastSquares
from automerge.infer import infer
from automerge.landscape import plane
from automerge.matchers import CCA, Matching, match
from automerge.merge import merge
from automerge.renormalise import Repair, reset_batchnorm
from automerge.symmetry import Generator, Slot, Symmetry

torch.set_num_threads(1)


def _net(seed: int, *, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    middle: nn.Module = nn.BatchNorm1d(8) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(4, 8), middle, nn.ReLU(), nn.Linear(8, 3))


def _data(sizes: list[int], seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in sizes]


def _joined(data: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4), seed=st.integers(0, 50))
def test_evaluate_is_exact_over_unequal_batches(sizes: list[int], seed: int) -> None:
    model = _net(seed).train()
    data = _data(sizes, seed)
    x, y = _joined(data)
    result = evaluate(model, data, {"mean score": lambda out, labels: out.mean()})
    with torch.no_grad():
        scores = model(x)
    assert model.training
    assert result.samples == len(x)
    assert result.accuracy == pytest.approx((scores.argmax(1) == y).float().mean().item())
    assert result.loss == pytest.approx(F.cross_entropy(scores, y).item(), rel=1e-5)
    assert result.metrics["mean score"] == pytest.approx(scores.mean().item(), rel=1e-4, abs=1e-6)
    json.dumps(result.to_dict())
    assert "accuracy" in str(result)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_ensemble(average: Any) -> None:
    models = [_net(s) for s in range(3)]
    data = _data([5, 6])
    x, y = _joined(data)
    with torch.no_grad():
        scores = torch.stack([m(x) for m in models]).double()
    mean = scores.softmax(-1).mean(0).log() if average == "probabilities" else scores.mean(0).log_softmax(-1)
    members: list[Any] = [models[0], (models[1], models[1].state_dict()), (models[0], models[2].state_dict())]
    result = evaluate(members, data, average=average)
    assert result.loss == pytest.approx(F.nll_loss(mean, y).item())
    assert result.accuracy == pytest.approx((mean.argmax(1) == y).float().mean().item())
    assert (result.members, result.average) == (3, average)
    assert f"ensemble of 3, mean of {average}" in str(result)
    same = evaluate(members, data, {"nll": lambda out, labels: F.nll_loss(out.log_softmax(1), labels)}, average=average)
    assert same.metrics["nll"] == pytest.approx(result.loss, rel=1e-5)


def test_evaluate_uses_a_given_state_dict_and_keeps_the_model() -> None:
    model, other = _net(0), _net(1)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    data = _data([9])
    assert evaluate((model, other.state_dict()), data) == evaluate(other, data)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"differ in the key 'z'"):
        evaluate((model, {**before, "z": torch.ones(1)}), data)
    with pytest.raises(CheckpointError, match=r"differ in the key '0.bias'"):
        evaluate((model, {n: v for n, v in before.items() if n != "0.bias"}), data)


def _twice(seed: int) -> nn.Sequential:
    """One module under two names."""
    torch.manual_seed(seed)
    shared = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(4, 6), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(6, 3))


class _Tied(nn.Module):
    """A siamese tower under two names, and a weight that two modules share."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.left = self.right = nn.Linear(4, 4)
        self.up, self.again, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.again.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.left(x)) * torch.sigmoid(self.right(-x))
        return self.out(torch.relu(self.again(torch.relu(self.up(h)))))


@pytest.mark.parametrize("make", [_twice, _Tied])
def test_a_module_with_two_names_gets_its_own_weights_back(make: Any) -> None:
    """torch.func.functional_call left what it had been lent in such a module: the caller's weights were lost."""
    model, other, data = make(0), make(1), _data([5, 7])
    tensors = {n: (t, t.detach().clone()) for n, t in model.named_parameters(remove_duplicate=False)}
    weights = other.state_dict()
    assert evaluate((model, weights), data) == evaluate(other, data)
    barrier(model, model.state_dict(), weights, data, 3, Repair())
    Repair()(model, weights, [weights, model.state_dict()], data)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        assert tensor is tensors[name][0], name
        assert torch.equal(tensor, tensors[name][1]), name


def test_names_that_the_model_ties_may_be_left_out() -> None:
    model, other, data = _Tied(0), _Tied(1), _data([5, 7])
    fewer = {n: v for n, v in other.state_dict().items() if not n.startswith("right.") and n != "again.weight"}
    assert evaluate((model, fewer), data) == evaluate(other, data)


def test_modules_in_the_place_of_state_dicts_are_refused() -> None:
    a, b, data = _net(0), _net(1), _data([5])
    for call in (
        lambda: evaluate((a, b), data),  # type: ignore[arg-type]
        lambda: barrier(a, a, b, data, 3),  # type: ignore[arg-type]
        lambda: plane(a, a, b, _net(2), data, 2),  # type: ignore[arg-type]
        lambda: similarity(a, b),  # type: ignore[arg-type]
        lambda: Repair()(a, a, [a, b], data),  # type: ignore[arg-type, list-item]
    ):
        with pytest.raises(CheckpointError, match=r"got a Sequential.*module\.state_dict\(\)"):
            call()


@pytest.mark.parametrize(
    "repair", [Repair(), RowNorms(), GaussianRepair(), LeastSquares()], ids=lambda r: type(r).__name__
)
def test_an_endpoint_that_lacks_a_tensor_is_refused(repair: Any) -> None:
    model, data = _net(0), _data([9])
    own = model.state_dict()
    for end in ({}, {n: v for n, v in own.items() if n != "3.bias"}, {**own, "z": torch.ones(1)}):
        with pytest.raises(CheckpointError, match="differ in the key"):
            repair(model, own, [own, end], data)


def test_complex_weights_are_on_the_way_too() -> None:
    a, b = {"w": torch.tensor([1 + 1j, 0j])}, {"w": torch.tensor([0j, 1 - 1j])}
    assert torch.equal(interpolate(a, b, 0.5)["w"], torch.tensor([0.5 + 0.5j, 0.5 - 0.5j]))
    assert similarity(a, a).cosine == pytest.approx(1)
    assert similarity(a, {"w": a["w"] * 1j}).cosine == pytest.approx(0)  # the real inner product of the planes


def test_arguments_of_another_kind_are_refused() -> None:
    a, b, data = _net(0), _net(1), _data([5])
    with pytest.raises(AutomergeError, match=r"metric 'int' is a int, not a callable"):
        evaluate(a, data, 3)  # type: ignore[arg-type]
    with pytest.raises(AutomergeError, match=r"metric 'raw' gave a tensor of shape \(5, 3\)"):
        evaluate(a, data, {"raw": lambda out, labels: out})
    with pytest.raises(AutomergeError, match=r"whole number of at least two points.*, got 2\.5"):
        barrier(a, a.state_dict(), b.state_dict(), data, 2.5)  # type: ignore[arg-type]
    with pytest.raises(AutomergeError, match=r"whole number of at least two points.*, got 2\.5"):
        plane(a, a.state_dict(), b.state_dict(), _net(2).state_dict(), data, 2.5)  # type: ignore[arg-type]
    with pytest.raises(AutomergeError, match="no axis 7"):
        agreement(a, b, data, class_axis=7)
    with pytest.raises(AutomergeError, match=r"predictions \(5,\), the other \(5, 2\)"):
        agreement(a, lambda_net(lambda x: torch.zeros(5, 2, 3)), data)


def lambda_net(function: Any) -> nn.Module:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return function(x)

    return Net()


def test_complex_scores_are_no_scores() -> None:
    with pytest.raises(AutomergeError, match="complex"):
        evaluate(lambda_net(lambda x: torch.complex(x, x)), _data([4]))


def test_class_axis_and_ignored_labels() -> None:
    scores = torch.randn(2, 5, 3)
    labels = torch.randint(0, 3, (2, 5))
    labels[0, 0] = -100
    last = evaluate(nn.Identity(), [(scores, labels)])
    first = evaluate(nn.Identity(), [(scores.movedim(-1, 1), labels)])
    assert last == first
    assert last.samples == 9
    assert last.loss == pytest.approx(F.cross_entropy(scores.flatten(0, 1), labels.flatten()).item(), rel=1e-5)


def _tokens(seed: int, length: int = 5, classes: int = 7) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A language model, its tokens, and labels."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, classes))
    return model, torch.randint(0, 11, (9, length)), torch.randint(0, classes, (9, length))


def test_a_batch_of_as_many_tokens_as_classes_is_read_as_the_others() -> None:
    model, tokens, labels = _tokens(0)
    _, square, wanted = _tokens(1, length=7)
    with torch.no_grad():
        parts = [model(x).flatten(0, 1) for x in (tokens, square)]
    loss = F.cross_entropy(torch.cat(parts), torch.cat([labels.flatten(), wanted.flatten()])).item()
    assert evaluate(model, [(tokens, labels), (square, wanted)]).loss == pytest.approx(loss, rel=1e-6)
    own = F.cross_entropy(parts[1], wanted.flatten()).item()
    assert evaluate(model, [(square, wanted)], class_axis=-1).loss == pytest.approx(own, rel=1e-6)
    torchs = F.cross_entropy(parts[1].view(9, 7, 7), wanted).item()
    assert evaluate(model, [(square, wanted)]).loss == pytest.approx(torchs, rel=1e-6)


def test_classes_of_tokens_and_of_pixels() -> None:
    model, tokens, _ = _tokens(0)
    other = _tokens(2)[0]
    with torch.no_grad():
        best, rest = (m(tokens).argmax(-1) for m in (model, other))
        image = torch.randn(3, 2, 6, 4)
        segment, second = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(2, 5, 3, padding=1)
        pixels = [m(image).argmax(1) for m in (segment, second)]
    assert torch.equal(predictions(model, [tokens])[0], best)
    assert agreement(model, other, [tokens]).share == (best == rest).double().mean().item()
    assert torch.equal(predictions(segment, [image])[0], pixels[0])
    assert agreement(segment, second, [image]).share == (pixels[0] == pixels[1]).double().mean().item()
    assert predictions(segment, [image], class_axis=-1)[0].shape == (3, 5, 6)


def test_outputs_with_logits_and_dict_batches() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net(0)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"hidden": x, "logits": self.net(x)}

    ((x, y),) = _data([6])
    model = Wrapped()
    assert evaluate(model, [{"x": x, "labels": y}]) == evaluate(model.net, [(x, y)])


def test_evaluate_bad_input() -> None:
    model = _net(0)
    with pytest.raises(AutomergeError, match="batch 0 carries no labels"):
        evaluate(model, [torch.randn(2, 4)])
    with pytest.raises(AutomergeError, match=r"labels \(2, 7\) are no class indices for scores \(2, 3\)"):
        evaluate(model, [(torch.randn(2, 4), torch.zeros(2, 7))])
    with pytest.raises(AutomergeError, match="data gave no batch"):
        evaluate(model, [])
    with pytest.raises(AutomergeError, match="expected a module, a pair"):
        evaluate("model", _data([2]))  # type: ignore[arg-type]
    with pytest.raises(AutomergeError, match="at least one network"):
        evaluate([], _data([2]))
    with pytest.raises(AutomergeError, match="average must be"):
        evaluate(model, _data([2]), average="median")  # type: ignore[arg-type]
    with pytest.raises(AutomergeError, match="str without a tensor of scores"):
        evaluate(_Text(), _data([2]))
    regression = evaluate(model, [(torch.randn(2, 4), torch.zeros(2, 3))], F.mse_loss)
    assert regression.accuracy is None
    assert regression.metrics["mse_loss"] > 0


class _Text(nn.Module):
    def forward(self, x: torch.Tensor) -> str:
        return ""


def test_agreement() -> None:
    a, b = _net(0), _net(1)
    data = _data([7, 8])
    x, _ = _joined(data)
    assert agreement(a, a, data).share == 1.0
    with torch.no_grad():
        expected = (a(x).argmax(1) == b(x).argmax(1)).float().mean().item()
    got = agreement(a, b, [x for x, _ in data])
    assert got.share == pytest.approx(expected)
    assert got.to_dict() == {"share": got.share, "samples": 15}
    assert agreement([a, b], [b, a], data).share == 1.0


# -------------------------------------------------------------------- barriers
def test_barrier_follows_its_definition() -> None:
    a, b = _net(0), _net(1)
    data = _data([20, 13])
    x, y = _joined(data)
    result = barrier(a, a.state_dict(), b.state_dict(), data, points=5)
    assert result.positions == (0.0, 0.25, 0.5, 0.75, 1.0)
    for t, loss in zip(result.positions, result.losses, strict=True):
        mixed = _net(2)
        mixed.load_state_dict(interpolate(a.state_dict(), b.state_dict(), t))
        with torch.no_grad():
            assert loss == pytest.approx(F.cross_entropy(mixed(x), y).item(), rel=1e-5)
    above = [
        v - (1 - t) * result.losses[0] - t * result.losses[-1]
        for t, v in zip(result.positions, result.losses, strict=True)
    ]
    assert result.loss_barrier == pytest.approx(max(0, *above))
    json.dumps(result.to_dict())
    assert "5 points" in str(result)
    assert barrier(a, a.state_dict(), a.state_dict(), data, points=3).loss_barrier == pytest.approx(0, abs=1e-6)


@given(losses=st.lists(st.floats(0, 10), min_size=2, max_size=9))
def test_barrier_is_never_negative_and_zero_on_lines(losses: list[float]) -> None:
    positions = tuple(np.linspace(0, 1, len(losses)).tolist())
    result = Barrier(positions, tuple(losses), tuple(losses))
    assert result.loss_barrier >= 0
    assert result.accuracy_barrier >= 0
    line = tuple(losses[0] * (1 - t) + losses[-1] * t for t in positions)
    assert Barrier(positions, line, line).loss_barrier == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("repair", ["reset", Repair(), Repair(reset=True)])
def test_barrier_with_repair_leaves_the_end_points(repair: Any) -> None:
    a, b = _net(0, norm=True), _net(1, norm=True)
    data = _data([16, 9])
    flags = [m.training for m in a.modules()]
    plain = barrier(a, a.state_dict(), b.state_dict(), data, 3)
    fixed = barrier(a, a.state_dict(), b.state_dict(), data, 3, repair, repair_data=[x for x, _ in data])
    assert (fixed.losses[0], fixed.losses[2]) == (plain.losses[0], plain.losses[2])
    assert fixed.losses[1] != plain.losses[1]
    assert fixed.repaired == str(repair)
    assert [m.training for m in a.modules()] == flags


def test_a_path_and_a_plane_of_a_regression(tmp_path: Path) -> None:
    a, b, c = (nn.Linear(3, 2) for _ in range(3))
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    states, data = [n.state_dict() for n in (a, b, c)], [(x[:12], y[:12]), (x[12:], y[12:])]

    def error(state: dict[str, torch.Tensor]) -> float:
        return F.mse_loss(F.linear(x, state["weight"], state["bias"]), y).item()

    path = barrier(a, states[0], states[1], data, 3, loss=F.mse_loss)
    expected = [error(interpolate(states[0], states[1], t)) for t in (0.0, 0.5, 1.0)]
    assert path.losses == pytest.approx(expected, rel=1e-5)
    assert path.accuracies == ()
    assert path.accuracy_barrier is None
    assert "accuracy" not in str(path)
    path.plot(tmp_path / "path.svg")
    seen = plane(a, *states, data, 3, loss=F.mse_loss)
    assert seen.anchor_losses == pytest.approx([error(s) for s in states], rel=1e-5)
    assert seen.accuracies == ()
    json.dumps([path.to_dict(), seen.to_dict()])
    with pytest.raises(AutomergeError, match=r"metrics=\{'name': callable\}, or loss=callable along a path"):
        barrier(a, states[0], states[1], data)


def test_barrier_bad_input() -> None:
    a = _net(0)
    state = a.state_dict()
    with pytest.raises(AutomergeError, match="at least two points, got 1"):
        barrier(a, state, state, _data([2]), points=1)
    with pytest.raises(AutomergeError, match="repair must be None"):
        barrier(a, state, state, _data([2]), repair="magic")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"differ in the shape of '0\.weight'"):
        barrier(a, state, {**state, "0.weight": torch.ones(1)}, _data([2]))


# -------------------------------------------------------------------- matchings and weights
def test_cycle_error_and_similarity() -> None:
    unit = np.arange(3)[:, None]
    symmetry = Symmetry({"a": (3,), "b": (3,)}, (Generator(3, (Slot("a", 0, unit), Slot("b", 0, unit))),))
    matching = Matching(tuple(symmetry.random_element(s) for s in range(3)), symmetry)
    assert cycle_error(matching).to_dict() == {"value": 0.0, "models": 3}

    x, y = {"a": torch.randn(3), "b": torch.zeros(3), "n": torch.tensor(1)}, {"a": torch.randn(3), "b": torch.ones(3)}
    result = similarity(x, y)
    flat = [torch.cat([s["a"], s["b"]]) for s in (x, y)]
    assert result.cosine == pytest.approx(F.cosine_similarity(flat[0], flat[1], dim=0).item(), rel=1e-5)
    assert result.per_tensor["b"] == 0.0
    assert similarity(x, {"a": -x["a"], "b": x["b"]}).cosine == pytest.approx(-1)
    assert json.loads(json.dumps(result.to_dict()))["cosine"] == result.cosine
    with pytest.raises(CheckpointError, match="differ in 'b'"):
        similarity(x, {"a": x["a"]})


# -------------------------------------------------------------------- planes
def quadratic(seed: int) -> tuple[nn.Module, list[dict[str, torch.Tensor]], list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    states = [{n: v + torch.randn(v.shape) if v.is_floating_point() else v for n, v in net.state_dict().items()}]
    states += [{n: v + torch.rand(v.shape) if v.is_floating_point() else v for n, v in states[0].items()} for _ in "bc"]
    for state in states:
        state["1.running_var"] = state["1.running_var"].abs() + 0.5
    return net, states, [(torch.randn(30, 4).double(), torch.randint(3, (30,)))]


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10**6))
def test_a_plane_passes_through_its_three_networks(seed: int) -> None:
    """Distances in the plane are those of the weights; a grid point is evaluated by hand."""
    net, states, data = quadratic(seed)
    before = {n: v.clone() for n, v in net.state_dict().items()}
    found = plane(net, *states, data, points=4, margin=0.1)

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(sum((a[n] - b[n]).double().square().sum() for n in a if a[n].is_floating_point()) ** 0.5)

    for i, j in itertools.combinations(range(3), 2):
        assert math.dist(found.anchors[i], found.anchors[j]) == pytest.approx(distance(states[i], states[j]), rel=1e-9)
    for state, loss in zip(states, found.anchor_losses, strict=True):
        assert loss == pytest.approx(evaluate((net, state), data).loss, rel=1e-9)
    mean = {n: sum(s[n] for s in states) / 3 if v.is_floating_point() else v for n, v in states[0].items()}
    assert found.centre_loss == pytest.approx(evaluate((net, mean), data).loss, rel=1e-9)
    assert found.centre_barrier == pytest.approx(found.centre_loss - sum(found.anchor_losses) / 3)
    b, c = found.anchors[1], found.anchors[2]
    share = np.linalg.solve(np.array([[b[0], c[0]], [b[1], c[1]]]), [found.xs[1], found.ys[2]])
    corner = {
        n: v + sum(w * (s[n] - v) for w, s in zip(share, states[1:], strict=True)) if v.is_floating_point() else v
        for n, v in states[0].items()
    }
    assert found.losses[2][1] == pytest.approx(evaluate((net, corner), data).loss, rel=1e-8)
    assert all(torch.equal(before[n], v) for n, v in net.state_dict().items())
    json.dumps(found.to_dict())


def test_a_plane_with_reset_statistics(tmp_path: Path) -> None:
    net, states, data = quadratic(0)
    plain, reset = plane(net, *states, data, points=3), plane(net, *states, data, points=3, repair="reset")
    assert plain.anchor_losses == reset.anchor_losses
    assert plain.centre_loss != reset.centre_loss
    file = reset.plot(tmp_path / "plane.png")
    assert file.stat().st_size > 1000
    with pytest.raises(OutputError, match="exists"):
        reset.plot(file)


def test_planes_that_are_none() -> None:
    net, states, data = quadratic(0)
    with pytest.raises(AutomergeError, match="on one line"):
        plane(net, states[0], states[1], states[1], data)
    with pytest.raises(AutomergeError, match="on one line"):
        plane(net, states[0], states[0], states[1], data)
    with pytest.raises(AutomergeError, match="at least two points"):
        plane(net, *states, data, points=1)
    with pytest.raises(AutomergeError, match="no class indices"):
        plane(net, *states, [(x, torch.randn(30, 3)) for x, _ in data])
    with pytest.raises(CheckpointError, match=r"differ in '0\.weight'"):
        plane(net, states[0], {}, states[1], data)


# -------------------------------------------------------------------- activations
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_cka_and_correlation(seed: int) -> None:
    """Against the definition with centred kernels; a permutation changes the correlation and not the CKA."""
    torch.manual_seed(seed)
    nets = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double() for _ in range(2)]
    a, b = (net.state_dict() for net in nets)
    x = torch.randn(20, 4).double()
    found = similarity(a, b, model=nets[0], data=[x[:13], x[13:]])
    with torch.no_grad():
        one, two = (net[1](net[0](x)) for net in nets)
    one, two = one - one.mean(0), two - two.mean(0)
    k, m = one @ one.T, two @ two.T
    (value,) = found.cka.values()
    assert value == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())), rel=1e-8)
    expected = ((one * two).sum(0) / (one.norm(dim=0) * two.norm(dim=0))).mean()
    (mean,) = found.correlation.values()
    assert mean == pytest.approx(float(expected), rel=1e-8)
    symmetry = infer(nets[0], x, verify=False)
    moved = symmetry.apply(b, symmetry.element([np.roll(np.arange(6), 1)]))
    again = similarity(a, moved, model=nets[0], data=x, symmetry=symmetry)
    assert again.cka["tanh_default in 1"] == pytest.approx(value)
    assert again.correlation["tanh_default in 1"] != pytest.approx(float(expected))
    assert similarity(a, a, model=nets[0], data=x).correlation["tanh_default in 1"] == pytest.approx(1)


def test_similarity_needs_both_and_draws(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(AutomergeError, match="both model= and data="):
        similarity(net.state_dict(), net.state_dict(), model=net)
    found = similarity(net.state_dict(), net.state_dict(), model=net, data=torch.randn(9, 4))
    assert "mean CKA 1.0000" in str(found)
    assert found.plot(tmp_path / "s.svg").stat().st_size > 1000
    path = barrier(net, net.state_dict(), net.state_dict(), [(torch.randn(9, 4), torch.zeros(9).long())], points=3)
    assert path.plot(tmp_path / "b.png").stat().st_size > 1000


def test_an_ensemble_without_classes_averages_outputs() -> None:
    torch.manual_seed(0)
    nets, x, y = [nn.Linear(3, 2) for _ in range(2)], torch.randn(7, 3), torch.randn(7, 2)
    found = evaluate(nets, [(x[:5], y[:5]), (x[5:], y[5:])], F.mse_loss)
    with torch.no_grad():
        wanted = F.mse_loss((nets[0](x) + nets[1](x)) / 2, y).item()
    assert found.metrics["mse_loss"] == pytest.approx(wanted, rel=1e-6)
    assert found.average == "outputs"
    assert "mean of outputs" in str(found)


class Remembering(nn.Module):
    """Writes to one buffer and replaces another, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.out = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("total", torch.zeros(6))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.into(x)
        self.count += 1
        self.total += h.sum(0)
        self.mean = 0.9 * self.mean + 0.1 * h.mean(0)
        return self.out(self.norm(h) - self.mean)


def test_what_a_network_writes_to_its_buffers_is_put_back() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(8, 4), torch.randint(0, 3, (8,))
    net, other = Remembering(), Remembering()
    symmetry = infer(net, x)
    uses: dict[str, Any] = {
        "evaluate": lambda: evaluate(net, [(x, labels)]),
        "agreement": lambda: agreement(net, other, [x, x]),
        "merge": lambda: merge([net, other], x, symmetry=symmetry, data=[x], repair="repair"),
        "compare": lambda: compare([net, other], x, [(x, labels)] * 4, matchers={}, repairs={"none": "none"}),
        "drift": lambda: match([net, other], symmetry, CCA(), data=[x, x]),
        "reset": lambda: reset_batchnorm(net, [x, x]),
    }
    for name, use in uses.items():
        before, kept = net.state_dict(), copy.deepcopy(net.state_dict())
        use()
        for key, value in net.state_dict().items():
            if name == "reset" and key.startswith("norm."):
                continue
            assert value.data_ptr() == before[key].data_ptr(), (name, key)
            assert torch.equal(value, kept[key]), (name, key)
