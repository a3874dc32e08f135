"""Inputs that are tuples with names: a packed sequence, or a model's own, in every function that takes batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from automerge import (
    ActivationMatching,
    GaussianRepair,
    Identity,
    Matcher,
    Repair,
    ZipIt,
    agreement,
    compare,
    evaluate,
    infer,
    match,
    merge,
    similarity,
)
from automerge._data import Batches, _moved


class Reader(nn.Module):
    """The class of a packed batch of sequences."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.out = nn.GRU(4, 5), nn.Linear(5, 3)

    def forward(self, sequences: PackedSequence) -> torch.Tensor:
        return self.out(self.inner(sequences)[1][-1])


def packed(seed: int) -> PackedSequence:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 2, 4])
    return pack_padded_sequence(torch.randn(3, 5, 4, generator=rng), lengths, batch_first=True, enforce_sorted=False)


MODELS = [Reader(0), Reader(1)]
PACKED = [packed(seed) for seed in range(6)]
LABELS = [torch.tensor([0, 1, 2])] * 6
LABELLED = list(zip(PACKED, LABELS, strict=True))
FORMS: dict[str, list[Any]] = {
    "one": PACKED,
    "tuple": [(p,) for p in PACKED],
    "labelled": LABELLED,
    "dict": [{"sequences": p, "labels": y} for p, y in LABELLED],
}


@cache
def _wanted(matcher: Matcher) -> dict[str, torch.Tensor]:
    return merge(MODELS, (PACKED[0],), data=LABELLED, matcher=matcher).state_dict


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_sequence_is_one_input(form: str) -> None:
    data = FORMS[form]
    args, kwargs = ((), {"sequences": PACKED[0]}) if form == "dict" else (PACKED[0], None)
    symmetry = infer(MODELS[0], PACKED[0], verify=False)
    for matcher in (Identity(), ActivationMatching(), ZipIt()):
        found = merge(MODELS, args, kwargs, data=data, matcher=matcher, symmetry=symmetry)
        wanted = _wanted(matcher)
        assert all(torch.allclose(v, wanted[n]) for n, v in found.state_dict.items())
    assert match(MODELS, symmetry, ActivationMatching(), data=data).stats["samples"] > 1
    assert agreement(MODELS[0], MODELS[1], data).samples == 18
    assert similarity(MODELS[0].state_dict(), MODELS[1].state_dict(), model=MODELS[0], data=data).cka
    found_rows = compare(
        MODELS,
        args,
        data[:2],
        kwargs=kwargs,
        symmetry=symmetry,
        select=data[2:4],
        report=data[4:],
        matchers={"identity": Identity(), "activations": ActivationMatching()},
        repairs={"repair": Repair()},
    )
    assert [row.error for row in found_rows.rows if row.error] == []
    assert not any("flatters" in note for note in found_rows.notes)
    if form in ("labelled", "dict"):
        right = sum(int((MODELS[0](p).argmax(-1) == y).sum()) for p, y in LABELLED)
        assert evaluate(MODELS[0], data).accuracy == right / 18


def test_a_packed_sequence_alone_is_one_batch() -> None:
    (batch,) = Batches(PACKED[0])
    assert isinstance(batch.args[0], PackedSequence)
    assert merge(MODELS, PACKED[0], repair=GaussianRepair()).state_dict.keys() == MODELS[0].state_dict().keys()


def test_samples_of_packed_sequences_given_twice_are_noticed() -> None:
    found = compare(
        MODELS,
        PACKED[0],
        LABELLED[:2],
        select=LABELLED[2:4],
        report=LABELLED[3:5],
        matchers={"identity": Identity()},
        repairs={"none": "none"},
    )
    assert any(note.startswith("3 of the 6 samples of the report") for note in found.notes)


def test_the_lengths_of_a_packed_sequence_stay_on_the_cpu() -> None:
    moved = _moved((PACKED[0], LABELS[0]), torch.device("meta"))
    assert moved[0].data.is_meta
    assert moved[1].is_meta
    assert not moved[0].batch_sizes.is_meta


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Sample(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class OfPairs(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, pair: Pair) -> torch.Tensor:
        return self.net(pair.first + pair.second)


def _pairs(make: Callable[[torch.Tensor, torch.Tensor], Any] = Pair) -> list[Any]:
    return [make(torch.randn(7, 4), torch.randn(7, 4)) for _ in range(2)]


def test_a_tuple_with_the_names_of_the_example_is_one_input() -> None:
    models, data = [OfPairs(0), OfPairs(1)], _pairs()
    labels = torch.arange(7) % 3
    wanted = merge(models, data[0], data=[(p,) for p in data], repair="repair").state_dict
    for form in (data, [(p, labels) for p in data], [{"pair": p} for p in data]):
        found = merge(models, data[0], data=form, repair="repair").state_dict
        assert all(torch.allclose(v, wanted[n]) for n, v in found.items())


def test_a_tuple_with_other_names_is_a_batch() -> None:
    """As a DataLoader makes of samples with names."""
    model = OfPairs(0).net
    x, y = torch.randn(7, 4), torch.arange(7) % 3
    assert evaluate(model, [Sample(x, y)]) == evaluate(model, [(x, y)])
    merge([model, OfPairs(1).net], x, data=[Sample(x, y)], repair="repair")
