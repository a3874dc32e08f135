"""What a model's own loading translates is read as it would load it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import automerge
from automerge import CheckpointError
from automerge._loading import as_loaded, read_checkpoint


class Renamed(nn.Module):
    """Its checkpoints of an older version call ``inner`` ``core``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(3, 5), nn.Linear(5, 2)
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
        for name in [n for n in state_dict if n.startswith(prefix + "core.")]:
            state_dict[prefix + "inner." + name[len(prefix) + 5 :]] = state_dict.pop(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.inner(x)))


class Lenient(nn.Module):
    """It does not mind what is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.adapter = nn.Linear(3, 3)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.adapter(self.layer(x))


class LenientLinear(nn.Linear):
    """It does not mind that its bias is missing."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + "bias", self.bias.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)


def old_weight_norm(dim: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, dim)), nn.ReLU(), nn.Linear(dim, 2))


def new_weight_norm(dim: int) -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, dim)), nn.ReLU(), nn.Linear(dim, 2))


def test_weight_norm_of_the_older_kind() -> None:
    x = torch.randn(4, 3)
    olds = [old_weight_norm(6) for _ in range(3)]
    architecture = new_weight_norm(6)
    merged = automerge.merge([m.state_dict() for m in olds], x, architecture=architecture)
    one = new_weight_norm(6)
    one.load_state_dict(as_loaded(olds[0].state_dict(), architecture))
    torch.testing.assert_close(one(x), olds[0](x))
    assert merged.state_dict.keys() == architecture.state_dict().keys()


def test_an_architecture_without_values_loads_as_one_with_them() -> None:
    old = old_weight_norm(6).state_dict()
    with torch.device("meta"):
        empty = new_weight_norm(6)
    found = as_loaded(old, empty)
    assert found.keys() == empty.state_dict().keys()
    assert not any(v.is_meta for v in found.values())


def test_counters_of_batch_norm(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model(torch.randn(8, 3))
    state = model.state_dict()
    without = {n: v for n, v in state.items() if "num_batches" not in n}
    found = as_loaded(without, model)
    assert found.keys() == state.keys()
    assert all(found[n] is v for n, v in without.items())
    assert found["1.num_batches_tracked"] == 1  # the model's own, as in PyTorch
    # converted along with the weights
    torch.save({n: v.double() for n, v in state.items()}, tmp_path / "a.pt")
    read = read_checkpoint(str(tmp_path / "a.pt"), model)
    assert read["1.num_batches_tracked"].dtype is torch.int64
    assert read["1.num_batches_tracked"] == 1
    assert read["0.weight"].dtype is torch.float64
    half = as_loaded({**state, "1.num_batches_tracked": torch.tensor(0.5)}, model)
    assert half["1.num_batches_tracked"].dtype is torch.float32  # no whole number: for the check to refuse


def test_hooks_that_rename(tmp_path: Path) -> None:
    models = [Renamed() for _ in range(2)]
    for i, m in enumerate(models):
        old = {n.replace("inner", "core"): v.half() for n, v in m.state_dict().items()}
        torch.save(old, tmp_path / f"{i}.pt")
    before = {n: v.clone() for n, v in models[0].state_dict().items()}
    states = [read_checkpoint(str(tmp_path / f"{i}.pt"), models[0]) for i in range(2)]
    assert all(v.dtype is torch.float16 for v in states[1].values())
    for name, value in models[1].state_dict().items():
        torch.testing.assert_close(states[1][name], value.half())
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, before[name])


def test_weights_that_a_lenient_load_leaves_out_are_missing(tmp_path: Path) -> None:
    lenient = Lenient()
    partial = {n: v for n, v in lenient.state_dict().items() if "adapter" not in n}
    torch.save(partial, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"no key 'adapter\.weight'"):
        read_checkpoint(str(tmp_path / "a.pt"), lenient)
    layer = nn.Sequential(LenientLinear(3, 3))
    torch.save({"0.weight": torch.ones(3, 3)}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"no key '0\.bias'"):
        read_checkpoint(str(tmp_path / "b.pt"), layer)
    with torch.device("meta"):
        empty = nn.Sequential(LenientLinear(3, 3))
    with pytest.raises(CheckpointError, match=r"no key '0\.bias'"):
        read_checkpoint(str(tmp_path / "b.pt"), empty)
