"""Runs of rows that are put together and cut again are the same runs, if what is done between treats every row alone.

A layer of experts may work on the runs of all experts before the next one does (JetMoe)::

    h = torch.cat([part @ w.T for part, w in zip(x.split(counts), first)])
    y = torch.cat([part @ w.T for part, w in zip(h.relu().split(counts), second)])

The run of an expert in ``h.relu()`` is the ``relu`` of what was put together for it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from automerge._aliases import shadow
from automerge._branches._graph import Workbench
from automerge._branches._joins import aten, keeps_rows, piece
from automerge.rules._nodes import draws
from automerge.rules._registry import is_pointwise

_SAME = (aten.alias.default, aten.clone.default, aten.detach.default, aten._to_copy.default)
_ALONG: dict[Any, int] = {  # operators along one axis -> which argument names it
    **dict.fromkeys((aten.slice.Tensor, aten.select.int, aten.unbind.int, aten._softmax.default), 1),
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default), 2),
}


def carry_through(bench: Workbench, slices: Mapping[fx.Node, int], bounds: Mapping[int, tuple[int, int]]) -> bool:
    """Take runs from where they were put together; whether any is.

    Args:
        bench: holds the graph.
        slices: the runs that are cut -> their kind.
        bounds: kind -> where its run begins and ends.
    """
    rows = _Rows(bench, bounds)
    cuts = [(node, cut.source, kind) for node, kind in slices.items() for cut in [piece(node)] if cut is not None]
    found = [(node, source, kind) for node, source, kind in cuts if rows.together(source)]
    for node, source, kind in found:
        with bench.graph.inserting_before(node):
            node.replace_all_uses_with(rows.run(source, kind))
    bench.erase([n for n in bench.graph.nodes if n.op == "call_function"])
    return bool(found)


class _Rows:
    """Values whose rows are runs one after the other."""

    def __init__(self, bench: Workbench, bounds: Mapping[int, tuple[int, int]]) -> None:
        self.bench, self.bounds = bench, bounds
        self.total = max(stop for _, stop in bounds.values())
        self.known: dict[fx.Node, bool] = {}
        self.runs: dict[tuple[fx.Node, int], fx.Node] = {}

    def together(self, node: fx.Node) -> bool:
        """Whether a value is made row by row from runs that were put together."""
        if node not in self.known:
            self.known[node] = self._joined(node) or (_by_rows(node) and any(map(self.together, self._long(node))))
        return self.known[node]

    def _joined(self, node: fx.Node) -> bool:
        args: Any = node.args
        if node.target is not aten.cat.default or (len(args) > 1 and args[1] != 0):
            return False
        lengths = [stop - start for start, stop in (self.bounds[e] for e in sorted(self.bounds))]
        return [n.meta["val"].shape[0] for n in args[0]] == lengths

    def _long(self, node: fx.Node) -> list[fx.Node]:
        """The operands that have a row for each of a value's rows."""
        value = _values(node)[0]
        return [n for n in node.all_input_nodes if not is_pointwise(node.target) or _has_rows(n, value)]

    def run(self, node: fx.Node, kind: int) -> fx.Node:
        """One run of a value, where nodes are inserted now."""
        if (node, kind) not in self.runs:
            self.runs[node, kind] = self._made(node, kind)
        return self.runs[node, kind]

    def _made(self, node: fx.Node, kind: int) -> fx.Node:
        args: Any = node.args
        start, stop = self.bounds[kind]
        if not self.together(node):
            return self._call(aten.slice.Tensor, (node, 0, start, stop), {}, node, kind)
        if self._joined(node):
            return args[0][sorted(self.bounds).index(kind)]
        long = self._long(node)
        args, kwargs = fx.node.map_arg((args, node.kwargs), lambda n: self.run(n, kind) if n in long else n)
        rest = keeps_rows(node)
        if rest is not None:
            args = (args[0], [stop - start, *rest])
        return self._call(node.target, args, kwargs, node, kind)

    def _call(self, target: Any, args: Any, kwargs: Any, like: fx.Node, kind: int) -> fx.Node:
        cut = slice(*self.bounds[kind])
        node = self.bench.graph.call_function(target, args, kwargs)
        cuts = [shadow(v[cut]) for v in _values(like)]
        single = isinstance(like.meta["val"], torch.Tensor)
        node.meta = {**like.meta, "val": cuts[0] if single else cuts}
        self.bench.know(node)
        return node


def _values(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta["val"]
    return [value] if isinstance(value, torch.Tensor) else list(value)


def _has_rows(node: fx.Node, like: torch.Tensor) -> bool:
    """Whether an operand is not broadcast along the rows of a value."""
    value = node.meta["val"]
    return bool(value.dim() == like.dim() and value.shape[0] == like.shape[0])


def _by_rows(node: fx.Node) -> bool:
    """Whether every row of a value is made from the same row of its operands."""
    if node.op != "call_function" or draws(node):
        return False
    if node.target is operator.getitem:
        return _by_rows(node.all_input_nodes[0])
    if node.target in _ALONG:
        source: Any = node.args[0]
        dim: Any = dict(enumerate(node.args)).get(_ALONG[node.target], 0)
        return bool(dim % source.meta["val"].dim() > 0)
    return node.target in _SAME or is_pointwise(node.target) or keeps_rows(node) is not None
