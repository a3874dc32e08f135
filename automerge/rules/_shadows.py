"""Constants of inputs that are longer than the example: what only a length of one made equal is not the same.

In a sequence of one, all positions are 0, and so are all angles and distances; on the diagonal of one row there is nothing but
the diagonal. What a length of one leaves open (which position this one is) is drawn anew a few times, and what follows from it
is computed again: entries of a constant are equal only if they are in all of these *shadows*.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from automerge._double import double_precision
from automerge.rules._exact import ROUNDING, entries
from automerge.rules._nodes import schema_name

_DRAWS, _NEAR, _FAR = 24, 8, 200  # most positions are near, so that all small distances between two of them are there


def single(node: fx.Node) -> bool:
    """Whether a constant was made along an axis of length one, along which a longer one would have other entries."""
    value, name = node.meta["val"], schema_name(node)
    if node.op != "call_function" or not isinstance(value, torch.Tensor):
        return False
    if name in _STEPS:
        return value.numel() == 1
    if name == "aten::cumsum":
        return value.dim() > 0 and value.shape[node.args[1]] == 1  # type: ignore[index]
    return name in _DIAGONALS and 1 in value.shape[-2:]


def shadows(node: fx.Node, single: Collection[fx.Node], known: dict[fx.Node, Sequence[Any]]) -> Sequence[Any]:
    """What a constant node may be where lengths are not one; its recorded value where it does not run so.

    Args:
        node: the node.
        single: the constants that were made along an axis of length one, and all that is computed from these.
        known: the shadows of nodes that were asked for; those of others are added.
    """
    todo = [node]
    while todo:
        last = todo[-1]
        missing = [n for n in last.all_input_nodes if n not in known] if last in single else []
        if last in known or not missing:
            if last not in known:
                drawn = range(_DRAWS) if last in single else ()
                known[last] = [_computed(last, k, known) for k in drawn] or [last.meta["val"]] * _DRAWS
            todo.pop()
        else:
            todo += missing
    return known[node]


def _computed(node: fx.Node, draw: int, known: dict[fx.Node, Sequence[Any]]) -> Any:
    if node.op != "call_function":
        return node.meta["val"]
    kept = [n for n in node.all_input_nodes if n.meta["val"] is not known[n][draw]]
    for still in ((), *((n,) for n in kept if len(kept) > 1)):  # a position that a table has not is what it was
        with contextlib.suppress(Exception):
            return _run(node, {n: n.meta["val"] if n in still else known[n][draw] for n in node.all_input_nodes}, draw)
    return node.meta["val"]


def _run(node: fx.Node, held: Mapping[fx.Node, Any], draw: int) -> Any:
    own = (node.args, node.kwargs)
    args, kwargs = fx.node.map_aggregate(own, lambda a: held[a] if isinstance(a, fx.Node) else a)
    with torch.no_grad(), double_precision():
        found = node.target(*args, **kwargs)  # type: ignore[operator]
        return _further(node, found, args, draw) if single(node) else found


def _further(node: fx.Node, found: torch.Tensor, args: Any, draw: int) -> torch.Tensor:
    """What an operator gives further on along an axis of length one."""
    rng = np.random.default_rng([draw, zlib.crc32(node.name.encode())])
    name, reach = schema_name(node), _NEAR if draw % 4 else _FAR
    row = int(rng.integers(reach))
    if name == "aten::arange":
        step = args[2] if len(args) > 2 else 1
        return found + row * step
    if name in _STEPS:
        return found + float(rng.uniform(0.1, 0.9))
    if name == "aten::cumsum":
        return found * (1 + row)
    where = np.random.default_rng(draw).integers(reach, size=2)  # one place for all diagonals: of one query and one key
    at = zip(found.shape[-2:], map(int, where), strict=True)
    rows, columns = (torch.arange(n) if n > 1 else torch.tensor([k]) for n, k in at)
    apart = columns[None] - rows[:, None]
    if name == "aten::eye":
        return (apart == 0).to(found.dtype)
    offset = args[1] if len(args) > 1 else 0
    return torch.where(apart <= offset if name == "aten::tril" else apart >= offset, args[0], 0)


def told_apart_by(array: np.ndarray, others: Sequence[Any]) -> np.ndarray:
    """Numbers for the entries of a constant: equal where it is, and where all its shadows are (but for their rounding).

    Where the last shadows still tell more apart, others would, too (one-hot rows): then no two are equal.
    """
    kinds = [np.unique(array, return_inverse=True)[1].reshape(-1)]
    for other in others:
        wide, kind = entries(other), kinds[-1]
        if wide.shape == array.shape:
            for part in (wide.real, wide.imag) if wide.dtype.kind == "c" else (wide,):
                near = _near(part)
                kind = np.unique(kind * (near.max(initial=0) + 1) + near, return_inverse=True)[1].reshape(-1)
        kinds.append(kind)
    half, whole = kinds[len(kinds) // 2].max(), kinds[-1].max()
    return (kinds[-1] if half == whole else np.arange(array.size)).reshape(array.shape)


def _near(array: np.ndarray) -> np.ndarray:
    """A number for every entry; the same for what only rounding tells apart."""
    numbers, where = np.unique(array, return_inverse=True)
    if numbers.dtype.kind == "f" and numbers.size:
        size = np.abs(numbers[np.isfinite(numbers)]).max(initial=0.0)
        with np.errstate(invalid="ignore"):
            steps = ~(np.diff(numbers) <= ROUNDING * size)
        where = np.concatenate([[0], np.cumsum(steps)])[where.reshape(-1)]
    return where.reshape(-1)


_STEPS = frozenset({"aten::arange", "aten::linspace", "aten::logspace"})
_DIAGONALS = frozenset({"aten::eye", "aten::tril", "aten::triu"})
