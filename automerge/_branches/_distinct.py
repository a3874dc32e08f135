"""Whether a mask chooses no place twice.

Rows that replace what was there are added instead when all rows are read; that is the same only where every place is
written once. ``token, slot = torch.where(chosen == e)`` names a token once because `topk` does not choose an expert twice.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from automerge._branches._joins import aten, piece

ZEROS = (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default)
EMPTY = (aten.empty_like.default, aten.empty.memory_format, aten.new_empty.default)
PRODUCTS = (aten.mul.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor)  # zero where either operand is
TRUTHS = (aten._to_copy.default, aten.clone.default, aten.alias.default, aten.detach.default)
_NOT_ZERO = (aten.ne.Scalar, aten.gt.Scalar)
_CHOICES = (aten.topk.default, aten.sort.default)
MOVES = (
    *(aten.t.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim),
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.select.int, aten.slice.Tensor),
    *(aten.clone.default, aten.alias.default, aten.detach.default),
)


def once(mask: fx.Node, at: tuple[int, ...]) -> bool:
    """Whether a mask chooses at most one position for each place along some of its axes."""
    shape = mask.meta["val"].shape
    rest = [k for k in range(len(shape)) if k not in at]
    if not rest:
        return True
    found = _chosen(mask)
    if found is None or tuple(found[0].shape) != tuple(shape):
        return False
    entries, sets = (t.permute(*at, *rest).reshape(-1, *(shape[k] for k in rest)).flatten(1) for t in found)
    distinct = (entries.sort(1).values.diff(dim=1) != 0).all()
    return bool(distinct and (sets == sets[:, :1]).all())


def distinct(index: fx.Node) -> bool:
    """Whether the entries of an index are different positions: some that one choice made."""
    found = _chosen(index, True)
    if found is None:
        return False
    entries, sets = (t.reshape(-1) for t in found)
    return bool(entries.unique().numel() == entries.numel() and (sets == sets[:1]).all())


def exclusive(a: fx.Node, b: fx.Node) -> bool:
    """Whether two masks choose different positions: no tensor is equal to two numbers, no code has two ones."""
    if a.meta["val"].shape != b.meta["val"].shape:
        return False
    here, there = tells(a), tells(b)
    return any(there.get(what, number) != number for what, number in here.items())


def tells(mask: fx.Node) -> dict[Any, Any]:
    """What holds wherever a mask chooses: tensor, or a code and its axis, and what was moved -> the number it is equal to."""
    args: Any = mask.args
    if mask.target is aten.eq.Scalar:
        number = torch.tensor(args[1]).to(args[0].meta["val"].dtype).item()  # as it is compared
        return {args[0]: number} | (tells(args[0]) if args[1] != 0 else {})
    cut = piece(mask)
    if cut is not None and cut.length == 1:
        codes = {(code, cut.dim): cut.start for code, along in _codes(cut.source).items() if along == cut.dim}
        return codes or _moved(mask, tells(args[0]))
    if mask.target in PRODUCTS:
        return {what: number for part in _parts(mask) for what, number in tells(part).items()}
    if mask.target in TRUTHS or (mask.target in _NOT_ZERO and args[1] == 0):
        return tells(args[0])
    return _moved(mask, tells(args[0])) if mask.target in MOVES else {}


def _codes(node: Any) -> dict[Any, int]:
    """One-hot codes that a tensor is nothing but the ones of, or some of these, and what was moved -> the axis of each."""
    args: Any = node.args
    if node.target is aten.scatter.value and args[0].target in ZEROS:
        dim = args[1] % node.meta["val"].dim()
        return {node: dim} if args[2].meta["val"].shape[dim] == 1 else {}
    if node.target in PRODUCTS:
        return {code: dim for part in _parts(node) for code, dim in _codes(part).items()}
    if node.target in TRUTHS or (node.target in _NOT_ZERO and args[1] == 0):
        return _codes(args[0])
    if node.target not in MOVES:
        return {}
    return {
        code: dim for code, along in _moved(node, _codes(args[0])).items() if (dim := _axis(node, along)) is not None
    }


def _parts(node: fx.Node) -> list[fx.Node]:
    """The operands that have the shape of the result; of floats none, since zero times infinity is not zero."""
    value: torch.Tensor = node.meta["val"]
    shape = value.shape
    if value.is_floating_point():
        return []
    return [a for a in node.args if isinstance(a, fx.Node) and a.meta["val"].shape == shape]


def _moved(node: fx.Node, found: dict[Any, Any]) -> dict[Any, Any]:
    """What was found of a tensor, of the same tensor in another layout."""
    return {(what, str(node.target), repr(node.args[1:])): number for what, number in found.items()}


def _axis(node: fx.Node, dim: int) -> int | None:
    """Where a move takes an axis; None if it does not stay one."""
    before, after = (n.meta["val"].shape for n in (node.args[0], node))  # type: ignore[union-attr]
    move: Any = node.target
    own = torch.arange(before[dim]).reshape([-1 if k == dim else 1 for k in range(len(before))]).expand(before)
    moved = move(own, *node.args[1:])
    for k, n in enumerate(after):
        if n == before[dim] and torch.equal(
            moved, own.new_tensor(range(n)).reshape([-1 if i == k else 1 for i in range(len(after))]).expand(after)
        ):
            return k
    return None


def _chosen(node: fx.Node, compared: bool = False) -> tuple[torch.Tensor, torch.Tensor] | None:
    """For each entry of a mask which entry of chosen positions it tells of, and of which set of different positions.

    None where it tells of something else, or not whether that position is a given one: a position is to be compared with a
    number, while an entry of a one-hot code tells that by itself.
    """
    args: Any = node.args
    source: Any = args[0] if args and isinstance(args[0], fx.Node) else None
    if source is None:
        return None
    if node.target is aten.eq.Scalar and not compared:
        return _chosen(source, True)
    if compared and node.target is operator.getitem and args[1] == 1 and source.target in _CHOICES:
        given: Any = source.args
        number = 2 if source.target is aten.topk.default else 1
        shape = node.meta["val"].shape
        dim = given[number] if len(given) > number else -1
        entries = torch.arange(shape.numel()).reshape(shape)
        return entries, entries.select(dim, 0).unsqueeze(dim).expand(shape)
    if not compared and node.target is aten.scatter.value and args[3] == 1 and source.target in ZEROS:
        found = _chosen(args[2], True)
        if found is None or found[0].shape[args[1]] != 1:
            return None
        shape = node.meta["val"].shape
        codes = torch.arange(shape[args[1]]).reshape(
            [-1 if k == args[1] % len(shape) else 1 for k in range(len(shape))]
        )
        entries, sets = (t.expand(shape) for t in found)
        return entries, sets * shape[args[1]] + codes
    if node.target not in MOVES:
        return None
    found = _chosen(source, compared)
    move: Any = node.target
    return None if found is None else (move(found[0], *args[1:]), move(found[1], *args[1:]))
