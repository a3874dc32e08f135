"""Writes that add to what is there, one after the other, as a sum of what each adds.

Experts that choose their rows add to these in turn, and each of several masks lets one expert through; a sum is a join like
others::

    for e, expert in enumerate(experts):
        out.index_add_(0, rows[e], expert(x[rows[e]]))           out = out + zeros.index_add(0, rows[e], ...)
        out = torch.where(chosen == e, expert(x), out)           out = out + torch.where(chosen == e, expert(x), 0)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from automerge._branches._distinct import ZEROS, distinct, exclusive, tells
from automerge._branches._forms import core
from automerge._branches._graph import Workbench
from automerge._branches._joins import aten

_Mask = tuple[fx.Node, tuple[Any, ...]]


def take_writes_apart(bench: Workbench) -> None:
    """Read two and more writes that add to one tensor as a sum, and so choices between zeros and values."""
    _take_wheres_apart(bench)
    for node in list(bench.graph.nodes):
        rows = _added(node)
        if rows is None or not _in_turn(node):
            continue
        index, added = rows
        base, value = node.args[0], node.meta["val"]
        with bench.graph.inserting_before(node):
            zeros = torch.zeros((), dtype=value.dtype).expand(value.shape)
            blank = bench.call(node, aten.zeros.default, list(value.shape), value=zeros, dtype=value.dtype)
            alone = bench.call(node, aten.index_add.default, blank, 0, index, added)
            total = bench.call(node, aten.add.Tensor, base, alone)
        node.replace_all_uses_with(total)
        bench.graph.erase_node(node)
    bench.erase([n for n in bench.graph.nodes if n.op == "call_function"])  # what stood there
    bench.know_all()


def adds_in_turn(graph: fx.Graph) -> bool:
    """Whether two writes of a graph add to one tensor, or two masks choose what stands there."""
    return any(
        (_added(node) is not None and _added(node.args[0]) is not None) or (_chooses(node) and _chooses(node.args[2]))
        for node in graph.nodes
    )


def _take_wheres_apart(bench: Workbench) -> None:
    """Where masks that exclude each other choose what is put over a tensor, each adds its values; the rest stays of that."""
    known: dict[fx.Node, _Put] = {}
    for node in list(bench.graph.nodes):
        if not _chooses(node):
            continue
        condition, _, base = node.args
        mask = _mask_of(condition)
        if mask is None:
            continue
        before = known.get(base)
        if before is None:
            before = _Put(base, None, None) if base.target in ZEROS or _goes_on(node, mask) else None
        if before is None or not all(exclusive(mask[0], m) and mask[1] == spread for m, spread in before.masks):
            continue
        with bench.graph.inserting_before(node):
            total, put = _separately(bench, node, before)
        known[total] = replace(put, masks=(*before.masks, mask))
        node.replace_all_uses_with(total)
        bench.graph.erase_node(node)
    bench.know_all()


@dataclass(frozen=True)
class _Put:
    """What was put over a tensor under masks: the sum of that, and where the tensor itself is left (None: all, or zeros)."""

    over: fx.Node
    added: fx.Node | None
    left: fx.Node | None
    masks: tuple[_Mask, ...] = ()


def _separately(bench: Workbench, node: fx.Node, before: _Put) -> tuple[fx.Node, _Put]:
    """A choice between values and what is there, as a sum, where nodes are inserted now."""
    condition, value, _ = node.args

    alone = bench.call(node, aten.where.ScalarOther, condition, value, 0.0)
    if before.over.target in ZEROS:
        total = bench.call(node, aten.add.Tensor, before.added or before.over, alone)
        return total, replace(before, added=total)
    opposite = bench.call(node, aten.logical_not.default, condition)
    rest = bench.call(node, aten._to_copy.default, opposite, dtype=node.meta["val"].dtype)
    left = rest if before.left is None else bench.call(node, aten.mul.Tensor, before.left, rest)
    added = alone if before.added is None else bench.call(node, aten.add.Tensor, before.added, alone)
    total = bench.call(node, aten.add.Tensor, bench.call(node, aten.mul.Tensor, before.over, left), added)
    return total, replace(before, added=added, left=left)


def _goes_on(node: fx.Node, mask: _Mask) -> bool:
    """Whether what is put over a tensor under a mask is put over under another one that excludes it."""
    following = [u for u in node.users if _chooses(u) and u.args[2] is node]
    masks = [_mask_of(u.args[0]) for u in following]
    return any(m is not None and exclusive(m[0], mask[0]) and m[1] == mask[1] for m in masks)


def _chooses(node: Any) -> bool:
    """Whether a node takes what a mask chooses of one tensor, and the rest of another as large as the result."""
    if not isinstance(node, fx.Node) or node.target is not aten.where.self:
        return False
    value, base = node.args[1:]
    shapes = [n.meta["val"].shape for n in (node, value, base) if isinstance(n, fx.Node)]
    floats = all(n.meta["val"].is_floating_point() for n in (value, base) if isinstance(n, fx.Node))
    return len(shapes) == 3 and len(set(shapes)) == 1 and floats


def _mask_of(condition: Any) -> _Mask | None:
    """The mask that a condition is, if that tells something, and how it is spread over further axes."""
    mask, spread = core(condition)
    return (mask, spread) if isinstance(mask, fx.Node) and tells(mask) else None


def _added(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """Where a node adds rows to a tensor, and which; None for another node."""
    if not isinstance(node, fx.Node) or node.kwargs:
        return None
    args: Any = node.args
    if node.target is aten.index_add.default:
        return (args[2], args[3]) if args[1] == 0 else None
    if node.target is not aten.index_put.default or len(args[1]) != 1 or (len(args) > 3 and args[3]):
        return None
    index, value = args[1][0], args[2]
    if not isinstance(index, fx.Node) or index.meta["val"].dim() != 1 or index.meta["val"].dtype is torch.bool:
        return None
    if value.target is not aten.add.Tensor or value.kwargs or not distinct(index):
        return None
    there = [a for a in value.args if _reads(a, args[0], index)]
    rest = [a for a in value.args if a not in there]
    whole = len(there) == len(rest) == 1 and rest[0].meta["val"].shape == value.meta["val"].shape
    return (index, rest[0]) if whole else None


def _reads(node: Any, base: fx.Node, index: fx.Node) -> bool:
    """Whether a node is what stood where a write goes."""
    return isinstance(node, fx.Node) and node.target is aten.index.Tensor and node.args == (base, [index])


def _in_turn(node: fx.Node) -> bool:
    """Whether a write follows another one, or another one follows it, and nothing else reads what is between."""
    base: Any = node.args[0]
    writes = [u for u in node.users if _added(u) is not None and u.args[0] is node]
    between = all(u in writes or u.target is aten.index.Tensor for u in node.users)
    first = base.target in ZEROS and len(writes) == 1 and between
    before = base.target is aten.add.Tensor and _added(base.args[1]) is not None
    return first or before
