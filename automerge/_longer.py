"""Inputs of other sizes: what is a symmetry on a short example only shows on a longer one.

All distances are 0 in a sequence of one, a table's first row may hold nothing but ones, and windows of different widths all
reach over a few tokens. Where a constant was computed from lists or written entry by entry, its values do not tell. Where a
view mixes channels with pixels, the size decides how.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from automerge._subject import Fresh, fresh_inputs
from automerge._tree_io import map_tensors, tensors_of

_ENTRIES, _FEW = 16_384, 1024
_FAR = 256
Inputs = tuple[Any, Any]


def longer_inputs(
    args: Any, kwargs: Any, seed: int, sizes: Collection[int] = (), growth: int = 1, only: int | None = None
) -> Iterator[Sequence[Callable[[], Inputs]]]:
    """For every length, inputs whose axes of that length are longer.

    The first of a group lengthens all these axes; the others, for models that do not run on it, those at one place in the
    shape. Nothing is known of what an axis is: many of these inputs are none that the model takes.

    Args:
        args: positional inputs.
        kwargs: keyword inputs.
        seed: of the values.
        sizes: the lengths of the parameters' axes. What is broadcast to one of these is no longer sequence.
        growth: how many times as long as they need be, about; from two on floats are of either sign, to reach more.
        only: the one length that is made longer; all without.

    Yields:
        groups of functions that make inputs; none that are large. Where they would be, those of fewer rows: the first axis, if
        all tensors have it, is the batch more often than not.
    """
    how = Fresh() if growth == 1 else Fresh("centred")
    many = next(n for n in (7, 11, 13, 17, 19, 23, 29, 31, 37) if n >= 6 * growth and (n not in sizes or n > 30))
    shapes = [tuple(t.shape) for t in tensors_of((args, kwargs))]
    for n in sorted({n for shape in shapes for n in shape if only in (None, n)}):
        times = many if n < 2 else (5 if n == 2 else 2) * growth
        for rows in (None, 2, 1):
            given = (args, kwargs) if rows is None else _of_rows(args, kwargs, rows)
            group = [] if given is None else _group(*given, n, times, seed, how)
            if group:
                yield group
                break


def _group(args: Any, kwargs: Any, n: int, times: int, seed: int, how: Fresh) -> list[Callable[[], Inputs]]:
    """Inputs whose axes of one length are longer: all of them, and those at one place in the shape; none that are large."""
    shapes = [tuple(t.shape) for t in tensors_of((args, kwargs))]
    ranks = sorted({k for shape in shapes for k, m in enumerate(shape) if m == n})
    group: list[Callable[[], Inputs]] = []
    for axes in [ranks, *([k] for k in ranks if len(ranks) > 1)] if ranks else ():
        fewer = times if sum(_entries(shape, n, axes, times) for shape in shapes) <= _FEW else 2
        if sum(_entries(shape, n, axes, fewer) for shape in shapes) <= _ENTRIES:
            group.append(partial(_lengthened, args, kwargs, n, axes, fewer, seed, how=how))
    return group


def _of_rows(args: Any, kwargs: Any, rows: int) -> Inputs | None:
    """The first rows of all inputs; None where they have no first axis in common, or no more rows."""
    first = {tuple(t.shape)[:1] for t in tensors_of((args, kwargs)) if t.dim()}
    if len(first) != 1 or next(iter(first))[0] <= rows:
        return None
    return _cut(args, kwargs, next(iter(first))[0], [0], rows)


def other_sizes(
    args: Any, kwargs: Any, seed: int, sizes: Collection[int] = (), single: bool = False
) -> Iterator[Sequence[Callable[[], Inputs]]]:
    """`longer_inputs`, and for every length inputs that are longer by one, and half as long; groups as above.

    Of the longer ones each is a group of its own: what tells rows from columns shows where one axis alone is longer.
    What is longer than a table is refused by the model, and where it is cut shows one position further; in a half, what was
    symmetric about the middle is not. With ``single`` also inputs of length one: one token reaches few of the experts.
    """
    for group in longer_inputs(args, kwargs, seed, sizes):
        yield from ([make] for make in group)
    shapes = [tuple(t.shape) for t in tensors_of((args, kwargs))]
    for n in sorted({n for shape in shapes for n in shape if n}):
        ranks = sorted({k for shape in shapes for k, m in enumerate(shape) if m == n})
        where: list[list[int]] = [ranks, *([k] for k in ranks if len(ranks) > 1)]
        if sum(_entries(shape, n, ranks, 2) for shape in shapes) <= 2 * _ENTRIES:
            yield [partial(_lengthened, args, kwargs, n, axes, 2, seed, size=n + 1) for axes in where]
        if n > 1:
            yield [partial(_cut, args, kwargs, n, axes, n // 2) for axes in where]
        if n > 3 and single:
            yield [partial(_cut, args, kwargs, n, axes, 1) for axes in where]


def far_inputs(args: Any, kwargs: Any, seed: int) -> Iterator[Iterator[Callable[[], Inputs]]]:
    """For every length and every place of it, inputs of few rows: twice as long there, then four times, ...

    Windows, numbers of neighbours and sizes of pools that are larger than the example are all the same on it, and on what is
    twice as long. Up to `_FAR` positions; the caller takes the last that it waits for.
    """
    rows = _of_rows(args, kwargs, 2)
    for n in sorted({n for t in tensors_of((args, kwargs)) for n in t.shape}):
        given = (args, kwargs) if rows is None or n <= 2 else rows
        shapes = [tuple(t.shape) for t in tensors_of(given)]
        ranks = sorted({k for shape in shapes for k, m in enumerate(shape) if m == n})
        for axes in [ranks, *([k] for k in ranks if len(ranks) > 1)] if n and ranks else ():
            yield _farther(*given, n, axes, seed)


def _farther(args: Any, kwargs: Any, n: int, axes: Sequence[int], seed: int) -> Iterator[Callable[[], Inputs]]:
    times, shapes = 2, [tuple(t.shape) for t in tensors_of((args, kwargs))]
    while n * times <= _FAR and sum(_entries(shape, n, axes, times) for shape in shapes) <= 4 * _ENTRIES:
        yield partial(_lengthened, args, kwargs, n, axes, times, seed)
        times *= 2


def _cut(args: Any, kwargs: Any, n: int, axes: Sequence[int], size: int) -> Inputs:
    def cut(_: str, x: torch.Tensor) -> torch.Tensor:
        for k in axes:
            x = x.narrow(k, 0, size) if k < x.dim() and x.shape[k] == n else x
        return x.clone()

    return map_tensors(cut, args), map_tensors(cut, kwargs)


def _entries(shape: Sequence[int], n: int, axes: Sequence[int], times: int) -> int:
    total = 1
    for k, m in enumerate(shape):
        total *= max(m, 1) * times if m == n and k in axes else m
    return total


def _lengthened(
    args: Any,
    kwargs: Any,
    n: int,
    axes: Sequence[int],
    times: int,
    seed: int,
    *,
    size: int | None = None,
    how: Fresh | None = None,
) -> Inputs:
    """The inputs with some axes repeated (up to a size), and other values: integers between those of the example."""
    rng = torch.Generator().manual_seed(seed)

    def repeated(_: str, x: torch.Tensor) -> torch.Tensor:
        here = [k for k, m in enumerate(x.shape) if m == n and k in axes]
        if not n:
            return x.new_zeros([times if k in here else m for k, m in enumerate(x.shape)])
        wide = x.repeat([times if k in here else 1 for k in range(x.dim())])
        for k in here:
            wide = wide if size is None else wide.narrow(k, 0, size)
        if not wide.numel() or wide.shape == x.shape or wide.dtype not in (torch.int64, torch.int32, torch.bool):
            return wide
        if wide.dtype is torch.bool:
            return torch.rand(wide.shape, generator=rng) < 0.7
        low, high = int(x.min()), int(x.max())
        low = min(low, 0) if low == high or seed % 2 else low  # 0 stands for padding, and is no length
        return torch.randint(low, max(high, 0) + 1, wide.shape, generator=rng, dtype=wide.dtype)

    return fresh_inputs(map_tensors(repeated, args), map_tensors(repeated, kwargs), seed, how or Fresh())
