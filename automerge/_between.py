"""State dicts between others, and their distances; entries that are infinite in all of them (a mask) are no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from automerge._errors import CheckpointError
from automerge._forward import reals
from automerge._loading import checked_state


def combination(states: Sequence[Mapping[str, torch.Tensor]], share: Sequence[float]) -> dict[str, torch.Tensor]:
    """A weighted sum of the float (or complex) tensors, in float64 and cast back; anything else is taken from the first.

    Entries that are the same infinite number in all stay.

    Raises:
        CheckpointError: if the state dicts are not of one architecture.
    """
    out = {}
    states = [checked_state(state) for state in states]
    for name, first in states[0].items():
        others = [_other(state, name, first) for state in states[1:]]
        if first.is_floating_point() or first.is_complex():
            wide = torch.complex128 if first.is_complex() else torch.float64
            values = [t.detach().to(first.device, wide) for t in (first, *others)]
            total = torch.stack([w * v for w, v in zip(share, values, strict=True)]).sum(0)
            fixed = _infinite(values)
            out[name] = (total if fixed is None else torch.where(fixed, values[0], total)).to(first.dtype)
        else:
            out[name] = first.detach().clone()
    return out


def numbers(states: Sequence[Mapping[str, torch.Tensor]], name: str) -> list[torch.Tensor] | None:
    """The numbers of several state dicts under a name, in float64 (see `reals`); None for integers and booleans.

    Entries that are the same infinite number in all are zero, and so do not count.

    Raises:
        CheckpointError: if the state dicts are not of one architecture.
    """
    first = states[0][name]
    if (own := reals(first)) is None:
        return None
    others = (reals(_other(state, name, first)) for state in states[1:])
    values = [own, *(t.to(first.device) for t in others if t is not None)]
    if len(values) < len(states):
        raise CheckpointError(f"the state dicts differ in the kind of numbers of {name!r}")
    fixed = _infinite(values)
    return values if fixed is None else [t.masked_fill(fixed, 0.0) for t in values]


def _other(state: Mapping[str, torch.Tensor], name: str, first: torch.Tensor) -> torch.Tensor:
    if name not in state or state[name].shape != first.shape:
        raise CheckpointError(f"the state dicts differ in {name!r}; they must be of one architecture")
    return state[name]


def _infinite(values: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Where all hold the same infinite number; None if nowhere."""
    if not bool(values[0].isinf().any()):
        return None
    same = [values[0] == other for other in values[1:]]
    return torch.stack([values[0].isinf(), *same]).all(0)
