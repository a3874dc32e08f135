"""The steps of `automerge.gauges`: what a gauge is made of, and what it does to a state dict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from automerge._norm_folds import NormFold
from automerge.symmetry import Slot, Symmetry

StateDict = dict[str, torch.Tensor]

_SWEEPS = 1000
_SETTLED = 1e-10


@dataclass(frozen=True)
class Scaling:
    """Units whose incoming weights may be multiplied by a number if the outgoing ones are divided by it.

    ReLU units and the like; the dimensions of attention heads (queries against keys, values against the projection); a
    BatchNorm's weight and bias against the next layer.

    Attributes:
        generator: the number of the set of units.
        up: the pieces that are multiplied.
        down: those that are divided.
    """

    generator: int
    up: tuple[Slot, ...]
    down: tuple[Slot, ...]


@dataclass(frozen=True)
class Fold:
    """A bias that passes linearly through a weight into another bias: values in attention, a LayerNorm's bias.

    Attributes:
        bias: its piece.
        weight: the piece of the matrix on the same units.
        into: the bias that takes it up.
    """

    bias: Slot
    weight: Slot
    into: str


Candidate = Scaling | Slot | Fold | NormFold
"""What may be a gauge; a slot is a piece of a bias that changes nothing."""


def _view(tensor: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The part of a tensor to which a slot is confined, its axis first; shares memory."""
    for axis, start, stop in slot.within:
        tensor = tensor.narrow(axis, start, stop - start)
    return tensor.movedim(slot.axis, 0)


def multiply(tensor: torch.Tensor, slot: Slot, factors: np.ndarray) -> None:
    part = _view(tensor, slot)
    along = torch.ones(part.shape[0], dtype=tensor.dtype)  # small: made on the CPU
    along[torch.from_numpy(slot.index)] = torch.from_numpy(factors).to(tensor.dtype)[:, None]
    part.mul_(along.to(part.device).view(-1, *[1] * (part.ndim - 1)))


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers in float64 or complex128; integers as they are.

    Examples:
        >>> widened(torch.ones(1, dtype=torch.complex64)).dtype, widened(torch.ones(1, dtype=torch.int8)).dtype
        (torch.complex128, torch.int8)
    """
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def _squares(state: StateDict, slots: Sequence[Slot]) -> np.ndarray:
    """The squared norm of each unit's entries."""
    total = np.zeros(slots[0].index.shape[0])
    for slot in slots:
        rows = _view(state[slot.param], slot).flatten(1) if state[slot.param].ndim > 1 else state[slot.param][:, None]
        total += rows.abs().square().sum(dim=1).cpu().numpy()[slot.index].sum(axis=1)
    return total


def scale_units(state: StateDict, scaling: Scaling, factors: np.ndarray) -> None:
    for slot in scaling.up:
        multiply(state[slot.param], slot, factors)
    for slot in scaling.down:
        multiply(state[slot.param], slot, 1.0 / factors)


def carry(state: StateDict, fold: Fold) -> None:
    at = torch.from_numpy(fold.bias.index.reshape(-1))
    columns = torch.from_numpy(fold.weight.index.reshape(-1))
    state[fold.into] += state[fold.weight.param][:, columns] @ state[fold.bias.param][at]
    state[fold.bias.param][at] = 0.0


def apply_gauges(
    state: StateDict,
    idle: Sequence[Slot],
    folds: Sequence[Fold],
    scalings: Sequence[Scaling],
    norms: Sequence[NormFold],
    symmetry: Symmetry,
) -> None:
    """All gauges on one float64 state dict, in place; balancing goes round until it changes nothing."""
    for norm in norms:
        norm.apply(state)
    for _ in folds:  # what is folded into a bias may have to be folded on from there
        for fold in folds:
            carry(state, fold)
    for slot in idle:
        state[slot.param][torch.from_numpy(slot.index.reshape(-1))] = 0.0
    _balance(state, scalings, norms)
    for alias, name in symmetry.aliases.items():
        if alias in state and name in state:
            state[alias] = state[name]


def _balance(state: StateDict, scalings: Sequence[Scaling], norms: Sequence[NormFold]) -> list[Scaling]:
    """Make the norms of incoming and outgoing weights equal, in place, by going round; returns what has not settled."""
    moving: list[Scaling] = []
    for _ in range(_SWEEPS):
        moving = []
        for scaling in scalings:
            up, down = _squares(state, scaling.up), _squares(state, scaling.down)
            fine = (up > 0) & (down > 0)
            factors = np.where(fine, np.where(fine, down, 1.0) / np.where(fine, up, 1.0), 1.0) ** 0.25
            scale_units(state, scaling, factors)
            if np.abs(np.log(factors)).max() > _SETTLED:
                moving.append(scaling)
        for norm in norms:  # balancing scales gamma, and what a norm takes up is balanced against what is next
            norm.apply(state)
        if not moving:
            break
    return moving


def bounded(state: StateDict, scalings: Sequence[Scaling], norms: Sequence[NormFold]) -> tuple[Scaling, ...]:
    """The scalings that settle together; whole heads, say, cannot be balanced as well as each of their dimensions.

    Where they do not, those of the largest units are given up first. Decided once, so that all models take the same.
    """
    left = list(scalings)
    while moving := _balance({n: v.clone() for n, v in state.items()}, left, norms):
        left.remove(max(moving, key=lambda s: sum(p.index.shape[1] for p in (*s.up, *s.down))))
    return tuple(left)
