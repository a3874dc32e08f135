"""Parameters over one memory are one, however the models are given: as modules, state dicts, files, or on the meta device."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from automerge import compare, infer, merge
from automerge._copies import loaded
from automerge._distributed import merge_share
from automerge._errors import CheckpointError
from automerge._ranks import ALONE
from automerge.io import save_state_dict
from automerge.matchers import FrankWolfe, Identity
from automerge.symmetry import Symmetry

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
VIEWS = {"same": lambda w: w, "transposed": lambda w: w.t()}


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.b.weight = nn.Parameter(VIEWS[kind](self.a.weight.data))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.b(torch.tanh(self.a(torch.tanh(self.first(x)))))))


def groups(symmetry: Symmetry) -> set[tuple[tuple[str, int], ...]]:
    return {
        tuple(sorted((symmetry.aliases.get(s.param, s.param), s.axis) for s in g.slots)) for g in symmetry.generators()
    }


def files(nets: list[nn.Module], folder: Path) -> list[str]:
    """Checkpoints as other programs write them: every name with a tensor of its own."""
    paths = [str(folder / f"{k}.safetensors") for k in range(len(nets))]
    for net, path in zip(nets, paths, strict=True):
        save_state_dict(path, {n: v.clone() for n, v in net.state_dict().items()})
    return paths


@pytest.mark.parametrize("kind", VIEWS)
def test_every_way_to_merge_finds_the_same_groups(kind: str, tmp_path: Path) -> None:
    nets: list[nn.Module] = []
    for seed in range(3):
        torch.manual_seed(seed)
        nets.append(Net(kind))
    wanted = groups(infer(nets[0], X))
    states = [{n: v.clone() for n, v in net.state_dict().items()} for net in nets]
    plain = merge(nets, X)
    for other in (merge(states, X, architecture=nets[0]), merge(states, X, architecture=nets[0], offload=tmp_path)):
        assert groups(other.symmetry) == wanted == groups(plain.symmetry)
        assert all(torch.equal(v, other.state_dict[n]) for n, v in plain.state_dict.items())
    assert torch.equal(VIEWS[kind](plain.state_dict["a.weight"]), plain.state_dict["b.weight"])
    shared = merge_share(ALONE, nets[0], files(nets, tmp_path), (X,), matcher=FrankWolfe())
    assert groups(shared.matching.symmetry) == wanted


@pytest.mark.parametrize("kind", VIEWS)
def test_compare_finds_the_same_groups(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = [Net(kind), Net(kind)]
    states = [{n: v.clone() for n, v in net.state_dict().items()} for net in nets]
    found, module = [], sys.modules["automerge.compare"]
    whole = module.infer_common
    monkeypatch.setattr(module, "infer_common", lambda *a, **k: found.append(whole(*a, **k)) or found[-1])
    data = [(X, torch.zeros(5, dtype=torch.int64))]
    compare(states, X, data, architecture=nets[0], matchers={"identity": Identity()}, repairs={"none": "none"})
    assert groups(found[0]) == groups(infer(nets[0], X))


def test_what_shares_memory_must_agree_in_every_checkpoint() -> None:
    nets = [Net("transposed"), Net("transposed")]
    states = [{n: v.clone() for n, v in net.state_dict().items()} for net in nets]
    states[1]["b.weight"][0, 1] += 1.0
    with pytest.raises(
        CheckpointError, match=r"model 1: b\.weight and a\.weight share memory in the architecture, but differ"
    ):
        merge(states, X, architecture=nets[0])


def test_views_without_values_are_refused() -> None:
    nets = [Net("transposed"), Net("transposed")]
    with torch.device("meta"):
        empty = Net("transposed")
    with pytest.raises(CheckpointError, match=r"share memory in several shapes; build the architecture on the CPU"):
        merge([net.state_dict() for net in nets], X, architecture=empty)


def test_a_copy_shares_what_the_module_shares_and_nothing_with_it() -> None:
    flat = torch.randn(10)
    net = nn.Module()
    net.a, net.b = nn.Parameter(flat[:6].view(2, 3)), nn.Parameter(flat[4:], requires_grad=False)
    net.register_buffer("c", flat[2:5])
    own = loaded(net, net.state_dict())
    assert not own.b.requires_grad
    with torch.no_grad():
        own.a[1, 1] = 7.0  # entry 4 of the memory
    assert own.b[0] == own.c[2] == 7.0
    assert flat[4] != 7.0
