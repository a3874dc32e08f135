"""Models whose state dicts hold more than tensors: versions, settings, counters."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge._errors import CheckpointError, TraceError
from automerge._extra_state import is_extra
from automerge.cli import main
from automerge.evaluate import barrier, evaluate, interpolate, similarity
from automerge.gauges import canonicalise
from automerge.infer import infer
from automerge.io import hash_state_dict, load_state_dict
from automerge.landscape import plane
from automerge.matchers import CCA, ActivationMatching, match
from automerge.merge import average, merge

_X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
_DATA = [(_X, torch.arange(24) % 3)]
_FACTORY = "tests.test_extra_state:Settings"


class Scaled(nn.Module):
    """A layer whose scale is a number, kept by ``get_extra_state`` beside a setting and a count."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.scale = scale
        self.steps = 0

    def get_extra_state(self) -> dict[str, Any]:
        return {"scale": self.scale, "steps": self.steps, "act": F.relu}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.scale, self.steps = state["scale"], state["steps"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x.relu()


class _Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x.relu()


class Settings(nn.Module):
    """A model that writes its settings into its state dict, and takes them out again, as neuraloperator does."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), Scaled(scale), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        held = super().state_dict(*args, **kwargs)
        held["settings"] = {"version": "1", "width": 6}
        return held

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        given = OrderedDict(state_dict)
        given.pop("settings", None)
        return super().load_state_dict(given, strict, assign)


def _models(count: int = 2, scale: float = 2.0) -> list[Settings]:
    out = []
    for seed in range(count):
        torch.manual_seed(seed)
        out.append(Settings(scale).eval())
        norm = out[-1].body[1]
        assert isinstance(norm, nn.BatchNorm1d)
        assert norm.running_mean is not None
        norm.running_mean.normal_()
    return out


@pytest.mark.parametrize("repair", ["none", "reset", "repair", "both"])
def test_they_are_merged_and_their_entries_stay(repair: str) -> None:
    models = _models()
    result = merge(models, _X, data=_DATA, repair=repair)
    assert all(isinstance(v, torch.Tensor) for v in result.state_dict.values())
    assert any("_extra_state and 1 more of the state dict" in note and "differs" not in note for note in result.notes)
    merged = result.load_into(Settings(2.0)).eval()
    bare = [nn.Sequential(*m.body[:2], _Double(), m.body[3]).eval() for m in models]  # the same without the entries
    other = merge(bare, _X, data=_DATA, repair=repair)
    assert {"body." + n for n in other.state_dict} == set(result.state_dict)
    assert all(torch.equal(v, result.state_dict["body." + n]) for n, v in other.state_dict.items())
    assert torch.equal(merged(_X), other.load_into(bare[0])(_X))


def test_entries_that_differ_are_named() -> None:
    first, second = _models()
    layer = second.body[2]
    assert isinstance(layer, Scaled)
    layer.steps = 7
    note = next(n for n in merge([first, second], _X).notes if "state dict" in n)
    assert "(body.2._extra_state differs" in note
    kept = merge([first, second], _X).load_into(Settings(3.0))
    assert isinstance(kept.body[2], Scaled)
    assert kept.body[2].scale == 3


def test_state_dicts_with_and_without_them() -> None:
    models = _models()
    network = Settings()
    states = [m.state_dict() for m in models]
    bare = [{n: v for n, v in state.items() if isinstance(v, torch.Tensor)} for state in states]
    results = [merge(given, _X, architecture=network).state_dict for given in (models, states, bare)]
    assert hash_state_dict(results[0]) == hash_state_dict(results[1]) == hash_state_dict(results[2])
    assert hash_state_dict(states[0]) == hash_state_dict(bare[0])


def test_what_measures_takes_them() -> None:
    models = _models(3)
    states = [m.state_dict() for m in models]
    symmetry = infer(models[0], _X)
    assert evaluate((Settings(), states[0]), _DATA).accuracy == evaluate(models[0], _DATA).accuracy
    assert barrier(models[0], states[0], states[1], _DATA, points=3, repair="reset").losses
    assert plane(models[0], states[0], states[1], states[2], _DATA, points=2).samples
    assert similarity(states[0], states[0]).cosine == pytest.approx(1)
    assert (
        set(average(states[:2], [1, 1]))
        == set(interpolate(states[0], states[1], 0.5))
        == set(symmetry.shapes) | {"body.1.num_batches_tracked"}
    )
    out, report = canonicalise(models[0], _X, states, symmetry)
    assert report.error < 1e-9
    assert set(out[0]) == set(average(states[:2], [1, 1]))
    for matcher in (ActivationMatching(), CCA()):
        assert len(match(models, symmetry, matcher, data=_DATA)) == 3


def test_files_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f"{k}.pt" for k in range(2)]
    for file, model in zip(files, _models(), strict=True):
        state = model.state_dict()
        state["body.2._extra_state"] = {"scale": 2.0, "steps": 5}
        torch.save(state, file)
    out = tmp_path / "merged.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["merge", _FACTORY, *map(str, files), "--input", "2,4", "-o", str(out)]) == 0
    said = "".join(capsys.readouterr())
    assert "not merged" in said
    assert "'body.2._extra_state' is no tensor and is not read" in said
    assert set(load_state_dict(out)) == set(average([m.state_dict() for m in _models()], [1, 1]))
    with pytest.raises(CheckpointError, match="the entry 'settings' is a dict"):
        load_state_dict(files[0])  # without the architecture, nobody knows that it is one of its own


@dataclass
class _Config:
    width: int
    values: Any = None


class _Kept:
    def __init__(self) -> None:
        self.mean = torch.zeros(2)


@pytest.mark.parametrize(
    ("value", "extra"),
    [
        (None, True),
        ({"a": [1, ("b", {2.5})], "c": torch.float16}, True),
        (_Config(3), True),
        (_Config(3, [torch.zeros(1)]), False),
        (_Config(3, b""), False),
        ([torch.zeros(1)], False),
        (_Kept(), False),
        (b"pickled", False),
        (nn.Linear(1, 1), False),
    ],
)
def test_which_entries_hold_no_weights(value: Any, extra: bool) -> None:
    assert is_extra(value) is extra


def test_cyclic_entries_end() -> None:
    held: list[Any] = [1]
    held.append(held)
    assert is_extra(held)


class _Wrapping(nn.Module):
    """Saves what it wraps, as Lightning's Fabric does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.net.state_dict(*args, **kwargs)


def test_a_module_that_saves_other_names_is_refused() -> None:
    """Nothing would be aligned: its groups are of names that no checkpoint has."""
    message = r"_Wrapping.state_dict\(\) calls '0.weight' what its modules call 'net.0.weight'; give .* its net"
    model = _Wrapping()
    with pytest.raises(TraceError, match=message):
        infer(model, _X)
    with pytest.raises(CheckpointError, match=message):
        merge([_Wrapping(), _Wrapping()], _X)
    with pytest.raises(CheckpointError, match=message):
        evaluate((model, model.state_dict()), _DATA)
    assert evaluate(model, _DATA).samples == 24
    assert infer(model.net, _X).sets


class _Plainly(_Wrapping):
    def state_dict(self) -> Any:  # type: ignore[override]
        return nn.Module.state_dict(self)


def test_a_state_dict_that_takes_no_arguments() -> None:
    models = [_Plainly(), _Plainly()]
    result = merge(models, _X, data=_DATA, repair="repair")
    assert [g.size for g in result.symmetry.sets] == [6]
    assert evaluate(result.load_into(_Plainly()), _DATA).loss == evaluate((_Plainly(), result.state_dict), _DATA).loss
