"""Writes that add to what is there, one after the other, as a sum of what each adds.

Experts that choose their rows add to these in turn; a sum is a join like others::

    for e, expert in enumerate(experts):
        out.index_add_(0, rows[e], expert(x[rows[e]]))           out = out + zeros.index_add(0, rows[e], ...)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from automerge._branches._distinct import ZEROS, distinct
from automerge._branches._graph import Workbench
from automerge._branches._joins import aten


def take_writes_apart(bench: Workbench) -> None:
    """Read two and more writes that add to one tensor as a sum."""
    for node in list(bench.graph.nodes):
        rows = _added(node)
        if rows is None or not _in_turn(node):
            continue
        index, added = rows
        base, value = node.args[0], node.meta["val"]
        with bench.graph.inserting_before(node):
            blank = bench.graph.call_function(aten.zeros.default, (list(value.shape),), {"dtype": value.dtype})
            blank.meta = {**node.meta, "val": torch.zeros((), dtype=value.dtype).expand(value.shape)}
            alone = bench.graph.call_function(aten.index_add.default, (blank, 0, index, added))
            alone.meta = dict(node.meta)
            total = bench.graph.call_function(aten.add.Tensor, (base, alone))
            total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        bench.graph.erase_node(node)
    bench.erase([n for n in bench.graph.nodes if n.op == "call_function"])  # what stood there
    for node in bench.graph.nodes:
        bench.know(node)


def adds_in_turn(graph: fx.Graph) -> bool:
    """Whether two writes of a graph add to one tensor."""
    return any(_added(node) is not None and _added(node.args[0]) is not None for node in graph.nodes)


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
