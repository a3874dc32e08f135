"""Activation matching: the right values at the right places, exact statistics, and what it refuses."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from automerge import infer, merge
from automerge._count_sketch import CountSketch
from automerge._data import Batches
from automerge._errors import AutomergeError, MatchingError, TraceError
from automerge._places import survey
from automerge.matchers import ActivationMatching, FrankWolfe, Identity, MergeMany, WeightMatching, match
from automerge.matchers._augment import augment
from automerge.matchers._sites import _sketched, observe
from automerge.symmetry import Slot, Symmetry
from automerge.trace import trace
from tests import _symmetries as hand
from tests.matchers import _families as families
from tests.matchers._families import NETWORKS, family
from tests.test_statistics import Tokens, padded

torch.set_num_threads(1)


def gram_of(root: torch.Tensor) -> torch.Tensor:
    """Of rows ``(N, n, r)`` the inner products ``(N, n, N, n)``."""
    return torch.einsum("air,bjr->aibj", root, root)


MORE = (
    "mlp_glu",
    "conv_flatten",
    "groupnorm",
    "pixel_shuffle",
    "Siamese",
    "OuterProduct",
    "GeGluChunk",
    "SqueezeExcite",
    "UNet",
    "HeadNorm",
    "AttentionTalking",
    "AttentionCross",
    "FusedDimHead",
    "GruBidirectional",
    "ExpertsList",
    "RmsNorm",
    "InPlace",
    "Maxout",
    "zoo lm",  # rotary positions pin the dimensions inside heads that move
)


def activations(model: nn.Module, state: dict[str, torch.Tensor], args: Any, symmetry: Symmetry) -> dict[str, Any]:
    """Place -> its values for a state dict."""
    own = deepcopy(model)
    own.load_state_dict(state)
    graph = trace(own, args)
    values = {n.name: n.meta.get("val") for n in graph.graph.nodes}
    return {p.node: (p, p.read(values[p.node])) for p in survey(graph, symmetry).places}


@pytest.mark.parametrize("name", [n for n in (*NETWORKS, *MORE) if n != "linear_only"])
def test_activations_move_as_the_slots_say(name: str) -> None:
    """The values of a moved model are the moved values of the model, at every place and for the whole group."""
    model, args, symmetry = families.network(name)
    state = families.weights(model, symmetry, 3)
    rng = np.random.default_rng(2)
    perms = [rng.permutation(g.size) for g in symmetry.generators()]
    before = activations(model, state, args, symmetry)
    after = activations(model, symmetry.apply(state, symmetry.element(perms)), args, symmetry)
    assert before.keys() == after.keys()
    assert before
    for node, (place, values) in before.items():
        assert values is not None
        sets = [
            type(g)(g.size, (*g.slots, Slot("activations", 0, place.slots[i])) if i in place.slots else g.slots)
            for i, g in enumerate(symmetry.sets)
        ]
        larger = Symmetry({**symmetry.shapes, "activations": tuple(values.T.shape)}, tuple(sets))
        moved = larger.element(perms).apply_to("activations", values.T.contiguous())
        assert torch.allclose(moved, after[node][1].T, rtol=1e-9, atol=1e-9 * float(values.abs().max()))


@pytest.mark.parametrize("name", [n for n in (*NETWORKS, *MORE) if n not in ("linear_only", "ConcatenateTwice")])
def test_every_group_is_observed(name: str) -> None:
    model, args, symmetry = families.network(name)
    places = survey(trace(model, args), symmetry).places
    assert {g for p in places for g in p.slots} == set(range(len(symmetry.sets)))


def test_copies_of_one_value_cannot_be_told_apart() -> None:
    """A tensor joined with itself: exchanging the weights of the two copies leaves every activation as it is."""
    model, args, symmetry = families.network("ConcatenateTwice")
    models, _ = family("ConcatenateTwice", 2)
    first = deepcopy(model)
    first.load_state_dict(models[0])
    data = families.batches("ConcatenateTwice")
    result = match([first, models[1]], symmetry, ActivationMatching(mix=1.0), data=data)
    assert len(result.stats["not_observed"]) == len(symmetry.sets) - 1
    places = survey(trace(model, args), symmetry).places
    assert all(p.chosen.size == symmetry.sets[max(p.slots)].size for p in places)


# -------------------------------------------------------------------- statistics
class Wired(nn.Module):
    """Convolution, pooling, attention over pixels, a hidden layer: hooks can see the same values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.up = nn.Linear(4, 6)
        self.act = nn.ReLU()
        self.down = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to two numbers per pixel."""
        y = torch.tanh(self.conv(x)).flatten(2).transpose(1, 2)
        return self.down(self.act(self.up(y)))


def wired(count: int = 3) -> tuple[list[nn.Module], Symmetry]:
    torch.manual_seed(0)
    nets = [Wired().double() for _ in range(count)]
    return nets, infer(nets[0], torch.randn(2, 1, 5, 5, dtype=torch.float64), verify=False)


@torch.no_grad()
def by_hooks(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The inputs of the two linear layers, ``(samples, units)``."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
        for layer in (net.up, net.down)
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", ["correlation", "inner"])
@pytest.mark.parametrize("sizes", [(9,), (4, 4, 1), (1, 5, 3)])
def test_statistics_are_those_of_all_samples_at_once(sizes: tuple[int, ...], kind: str) -> None:
    """Pixels are samples; unequal batches give what one batch gives, to rounding."""
    nets, symmetry = wired()
    x = torch.randn(9, 1, 5, 5, dtype=torch.float64)
    states = [n.state_dict() for n in nets]
    sites, report = observe(nets[0], states, symmetry, Batches(list(x.split(sizes))), kind)
    assert report["samples"] == 9 * 9
    assert [s.shape for s in sites] == [(4,), (6,)]
    per_net = [by_hooks(net, x) for net in nets]
    for k, site in enumerate(sites):
        joint = torch.cat([values[k] for values in per_net], dim=1).numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = np.corrcoef(joint.T) if kind == "correlation" else joint.T @ joint / len(joint)
        gram = gram_of(site.root).reshape(joint.shape[1], -1).numpy()
        assert np.allclose(gram, np.nan_to_num(expected), rtol=1e-10, atol=1e-12)


def test_attention_with_a_smaller_last_batch() -> None:
    """Heads and batch share an axis inside the attention products; the batch may still change."""
    model, _, symmetry = families.network("zoo vit")
    states = [families.weights(model, symmetry, seed) for seed in range(2)]
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    whole, one = observe(model, states, symmetry, Batches([x]), "inner")
    parts, other = observe(model, states, symmetry, Batches([x[:3], x[3:]]), "inner")
    assert one == other
    assert len(whole) == len(parts) > 8
    assert all(
        torch.allclose(gram_of(a.root), gram_of(b.root), rtol=1e-9, atol=1e-12)
        for a, b in zip(whole, parts, strict=True)
    )


def test_nothing_is_changed() -> None:
    model, _, symmetry = families.network("conv_bn")
    models, _ = family("conv_bn", 2)
    first = deepcopy(model).train()
    first.load_state_dict(models[0])
    data = families.batches("conv_bn")
    kept = [tuple(x.clone() for x in batch) for batch in data]
    match([first, models[1]], symmetry, ActivationMatching(), data=data)
    assert first.training
    assert all(p.requires_grad and p.grad is None for p in first.parameters())
    assert all(torch.equal(v, models[0][n]) for n, v in first.state_dict().items())
    assert all(torch.equal(a, b) for x, y in zip(data, kept, strict=True) for a, b in zip(x, y, strict=True))


# -------------------------------------------------------------------- matching
def test_activations_find_what_weights_cannot() -> None:
    """Rescaled units (ReLU is positively homogeneous) compute the same; weights of such models look unrelated."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    symmetry = infer(net, torch.randn(2, 4, dtype=torch.float64), verify=False)
    planted = symmetry.element([np.random.default_rng(0).permutation(12)])
    state = net.state_dict()
    scale = 10 ** torch.linspace(-2, 2, 12, dtype=torch.float64)[torch.randperm(12)]
    state["0.weight"], state["0.bias"] = state["0.weight"] * scale[:, None], state["0.bias"] * scale
    state["2.weight"] = state["2.weight"] / scale
    other = symmetry.apply(state, planted)
    data = [torch.randn(400, 4, dtype=torch.float64)]
    alone = ActivationMatching(mix=1.0)
    assert match([net, other], symmetry, alone, data=data).between(0, 1) == planted
    assert match([net, other], symmetry, FrankWolfe()).between(0, 1) != planted


@pytest.mark.parametrize("rank", [8, 32, 100])
@pytest.mark.parametrize("solver", [WeightMatching(), FrankWolfe()])
def test_planted_units_of_wide_layers_are_found_in_a_sketch(solver: Any, rank: int) -> None:
    """By activations alone; 60 units and 2,400 samples in few buckets, the same for all models."""
    nets, symmetry = wired(1)
    nets[0].up, nets[0].act, nets[0].down = (
        nn.Linear(4, 60).double(),
        nn.Tanh(),
        nn.Linear(60, 2).double(),
    )  # none is dead
    symmetry = infer(nets[0], torch.randn(2, 1, 5, 5, dtype=torch.float64), verify=False)
    elements = [symmetry.random_element(seed) for seed in range(3)]
    first, *others = [symmetry.apply(deepcopy(nets[0]).state_dict(), e) for e in elements]
    nets[0].load_state_dict(first)
    data = [torch.randn(n, 1, 5, 5, dtype=torch.float64) for n in (100, 167)]
    result = match([nets[0], *others], symmetry, ActivationMatching(solver, mix=1.0, rank=rank), data=data)
    assert result.stats["samples"] == 267 * 9
    for a, b in ((0, 1), (1, 2), (2, 0)):
        assert result.between(a, b) == elements[a].inverse().then(elements[b])


def test_sketches_of_several_places_are_exact_side_by_side_and_right_in_the_mean_when_they_are_added() -> None:
    """Two places, 30 samples each: 60 columns fit into 64 buckets, and not into 16."""
    rows = torch.randn(2, 2, 30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    expected = sum(np.corrcoef(*(z.T.numpy() for z in place))[:5, 5:] for place in rows)

    def cross(buckets: int, seed: int) -> torch.Tensor:
        sketches = [CountSketch(buckets, 2 * seed + k) for k in range(2)]
        for sketch, place in zip(sketches, rows, strict=True):
            sketch.update(list(place))
        root = _sketched(sketches, "correlation")
        assert root.shape == (2, 5, 60 if buckets == 64 else 16)
        return root[0] @ root[1].T

    assert np.allclose(cross(64, 0), expected, atol=1e-5)
    mean = torch.stack([cross(16, seed) for seed in range(400)]).mean(0)
    assert np.allclose(mean, expected, atol=5 * 2 * (2 / 16 / 400) ** 0.5)


def test_a_sketch_finds_nearly_what_all_covariances_find() -> None:
    """Two wide networks with half of their units in common: the correlations of those that are matched."""
    torch.manual_seed(0)
    one, two = (nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 2)).double() for _ in range(2))
    with torch.no_grad():
        two[0].weight[:100], two[0].bias[:100] = one[0].weight[:100], one[0].bias[:100]
    x = torch.randn(3000, 6, dtype=torch.float64)
    symmetry = infer(one, x[:2], verify=False)
    hidden = [net[1](net[0](x)).detach().numpy() for net in (one, two)]
    gained = []
    for rank in (400, 256, 32):
        found = match([one, two], symmetry, ActivationMatching(mix=1.0, rank=rank), data=[x]).between(0, 1)
        order = found.maps["0.bias"][0].reshape(-1) if "0.bias" in found.maps else np.arange(200)
        joint = np.corrcoef(hidden[0][:, order].T, hidden[1].T)[:200, 200:]
        gained.append(joint.diagonal().mean())
    assert gained[0] > 0.9
    assert gained[1] > 0.95 * gained[0]
    assert gained[2] > 0.8 * gained[0]


def test_values_of_which_two_axes_move_are_read_however_many_positions_they_have() -> None:
    """120 queries of 80 features: 9,600 positions, too many for covariances, and a sketch of 32 numbers."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(120, 80))
            self.key, self.up, self.down = nn.Linear(6, 80), nn.Linear(80, 80), nn.Linear(80, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            memory = self.key(x)
            read = (self.queries @ memory.mT).softmax(-1) @ memory
            return self.down(self.up(read + self.queries).tanh()).logsumexp(1)

    torch.manual_seed(0)
    net = Decoder().double()
    x = torch.randn(6, 5, 6, dtype=torch.float64)
    symmetry = infer(net, x[:2], verify=False)
    assert sorted(g.size for g in symmetry.sets) == [80, 80, 120]
    elements = [symmetry.random_element(seed) for seed in range(2)]
    states = [symmetry.apply(deepcopy(net).state_dict(), e) for e in elements]
    net.load_state_dict(states[0])
    result = match([net, states[1]], symmetry, ActivationMatching(), data=[x])
    assert result.stats["not_observed"] == []
    assert result.between(0, 1) == elements[0].inverse().then(elements[1])


@pytest.mark.parametrize("solver", [WeightMatching(), MergeMany(), FrankWolfe()])
def test_one_assignment_of_activations_is_optimal(solver: Any) -> None:
    """With two models every group is one linear assignment of the cross-correlation: scipy's answer, whatever solves it."""
    from scipy.optimize import linear_sum_assignment

    nets, symmetry = wired(2)
    x = torch.randn(40, 1, 5, 5, dtype=torch.float64)
    result = match(nets, symmetry, ActivationMatching(solver, mix=1.0), data=[x])
    sites, _ = observe(nets[0], [n.state_dict() for n in nets], symmetry, Batches([x]), "correlation")
    moved = result.between(1, 0)
    for site, param in zip(sites, ("conv.bias", "up.bias"), strict=True):
        cross = (site.root[0] @ site.root[1].T).numpy()
        rows, columns = linear_sum_assignment(cross, maximize=True)
        ours = moved.maps[param][0].reshape(-1) if param in moved.maps else np.arange(len(rows))
        assert cross[rows, ours].sum() == pytest.approx(cross[rows, columns].sum(), rel=1e-6)


def test_no_weight_of_activations_is_the_matching_of_weights() -> None:
    models, _ = family("mlp", 3, noise=0.9)
    model, _, symmetry = families.network("mlp")
    first = deepcopy(model)
    first.load_state_dict(models[0])
    data = families.batches("mlp")
    ours = match([first, *models[1:]], symmetry, ActivationMatching(MergeMany(dtype="float64"), mix=0.0), data=data)
    assert ours.to_universe == match(models, symmetry, MergeMany(dtype="float64")).to_universe
    grown = augment(symmetry, models, (), 1.0)
    assert all(n in grown[0].statistics for n in symmetry.shapes)


def test_the_report_says_what_was_observed() -> None:
    nets, symmetry = wired()
    result = match(nets, symmetry, ActivationMatching(), data=[torch.randn(6, 1, 5, 5, dtype=torch.float64)])
    assert result.stats["samples"] == 54
    assert len(result.stats["sites"]) == 2
    assert result.stats["not_observed"] == []
    assert {"activations", "total"} <= set(result.stats["seconds"])
    assert "activations" in str(result)
    assert set(result.to_universe[1].maps) <= set(symmetry.shapes)


def test_merging_state_dicts_by_activations() -> None:
    nets, _ = wired(2)
    x = torch.randn(6, 1, 5, 5, dtype=torch.float64)
    states = [n.state_dict() for n in nets]
    by_dicts = merge(states, x[:2], architecture=nets[0], matcher=ActivationMatching(), data=[x], repair="none")
    by_modules = merge(nets, x[:2], matcher=ActivationMatching(), data=[x], repair="none")
    assert by_dicts.matching.to_universe == by_modules.matching.to_universe
    assert all(torch.equal(by_dicts.state_dict[n], v) for n, v in by_modules.state_dict.items())


def test_padding_decides_nothing() -> None:
    """A padded batch gives what the sentences give one by one; the mask can be another, or none."""
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(Tokens().eval())
    ids, mask = padded(0, 6, 5)
    symmetry = infer(nets[0], (), {"input_ids": ids, "attention_mask": mask})
    whole = [{"input_ids": ids, "attention_mask": mask}]
    rows = [slice(0, int(m.sum())) for m in mask]
    single = [{"input_ids": ids[k : k + 1, r], "attention_mask": mask[k : k + 1, r]} for k, r in enumerate(rows)]
    one, two = (match(nets, symmetry, ActivationMatching(mix=1.0), data=d) for d in (whole, single))
    assert one.to_universe == two.to_universe
    loose = match(nets, symmetry, ActivationMatching(mask=None), data=whole)
    own = match(nets, symmetry, ActivationMatching(mask=lambda b: b.kwargs["input_ids"] > 0), data=whole)
    assert (one.stats["samples"], loose.stats["samples"]) == (int(mask.sum()), mask.numel())
    assert own.stats["samples"] == int((ids > 0).sum())


# -------------------------------------------------------------------- what it refuses
@pytest.mark.parametrize("solver", [WeightMatching(), FrankWolfe()])
@pytest.mark.parametrize("mix", [0.5, 1.0])
def test_activations_that_never_vary_leave_the_matching_to_the_weights(solver: Any, mix: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    symmetry = infer(net, torch.ones(1, 4))
    planted = symmetry.random_element(3)
    other = symmetry.apply(net.state_dict(), planted)
    same = [torch.full((n, 4), 0.3) for n in (3, 5, 7)]
    found = match([net, other], symmetry, ActivationMatching(solver, mix=mix), data=same).between(0, 1)
    assert mix == 1.0 or found == planted


def test_bad_input() -> None:
    nets, symmetry = wired(2)
    x = torch.randn(6, 1, 5, 5, dtype=torch.float64)
    with pytest.raises(MatchingError, match=r"ActivationMatching looks at activations: give batches"):
        match(nets, symmetry, ActivationMatching())
    with pytest.raises(MatchingError, match="give at least one of them as a module"):
        match([n.state_dict() for n in nets], symmetry, ActivationMatching(), data=[x])
    with pytest.raises(AutomergeError, match="gave no batch"):
        match(nets, symmetry, ActivationMatching(), data=[])
    with pytest.raises(TraceError, match="does not run on the example inputs"):
        match(nets, symmetry, ActivationMatching(), data=[x[:, :, :2]])
    with pytest.raises(MatchingError, match="looks at activations"):
        merge(nets, x, matcher=ActivationMatching())


def test_a_symmetry_of_ones_own() -> None:
    """Groups that inference does not know are not observed; those that it knows are, in any order."""
    nets, symmetry = wired(2)
    x = torch.randn(6, 1, 5, 5, dtype=torch.float64)
    mixed = [
        type(g)(g.size, tuple(Slot(s.param, s.axis, s.index[order], s.within) for s in g.slots[::-1]))
        for g in symmetry.sets[::-1]
        for order in [np.random.default_rng(0).permutation(g.size)]
    ]
    turned = Symmetry(symmetry.shapes, tuple(mixed))
    a, b = (match(nets, s, ActivationMatching(mix=1.0), data=[x]) for s in (symmetry, turned))
    assert a.stats["not_observed"] == b.stats["not_observed"] == []
    assert a.between(0, 1) == b.between(0, 1)
    part = Symmetry(symmetry.shapes, symmetry.sets[:1])
    assert len(match(nets, part, ActivationMatching(mix=1.0), data=[x]).stats["not_observed"]) == 0
    other = Symmetry(symmetry.shapes, hand.mlp((4, 6, 2)).sets[:0])
    assert match(nets, other, ActivationMatching(), data=[x]).to_universe[1].is_identity()


def test_who_needs_data() -> None:
    assert not Identity().needs_data
    assert ActivationMatching().needs_data


# -------------------------------------------------------------------- experts
class Router(nn.Module):
    """Two experts for every token, the second one chosen where the first is struck out."""

    def __init__(self, strike: Any) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(3, 4), nn.Linear(3, 2)
        self.up, self.strike = nn.Parameter(torch.randn(4, 3, 3)), strike

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Points to two numbers."""
        scores = self.gate(x)
        first = scores.argmax(-1)
        second = self.strike(scores, nn.functional.one_hot(first, 4).bool()).argmax(-1)
        chosen = torch.stack([first, second], -1)
        return self.head(torch.einsum("td,tkde->te", x, self.up[chosen]).relu())


STRIKES = {
    "masked_fill": lambda scores, mask: scores.masked_fill(mask, float("-inf")),
    "where": lambda scores, mask: torch.where(mask, torch.full_like(scores, torch.finfo(scores.dtype).min), scores),
    "added": lambda scores, mask: scores + torch.zeros_like(scores).masked_fill(mask, float("-inf")),
}


@pytest.mark.parametrize("how", STRIKES)
def test_scores_are_observed_before_some_are_struck_out(how: str) -> None:
    torch.manual_seed(1)
    nets = [Router(STRIKES[how]) for _ in range(2)]
    x = torch.randn(64, 3)
    symmetry = infer(nets[0], x)
    assert [g.size for g in symmetry.generators()] == [4, 3]
    nets[1].load_state_dict(symmetry.apply(nets[0].state_dict(), symmetry.random_element(np.random.default_rng(3))))
    merged = merge(nets, x, symmetry=symmetry, matcher=ActivationMatching(mix=1.0), data=[x]).load_into(
        deepcopy(nets[0])
    )
    assert torch.allclose(merged(x), nets[0](x), atol=1e-6)


class _Pair(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tower, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, a: torch.Tensor, b: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return self.head((self.tower(a).tanh() - self.tower(b).tanh()).abs() * scale)


def test_batches_of_several_inputs() -> None:
    net, data = _Pair(0), [(torch.randn(20, 4), torch.randn(20, 4), torch.zeros(20))] * 2
    symmetry = infer(net, data[0][:2])
    planted = symmetry.element([[2, 0, 3, 1, 5, 4]])
    models = [net, symmetry.apply(net.state_dict(), planted)]
    found = match(models, symmetry, ActivationMatching(mix=1.0), data=data, inputs=2, kwargs={"scale": 2.0})
    assert found.between(0, 1) == planted
    assert found.stats["samples"] == 40
    with pytest.raises(TraceError, match="inputs= says how many items of a batch are inputs, and it is 1"):
        match(models, symmetry, ActivationMatching(), data=data)
