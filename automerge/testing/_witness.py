"""A float64 copy of a model, run with any weights, and the definition of what a generator does to them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from automerge._double import double_precision
from automerge._errors import AutomergeError
from automerge._gradients import as_needed, passed
from automerge._random import forked
from automerge._subject import Change, doubled, randomised
from automerge._tree_io import tensors_of
from automerge.rules._nodes import looked_at
from automerge.symmetry import Exchange, Generator, Symmetry
from automerge.trace import prepared, trace

Given = tuple[tuple[Any, ...], dict[str, Any]]
State = dict[str, torch.Tensor]
_DRAWS = 5  # of weights, before outputs are taken that do not react to them
_REACTION = 1e-8  # relative


class Witness:
    """A float64 copy of a model, run with any state."""

    def __init__(self, model: nn.Module) -> None:
        self.model = doubled(model)
        named = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        self.tensors = dict(named)
        self.own: State = {n: t.detach().clone() for n, t in named}

    def run(self, state: State, given: Given) -> list[torch.Tensor]:
        """The outputs with these values; a tied tensor takes the value of its first name."""
        done: set[int] = set()
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                if name in state and id(tensor) not in done:
                    done.add(id(tensor))
                    tensor.copy_(state[name])
        positional, keywords = self.wide(given)

        def once() -> list[torch.Tensor]:
            with prepared(self.model), double_precision(), forked(seed=0), as_needed(self.model):
                return [t.detach().clone() for t in tensors_of(self.model(*positional, **keywords))]

        return passed(self.model, once)

    @staticmethod
    def wide(given: Given) -> Given:
        """The inputs in double precision."""
        return tuple(_double(v) for v in given[0]), {k: _double(v) for k, v in given[1].items()}

    def changed(self, state: State, given: Given, change: Change) -> list[torch.Tensor]:
        """The outputs with these values, changed on the way."""
        return self.run({n: change(n, v) for n, v in state.items()}, given)


def lively(subject: Witness, inputs: Sequence[Given], symmetry: Symmetry, seed: int) -> State | None:
    """Random weights with finite outputs, and if there are such, outputs that react to what the group moves.

    Where all units are dead, any claim would pass; so later draws have other signs.
    """
    fixed = _settings(subject, inputs[0], symmetry)
    free = {n: subject.own[n] for n in symmetry.shapes if n in subject.own and n not in fixed}
    found: State | None = None
    for draw in range(_DRAWS):
        rng = torch.Generator().manual_seed(seed + draw)
        state = subject.own | randomised(free, symmetry.statistics, seed + draw)
        for name in free if draw else ():
            if state[name].is_floating_point() and name not in symmetry.statistics:
                state[name] = state[name] * (torch.rand(state[name].shape, generator=rng) < 0.5).to(state[name]).mul(
                    2
                ).sub(1)
        other = state | randomised({n: state[n] for n in symmetry.moved & set(state)}, symmetry.statistics, seed)
        try:
            before = [subject.run(state, given) for given in inputs]
            if not all(bool(torch.isfinite(t).all()) for outputs in before for t in outputs):
                continue
            found = found or state
            if not symmetry.moved or any(
                difference(o, subject.run(other, g)) > _REACTION for o, g in zip(before, inputs, strict=True)
            ):
                return state
        except Exception:  # such weights are none that the model runs with
            continue
    return found


def _settings(subject: Witness, given: Given, symmetry: Symmetry) -> set[str]:
    """The buffers by whose numbers python chooses its path: sizes and flags, which no training changes."""
    own = {n for n, _ in subject.model.named_buffers()} - symmetry.statistics - symmetry.moved
    with contextlib.suppress(AutomergeError), double_precision(), forked(seed=0):
        return own & looked_at(trace(subject.model, *subject.wide(given), values=False)) if own else own
    return set()


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def permuted(state: State, generator: Generator | Exchange, p: np.ndarray) -> State:
    """The definition: for every slot, ``new[index[u]] = old[index[p[u]]]``, inside its window; whole parameters before."""
    out = dict(state)
    if isinstance(generator, Exchange):
        for names, sources in zip(generator.params, [generator.params[u] for u in p], strict=True):
            out.update(zip(names, [state[n] for n in sources], strict=True))
    for slot in generator.slots:
        old = out[slot.param]
        new = old.clone()
        to: list[Any] = [slice(None)] * old.ndim
        for axis, start, stop in slot.within:
            to[axis] = slice(start, stop)
        source = list(to)
        to[slot.axis] = torch.from_numpy(slot.index.reshape(-1))
        source[slot.axis] = torch.from_numpy(slot.index[p].reshape(-1))
        new[tuple(to)] = old[tuple(source)]
        out[slot.param] = new
    return out


def difference(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """The largest difference relative to the largest entry; infinite for other shapes, integers or non-finite entries."""
    worst = 0.0
    for x, y in zip(before, after, strict=True):
        if x.shape != y.shape or not (x.is_floating_point() or x.is_complex()):
            worst = max(worst, 0.0 if torch.equal(x, y) else float("inf"))
        elif x.numel():
            finite = torch.isfinite(x)
            if not torch.equal(finite, torch.isfinite(y)):
                return float("inf")
            x, y = x[finite], y[finite]
            scale = max(float(x.abs().max()), 1e-30) if x.numel() else 1.0
            worst = max(worst, float((x - y).abs().max()) / scale if x.numel() else 0.0)
    return worst
