"""Two models, against the `rebasin` package (PyPI), whose specification is derived as well: run by `matching.py`."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from automerge.matchers import FrankWolfe, Matcher, WeightMatching, match
from automerge.symmetry import Symmetry

Factory = Callable[[], nn.Module]
State = dict[str, torch.Tensor]
INPUT = (2, 1, 8, 8)


def rebasin(factory: Factory, a: State, b: State) -> State:
    """The second model permuted to the first by `rebasin`."""
    from rebasin import PermutationCoordinateDescent

    first, second = factory().eval(), factory().eval()
    first.load_state_dict(a)
    second.load_state_dict(copy.deepcopy(b))
    PermutationCoordinateDescent(first, second, torch.randn(*INPUT)).rebasin()
    return {n: v.detach() for n, v in second.state_dict().items()}


def change(factory: Factory, before: State, after: State) -> float:
    """The largest change of a float64 output, relative to the largest output."""
    x = torch.randn(64, *INPUT[1:], dtype=torch.float64)
    outputs = []
    for state in (before, after):
        model = factory().double().eval()
        model.load_state_dict(state)
        with torch.no_grad():
            outputs.append(model(x))
    return float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())


def gain(symmetry: Symmetry, a: Mapping[str, torch.Tensor], b: State, moved: State) -> float:
    """What the inner product of the weights grew by."""
    names = [n for n in symmetry.shapes if n not in symmetry.statistics]
    return sum(float((a[n].double() * (moved[n].double() - b[n].double())).sum()) for n in names)


def peer_table(sets: Mapping[str, tuple[Factory, Symmetry, list[State]]]) -> list[str]:
    """One row per set and method; a sentence if the package is not installed."""
    if importlib.util.find_spec("rebasin") is None:
        return ["The package `rebasin` was not installed."]
    matchers: dict[str, Matcher] = {"WeightMatching()": WeightMatching(), "FrankWolfe()": FrankWolfe()}
    version = importlib.metadata.version("rebasin")
    rows = [f"| networks | `rebasin` {version} | " + " | ".join(f"`{name}`" for name in matchers) + " |"]
    rows.append("|---|---|---|---|")
    for title, (factory, symmetry, (a, b, *_)) in sets.items():
        cells, best = [], -math.inf
        found: list[tuple[float, float, float] | str] = []
        for method in (None, *matchers.values()):
            torch.manual_seed(0)
            start = time.process_time()
            try:
                if method is None:
                    moved = rebasin(factory, a, b)
                else:
                    moved = symmetry.apply(b, match([a, b], symmetry, method).between(1, 0))
            except Exception as error:
                found.append(f"fails ({type(error).__name__})")
                continue
            seconds = time.process_time() - start
            own = gain(symmetry, a, b, moved)
            found.append((own, change(factory, b, moved), seconds))
            best = max(best, own)
        for item in found:
            if isinstance(item, str):
                cells.append(item)
                continue
            own, changed, seconds = item
            wrong = f", **outputs change by {changed:.0%}**" if changed > 1e-4 else ""
            cells.append(f"{own / best:.1%}, {seconds:.2f} s{wrong}")
        rows.append(f"| {title} | " + " | ".join(cells) + " |")
    return rows
