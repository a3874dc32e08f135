"""State dicts that hold two values for the names of one tensor are refused wherever they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import automerge
from automerge import FrankWolfe, Identity, LeastSquares, Repair
from automerge._errors import CheckpointError

torch.set_num_threads(1)


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.embedding(i)).relu())


MODEL = Language().eval()
X = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))
DATA = [(X, X)]
SYMMETRY = automerge.infer(MODEL, X)
State = dict[str, torch.Tensor]
USES: dict[str, Callable[[State, State], Any]] = {
    "merge": lambda a, b: automerge.merge([a, b], X, architecture=MODEL),
    "evaluate": lambda a, b: automerge.evaluate((MODEL, b), DATA),
    "ensemble": lambda a, b: automerge.evaluate([(MODEL, a), (MODEL, b)], DATA),
    "barrier": lambda a, b: automerge.barrier(MODEL, a, b, DATA),
    "match": lambda a, b: automerge.match([a, b], SYMMETRY, FrankWolfe()),
    "identity": lambda a, b: automerge.match([a, b], SYMMETRY, Identity()),
    "canonicalise": lambda a, b: automerge.canonicalise(MODEL, X, [a, b], SYMMETRY),
    "repair": lambda a, b: Repair()(MODEL, a, [a, b], [X]),
    "least squares": lambda a, b: LeastSquares()(MODEL, a, [a, b], [X]),
    "compare": lambda a, b: automerge.compare([a, b], X, DATA, select=DATA, report=DATA, architecture=MODEL),
}


def states() -> tuple[State, State]:
    torch.manual_seed(1)
    return tuple({n: v.clone() for n, v in Language().state_dict().items()} for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("use", USES)
def test_two_values_for_one_tensor(use: str) -> None:
    a, b = states()
    USES[use](
        a, {n: v for n, v in b.items() if n != "head.weight"} if use not in ("match", "identity", "canonicalise") else b
    )
    b["head.weight"] = torch.randn(11, 8)
    with pytest.raises(CheckpointError, match=r"head.weight and embedding.weight are one tensor.*leave out the one"):
        USES[use](a, b)


def test_equal_values_that_are_no_numbers_are_one_tensor() -> None:
    _, b = states()
    for name in ("embedding.weight", "head.weight"):
        b[name][0, 0] = float("nan")
    assert automerge.evaluate((MODEL, b), DATA).samples
