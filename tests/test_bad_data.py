"""Bad data, through every function that takes them: one sentence that names the batch, and nothing half done."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from automerge import (
    CCA,
    ActivationMatching,
    AutomergeError,
    FrankWolfe,
    GaussianRepair,
    LeastSquares,
    Procrustes,
    Repair,
    RowNorms,
    ZipIt,
    agreement,
    barrier,
    compare,
    evaluate,
    infer,
    match,
    merge,
    plane,
    reset_batchnorm,
    similarity,
)

torch.set_num_threads(1)
X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(1))


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def spoiled(value: float) -> torch.Tensor:
    x = X.clone()
    x[3, 1] = value
    return x


NETS = [net(k) for k in range(3)]
STATES = [n.state_dict() for n in NETS]
NORMED = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()
FEW: Any = {"repairs": {"none": "none", "repair": "repair"}, "matchers": {"fw": FrankWolfe()}}

MEASURING: dict[str, Callable[[Any], Any]] = {
    "merge": lambda d: merge(NETS, X[:2], data=d),
    "merge by cca": lambda d: merge(NETS, X[:2], data=d, matcher=CCA()),
    "merge by zipit": lambda d: merge(NETS, X[:2], data=d, matcher=ZipIt()),
    "merge and fit": lambda d: merge(NETS, X[:2], data=d, repair=LeastSquares()),
    "match": lambda d: match(NETS, infer(NETS[0], X[:2]), ActivationMatching(), data=d),
    "compare": lambda d: compare(NETS, X[:2], [(X, Y)] if d is None else d, **FEW),
    "compare, calibration": lambda d: compare(NETS, X[:2], d, select=[(X, Y)], report=[(X, Y)], **FEW),
    "Repair": lambda d: Repair()(NETS[0], STATES[0], STATES, d),
    "LeastSquares": lambda d: LeastSquares()(NETS[0], STATES[0], STATES, d),
    "similarity": lambda d: similarity(STATES[0], STATES[1], model=NETS[0], data=d),
    "reset": lambda d: reset_batchnorm(NORMED, d),
}
SCORING: dict[str, Callable[[Any], Any]] = {
    "evaluate": lambda d: evaluate(NETS[0], d),
    "evaluate an ensemble": lambda d: evaluate(list(NETS), d),
    "barrier": lambda d: barrier(NETS[0], STATES[0], STATES[1], d, 3),
    "plane": lambda d: plane(NETS[0], *STATES, d, 2),
    "compare, report": lambda d: compare(NETS, X[:2], [(X, Y)], select=[(X, Y)], report=d, **FEW),
}
REPAIRING: dict[str, Callable[[Any], Any]] = {
    "barrier": lambda d: barrier(NETS[0], STATES[0], STATES[1], [(X, Y)], 3, Repair(), repair_data=d),
    "agreement": lambda d: agreement(NETS[0], NETS[1], d),
    "row norms": lambda d: RowNorms()(NETS[0], STATES[0], STATES, d),
    "gaussian": lambda d: GaussianRepair()(NETS[0], STATES[0], STATES, d),
}
EVERY = {**MEASURING, **SCORING, **{f"{n} (repair)": f for n, f in REPAIRING.items()}}


class Twice:
    """Batches that can be read again and again."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        yield from self.items


def once(*items: Any) -> Iterator[Any]:
    yield from items


def unchanged(call: Callable[[], object]) -> None:
    """Nothing that was given is written, not even by a call that fails."""
    given = [*NETS, NORMED]
    before = [{n: v.clone() for n, v in m.state_dict().items()} for m in given]
    flags = [[m.training for m in g.modules()] for g in given]
    try:
        call()
    finally:
        assert [[m.training for m in g.modules()] for g in given] == flags
        for m, old in zip(given, before, strict=True):
            if m is not NORMED:
                assert all(torch.equal(v, old[n]) for n, v in m.state_dict().items())


@pytest.mark.parametrize("name", EVERY)
def test_nan(name: str) -> None:
    for data in ([(spoiled(torch.nan), Y)], once((spoiled(torch.nan), Y))):
        with pytest.raises(AutomergeError, match="batch 0 of the data holds NaN"):
            unchanged(lambda data=data: EVERY[name](data))  # type: ignore[misc]


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("row norms (repair)", "gaussian (repair)")])
def test_a_later_batch(name: str) -> None:
    """What is wrong with the second batch is said of the second."""
    with pytest.raises(AutomergeError, match=r"batch 1 of the data holds NaN"):
        unchanged(lambda: EVERY[name](Twice((X, Y), (spoiled(torch.nan), Y))))
    with pytest.raises(
        AutomergeError, match=r"batch 1 of the data.* does not run on|does not run on batch 1 of the data"
    ):
        unchanged(lambda: EVERY[name](Twice((X, Y), (X[:, :3], Y))))


def test_merge_looks_at_all_batches_in_memory_before_it_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    def long(*args: object, **kwargs: object) -> None:
        raise AssertionError("inference began")

    monkeypatch.setattr(importlib.import_module("automerge._merge_task"), "infer_common", long)
    for data, message in (
        ([(X, Y), (spoiled(torch.nan), Y)], "batch 1 of the data holds NaN"),
        ([(X, Y), (X[:7], Y[:7]), (X[:, :3], Y)], "does not run on batch 2 of the data"),
    ):
        for given in (data, once(*data)):
            with pytest.raises(AutomergeError, match=message):
                merge(NETS, X[:2], data=given)


@pytest.mark.parametrize("name", [n for n in MEASURING if n != "similarity"])
def test_infinite_activations(name: str) -> None:
    """Infinite inputs may be meant (masks); what is measured from them is not."""
    try:
        result = EVERY[name]([(spoiled(torch.inf), Y)])
        told = " ".join(r.error for r in getattr(result, "rows", ()))
    except AutomergeError as error:
        told = str(error)
    assert "NaN or infinite" in told


@pytest.mark.parametrize("name", EVERY)
def test_nothing_to_look_at(name: str) -> None:
    for data in ([], once()):
        with pytest.raises(AutomergeError, match="gave no batch"):
            EVERY[name](data)
    with pytest.raises(AutomergeError, match="no sample"):
        EVERY[name]([(X[:0], Y[:0]), (X[:0], Y[:0])])


@pytest.mark.parametrize("name", EVERY)
def test_empty_batches_among_others_and_generators_count_as_nothing_special(name: str) -> None:
    whole = EVERY[name]([(X, Y)])
    for data in (Twice((X, Y), (X[:0], Y[:0])), once((X, Y))):
        assert _text(EVERY[name](data)) == _text(whole)


def _text(result: Any) -> str:
    """What a result says, without the seconds."""
    if hasattr(result, "recommendation"):
        return str(result.recommendation())
    if isinstance(result, tuple):
        return str(result[-1])
    return str(getattr(result, "repair", "") or (result.to_universe if hasattr(result, "to_universe") else result))


@pytest.mark.parametrize("name", EVERY)
def test_what_the_model_does_not_run_on(name: str) -> None:
    for bad in ((X[:, :3], Y), (X.double(), Y), {"wrong": X, "labels": Y}):
        with pytest.raises(AutomergeError, match="does not run on"):
            unchanged(lambda bad=bad: EVERY[name]([bad]))  # type: ignore[misc]


@pytest.mark.parametrize("name", EVERY)
def test_an_iterable_that_fails_keeps_its_error_and_says_where(name: str) -> None:
    class Failing:
        def __iter__(self) -> Iterator[Any]:
            yield X, Y
            raise OSError("the disk is gone")

    if name in ("row norms (repair)", "gaussian (repair)"):
        return  # they read one batch
    with pytest.raises(OSError, match="the disk is gone") as info:
        unchanged(lambda: EVERY[name](Failing()))
    assert "while batch 1 of the data was read" in str(info.value.__notes__)


@pytest.mark.parametrize("name", [*SCORING, "compare"])
def test_labels_that_are_no_classes(name: str) -> None:
    for wrong, message in (
        (Y + 7, r"labels from 7 to 9, .* 3 classes"),
        (Y - 1, r"labels from -1 to 1, .* 3 classes"),
        (torch.full_like(Y, -100), "no label counts"),
        (Y.double(), "no class indices|labels that are classes"),
        (torch.randn(60, 3), "no class indices|labels that are classes"),
    ):
        with pytest.raises(AutomergeError, match=message):
            unchanged(lambda wrong=wrong: EVERY[name]([(X, wrong)]))  # type: ignore[misc]


@pytest.mark.parametrize(
    "matcher", [ActivationMatching(), CCA(), Procrustes(), ZipIt()], ids=lambda m: type(m).__name__
)
def test_one_sample_tells_nothing_about_variances(matcher: Any) -> None:
    with pytest.raises(AutomergeError, match="one sample"):
        match(NETS, infer(NETS[0], X[:2]), matcher, data=X[:1])


def test_predictions_that_are_nan_are_wrong() -> None:
    """A network without an answer gets no credit for class 0."""

    class Lost(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((len(x), 3), torch.nan)

    found = evaluate(Lost(), [(X, torch.zeros(60, dtype=torch.long))])
    assert found.accuracy == 0
    assert found.loss != found.loss
    assert agreement(Lost(), Lost(), [X]).share == 0
