"""Random group elements that tell generators apart, and what is a rounding error among the differences that they make."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from automerge._subject import Change
from automerge.groups import Element
from automerge.symmetry import Exchange, Generator, Symmetry


def trial_elements(symmetry: Symmetry, count: int, seed: int) -> Iterator[Element]:
    """The elements of `trial_moves`."""
    sets = len(symmetry.sets)
    for moves in trial_moves(symmetry, count, seed):
        yield symmetry.element(moves[:sets], moves[sets:] or None)


def trial_moves(symmetry: Symmetry, count: int, seed: int) -> Iterator[list[np.ndarray]]:
    """Permutations of each generator and exchange that tell them apart: every one moves, of two small ones one alone.

    Large sets move by independent random cycles each time. A set of two or three units has hardly a choice, so two of them
    that may only move together would always do so, or by chance in every trial: each gets a binary code of its own, and
    moves in the trials where its code has a one.

    Args:
        symmetry: the group.
        count: at least so many of them; more where the codes need them. None if there are no generators.
        seed: of the codes and cycles.
    """
    rng = np.random.default_rng(seed)
    groups: list[Generator | Exchange] = [*symmetry.sets, *symmetry.exchanges]
    small = [i for i, g in enumerate(groups) if g.size <= 3]
    bits = max(count, int(np.ceil(np.log2(len(small) + 1)))) if groups else 0
    drawn: Any = rng.choice(2**bits - 1, size=len(small), replace=False) + 1 if small else ()
    codes = dict(zip(small, map(int, drawn), strict=True))
    for bit in range(bits):
        yield [_cycle(g.size, rng) if codes.get(i, -1) >> bit & 1 else np.arange(g.size) for i, g in enumerate(groups)]


def _cycle(n: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation that is one cycle, so that nothing stays."""
    order = rng.permutation(n)
    out = np.empty(n, np.int64)
    out[order] = np.roll(order, 1)
    return out


def within_rounding(
    error: float,
    before: Sequence[torch.Tensor],
    run: Callable[[Change], list[torch.Tensor]],
    difference: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], float],
    draws: int = 8,
    size: float = 1e-15,
) -> bool:
    """Whether changing every weight in its last digits changes the outputs about as much as ``error``.

    An output that cancels exactly (the sum of a normalisation over two channels) holds nothing but rounding errors, which
    depend on the order of summation: no permutation leaves them alone. A wrong group changes more than that by far.

    Args:
        error: a difference of outputs.
        before: the outputs under the weights as they are.
        run: the outputs under weights that are changed on the way.
        difference: how outputs are compared.
        draws: how many random changes.
        size: of each, relative: about four units in the last place.
    """
    return any(error <= 32 * difference(before, run(partial(jitter, size, seed))) for seed in range(draws))


def jitter(size: float, seed: int, name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor whose entries change by about this share; the same for the same name and seed."""
    if value.is_complex():
        return torch.view_as_complex(jitter(size, seed, name, torch.view_as_real(value.resolve_conj())))
    if not value.is_floating_point():
        return value
    rng = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    noise = torch.randn(value.shape, generator=rng, dtype=torch.float32)  # several times faster than in float64
    return value * noise.to(value.device, torch.float64).mul_(size).add_(1)
