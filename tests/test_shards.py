"""Checkpoints as libraries write them: in several files, without tied names, with masks that hold infinities."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from automerge import CheckpointError, cli, load_state_dict, merge
from tests import _factories


def shard(state: dict[str, torch.Tensor], index: Path) -> dict[str, str]:
    """Write every tensor but two to a file of its own."""
    names = sorted(state)
    places = {n: f"{index.name.split('.')[0]}-{min(k, 2)}.safetensors" for k, n in enumerate(names)}
    for file in set(places.values()):
        save_file({n: state[n] for n in names if places[n] == file}, index.parent / file)
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return places


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    files = []
    for seed in range(2):
        torch.manual_seed(seed)
        state = _factories.mlp().state_dict()
        whole, index = tmp_path / f"{seed}.safetensors", tmp_path / f"s{seed}.safetensors.index.json"
        save_file(state, whole)
        shard(state, index)
        read = load_state_dict(index)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[n], v) for n, v in state.items())
        files.append((whole, index))
    outs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for out, chosen in zip(outs, zip(*files, strict=True), strict=True):
        assert cli.main(["merge", "tests._factories:mlp", *map(str, chosen), "-o", str(out), "--input", "2,1,4,4"]) == 0
    one, two = map(load_file, outs)
    assert all(torch.equal(one[n], two[n]) for n in one)


def _without(index: Path, places: dict[str, str]) -> None:
    (index.parent / places[min(places)]).unlink()


def _unlisted(index: Path, places: dict[str, str]) -> None:
    index.write_text(json.dumps({"weight_map": dict(list(places.items())[:-1])}))


def _unheld(index: Path, places: dict[str, str]) -> None:
    index.write_text(json.dumps({"weight_map": {**places, "more": places[min(places)]}}))


def _elsewhere(index: Path, places: dict[str, str]) -> None:
    index.write_text(json.dumps({"weight_map": {n: f"../{f}" for n, f in places.items()}}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without, "which is not there; download all files"),
        (_unlisted, "do not agree about"),
        (_unheld, "do not agree about 'more'"),
        (_elsewhere, "only .safetensors files beside the index are read"),
        (lambda index, _: index.write_text("{"), "is not an index of safetensors files"),
        (lambda index, _: index.write_text("[" * 100_000), "is not an index of safetensors files"),
        (lambda index, _: index.write_text("[1]"), "is not an index of safetensors files"),
        (lambda index, _: index.write_text('{"weight_map": 3}'), "is not an index of safetensors files"),
        (lambda index, p: (index.parent / p[min(p)]).write_bytes(b"no"), "truncated or not a safetensors file"),
    ],
)
def test_shards_that_do_not_fit(spoil: Callable[[Path, dict[str, str]], Any], message: str, tmp_path: Path) -> None:
    index = tmp_path / "m.safetensors.index.json"
    spoil(index, shard({"a": torch.ones(2), "b": torch.ones(3), "c": torch.zeros(1), "d": torch.zeros(1)}, index))
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(index)


class Language(nn.Module):
    """A head tied to the embedding, and a mask with infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.tokens.weight
        self.inner = nn.Linear(6, 6)
        self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.tokens(x)
        h = (h @ h.mT + self.mask).softmax(-1) @ h
        return self.head(self.inner(h).relu())


@pytest.mark.parametrize("kept", ["tokens.weight", "head.weight"])
def test_checkpoints_that_leave_a_tied_name_out(kept: str) -> None:
    torch.manual_seed(0)
    models = [Language() for _ in range(2)]
    left_out = {"tokens.weight", "head.weight"} - {kept}
    states = [{n: v for n, v in m.state_dict().items() if n not in left_out} for m in models]
    x = torch.randint(7, (2, 5))
    one, two = merge(models, x), merge(states, x, architecture=models[0])
    assert one.state_dict.keys() == two.state_dict.keys()
    assert all(torch.equal(v, two.state_dict[n]) for n, v in one.state_dict.items())


def test_infinities_are_for_masks_only() -> None:
    torch.manual_seed(0)
    models = [Language() for _ in range(2)]
    x = torch.randint(7, (2, 5))
    merged = merge(models, x, weights=[0.0, 1.0])
    assert torch.equal(merged.state_dict["mask"], models[0].mask)
    states = [copy.deepcopy(m.state_dict()) for m in models]
    states[1]["mask"][0, 0] = -torch.inf
    with pytest.raises(CheckpointError, match=r"model 1: mask has 11 of 25 values that are infinite"):
        merge(states, x, architecture=models[0])
    states = [copy.deepcopy(m.state_dict()) for m in models]
    for state in states:
        state["inner.bias"][0] = torch.inf
    with pytest.raises(CheckpointError, match=r"model 0: inner.bias has 1 of 6 values that are infinite"):
        merge(states, x, architecture=models[0])
