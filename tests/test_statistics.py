"""Statistics of activations: places against the group's own action, moments against hooks and `torch.cov`."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from automerge import infer, trace
from automerge._data import Batch, Batches
from automerge._errors import CheckpointError
from automerge._moments import CrossMoments
from automerge._places import _spread_mask, survey
from automerge._statistics import collect
from automerge.symmetry import Symmetry
from tests.matchers import _families as families

torch.set_num_threads(1)
F64 = torch.float64
INVISIBLE = {"ConcatenateTwice": range(5)}  # they exchange weights that read copies of one and the same activation


def values_at(model: nn.Module, args: Any, places: dict[str, Any]) -> dict[str, torch.Tensor]:
    graph = trace(model, args)
    out = {}
    for node in graph.graph.nodes:
        if node.name in places:
            rows = places[node.name].read(node.meta["val"])
            assert rows is not None
            out[node.name] = rows
    return out


@pytest.mark.parametrize("name", families.NETWORKS)
def test_places_move_as_the_group_does(name: str) -> None:
    """The oracle is the model itself: move its weights by one generator, and see which positions of the value moved."""
    model, args, symmetry = families.network(name)
    model = deepcopy(model)
    state = families.family(name, 1)[0][0]
    model.load_state_dict(state)
    places = {p.node: p for p in survey(trace(model, args), symmetry).places}
    before = values_at(model, args, places)
    assert bool(places) == bool(symmetry.sets)
    seen = {g for p in places.values() for g in p.slots}
    assert seen == {g for g in range(len(symmetry.sets)) if g not in INVISIBLE.get(name, ())}
    rng = np.random.default_rng(0)
    for g, generator in enumerate(symmetry.sets[:12]):
        perms = [np.arange(other.size) for other in symmetry.sets]
        perms[g] = np.roll(rng.permutation(generator.size), 1)
        model.load_state_dict(symmetry.apply(state, symmetry.element(perms)))
        after = values_at(model, args, places)
        for node, place in places.items():
            expected = before[node].clone()
            if g in place.slots:
                table = place.slots[g]
                expected[:, table] = before[node][:, table[perms[g]]]
            scale = before[node].abs().max()
            assert (after[node] - expected).abs().max() <= 1e-4 * scale, (node, g)


@pytest.mark.parametrize("name", families.NETWORKS)
def test_replayed_models_give_what_they_compute(name: str) -> None:
    """The graph is traced with the first model's weights and a batch; the others' moments are those of their own runs."""
    model, args, symmetry = families.network(name)
    models, _ = families.family(name, 3, noise=0.5)
    own = deepcopy(model)
    own.load_state_dict(models[0])
    found = collect(own, models, symmetry, [Batch(args), Batch(args)])
    places = {o.place.node: o.place for o in found.observed}
    for m, state in enumerate(models):
        own.load_state_dict(state)
        values = values_at(own, args, places)
        for o in found.observed:
            rows = values[o.place.node]
            assert o.moments.count == 2 * len(rows)
            assert torch.allclose(o.moments.means[m], rows.mean(0), rtol=1e-5, atol=1e-5 * float(rows.abs().max()))
            centred = rows - rows.mean(0)
            second = centred.T @ centred / len(rows)
            level = float(second.abs().max())
            assert torch.allclose(o.moments.covariance(m, m), second, rtol=1e-4, atol=1e-5 * level + 1e-12)


class Hooked:
    """What a network's modules return, gathered by hooks."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        self.seen: dict[str, list[torch.Tensor]] = {n: [] for n in names}
        for n in names:
            model.get_submodule(n).register_forward_hook(lambda _, __, out, n=n: self.seen[n].append(out))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_moments_are_those_of_all_samples(seed: int, sizes: list[int]) -> None:
    """Two MLPs, batches of any size, against hooks on the activation and one pass of numpy."""
    torch.manual_seed(seed)
    nets = [nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double() for _ in range(2)]
    batches = [torch.randn(n, 3, dtype=F64) for n in sizes]
    symmetry = infer(nets[0], batches[0], verify=False)
    found = collect(nets[0], [n.state_dict() for n in nets], symmetry, Batches(batches))
    hidden = [torch.cat([net[1](net[0](b)) for b in batches]).detach().numpy() for net in nets]
    centred = [h - h.mean(0) for h in hidden]
    assert found.samples == sum(sizes)
    for a in range(2):
        assert np.allclose(found.observed[0].moments.means[a], hidden[a].mean(0))
        for b in range(2):
            assert np.allclose(found.covariance(0, a, b), centred[a].T @ centred[b] / sum(sizes), atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(1, 3))
def test_a_reference_keeps_the_same_covariances(seed: int, sizes: list[int], models: int) -> None:
    torch.manual_seed(seed)
    rows = [[torch.randn(n, 4, dtype=F64) + 100 for _ in range(models)] for n in sizes]
    whole, part = CrossMoments(), CrossMoments(reference=models - 1)
    for r in rows:
        whole.update(r)
        part.update(r)
    if not sum(sizes):
        return
    for a in range(models):
        for b in (a, models - 1):
            assert torch.allclose(whole.covariance(a, b), part.covariance(a, b), atol=1e-12)
            assert torch.allclose(part.covariance(b, a), part.covariance(a, b).T, atol=1e-12)
    if models > 2:
        with pytest.raises(KeyError):
            part.covariance(0, 1)


def test_pixels_are_samples_and_the_value_is_after_the_nonlinearity() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(net, nn.Linear(4 * 16, 3)).eval()
    x = [torch.randn(n, 1, 8, 8) for n in (4, 2)]
    symmetry = infer(net, x[0])
    found = collect(net, [net.state_dict()], symmetry, Batches(x))
    hooked = Hooked(net, "0.2", "0.4")
    with torch.no_grad():
        for b in x:
            net(b)
    for name, observed in zip(("0.2", "0.4"), found.observed, strict=True):
        flat = torch.cat([o.movedim(1, -1).flatten(0, -2) for o in hooked.seen[name]]).double()
        assert observed.moments.count == flat.shape[0]
        (generator,) = observed.place.slots
        expected = torch.cov(flat.T, correction=0)
        assert torch.allclose(found.covariance(generator, 0, 0), expected, atol=1e-12)


class Tokens(nn.Module):
    """Attention over padded tokens; the residual stream and the hidden units of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        x = x + self.attend(x, x, x, key_padding_mask=attention_mask == 0, need_weights=False)[0]
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x[:, 0])


def padded(seed: int, n: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (n, length), generator=rng)
    mask = (torch.arange(length) < torch.randint(2, length + 1, (n, 1), generator=rng)).long()
    return ids, mask


@pytest.mark.parametrize("count", [6, 5, 2])
def test_padding_does_not_count(count: int) -> None:
    """Padded batches give what the same sentences give one by one, without padding."""
    torch.manual_seed(0)
    net = Tokens().eval()
    ids, mask = padded(0, count, 5)
    symmetry = infer(net, (), {"input_ids": ids, "attention_mask": mask})
    whole = [{"input_ids": ids, "attention_mask": mask}]
    single = [
        {"input_ids": ids[k : k + 1, : int(mask[k].sum())], "attention_mask": mask[k : k + 1, : int(mask[k].sum())]}
        for k in range(count)
    ]
    a, b = (collect(net, [net.state_dict()], symmetry, Batches(d)) for d in (whole, single))
    loose = collect(net, [net.state_dict()], symmetry, Batches(whole), mask=None)
    assert [o.place.key for o in a.observed] == [o.place.key for o in b.observed]
    counts = {o.moments.count for o in a.observed}
    assert int(mask.sum()) in counts
    assert loose.samples == mask.numel()
    for x, y in zip(a.observed, b.observed, strict=True):
        assert x.moments.count == y.moments.count
        assert torch.allclose(x.moments.covariance(0, 0), y.moments.covariance(0, 0), atol=1e-6)


def test_masks_find_their_axes() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert _spread_mask(mask, [2, 3]).tolist() == mask.flatten().tolist()
    assert _spread_mask(mask, [6]).tolist() == mask.flatten().tolist()
    assert _spread_mask(mask, [3, 2]).tolist() == mask.T.flatten().tolist()
    assert _spread_mask(mask, [2, 4, 3]).tolist() == mask[:, None].expand(2, 4, 3).flatten().tolist()
    assert _spread_mask(mask, [2]) is None
    assert _spread_mask(mask, [2, 3, 3]).tolist() == (mask[:, :, None] & mask[:, None]).flatten().tolist()
    assert _spread_mask(mask[:, 0], [2, 3]).tolist() == mask[:, :1].expand(2, 3).flatten().tolist()


class Branch(nn.Module):
    """Its path depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).tanh()
        if h.sum() > 0:
            h = self.b(h).tanh()
        return self.c(h)


def test_paths_that_depend_on_data_are_followed() -> None:
    torch.manual_seed(1)
    net = Branch()
    x = [torch.randn(6, 2) for _ in range(8)]
    taken = [bool(net.a(b).tanh().sum() > 0) for b in x]
    assert any(taken)
    assert not all(taken)
    start = x.pop(taken.index(True))
    symmetry = infer(net, start)
    found = collect(net, [net.state_dict()], symmetry, Batches([start, *x]))
    first = found.observed[0]
    hidden = torch.cat([net.a(b).tanh() for b in (start, *x)]).double().detach()
    assert first.moments.count == len(hidden)
    assert torch.allclose(first.moments.covariance(0, 0), torch.cov(hidden.T, correction=0), atol=1e-12)
    assert len(found.observed) == 1, "what some batches lack is left out"


def test_any_iterable_and_no_change() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Dropout(), nn.ReLU(), nn.Linear(6, 2)).train()
    before = deepcopy(net.state_dict())
    symmetry = infer(net, torch.ones(1, 3))

    def stream() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for n in (3, 1):
            yield torch.ones(n, 3), torch.zeros(n)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 3)), batch_size=3)
    one, two = (collect(net, [net.state_dict()], symmetry, Batches(d)) for d in (stream(), loader))
    assert one.samples == two.samples == 4
    assert torch.equal(one.covariance(0, 0, 0), two.covariance(0, 0, 0))
    assert net.training
    assert all(m.training for m in net.modules())
    assert all(torch.equal(before[n], v) for n, v in net.state_dict().items())


def test_symmetries_from_elsewhere() -> None:
    """From a file the places are the same; of a group that the graph does not have nothing is observed."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(5, 3)
    symmetry = infer(net, x)
    read = Symmetry.from_json(symmetry.to_json())
    state = net.state_dict()
    one, two = (collect(net, [state], s, [Batch((x,))]) for s in (symmetry, read))
    assert torch.equal(one.covariance(0, 0, 0), two.covariance(0, 0, 0))
    with pytest.raises(CheckpointError, match=r"model 1 has no '2\.bias'"):
        collect(net, [state, {n: v for n, v in state.items() if n != "2.bias"}], symmetry, [Batch((x,))])
